"""Host memory that goes by segment: what is given back is really free, and nothing of it is given back too early."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentLayout
from layerkv.core.transfer import BlockRun
from layerkv.device.base import Direction
from layerkv.device.copy_event import CopyEvent
from layerkv.device.elastic_host_memory import ElasticMmapHostMemory
from layerkv.device.mechanism import make_mechanism
from layerkv.errors import LostCopyError, TransferError

WAIT_S = 60.0
MIB = 1 << 20
LAYERS = 3
PAGE_SIZES = pytest.mark.parametrize("page_bytes", [4096, MIB], ids=["small pages", "huge pages"])


def geometry(page_bytes: int) -> KVGeometry:
    return KVGeometry(num_layers=LAYERS, page_bytes=page_bytes, block_tokens=16, pool_blocks=4, zone_blocks=2, lanes=1)


def make_host(page_bytes: int, *, num_segments: int = 4, guards: bool = False) -> ElasticMmapHostMemory:
    """Two blocks to a segment; all in service."""
    host = ElasticMmapHostMemory(geometry(page_bytes), SegmentLayout(2, num_segments), guards=guards)
    host.put(range(1, num_segments))
    return host


def pieces(host: ElasticMmapHostMemory) -> Any:
    """``[layers, segments, bytes]``."""
    return host.tensor().numpy().reshape(LAYERS, -1, 2 * host._page_bytes)


def resident_bytes(host: ElasticMmapHostMemory) -> int:
    """Of all of it, the bytes that have memory."""
    size = LAYERS * host.layer_bytes
    found = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
    done = ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(host.address(0, 0)), ctypes.c_size_t(size), found)
    assert done == 0
    return int((np.frombuffer(found, np.uint8) & 1).sum()) * mmap.PAGESIZE


def wait_until(is_so: Callable[[], object]) -> None:
    for _ in range(6000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError


@PAGE_SIZES
def test_what_is_given_back_is_free_and_reads_as_zero(page_bytes: int) -> None:
    host = make_host(page_bytes)
    pieces(host)[:] = 7
    assert resident_bytes(host) == LAYERS * host.layer_bytes
    event = host.unmap([1, 3])
    assert event.wait(WAIT_S)  # type: ignore[attr-defined]
    assert event.error is None
    assert resident_bytes(host) == LAYERS * host.layer_bytes // 2
    assert (pieces(host)[:, [0, 2]] == 7).all()
    assert not pieces(host)[:, [1, 3]].any()
    host.put([1])
    pieces(host)[:, 1] = 5
    assert (pieces(host)[:, 1] == 5).all()


def test_huge_pages_are_given_back_whole() -> None:
    """A piece is as large as one, and begins where one begins: else the kernel only splits it."""
    host = make_host(MIB)
    assert host.address(0, 0) % (2 * MIB) == 0
    assert host.layer_bytes % (2 * MIB) == 0


def test_nothing_is_given_back_before_what_writes_it_has_ended() -> None:
    host, store = make_host(4096), CopyEvent()
    pieces(host)[:] = 7
    event, other = host.unmap([1], after=[store]), host.unmap([2])
    assert not event.is_done()
    assert (pieces(host)[:, 1] == 7).all()
    store.end(TransferError("it has failed, and has ended"))
    assert event.wait(WAIT_S)  # type: ignore[attr-defined]
    assert other.wait(WAIT_S)  # type: ignore[attr-defined]
    assert not pieces(host)[:, 1:3].any()


def test_what_a_lost_copy_may_still_write_is_not_given_back() -> None:
    host, lost = make_host(4096), CopyEvent()
    pieces(host)[:] = 7
    lost.end(LostCopyError("it has not ended"))
    event = host.unmap([1], after=[lost])
    assert event.wait(WAIT_S)  # type: ignore[attr-defined]
    assert isinstance(event.error, LostCopyError)
    assert (pieces(host)[:, 1] == 7).all()


def test_nothing_out_of_service_is_touched_ahead_of_use() -> None:
    host = ElasticMmapHostMemory(geometry(4096), SegmentLayout(512, 4))
    piece_bytes = 512 * 4096
    while host.touch_ahead():
        pass
    assert resident_bytes(host) == LAYERS * piece_bytes, "the first segment"
    host.put([1])
    while host.touch_ahead():
        pass
    assert resident_bytes(host) == 2 * LAYERS * piece_bytes
    host.put([3])
    assert not host.touch_ahead(), "the one before it is not there"
    assert host.unmap([1]).wait(WAIT_S)  # type: ignore[attr-defined]
    host.used(1024)
    assert not host.touch_ahead()
    assert resident_bytes(host) == LAYERS * piece_bytes


@PAGE_SIZES
def test_stores_and_loads_go_through_it_as_through_any_host_memory(page_bytes: int) -> None:
    mechanism = make_mechanism("cpu", geometry(page_bytes), 8, host_layout=SegmentLayout(2, 4), guards=True)
    host, engine = mechanism.elastic_host, mechanism.engine
    assert host is mechanism.host
    assert host is not None
    kv = mechanism.arena.tensor().view(LAYERS, 6, page_bytes)
    kv[:, 0] = 9
    host.put([2])
    stored = engine.submit(Direction.STORE, range(LAYERS), [BlockRun(0, 4, 1)])
    loaded = engine.submit(Direction.LOAD, range(LAYERS), [BlockRun(1, 4, 1)], after=[stored])
    assert engine.wait_host(loaded, WAIT_S)
    assert (kv[:, 1] == 9).all()
    again = engine.submit(Direction.STORE, range(LAYERS), [BlockRun(0, 5, 1)])
    assert engine.wait_host(host.unmap([2], after=[again]), WAIT_S)
    host.put([2])
    loaded = engine.submit(Direction.LOAD, range(LAYERS), [BlockRun(2, 5, 1)])
    assert engine.wait_host(loaded, WAIT_S)
    assert not kv[:, 2].any()
    engine.close()


def test_with_guards_whoever_uses_what_is_out_of_service_is_killed() -> None:
    child = os.fork()
    if not child:
        host = make_host(4096, guards=True)
        pieces(host)[:, 1] = 1
        host.unmap([1]).wait(WAIT_S)  # type: ignore[attr-defined]
        pieces(host)[:, 1] = 1
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGSEGV


def test_its_thread_ends_with_it() -> None:
    gc.collect()
    before = threading.active_count()
    host = make_host(4096)
    assert threading.active_count() == before + 1
    event = host.unmap([1])
    del host
    gc.collect()
    assert event.wait(WAIT_S)  # type: ignore[attr-defined]
    wait_until(lambda: threading.active_count() == before)


def test_a_single_segment_of_any_size_is_host_memory_that_stays() -> None:
    host = ElasticMmapHostMemory(
        KVGeometry(num_layers=2, page_bytes=1024, block_tokens=4, pool_blocks=4, zone_blocks=4, lanes=1),
        SegmentLayout(3, 1),
    )
    assert host.num_blocks == 3
    assert host.layer_bytes == 4096


def test_pinned_host_memory_does_not_shrink() -> None:
    with pytest.raises(AssertionError, match="pinned stays"):
        make_mechanism("cuda", geometry(MIB), 8, host_layout=SegmentLayout(2, 4))
