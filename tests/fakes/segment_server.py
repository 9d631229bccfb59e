"""`TinyServer` with a pool that grows and shrinks, and an arena whose moves come as early or as late as they may.

`StreamElasticArena` keeps the contract of `layerkv.device.base.ElasticArena` and promises nothing beyond it: its moves
are operations of a `StreamEngine`. What has no memory is full of `GARBAGE`, so that who reads it reads wrong KV, and
who writes it is found out when it has memory again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentLayout, SegmentState, SegmentTable
from layerkv.core.transfer import StepPlan
from layerkv.device.base import Arena, ElasticArena, TransferEngine
from layerkv.device.cpu_engine import CPUTransferEngine
from layerkv.device.cuda_arena import GRANULARITY_BYTES
from layerkv.device.cuda_driver import CudaDriver
from layerkv.device.cuda_engine import CudaTransferEngine
from layerkv.device.elastic_cuda_arena import ElasticCudaArena
from layerkv.device.elastic_mmap_arena import ElasticMmapArena
from layerkv.device.host_memory import MmapHostMemory
from layerkv.device.mmap_arena import MmapArena
from layerkv.device.pinned_memory import PinnedHostMemory
from layerkv.device.segment_mover import EndedMove, SegmentMover
from layerkv.errors import CapacityError
from tests.fakes.cuda_bindings import FakeBindings, over_own_memory
from tests.fakes.cuda_streams import FakeCuda
from tests.fakes.stream_engine import (
    AHEAD,
    COMPUTE,
    LOAD,
    MAP,
    STORE,
    UNMAP,
    ReorderingEngine,
    SlowEngine,
    StreamEngine,
    StreamEvent,
    at_random,
    preferring,
)
from tests.fakes.tiny_server import TinyModel, TinyServer

GARBAGE = 0x55
_ORDERS: dict[str, tuple[str, ...]] = {
    "unmaps-first": (UNMAP, MAP, COMPUTE, LOAD, STORE, AHEAD),
    "unmaps-last": (MAP, COMPUTE, LOAD, STORE, AHEAD, UNMAP),
    "stores-last": (UNMAP, COMPUTE, MAP, LOAD, STORE, AHEAD),
    "compute-last": (UNMAP, MAP, LOAD, STORE, AHEAD, COMPUTE),
    "maps-last": (COMPUTE, LOAD, STORE, AHEAD, UNMAP, MAP),
}
STREAM_ORDERS = ("slow", *_ORDERS, *(f"random-{seed}" for seed in range(4)))
CUDA_ORDERS = tuple(f"cuda-{seed}" for seed in range(3))
"""The CUDA engine and arena on fake streams, in random orders, over a driver whose device memory is this process's."""


class StreamElasticArena:
    """See `layerkv.device.base.ElasticArena`."""

    def __init__(self, arena: Arena, engine: StreamEngine, layout: SegmentLayout, num_mapped: int) -> None:
        self.geometry, self._inner, self._engine = arena.geometry, arena, engine
        g = arena.geometry
        pool = arena.tensor().view(g.num_layers, g.total_blocks, g.page_bytes)[:, : g.pool_blocks]
        self._pieces = pool.unflatten(1, (layout.num_segments, layout.segment_blocks))
        self._pieces[:, num_mapped:] = GARBAGE
        self._is_garbage = set(range(num_mapped, layout.num_segments))
        self.leaving: dict[int, StreamEvent] = {}
        self.full: set[int] = set()
        """Segments for which the device has no memory."""

    def tensor(self) -> torch.Tensor:
        return self._inner.tensor()

    def prepare_map(self, segments: Sequence[int]) -> StreamEvent:
        def get_memory() -> None:
            if not self.full.isdisjoint(segments):
                raise MemoryError("the device is full")

        leaving = [self.leaving.pop(segment) for segment in segments if segment in self.leaving]
        return self._engine.in_background(MAP, get_memory, leaving)

    def map(self, segments: Sequence[int]) -> None:
        self._engine.compute(lambda: self._clear(segments))

    def unmap(self, segments: Sequence[int], *, after: Sequence[StreamEvent] = ()) -> StreamEvent:
        event = self._engine.in_background(UNMAP, lambda: self._give_back(segments), after)
        self.leaving.update(dict.fromkeys(segments, event))
        return event

    def _give_back(self, segments: Sequence[int]) -> None:
        self._is_garbage.update(segments)
        self._pieces[:, list(segments)] = GARBAGE

    def _clear(self, segments: Sequence[int]) -> None:
        for segment in self._is_garbage.intersection(segments):
            assert (self._pieces[:, segment] == GARBAGE).all(), f"segment {segment} was written without memory"
        self._is_garbage.difference_update(segments)
        self._pieces[:, list(segments)] = 0


class SegmentPool:
    """The blocks in service that nobody has; those of `prefers` are handed out first."""

    def __init__(self, layout: SegmentLayout, num_mapped: int) -> None:
        self._layout = layout
        self._free = set(range(1, num_mapped * layout.segment_blocks))
        self._out_of_service = set(range(num_mapped, layout.num_segments))
        self._withheld = {block for segment in self._out_of_service for block in layout.blocks(segment)}
        self.prefers = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, num_blocks: int) -> list[int]:
        if num_blocks > len(self._free):
            raise CapacityError(f"{num_blocks} blocks wanted, {len(self._free)} free")
        of = self._layout.segment_of
        taken = sorted(self._free, key=lambda block: (of(block) != self.prefers, block))[:num_blocks]
        self._free.difference_update(taken)
        return sorted(taken)

    def give_back(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            is_withheld = self._layout.segment_of(block) in self._out_of_service
            (self._withheld if is_withheld else self._free).add(block)

    def withhold(self, segment: int) -> None:
        self._out_of_service.add(segment)
        mine = self._free.intersection(self._layout.blocks(segment))
        self._free -= mine
        self._withheld |= mine

    def put_in_service(self, segment: int) -> None:
        self._out_of_service.discard(segment)
        mine = self._withheld.intersection(self._layout.blocks(segment))
        self._withheld -= mine
        self._free |= mine

    def is_empty(self, segment: int) -> bool:
        return self._withheld.issuperset(self._layout.blocks(segment))

    def check(self) -> None:
        assert self._free.isdisjoint(self._withheld)
        assert not any(self._layout.segment_of(block) in self._out_of_service for block in self._free)


class SegmentServer(TinyServer):
    """Moves segments too: `shrink` and `grow` are decisions, the rest follows in the steps after."""

    def __init__(
        self,
        arena: ElasticArena,
        engine: TransferEngine,
        model: TinyModel,
        num_host_blocks: int,
        layout: SegmentLayout,
        num_mapped: int,
    ) -> None:
        super().__init__(arena, engine, model, num_host_blocks)
        self.layout = layout
        self.table = SegmentTable(layout.num_segments, num_ranks=1, num_mapped=num_mapped)
        self.table.limit = layout.num_segments
        self.mover = SegmentMover(arena, engine.wait_host)
        self.failed_maps: list[EndedMove] = []
        self.pool: Any = SegmentPool(layout, num_mapped)

    def shrink(self, segment: int) -> None:
        """The segment goes out of service; it leaves with the first step that finds nobody in it."""
        self.table.leave([segment])
        self.pool.withhold(segment)

    def stay(self, segment: int) -> None:
        """A segment that has not left yet is wanted again."""
        self.table.stay([segment])
        self.pool.put_in_service(segment)

    def grow(self, num_segments: int = 1) -> list[int]:
        """Begin to map the lowest segments that have no memory."""
        return self.table.arrive(num_segments)

    def await_moves(self) -> None:
        """Run empty steps until nothing moves."""
        for _ in range(100):
            if not (self.table.all_in(SegmentState.ARRIVING) or self.table.all_in(SegmentState.RELEASING)):
                return
            self.step()
            self.poll(wait_s=5.0)
        raise AssertionError("a move does not end")

    def everything_ends(self) -> None:
        """All that is enqueued on a fake ends, in its order."""
        if isinstance(self.engine, StreamEngine):
            self.engine.synchronize()
        elif isinstance(self.engine, CudaTransferEngine):
            self.engine._cuda.synchronize()

    def poll(self, wait_s: float = 0.0) -> None:
        super().poll(wait_s)
        for ended in self.mover.take_ended(wait_s):
            if ended.error is not None:
                self.failed_maps.append(ended)
            state = self.table.answer(ended.segment, 0, has_failed=ended.error is not None)
            if state is SegmentState.MAPPED:
                self.pool.put_in_service(ended.segment)

    def end(self) -> None:
        for request_id in list(self.requests):
            self.finish(request_id)
        while self.lanes.has_fetches:
            self.poll(wait_s=5.0)
        for segment in self.table.all_in(SegmentState.LEAVING):
            self.stay(segment)
        self.await_moves()
        self.grow(self.layout.num_segments)
        self.await_moves()
        super().end()

    def check(self) -> None:
        super().check()
        self.table.check()

    def _plan(self, num_tokens: int) -> StepPlan:
        leaving = self.table.all_in(SegmentState.LEAVING)
        self.table.release([segment for segment in leaving if self.pool.is_empty(segment)])
        return super()._plan(num_tokens)._replace(moves=self.table.take_moves())

    def _begin(self, plan: StepPlan) -> None:
        self.mover.begin_maps(plan.moves.maps)
        super()._begin(plan)
        self.mover.begin_unmaps(plan.moves.unmaps, self.lanes.before_unmap)


@dataclass
class SegmentWorker:
    """An elastic arena and the engine beside it."""

    arena: Any
    engine: Any
    compute: Callable[[Callable[[], None]], None]
    layout: SegmentLayout
    num_mapped: int

    def server(self, num_host_blocks: int, arena: Any = None) -> SegmentServer:
        """A server over this worker; `arena` stands in front of the worker's own, if given."""
        model = TinyModel(self.arena, self.compute)
        arena = arena or self.arena
        return SegmentServer(arena, self.engine, model, num_host_blocks, self.layout, self.num_mapped)


def make_segment_worker(
    order: str, geometry: KVGeometry, layout: SegmentLayout, num_host_blocks: int, *, num_mapped: int
) -> SegmentWorker:
    """A worker with the engine of that name: `cpu` (with guards), or one of `STREAM_ORDERS` or `CUDA_ORDERS`."""
    if order in CUDA_ORDERS:
        return _cuda_worker(int(order.removeprefix("cuda-")), geometry, layout, num_host_blocks, num_mapped)
    host = MmapHostMemory(geometry, num_host_blocks)
    if order == "cpu":
        arena = ElasticMmapArena(geometry, layout, num_mapped=num_mapped, guards=True)
        return SegmentWorker(arena, CPUTransferEngine(arena, host), lambda action: action(), layout, num_mapped)
    inner = MmapArena(geometry)
    engine: StreamEngine
    if order == "slow":
        engine = SlowEngine(inner, host)
    elif order in _ORDERS:
        engine = ReorderingEngine(inner, host, preferring(*_ORDERS[order]))
    else:
        engine = ReorderingEngine(inner, host, at_random(int(order.removeprefix("random-"))))
    elastic = StreamElasticArena(inner, engine, layout, num_mapped)
    return SegmentWorker(elastic, engine, engine.compute, layout, num_mapped)


def _cuda_worker(
    seed: int, geometry: KVGeometry, layout: SegmentLayout, num_host_blocks: int, num_mapped: int
) -> SegmentWorker:
    geometry = replace(geometry, page_bytes=GRANULARITY_BYTES // layout.segment_blocks)
    cuda = FakeCuda(seed)
    driver = CudaDriver(0, FakeBindings(enqueue=cuda.enqueue))
    arena = ElasticCudaArena(geometry, layout, driver, num_mapped=num_mapped, as_tensor=over_own_memory, cuda=cuda)
    host = PinnedHostMemory(geometry, num_host_blocks, driver)
    assert host.wait_pinned(10.0)
    engine = CudaTransferEngine(arena, host, driver, kernel_below_bytes=0, cuda=cuda)
    return SegmentWorker(arena, engine, cuda.compute_stream.queue.append, layout, num_mapped)
