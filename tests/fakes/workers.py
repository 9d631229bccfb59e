"""Every transfer engine there is, real and fake, made the same way and driven the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from layerkv.core.geometry import KVGeometry
from layerkv.device.cpu_engine import CopyEvent, CPUTransferEngine
from layerkv.device.host_memory import MmapHostMemory
from layerkv.device.mmap_arena import MmapArena
from tests.fakes.stream_engine import (
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
    "compute-first": (COMPUTE, LOAD, BACKGROUND, STORE),
    "stores-first": (STORE, COMPUTE, BACKGROUND, LOAD),
    "loads-first": (LOAD, BACKGROUND, COMPUTE, STORE),
    "fetches-first": (BACKGROUND, COMPUTE, LOAD, STORE),
    "compute-last": (LOAD, BACKGROUND, STORE, COMPUTE),
    "stores-then-loads": (STORE, LOAD, BACKGROUND, COMPUTE),
}
RANDOM_ORDERS = tuple(f"random-{seed}" for seed in range(4))
ORDERS = ("slow", *FIXED_ORDERS, *RANDOM_ORDERS)
"""The fakes, by the order in which they do what they may do."""


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
    """A worker with the engine of that name: `cpu`, or one of `ORDERS`."""
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


def small_geometry(num_layers: int, lanes: int, *, pool_blocks: int = 16, zone_blocks: int = 12) -> KVGeometry:
    """Blocks of four tokens, 1 KiB in each layer; pool and zone sizes are multiples of four blocks."""
    return KVGeometry(
        num_layers=num_layers,
        page_bytes=1024,
        block_tokens=4,
        pool_blocks=pool_blocks,
        zone_blocks=zone_blocks,
        lanes=lanes,
    )
