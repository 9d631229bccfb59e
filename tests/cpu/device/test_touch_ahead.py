"""Host memory is touched ahead of use: a window of it, never all of it at once, and nothing that is there is lost."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable

import numpy as np
import pytest

from layerkv.core.geometry import KVGeometry
from layerkv.core.transfer import BlockRun
from layerkv.device.base import Direction
from layerkv.device.cpu_engine import CPUTransferEngine
from layerkv.device.host_memory import MmapHostMemory
from layerkv.device.mmap_arena import MmapArena
from layerkv.device.touch_ahead import STEP_BYTES, WINDOW_BYTES, Stretch, TouchAhead

PAGE_BYTES = 64 << 10
LAYERS = 4
LAYER_WINDOW = WINDOW_BYTES // LAYERS
NUM_BLOCKS = 3 * LAYER_WINDOW // PAGE_BYTES


def taken(ahead: TouchAhead) -> list[Stretch]:
    stretches = []
    while (stretch := ahead.take()) is not None:
        stretches.append(stretch)
    return stretches


def test_each_byte_of_the_window_is_touched_once_and_none_beyond() -> None:
    ahead = TouchAhead(LAYERS, 10 * LAYER_WINDOW)
    touched = taken(ahead)
    assert [(s.layer, s.offset) for s in touched[: LAYERS + 1]] == [
        *((layer, 0) for layer in range(LAYERS)),
        (0, STEP_BYTES),
    ]
    assert sum(s.num_bytes for s in touched) == WINDOW_BYTES
    assert len(set(touched)) == len(touched)
    ahead.used(STEP_BYTES + 1)
    assert {s.offset for s in taken(ahead)} == {LAYER_WINDOW, LAYER_WINDOW + STEP_BYTES}
    ahead.used(STEP_BYTES)
    assert taken(ahead) == []


def test_what_stores_have_touched_themselves_is_left_out() -> None:
    ahead = TouchAhead(2, 1 << 40)
    ahead.take()
    ahead.used(1 << 30)
    touched = taken(ahead)
    assert touched[0] == Stretch(1, 0, STEP_BYTES), "layers advance together"
    assert min(s.offset for s in touched[1:]) == 1 << 30


@pytest.mark.parametrize("layer_bytes", [4096, STEP_BYTES, STEP_BYTES + 4096])
def test_a_small_layer_is_touched_to_its_end(layer_bytes: int) -> None:
    ahead = TouchAhead(3, layer_bytes)
    touched = taken(ahead)
    for layer in range(3):
        assert sum(s.num_bytes for s in touched if s.layer == layer) == layer_bytes
    ahead.used(layer_bytes)
    assert taken(ahead) == []


def test_with_very_many_layers_each_has_a_huge_page_ahead() -> None:
    assert len(taken(TouchAhead(200, 1 << 30))) == 200


def test_the_window_has_memory_and_the_rest_has_none() -> None:
    host = MmapHostMemory(geometry(), NUM_BLOCKS)
    assert resident_bytes(host, 0, 0, NUM_BLOCKS) == 0
    while host.touch_ahead():
        pass
    for layer in range(LAYERS):
        assert resident_bytes(host, layer, 0, LAYER_WINDOW // PAGE_BYTES) == LAYER_WINDOW
        # A huge page may reach into what is not to be touched.
        assert resident_bytes(host, layer, 0, NUM_BLOCKS) <= LAYER_WINDOW + 2 * STEP_BYTES


def test_touching_changes_nothing_that_is_there() -> None:
    host = MmapHostMemory(geometry(), NUM_BLOCKS)
    content = host.tensor()
    content[:, :100] = 7
    while host.touch_ahead():
        pass
    assert int(content[:, :100].min()) == 7
    assert not content[:, 100 : 2 * LAYER_WINDOW].any()


def test_the_thread_that_stores_touches_ahead_of_the_highest_block_stored_to() -> None:
    arena, host = MmapArena(geometry()), MmapHostMemory(geometry(), NUM_BLOCKS)
    arena.tensor()[:PAGE_BYTES] = 5
    engine = CPUTransferEngine(arena, host)
    first = LAYER_WINDOW // PAGE_BYTES
    stored = engine.submit(Direction.STORE, range(LAYERS), [BlockRun(0, first, 1)])
    assert engine.wait_host(stored, 60)
    wait_until(lambda: resident_bytes(host, LAYERS - 1, first, first) == LAYER_WINDOW)
    assert resident_bytes(host, 0, 0, NUM_BLOCKS) < 3 * LAYER_WINDOW
    assert bool((host.tensor()[0, first * PAGE_BYTES :][:PAGE_BYTES] == 5).all())
    engine.close()


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never was so")


def geometry() -> KVGeometry:
    return KVGeometry(num_layers=LAYERS, page_bytes=PAGE_BYTES, block_tokens=16, pool_blocks=2, zone_blocks=1, lanes=1)


def resident_bytes(host: MmapHostMemory, layer: int, first: int, num_blocks: int) -> int:
    """Of so many blocks of a layer, the bytes that have memory."""
    num_pages = num_blocks * PAGE_BYTES // mmap.PAGESIZE
    found = (ctypes.c_ubyte * num_pages)()
    done = ctypes.CDLL(None, use_errno=True).mincore(
        ctypes.c_void_p(host.address(layer, first)), ctypes.c_size_t(num_blocks * PAGE_BYTES), found
    )
    assert done == 0
    return int((np.frombuffer(found, np.uint8) & 1).sum()) * mmap.PAGESIZE
