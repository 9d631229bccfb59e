"""Sizes of a pool that grows and shrinks: what it has at the start, and what it may grow to.

Block ids are those of the ceiling, so that addresses never change. What the engine counts on, and what must fit limits
of memory, is what it has at the start: whatever comes on top of that is for somebody else to give.
"""

from __future__ import annotations

from dataclasses import replace

from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentPlan
from layerkv.device.libc import HUGE_PAGE_BYTES
from layerkv.device.mechanism import ALIGNMENT_BYTES
from layerkv.errors import ConfigError
from layerkv.units import format_bytes


def alignment_bytes(device_type: str, page_bytes: int, segments: SegmentPlan | None) -> int:
    """What sizes of pool and lanes are multiples of.

    Where the pool's pieces are whole huge pages, each layer's range is too: of a part of one nothing is given back.
    """
    smallest: int = ALIGNMENT_BYTES[device_type]
    if segments is None or segments.layout.segment_blocks * page_bytes % HUGE_PAGE_BYTES:
        return smallest
    return max(smallest, HUGE_PAGE_BYTES)


def at_start(geometry: KVGeometry, segments: SegmentPlan | None) -> KVGeometry:
    """The division with the pool as large as it is at first."""
    return geometry if segments is None else replace(geometry, pool_blocks=segments.mapped_blocks)


def at_ceiling(geometry: KVGeometry, segments: SegmentPlan) -> KVGeometry:
    """The division with the pool at its largest; the zone stays as it is."""
    return replace(geometry, pool_blocks=segments.ceiling_blocks)


def geometry_at_start(whole: KVGeometry, segments: SegmentPlan, available_bytes: int) -> KVGeometry:
    """The division of what a worker has at the start, into the segments mapped then and the zone.

    Args:
        whole: The division of ``available_bytes`` for a pool that never grows: the zone is as large as it says.
        segments: What has memory at the start.
        available_bytes: What vLLM found for the KV cache.

    Raises:
        ConfigError: segments and zone do not fit.
    """
    geometry = at_start(whole, segments)
    if geometry.physical_bytes > available_bytes:
        raise ConfigError(
            f"KV memory: found {format_bytes(available_bytes)}, but the {segments.num_mapped} segments that the pool "
            f"starts with and a lane zone of {whole.zone_blocks * whole.block_tokens} tokens take "
            f"{format_bytes(geometry.physical_bytes)}; give more KV memory (--kv-cache-memory-bytes or "
            "--gpu-memory-utilization), or set a smaller zone_tokens"
        )
    return geometry
