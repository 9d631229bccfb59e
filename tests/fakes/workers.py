"""Every transfer engine there is, real and fake, made the same way and driven the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from layerkv.core.geometry import KVGeometry
from layerkv.device.cpu_engine import CopyEvent, CPUTransferEngine
from layerkv.device.cuda_driver import CudaDriver
from layerkv.device.cuda_engine import CudaEvent, CudaTransferEngine
from layerkv.device.host_memory import MmapHostMemory
from layerkv.device.mmap_arena import MmapArena
from layerkv.device.pinned_memory import PinnedHostMemory
from tests.fakes.cuda_bindings import FakeBindings
from tests.fakes.cuda_streams import FakeCuda
from tests.fakes.stream_engine import (
    AHEAD,
    BACKGROUND,
    COMPUTE,
    LOAD,
    STORE,
    ReorderingEngine,
    SlowEngine,
    at_random,
    preferring,
)
from tests.fakes.tiny_server import TinyModel, TinyServer

FIXED_ORDERS = {
    "compute-first": (COMPUTE, LOAD, BACKGROUND, STORE, AHEAD),
    "stores-first": (STORE, AHEAD, COMPUTE, BACKGROUND, LOAD),
    "loads-first": (LOAD, BACKGROUND, COMPUTE, STORE, AHEAD),
    "fetches-first": (BACKGROUND, COMPUTE, LOAD, AHEAD, STORE),
    "compute-last": (LOAD, BACKGROUND, STORE, AHEAD, COMPUTE),
    "stores-then-loads": (STORE, LOAD, BACKGROUND, COMPUTE, AHEAD),
}
RANDOM_ORDERS = tuple(f"random-{seed}" for seed in range(4))
CUDA_ORDERS = tuple(f"cuda-{seed}" for seed in range(4))
ORDERS = ("slow", *FIXED_ORDERS, *RANDOM_ORDERS, *CUDA_ORDERS)
"""The fakes, by the order in which they do what they may do; and the CUDA engine on fake streams, in random orders."""


@dataclass
class Worker:
    """One worker's memory, its engine, and how to enqueue compute and a gate on it."""

    arena: MmapArena
    host: MmapHostMemory
    engine: Any
    compute: Callable[[Callable[[], None]], None]
    gate: Callable[[], Any]

    def server(self, num_host_blocks: int, engine: Any = None) -> TinyServer:
        """A tiny server over this worker; `engine` stands in front of the worker's own, if given."""
        model = TinyModel(self.arena, self.compute)
        return TinyServer(self.arena, engine or self.engine, model, num_host_blocks)


def make_worker(name: str, geometry: KVGeometry, num_host_blocks: int) -> Worker:
    """A worker with the engine of that name: `cpu`, one of `ORDERS`, or `cuda-unpinned`."""
    if name.startswith("cuda-"):
        return _cuda_worker(name.removeprefix("cuda-"), geometry, num_host_blocks)
    arena, host = MmapArena(geometry), MmapHostMemory(geometry, num_host_blocks)
    if name == "cpu":
        return Worker(arena, host, CPUTransferEngine(arena, host), lambda action: action(), CopyEvent)
    if name == "slow":
        fake = SlowEngine(arena, host)
    elif name in FIXED_ORDERS:
        fake = ReorderingEngine(arena, host, preferring(*FIXED_ORDERS[name]))
    else:
        fake = ReorderingEngine(arena, host, at_random(int(name.removeprefix("random-"))))
    return Worker(arena, host, fake, fake.compute, fake.gate)


def _cuda_worker(order: str, geometry: KVGeometry, num_host_blocks: int) -> Worker:
    is_unpinned = order == "unpinned"
    cuda = FakeCuda(0 if is_unpinned else int(order))
    bindings = FakeBindings(enqueue=cuda.enqueue, refusals={"cuMemHostRegister": 0} if is_unpinned else None)
    driver = CudaDriver(0, bindings)
    arena, host = MmapArena(geometry), PinnedHostMemory(geometry, num_host_blocks, driver)
    assert host.wait_pinned(10.0) != is_unpinned
    engine = CudaTransferEngine(arena, host, driver, kernel_below_bytes=0, cuda=cuda)
    compute = cuda.compute_stream.queue.append
    return Worker(arena, host, engine, compute, lambda: CudaGate(cuda))


class CudaGate(CudaEvent):
    """The end of a copy that takes as long as a test likes."""

    def __init__(self, cuda: FakeCuda) -> None:
        stream, self._is_open = cuda.Stream(), False
        cuda.enqueue_wait(stream, lambda: self._is_open)
        super().__init__(cuda.Event(), stream, copies_after=())

    def end(self, error: BaseException | None = None) -> None:
        self._is_open = True
        if error is not None:
            self.fail(error)


def small_geometry(
    num_layers: int, lanes: int, retained_layers: int = 0, *, pool_blocks: int = 16, zone_blocks: int = 12
) -> KVGeometry:
    """Blocks of four tokens, 1 KiB in each layer; pool and zone sizes are multiples of four blocks."""
    return KVGeometry(
        num_layers=num_layers,
        page_bytes=1024,
        block_tokens=4,
        pool_blocks=pool_blocks,
        zone_blocks=zone_blocks,
        lanes=lanes,
        retained_layers=retained_layers,
    )
