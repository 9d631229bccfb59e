"""The memory of one worker and what copies it, by the type of its device."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentLayout, SegmentPlan
from layerkv.device.base import Arena, ElasticArena, ElasticHostMemory, HostMemory, TouchedMemory, TransferEngine

if TYPE_CHECKING:
    from layerkv.device.elastic_mmap_arena import ElasticMmapArena

ALIGNMENT_BYTES = MappingProxyType({"cpu": 4 << 10, "cuda": 2 << 20})
"""What sizes of pool and lanes are multiples of: the granularity of mapping memory."""


@dataclass(frozen=True, slots=True)
class Mechanism:
    """KV memory, host blocks, and the engine that copies between them. Lives as long as its worker.

    ``elastic_arena`` is the arena, where its pool grows and shrinks and segments are mapped, ``touched_arena`` where
    they come by the first touch, and ``elastic_host`` the host blocks, where their memory comes and goes.
    """

    arena: Arena
    host: HostMemory
    engine: TransferEngine
    elastic_arena: ElasticArena | None = None
    touched_arena: TouchedMemory | None = None
    elastic_host: ElasticHostMemory | None = None

    def wait_ready(self, timeout_s: float) -> bool:
        """Block until copies run at full speed, or the time is up; whether they do. Only measurements need it."""
        return self.host.wait_pinned(timeout_s)


def make_mechanism(
    device_type: str,
    geometry: KVGeometry,
    num_host_blocks: int,
    segments: SegmentPlan | None = None,
    *,
    host_layout: SegmentLayout | None = None,
    guards: bool = False,
) -> Mechanism:
    """Take the memory and start the engine, on the device that is current for this thread.

    Args:
        device_type: A key of :data:`ALIGNMENT_BYTES`.
        geometry: Aligned to that.
        num_host_blocks: Of this worker.
        segments: How the pool grows and shrinks; None: it does not.
        host_layout: How host memory does, of which these are all blocks; None: it does not. It cannot on CUDA: the
            driver has it pinned.
        guards: See :class:`layerkv.device.elastic_mmap_arena.ElasticMmapArena`. On CUDA, memory that is not mapped is
            guarded anyway.

    Raises:
        MemoryError: device or host has not that much; nothing is left behind.
    """
    if device_type == "cuda":
        assert host_layout is None, "host memory that is pinned stays"
        return _make_cuda(geometry, num_host_blocks, segments)
    from layerkv.device.cpu_engine import CPUTransferEngine
    from layerkv.device.host_memory import MmapHostMemory
    from layerkv.device.mmap_arena import MmapArena

    arena: MmapArena
    host: MmapHostMemory
    elastic: ElasticMmapArena | None = None
    elastic_host: ElasticHostMemory | None = None
    by_touch = segments is not None and segments.by_touch
    if segments is None:
        arena = MmapArena(geometry)
    else:
        from layerkv.device.elastic_mmap_arena import ElasticMmapArena

        arena = elastic = ElasticMmapArena(geometry, segments.layout, num_mapped=segments.num_mapped, guards=guards)
    if host_layout is None:
        host = MmapHostMemory(geometry, num_host_blocks)
    else:
        from layerkv.device.elastic_host_memory import ElasticMmapHostMemory

        host = elastic_host = ElasticMmapHostMemory(geometry, host_layout, guards=guards)
    return Mechanism(
        arena,
        host,
        CPUTransferEngine(arena, host),
        elastic_arena=None if by_touch else elastic,
        touched_arena=elastic if by_touch else None,
        elastic_host=elastic_host,
    )


def _make_cuda(geometry: KVGeometry, num_host_blocks: int, segments: SegmentPlan | None) -> Mechanism:
    import torch

    from layerkv.device.cuda_arena import CudaArena
    from layerkv.device.cuda_driver import CudaDriver
    from layerkv.device.cuda_engine import CudaTransferEngine
    from layerkv.device.pinned_memory import PinnedHostMemory

    torch.cuda.synchronize()  # makes the device's context current on this thread
    driver = CudaDriver(torch.cuda.current_device())
    arena: Arena
    elastic: ElasticArena | None = None
    if segments is None:
        arena = CudaArena(geometry, driver)
    else:
        from layerkv.device.elastic_cuda_arena import ElasticCudaArena

        arena = elastic = ElasticCudaArena(geometry, segments.layout, driver, num_mapped=segments.num_mapped)
    host = PinnedHostMemory(geometry, num_host_blocks, driver)
    return Mechanism(arena, host, CudaTransferEngine(arena, host, driver), elastic)
