"""How the KV-cache address range is divided into the pool and the lane zone.

Scheduler and workers must agree on the division without talking to each other, so it is a pure function
of numbers both know: the total number of block ids that vLLM settled on, and the configuration.

Layer ``l`` owns the byte range ``[l * T * page, (l + 1) * T * page)`` with ``T = pool_blocks + zone_blocks``.
Inside it, block ``b`` starts at ``b * page``. Blocks ``0 .. pool_blocks - 1`` (the *pool*) have physical memory
of their own in every layer. Blocks ``pool_blocks .. T - 1`` (the *lane zone*) share physical memory between
all layers of one *lane*: the first layer uses lane 0, the next lane 1, and so on in turn. *Retained* layers stand
outside of the turn, each with a lane, and so zone memory, of its own (LayerKV's x, Eq. 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

from layerkv.core.groups import Group, Row, is_plain, rows_of, zone_shares
from layerkv.errors import ConfigError

DEFAULT_ZONE_SHARE = 0.05
"""Largest share of the KV memory that a zone of default size takes, but for :data:`ZONE_OF_POOL`. Not measured: chosen
by design, as a bound on the price; in the simulator 2 % cost 1.2 % of throughput, and 8 % cost 5.1 %
(docs/simulator.md)."""

ZONE_OF_POOL = 0.3
"""With few layers that is little: there a zone of default size may take more, until it is so large a part of the pool.
Not measured: chosen by simulated loads (2026-11-29, no result file); with 0.4 two streams in a hundred more flow at 12
layers, at 1 to 2 % longer times for all."""

FEW_LAYERS_ZONE_SHARE = 0.12
"""But no more than this share of the KV memory. Not measured: chosen by simulated loads (2026-11-29, no result file);
with 6 layers, on average of nine loads, 86 % of requests flow with 5 %, 88 % with 8 % and 90 % with 12 %, at 0.7 % and
2.2 % longer times for all."""

LONGEST_ZONE_SHARE = 0.5
"""Largest share that a zone of default size takes where it must hold requests longer than the pool. Not measured:
chosen by judgement: neither pool nor zone gets less than the other."""

DEFAULT_ZONE_STEPS = 2
"""A zone of default size holds the prompts of this many full prefill steps, and the longest prompt, if the share allows
it: a prompt that is longer than the zone cannot run layered. Not measured: chosen by judgement."""


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The division of one worker's KV memory. Immutable; lives as long as the engine.

    Attributes:
        num_layers: Slots: as many as the largest group has layers. With one group each attention layer has its own.
        page_bytes: Bytes of one block in one slot.
        block_tokens: Tokens of one block; of groups that differ in that, of the longest blocks that pass through lanes.
        pool_blocks: Block ids backed by memory of their own in every slot (vLLM's null block included).
        zone_blocks: Block ids of the lane zone, of each group that passes through lanes (or as many times more as its
            blocks have fewer tokens).
        lanes: Lanes that layers share, in turn.
        retained_layers: How many layers, evenly spread, have a lane each.
        groups: The KV-cache groups; left out, there is one that keeps all blocks.
    """

    num_layers: int
    page_bytes: int
    block_tokens: int
    pool_blocks: int
    zone_blocks: int
    lanes: int
    retained_layers: int = 0
    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        if not self.groups:
            object.__setattr__(self, "groups", (Group(self.block_tokens, self.num_layers),))

    @property
    def is_plain(self) -> bool:
        """Whether there is one group, which keeps all blocks."""
        return is_plain(self.groups)

    @property
    def zone_shares(self) -> tuple[int, ...]:
        """For each group, how many of its block ids the zone has for each of ``zone_blocks``; 0 without lanes."""
        return zone_shares(self.groups, self.block_tokens)

    @property
    def num_zone_ids(self) -> int:
        """Block ids of the lane zone in all groups."""
        return self.zone_blocks * sum(self.zone_shares)

    @property
    def total_blocks(self) -> int:
        """Block ids that vLLM sees."""
        return self.pool_blocks + self.num_zone_ids

    @property
    def layer_bytes(self) -> int:
        """Virtual bytes of one slot's range."""
        return self.total_blocks * self.page_bytes

    @property
    def virtual_bytes(self) -> int:
        """Bytes of address range that vLLM believes to be memory."""
        return self.num_layers * self.layer_bytes

    @property
    def lane_bytes(self) -> int:
        """Physical bytes of one lane, which all groups' zones share."""
        return self.zone_blocks * max(self.zone_shares) * self.page_bytes

    @property
    def physical_bytes(self) -> int:
        """Bytes of device memory really used: pool plus lanes."""
        return self.pool_blocks * self.num_layers * self.page_bytes + self.num_lanes * self.lane_bytes

    @property
    def num_lanes(self) -> int:
        """Physical copies of the zone."""
        return self.lanes + self.retained_layers

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all slots, the size of a host block."""
        return self.num_layers * self.page_bytes

    @property
    def streamed_block_bytes(self) -> int:
        """Bytes of a zone block that pass through lanes of several layers: what one more step must load of it."""
        rows = self.rows()
        streamed = [rows[row] for layers in self.lane_layers() if len(layers) > 1 for row in layers]
        num_groups = sum(map(bool, self.zone_shares))
        return len(streamed) * self.page_bytes // num_groups

    def is_zone_block(self, block: int) -> bool:
        """Whether a block id is of the lane zone; else it is of the pool."""
        return block >= self.pool_blocks

    def first_zone_block(self, group: int) -> int:
        """The first of a group's ids in the lane zone."""
        return self.pool_blocks + self.zone_blocks * sum(self.zone_shares[:group])

    def num_zone_blocks(self, block_ids: Sequence[int]) -> int:
        """Zone blocks of a block table: all after its prefix-cache hits, which are in the pool."""
        return len(block_ids) - self.num_leading_pool_blocks(block_ids)

    def num_leading_pool_blocks(self, block_ids: Sequence[int]) -> int:
        """Entries of a block table before the first one of the zone: hits, and what has been given back."""
        return next((i for i, block in enumerate(block_ids) if self.is_zone_block(block)), len(block_ids))

    def rows(self) -> list[Row]:
        """The layers that may pass through lanes, in the order in which they run. With one group, layer by layer."""
        return rows_of(self.groups)

    def lane_layers(self) -> list[list[int]]:
        """The rows that write their zone blocks to each lane, in the order in which they run."""
        num_rows = len(self.rows())
        retained = [(2 * i + 1) * num_rows // (2 * self.retained_layers) for i in range(self.retained_layers)]
        streamed = [row for row in range(num_rows) if row not in retained]
        return [streamed[lane :: self.lanes] for lane in range(self.lanes)] + [[row] for row in retained]

    def lane_ranges(self) -> list[list[tuple[int, int]]]:
        """For each lane the stretches of address range that it is mapped at: of each the byte offset, and bytes.

        A group with fewer layers than there are slots has zone ids in all of them; where no layer of it is, the first
        lane is mapped, and nobody uses it.
        """
        rows = self.rows()
        ranges = [[self._zone_range(rows[row]) for row in lane] for lane in self.lane_layers()]
        with_lanes = [group for group, share in enumerate(self.zone_shares) if share]
        all_rows = {Row(group, slot) for group in with_lanes for slot in range(self.num_layers)}
        ranges[0] += [self._zone_range(row) for row in sorted(all_rows.difference(rows))]
        return ranges

    def _zone_range(self, row: Row) -> tuple[int, int]:
        num_blocks = self.zone_blocks * self.zone_shares[row.group]
        return self.offset(row.slot, self.first_zone_block(row.group)), num_blocks * self.page_bytes

    def offset(self, layer: int, block: int) -> int:
        """Byte offset of ``block`` in slot ``layer`` from the start of the address range."""
        return layer * self.layer_bytes + block * self.page_bytes


@dataclass(frozen=True, slots=True)
class GeometryRequest:
    """What the division depends on besides the number of block ids.

    Attributes:
        num_layers: Slots: as many as the largest group has layers, on one worker.
        page_bytes: Bytes of one block in one slot.
        block_tokens: Tokens of one block; of groups that differ in that, of the longest blocks that pass through lanes.
        lanes: Number of lanes; clipped to the number of layers that share them.
        retained_layers: Layers with a lane of their own.
        step_tokens: Most tokens of one engine step (``max_num_batched_tokens``), for the default zone size.
        zone_tokens: Zone size asked for, or None for the default size, or 0 for no zone (only inside layerkv).
        alignment_bytes: Granularity of memory mapping: 4 KiB on CPU, 2 MiB on CUDA.
        longest_tokens: Longest request (``max_model_len``), for the default zone size.
        may_outgrow_pool: Whether requests may be longer than the pool and decode in the zone: a zone of default size
            then holds the longest one if the pool does not.
        groups: The KV-cache groups; left out, there is one that keeps all blocks.
    """

    num_layers: int
    page_bytes: int
    block_tokens: int
    lanes: int
    step_tokens: int
    zone_tokens: int | None
    alignment_bytes: int
    longest_tokens: int = 0
    may_outgrow_pool: bool = False
    retained_layers: int = 0
    groups: tuple[Group, ...] = ()

    @property
    def unit_blocks(self) -> int:
        """Pool and zone sizes are multiples of this many blocks, so that every mapping is aligned."""
        return self.alignment_bytes // gcd(self.alignment_bytes, self.page_bytes)

    @property
    def num_rows(self) -> int:
        """Layers that may pass through lanes."""
        return len(rows_of(self.groups)) if self.groups else self.num_layers

    @property
    def used_lanes(self) -> int:
        """More lanes than layers would never be used."""
        return min(self.lanes, self.num_rows - self.retained_layers)

    @property
    def num_lanes(self) -> int:
        """Physical copies of the zone."""
        return self.used_lanes + self.retained_layers

    @property
    def zone_ids_per_block(self) -> int:
        """Block ids, of all groups, for each block of the zone,"""
        return sum(zone_shares(self.groups, self.block_tokens)) if self.groups else 1

    @property
    def lane_pages_per_block(self) -> int:
        """and pages of each lane."""
        return max(zone_shares(self.groups, self.block_tokens)) if self.groups else 1


def require_retained_layers(retained_layers: int, num_layers: int) -> None:
    """Check what needs no more than the model.

    Raises:
        ConfigError: no layer is left that shares a lane.
    """
    if retained_layers >= num_layers:
        raise ConfigError(
            f"kv_connector_extra_config.retained_layers: found {retained_layers}, but the model has "
            f"{num_layers} layers, of which at least one shares a lane; set retained_layers to less"
        )


def require_zone_tokens(zone_tokens: int, block_tokens: int) -> None:
    """Check what needs no more than the block size.

    Raises:
        ConfigError: the zone is smaller than a block.
    """
    if zone_tokens < block_tokens:
        raise ConfigError(
            f"kv_connector_extra_config.zone_tokens: found {zone_tokens}, but a lane holds at least one "
            f"block of {block_tokens} tokens; set zone_tokens to {block_tokens} or more"
        )


def geometry_for_blocks(request: GeometryRequest, total_blocks: int) -> KVGeometry:
    """Divide ``total_blocks`` block ids into pool and zone.

    Raises:
        ConfigError: the zone asked for is larger than the KV memory or smaller than one block per lane, or
            ``total_blocks`` is not a multiple of the mapping unit (only a manual override can cause that).
    """
    unit = request.unit_blocks
    require_retained_layers(request.retained_layers, request.num_rows)
    if total_blocks % unit:
        raise ConfigError(
            f"num_gpu_blocks_override: found {total_blocks}, but KV memory is mapped in units of {unit} blocks "
            f"(block of {request.page_bytes} bytes per layer, {request.alignment_bytes}-byte granularity); "
            f"set num_gpu_blocks_override to a multiple of {unit}"
        )
    zone_blocks = _zone_blocks(request, total_blocks)
    pool_blocks = total_blocks - zone_blocks * request.zone_ids_per_block
    if pool_blocks < max(unit, 2):  # vLLM keeps one block back as its null block
        raise ConfigError(_zone_too_large(request, total_blocks))
    return KVGeometry(
        num_layers=request.num_layers,
        page_bytes=request.page_bytes,
        block_tokens=request.block_tokens,
        pool_blocks=pool_blocks,
        zone_blocks=zone_blocks,
        lanes=request.used_lanes,
        retained_layers=request.retained_layers,
        groups=request.groups,
    )


def geometry_for_memory(request: GeometryRequest, memory_bytes: int) -> KVGeometry:
    """The largest division whose physical memory fits into ``memory_bytes``.

    Raises:
        ConfigError: the memory holds no pool beside the zone asked for.
    """
    total_blocks = _largest_total(replace(request, may_outgrow_pool=False), memory_bytes)
    total_blocks = _total_with_large_zone(request, total_blocks, memory_bytes) or total_blocks
    if total_blocks == 0 or _zone_blocks(request, total_blocks) * request.zone_ids_per_block >= total_blocks:
        raise ConfigError(_zone_too_large(request, memory_bytes // (request.num_layers * request.page_bytes)))
    return geometry_for_blocks(request, total_blocks)


def _largest_total(request: GeometryRequest, memory_bytes: int) -> int:
    unit = request.unit_blocks
    ids = request.zone_ids_per_block
    low, high = 0, ids * memory_bytes // (max(request.num_lanes, 1) * request.page_bytes * unit) + 1
    while high - low > 1:  # physical bytes grow with the number of ids, so bisect for the last that fits
        middle = (low + high) // 2
        if _physical_bytes(request, middle * unit) <= memory_bytes:
            low = middle
        else:
            high = middle
    return low * unit


def _total_with_large_zone(request: GeometryRequest, total_blocks: int, memory_bytes: int) -> int | None:
    """Block ids if the zone is to hold the longest request because the pool, with ``total_blocks``, does not."""
    if not request.may_outgrow_pool or request.zone_tokens is not None:
        return None
    longest = _round_up(_ceil_div(request.longest_tokens, request.block_tokens), request.unit_blocks)
    if total_blocks > 2 * longest:
        return None
    with_large_zone = replace(request, zone_tokens=longest * request.block_tokens)
    total_blocks = min(_largest_total(with_large_zone, memory_bytes), 2 * longest)
    return total_blocks if _large_zone_blocks(request, total_blocks) is not None else None


def _zone_blocks(request: GeometryRequest, total_blocks: int) -> int:
    unit = request.unit_blocks
    if request.zone_tokens == 0:
        return 0
    if request.zone_tokens is not None:
        require_zone_tokens(request.zone_tokens, request.block_tokens)
        return _round_up(_ceil_div(request.zone_tokens, request.block_tokens), unit)
    if (large_zone_blocks := _large_zone_blocks(request, total_blocks)) is not None:
        return large_zone_blocks
    wanted_tokens = max(DEFAULT_ZONE_STEPS * request.step_tokens, request.longest_tokens)
    wanted = _round_up(_ceil_div(wanted_tokens, request.block_tokens), unit)
    ids = request.zone_ids_per_block
    of_pool = int(total_blocks * ZONE_OF_POOL / (1 + ZONE_OF_POOL * ids)) // unit * unit
    with_few_layers = min(of_pool, _most_zone_blocks(request, total_blocks, FEW_LAYERS_ZONE_SHARE))
    most = max(with_few_layers, _most_zone_blocks(request, total_blocks, DEFAULT_ZONE_SHARE))
    return max(min(wanted, most), unit)


def _large_zone_blocks(request: GeometryRequest, total_blocks: int) -> int | None:
    """Size of a zone that holds the longest request, where that is for the zone to do; None where it is not.

    The pool holds it if it does so beside a zone of that size: then the zone may be smaller.
    """
    if not request.may_outgrow_pool or request.zone_tokens is not None:
        return None
    longest = _ceil_div(request.longest_tokens, request.block_tokens)
    zone_blocks = _round_up(longest, request.unit_blocks)
    pool_blocks = total_blocks - zone_blocks - 1  # vLLM keeps one block as its null block
    may_be_that_large = zone_blocks <= _most_zone_blocks(request, total_blocks, LONGEST_ZONE_SHARE)
    return zone_blocks if pool_blocks < longest and may_be_that_large else None


def _most_zone_blocks(request: GeometryRequest, total_blocks: int, share: float) -> int:
    """The largest zone whose lanes take at most that share of the KV memory."""
    # lanes * zone <= share * (layers * pool + lanes * zone), solved for zone with pool = total - ids * zone
    layers, unit, ids = request.num_layers, request.unit_blocks, request.zone_ids_per_block
    lanes = request.num_lanes * request.lane_pages_per_block
    return int(share * layers * total_blocks / (lanes * (1 - share) + share * layers * ids)) // unit * unit


def _physical_bytes(request: GeometryRequest, total_blocks: int) -> int:
    zone_blocks = _zone_blocks(request, total_blocks)
    pool_blocks = max(total_blocks - zone_blocks * request.zone_ids_per_block, 0)
    lane_pages = zone_blocks * request.num_lanes * request.lane_pages_per_block
    return (pool_blocks * request.num_layers + lane_pages) * request.page_bytes


def _zone_too_large(request: GeometryRequest, kv_blocks: int) -> str:
    found = "the default zone" if request.zone_tokens is None else f"found {request.zone_tokens} tokens, which"
    return (
        f"kv_connector_extra_config.zone_tokens: {found} leaves no pool in KV memory for "
        f"{kv_blocks * request.block_tokens} tokens ({request.num_lanes} of {request.num_layers} layers' memory per "
        f"zone token); set a smaller zone_tokens, fewer lanes, or more KV memory"
    )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(value: int, unit: int) -> int:
    return _ceil_div(value, unit) * unit
