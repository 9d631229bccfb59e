"""From sizes to segments: the floor, the ceiling, and what an elastic engine cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import lcm
from typing import TYPE_CHECKING, Any

from layerkv.config import EXTRA_CONFIG, EngineConfig
from layerkv.core.geometry import GeometryRequest, KVGeometry, geometry_for_blocks, geometry_for_memory
from layerkv.core.segments import SegmentLayout, SegmentPlan, layout_for_blocks
from layerkv.device.libc import HUGE_PAGE_BYTES
from layerkv.device.mechanism import ALIGNMENT_BYTES
from layerkv.errors import ConfigError
from layerkv.units import format_bytes
from layerkv.vllm_plugin.drafts import drafting_blocks

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LEAST_HUGE_SEGMENTS = 16
"""With fewer segments of huge pages in a pool, or in host memory, it has smaller ones of small pages, which come and go
more slowly. Not measured: chosen by judgement."""

_NEXT_TO_NOTHING = 1e-9
"""Of a device's memory. Derived: vLLM wants a share above 0, and this is less than a KiB of any device."""

LEAST_CUDA_BLOCKS = 2
"""Blocks that have memory from the start on, on CUDA. Derived: vLLM's null block, and one for a request: its warm-up
computes one at least."""


@dataclass(frozen=True, slots=True)
class ElasticSizes:
    """What follows from floor and ceiling, the same in scheduler and workers.

    Attributes:
        geometry: Of the address range: the pool at its ceiling, and the zone.
        plan: Its segments, and how many have memory when the engine starts: with a broker the first one only, because
            nobody has been asked by then.
        floor: Segments that the engine gets back whenever it needs them.
        is_alone: Whether no broker says how much it may hold: it takes what it needs, to its ceiling.
    """

    geometry: KVGeometry
    plan: SegmentPlan
    floor: int
    is_alone: bool

    @property
    def floor_blocks(self) -> int:
        """Pool blocks of the floor, vLLM's null block included."""
        return self.floor * self.plan.layout.segment_blocks

    @property
    def geometry_at_floor(self) -> KVGeometry:
        """The division with the pool at its floor."""
        return replace(self.geometry, pool_blocks=self.floor_blocks)

    @property
    def geometry_to_fit(self) -> KVGeometry:
        """The division that must fit limits of memory: with a broker that at the floor, since more is its to give."""
        return self.geometry if self.is_alone else self.geometry_at_floor

    @property
    def segment_bytes(self) -> int:
        """Of a segment in all layers of one worker."""
        return self.plan.layout.segment_blocks * self.geometry.block_bytes

    @property
    def zone_bytes(self) -> int:
        """Of all lanes of one worker."""
        return self.geometry.num_lanes * self.geometry.lane_bytes

    @property
    def floor_bytes(self) -> int:
        """Of one worker with no more than its floor."""
        return self.geometry_at_floor.physical_bytes


@dataclass(frozen=True, slots=True)
class HostSizes:
    """How host memory comes and goes, the same in scheduler and workers.

    Attributes:
        layout: Of all host blocks of a worker, those of its ``host_memory``.
        floor: Segments that the engine gets back whenever it needs them: they hold the longest request, so that there
            is always somebody who can be parked. All of them where host memory is smaller.
        segment_bytes: Of a segment in all layers of one worker.
    """

    layout: SegmentLayout
    floor: int
    segment_bytes: int

    @property
    def num_blocks(self) -> int:
        """Host blocks of a worker at the ceiling."""
        return self.layout.num_segments * self.layout.segment_blocks

    @property
    def floor_blocks(self) -> int:
        """Host blocks of the floor."""
        return self.floor * self.layout.segment_blocks


def host_sizes(geometry: KVGeometry, host_blocks: int, longest_tokens: int) -> HostSizes:
    """Divide host memory into segments; what is less than one at its end is left out.

    Args:
        geometry: Of the worker.
        host_blocks: Of the worker, 1 at least.
        longest_tokens: Most tokens of one request.
    """
    page_bytes = geometry.page_bytes
    granule_bytes = HUGE_PAGE_BYTES
    if host_blocks * page_bytes < LEAST_HUGE_SEGMENTS * lcm(page_bytes, HUGE_PAGE_BYTES):
        granule_bytes = ALIGNMENT_BYTES["cpu"]
    layout = layout_for_blocks(host_blocks, page_bytes=page_bytes, granule_bytes=granule_bytes)
    if layout.num_segments == 0:  # less than a page of the kernel in each layer
        layout = SegmentLayout(host_blocks, 1)
    floor = min(layout.num_segments_for(-(-longest_tokens // geometry.block_tokens)), layout.num_segments)
    return HostSizes(layout, floor, layout.segment_blocks * geometry.block_bytes)


def require_elastic(vllm_config: VllmConfig, config: EngineConfig) -> None:
    """Refuse what an elastic engine cannot be combined with. Nothing, without one.

    Raises:
        ConfigError: with what, why, and what to set.
    """
    if not config.is_elastic:
        return
    without = f"or leave kv_floor, kv_ceiling and broker out of {EXTRA_CONFIG}"
    _require_device(vllm_config, config, without)
    if config.long_contexts:
        raise ConfigError(
            "long_contexts: found true beside a pool that grows and shrinks, which a request that is longer than the "
            f"pool would hold at its ceiling; set long_contexts to false, {without}"
        )
    if (found := vllm_config.cache_config.num_gpu_blocks_override) is not None:
        raise ConfigError(
            f"num_gpu_blocks_override: found {found} beside kv_ceiling, which says how many blocks there are; "
            f"leave it out, {without}"
        )
    _ceiling_bytes(vllm_config, config)


def _require_device(vllm_config: VllmConfig, config: EngineConfig, without: str) -> None:
    device = vllm_config.device_config.device_type
    if device == "cpu":
        return
    if device == "cuda" and not config.allow_untested_elastic_cuda:
        raise ConfigError(
            "kv_ceiling: found on device type 'cuda', where a pool that grows and shrinks has never run on a GPU; to "
            f"try it, set allow_untested_elastic_cuda to true in {EXTRA_CONFIG}; else run it on a CPU, {without}"
        )
    if device != "cuda":
        raise ConfigError(
            f"kv_ceiling: found on device type {device!r}, where KV memory cannot grow; run it on a CPU, {without}"
        )
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if config.broker is not None and ranks > 1:
        raise ConfigError(
            f"broker: found beside a tensor-parallel size of {ranks} on CUDA, where each rank has a device of its own, "
            "and a broker divides one; set --tensor-parallel-size to 1, or leave out broker"
        )


def elastic_sizes(vllm_config: VllmConfig, config: EngineConfig, request: GeometryRequest) -> ElasticSizes:
    """Divide what an elastic engine may have.

    Args:
        vllm_config: Of the engine.
        config: Our part of it.
        request: As for an engine that is not elastic.

    Raises:
        ConfigError: the ceiling is below the floor, or the floor below the longest request; or as
            :func:`require_elastic`, which not every way of starting vLLM asks before.
    """
    require_elastic(vllm_config, config)
    ceiling_bytes = _ceiling_bytes(vllm_config, config)
    request = _aligned(request, ceiling_bytes)
    longest = -(-request.longest_tokens // request.block_tokens) + 1  # vLLM keeps one block as its null block
    longest += drafting_blocks(vllm_config, request.block_tokens)
    at_floor = (
        _geometry_for_pool(request, longest)
        if config.kv_floor_bytes is None
        else geometry_for_memory(request, config.kv_floor_bytes)
    )
    zone_bytes = at_floor.num_lanes * at_floor.lane_bytes
    layout = layout_for_blocks(
        max(ceiling_bytes - zone_bytes, 0) // at_floor.block_bytes,
        page_bytes=request.page_bytes,
        granule_bytes=request.alignment_bytes,
    )
    least = layout.num_segments_for(longest)
    floor = least if config.kv_floor_bytes is None else at_floor.pool_blocks // layout.segment_blocks
    _require_room(
        config, request, layout, floor, least, zone_bytes + least * layout.segment_blocks * at_floor.block_bytes
    )
    if floor > layout.num_segments:
        raise ConfigError(
            f"{EXTRA_CONFIG}.kv_ceiling: found {format_bytes(ceiling_bytes)}, which is {layout.num_segments} segments "
            f"of KV memory, below the floor of {floor}; set kv_ceiling to "
            f"{_rounded_up(zone_bytes + floor * layout.segment_blocks * at_floor.block_bytes)} or more"
        )
    geometry = replace(at_floor, pool_blocks=layout.num_segments * layout.segment_blocks)
    is_alone = config.broker is None
    is_cuda = vllm_config.device_config.device_type == "cuda"
    num_mapped = floor if is_alone else layout.num_segments_for(LEAST_CUDA_BLOCKS if is_cuda else 1)
    return ElasticSizes(geometry, SegmentPlan(layout, num_mapped, by_touch=not is_cuda), floor, is_alone)


@contextmanager
def told_kv_bytes(vllm_config: Any, num_bytes: int) -> Iterator[None]:
    """What vLLM takes the KV cache's size to be while it looks for memory: engines must start beside each other."""
    with _told(vllm_config.cache_config, "kv_cache_memory_bytes", num_bytes):
        yield


@contextmanager
def told_to_use_what_is_free(vllm_config: Any) -> Iterator[None]:
    """vLLM's CUDA worker asks for a share of the device before it looks, and refuses to start beside others that leave
    less, whatever size of the KV cache it is told: here it asks for next to nothing."""
    with _told(vllm_config.cache_config, "gpu_memory_utilization", _NEXT_TO_NOTHING):
        yield


@contextmanager
def told_num_blocks(model_runner: Any, num_blocks: int) -> Iterator[None]:
    """How many blocks vLLM's warm-up takes to be there: it computes requests of its own, whose blocks it numbers from 1
    on, and a kernel that touches a segment without memory ends the process."""
    with _told(model_runner.kv_cache_config, "num_blocks", num_blocks):
        yield


@contextmanager
def _told(where: Any, name: str, value: object) -> Iterator[None]:
    found = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, found)


def _ceiling_bytes(vllm_config: VllmConfig, config: EngineConfig) -> int:
    ceiling_bytes = config.kv_ceiling_bytes or vllm_config.cache_config.kv_cache_memory_bytes
    where = "kv_ceiling" if config.kv_ceiling_bytes else "--kv-cache-memory-bytes"
    if ceiling_bytes is None:
        raise ConfigError(
            f"{EXTRA_CONFIG}.kv_ceiling: found none beside kv_floor or broker; set it to the most KV memory that a "
            "worker may have, such as 8GiB (--kv-cache-memory-bytes counts as well)"
        )
    if config.kv_floor_bytes is not None and ceiling_bytes < config.kv_floor_bytes:
        raise ConfigError(
            f"{EXTRA_CONFIG}.kv_floor: found {format_bytes(config.kv_floor_bytes)}, above the ceiling of "
            f"{format_bytes(ceiling_bytes)} ({where}); set kv_floor to that or less"
        )
    return ceiling_bytes


def _aligned(request: GeometryRequest, ceiling_bytes: int) -> GeometryRequest:
    """Pieces of whole huge pages, but in small pools."""
    huge = replace(request, alignment_bytes=HUGE_PAGE_BYTES)
    segment_bytes = huge.unit_blocks * request.num_layers * request.page_bytes
    return huge if ceiling_bytes >= LEAST_HUGE_SEGMENTS * segment_bytes else request


def _geometry_for_pool(request: GeometryRequest, pool_blocks: int) -> KVGeometry:
    """The smallest division whose pool has so many blocks."""
    unit = request.unit_blocks
    total_blocks = -(-pool_blocks // unit) * unit
    while (geometry := _divided(request, total_blocks)) is None or geometry.pool_blocks < pool_blocks:
        total_blocks += max((pool_blocks - geometry.pool_blocks if geometry else 0) // unit, 1) * unit
    return geometry


def _divided(request: GeometryRequest, total_blocks: int) -> KVGeometry | None:
    try:
        return geometry_for_blocks(request, total_blocks)
    except ConfigError:  # the zone leaves no pool
        return None


def _require_room(
    config: EngineConfig, request: GeometryRequest, layout: SegmentLayout, floor: int, least: int, least_bytes: int
) -> None:
    if floor >= least:
        return
    assert config.kv_floor_bytes is not None
    tokens = max(floor * layout.segment_blocks - 1, 0) * request.block_tokens
    raise ConfigError(
        f"{EXTRA_CONFIG}.kv_floor: found {format_bytes(config.kv_floor_bytes)}, which holds {tokens} tokens beside the "
        f"lane zone, but max_model_len is {request.longest_tokens}; set kv_floor to {_rounded_up(least_bytes)} or "
        "more, or max_model_len to less"
    )


def _rounded_up(num_bytes: int) -> str:
    return f"{-(-num_bytes >> 20)}MiB"  # a size that is named must suffice
