"""How the KV-cache address range is divided into the pool and the lane zone.

Scheduler and workers must agree on the division without talking to each other, so it is a pure function
of numbers both know: the total number of block ids that vLLM settled on, and the configuration.

Layer ``l`` owns the byte range ``[l * T * page, (l + 1) * T * page)`` with ``T = pool_blocks + zone_blocks``.
Inside it, block ``b`` starts at ``b * page``. Blocks ``0 .. pool_blocks - 1`` (the *pool*) have physical memory
of their own in every layer. Blocks ``pool_blocks .. T - 1`` (the *lane zone*) share physical memory between
all layers of one *lane*; layer ``l`` uses lane ``l % lanes``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from layerkv.errors import ConfigError

DEFAULT_ZONE_SHARE = 0.05
"""Largest share of the KV memory that a zone of default size takes (DESIGN.md 2: the price of layered prefill)."""

DEFAULT_ZONE_STEPS = 2
"""A zone of default size holds the prompts of this many full prefill steps, and the longest prompt, if the share
allows it: a prompt that is longer than the zone cannot run layered."""


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The division of one worker's KV memory. Immutable; lives as long as the engine.

    Attributes:
        num_layers: Attention layers with a KV cache on this worker.
        page_bytes: Bytes of one block in one layer.
        block_tokens: Tokens of one block.
        pool_blocks: Block ids backed by memory of their own in every layer (vLLM's null block included).
        zone_blocks: Block ids of the lane zone.
        lanes: Physical copies of the zone; layer ``l`` uses lane ``l % lanes``.
    """

    num_layers: int
    page_bytes: int
    block_tokens: int
    pool_blocks: int
    zone_blocks: int
    lanes: int

    @property
    def total_blocks(self) -> int:
        """Block ids that vLLM sees."""
        return self.pool_blocks + self.zone_blocks

    @property
    def layer_bytes(self) -> int:
        """Virtual bytes of one layer's range."""
        return self.total_blocks * self.page_bytes

    @property
    def virtual_bytes(self) -> int:
        """Bytes of address range that vLLM believes to be memory."""
        return self.num_layers * self.layer_bytes

    @property
    def lane_bytes(self) -> int:
        """Physical bytes of one lane."""
        return self.zone_blocks * self.page_bytes

    @property
    def physical_bytes(self) -> int:
        """Bytes of device memory really used: pool plus lanes."""
        return self.pool_blocks * self.num_layers * self.page_bytes + self.lanes * self.lane_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, the size of a host block."""
        return self.num_layers * self.page_bytes

    def lane_of(self, layer: int) -> int:
        """The lane that layer ``layer`` writes its zone blocks to."""
        return layer % self.lanes

    def offset(self, layer: int, block: int) -> int:
        """Byte offset of ``block`` of ``layer`` from the start of the address range."""
        return layer * self.layer_bytes + block * self.page_bytes


@dataclass(frozen=True, slots=True)
class GeometryRequest:
    """What the division depends on besides the number of block ids.

    Attributes:
        num_layers: Attention layers with a KV cache on one worker.
        page_bytes: Bytes of one block in one layer.
        block_tokens: Tokens of one block.
        lanes: Number of lanes; clipped to ``num_layers``.
        step_tokens: Most tokens of one engine step (``max_num_batched_tokens``), for the default zone size.
        zone_tokens: Zone size asked for, or None for the default size, or 0 for no zone (only inside layerkv).
        alignment_bytes: Granularity of memory mapping: 4 KiB on CPU, 2 MiB on CUDA.
        longest_tokens: Longest prompt (``max_model_len``), for the default zone size.
    """

    num_layers: int
    page_bytes: int
    block_tokens: int
    lanes: int
    step_tokens: int
    zone_tokens: int | None
    alignment_bytes: int
    longest_tokens: int = 0

    @property
    def unit_blocks(self) -> int:
        """Pool and zone sizes are multiples of this many blocks, so that every mapping is aligned."""
        return self.alignment_bytes // gcd(self.alignment_bytes, self.page_bytes)

    @property
    def used_lanes(self) -> int:
        """More lanes than layers would never be used."""
        return min(self.lanes, self.num_layers)


def geometry_for_blocks(request: GeometryRequest, total_blocks: int) -> KVGeometry:
    """Divide ``total_blocks`` block ids into pool and zone.

    Raises:
        ConfigError: the zone asked for is larger than the KV memory or smaller than one block per lane, or
            ``total_blocks`` is not a multiple of the mapping unit (only a manual override can cause that).
    """
    unit = request.unit_blocks
    if total_blocks % unit:
        raise ConfigError(
            f"num_gpu_blocks_override: found {total_blocks}, but KV memory is mapped in units of {unit} blocks "
            f"(block of {request.page_bytes} bytes per layer, {request.alignment_bytes}-byte granularity); "
            f"set num_gpu_blocks_override to a multiple of {unit}"
        )
    zone_blocks = _zone_blocks(request, total_blocks)
    pool_blocks = total_blocks - zone_blocks
    if pool_blocks < max(unit, 2):  # vLLM keeps one block back as its null block
        raise ConfigError(_zone_too_large(request, total_blocks))
    return KVGeometry(
        num_layers=request.num_layers,
        page_bytes=request.page_bytes,
        block_tokens=request.block_tokens,
        pool_blocks=pool_blocks,
        zone_blocks=zone_blocks,
        lanes=request.used_lanes,
    )


def geometry_for_memory(request: GeometryRequest, memory_bytes: int) -> KVGeometry:
    """The largest division whose physical memory fits into ``memory_bytes``.

    Raises:
        ConfigError: the memory holds no pool beside the zone asked for.
    """
    unit = request.unit_blocks
    low, high = 0, memory_bytes // (request.used_lanes * request.page_bytes * unit) + 1
    while high - low > 1:  # physical bytes grow with the number of ids, so bisect for the last that fits
        middle = (low + high) // 2
        if _physical_bytes(request, middle * unit) <= memory_bytes:
            low = middle
        else:
            high = middle
    total_blocks = low * unit
    if total_blocks == 0 or _zone_blocks(request, total_blocks) >= total_blocks:
        raise ConfigError(_zone_too_large(request, memory_bytes // (request.num_layers * request.page_bytes)))
    return geometry_for_blocks(request, total_blocks)


def _zone_blocks(request: GeometryRequest, total_blocks: int) -> int:
    unit, lanes, layers = request.unit_blocks, request.used_lanes, request.num_layers
    if request.zone_tokens == 0:
        return 0
    if request.zone_tokens is not None:
        if request.zone_tokens < request.block_tokens:
            raise ConfigError(
                f"kv_connector_extra_config.zone_tokens: found {request.zone_tokens}, but a lane holds at least one "
                f"block of {request.block_tokens} tokens; set zone_tokens to {request.block_tokens} or more"
            )
        return _round_up(_ceil_div(request.zone_tokens, request.block_tokens), unit)
    # lanes * zone <= share * (layers * pool + lanes * zone), solved for zone with pool = total - zone
    share = DEFAULT_ZONE_SHARE
    most = int(share * layers * total_blocks / (lanes * (1 - share) + share * layers))
    wanted = _ceil_div(max(DEFAULT_ZONE_STEPS * request.step_tokens, request.longest_tokens), request.block_tokens)
    return max(min(_round_up(wanted, unit), most // unit * unit), unit)


def _physical_bytes(request: GeometryRequest, total_blocks: int) -> int:
    zone_blocks = _zone_blocks(request, total_blocks)
    pool_blocks = max(total_blocks - zone_blocks, 0)
    return (pool_blocks * request.num_layers + zone_blocks * request.used_lanes) * request.page_bytes


def _zone_too_large(request: GeometryRequest, kv_blocks: int) -> str:
    found = "the default zone" if request.zone_tokens is None else f"found {request.zone_tokens} tokens, which"
    return (
        f"kv_connector_extra_config.zone_tokens: {found} leaves no pool in KV memory for "
        f"{kv_blocks * request.block_tokens} tokens ({request.used_lanes} of {request.num_layers} layers' memory per "
        f"zone token); set a smaller zone_tokens, fewer lanes, or more KV memory"
    )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(value: int, unit: int) -> int:
    return _ceil_div(value, unit) * unit
