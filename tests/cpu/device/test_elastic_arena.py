"""Arenas whose pool grows and shrinks: what is given back is really free, and nobody's old bytes are ever seen."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentLayout
from layerkv.device import libc
from layerkv.device.base import ElasticArena
from layerkv.device.copy_event import CopyEvent
from layerkv.device.cuda_driver import CudaDriver
from layerkv.device.elastic_cuda_arena import ElasticCudaArena
from layerkv.device.elastic_mmap_arena import ElasticMmapArena
from layerkv.errors import LostCopyError, TransferError
from tests.fakes.cuda_bindings import FakeBindings, over_own_memory
from tests.fakes.cuda_streams import FakeCuda
from tests.fakes.workers import CudaGate

WAIT_S = 60.0
MIB = 1 << 20
SMALL, HUGE = 4096, 2 * MIB


def geometry_of(page_bytes: int, num_segments: int) -> KVGeometry:
    """Two blocks to a segment, three layers, a zone of two blocks that all share."""
    return KVGeometry(
        num_layers=3, page_bytes=page_bytes, block_tokens=16, pool_blocks=2 * num_segments, zone_blocks=2, lanes=1
    )


def make_arena(
    page_bytes: int, *, num_segments: int = 4, num_mapped: int = 4, guards: bool = False
) -> ElasticMmapArena:
    geometry = geometry_of(page_bytes, num_segments)
    return ElasticMmapArena(geometry, SegmentLayout(2, num_segments), num_mapped=num_mapped, guards=guards)


@dataclass
class Kit:
    """An arena of some kind, with what its tests need beside it."""

    arena: ElasticArena
    gate: Callable[[], Any]
    """An event that ends when a test says so."""
    held_bytes: Callable[[], int]
    """Memory behind the range, as the kernel or the driver counts it."""
    bindings: FakeBindings | None = None


KINDS = ("small pages", "huge pages", "guards", "cuda")
if os.environ.get("LAYERKV_NULL_GPU"):  # CUDA's libraries are stubs whose device memory is memory of this process
    KINDS += ("null gpu",)


def make_kit(kind: str, *, num_segments: int = 4, num_mapped: int = 4, **refusals: int) -> Kit:
    """An arena of that kind; the CUDA one over a driver whose device memory is memory of this process."""
    if kind not in ("cuda", "null gpu"):
        page_bytes = HUGE if kind == "huge pages" else SMALL
        arena = make_arena(page_bytes, num_segments=num_segments, num_mapped=num_mapped, guards=kind == "guards")
        return Kit(arena, CopyEvent, partial(resident_bytes, arena))
    cuda, bindings = FakeCuda(0), None
    if kind == "null gpu":
        torch.cuda.synchronize()
        driver = CudaDriver(torch.cuda.current_device())
    else:
        bindings = FakeBindings(refusals=refusals)
        driver = CudaDriver(0, bindings)
    elastic = ElasticCudaArena(
        geometry_of(MIB, num_segments),
        SegmentLayout(2, num_segments),
        driver,
        num_mapped=num_mapped,
        as_tensor=over_own_memory,
        cuda=cuda,
    )
    return Kit(elastic, partial(CudaGate, cuda), partial(device_bytes, bindings), bindings)


def device_bytes(bindings: FakeBindings | None) -> int:
    """Device memory that is not free, as its driver counts it."""
    if bindings is not None:
        return bindings.mapped_bytes
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def pieces(arena: ElasticArena) -> torch.Tensor:
    """The pool as `[num_layers, num_segments, 2, page_bytes]`."""
    g = arena.geometry
    blocks = arena.tensor().view(g.num_layers, g.total_blocks, g.page_bytes)
    return blocks[:, : g.pool_blocks].unflatten(1, (-1, 2))


def ended(event: object) -> bool:
    assert isinstance(event, CopyEvent)
    return event.wait(WAIT_S)


def map_now(arena: ElasticArena, *segments: int) -> None:
    event = arena.prepare_map(segments)
    assert ended(event)
    assert event.error is None
    arena.map(segments)


def is_mapped(address: int, num_bytes: int) -> bool:
    """Whether any of the range is."""
    with open("/proc/self/maps") as maps:
        ranges = [[int(part, 16) for part in line.split()[0].split("-")] for line in maps]
    return any(start < address + num_bytes and end > address for start, end in ranges)


def resident_bytes(arena: ElasticArena) -> int:
    """Memory behind the arena's private pages, as the kernel counts it."""
    first, total = arena.tensor().data_ptr(), 0
    is_ours = False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            head = line.split()[0]
            if "-" in head and ":" not in head:
                start, end = (int(part, 16) for part in head.split("-"))
                is_ours = start < first + arena.geometry.virtual_bytes and end > first and "layerkv" not in line
            elif is_ours and head == "Rss:":
                total += int(line.split()[1]) << 10
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_unmapped_is_free_and_what_comes_back_is_zero(kind: str) -> None:
    kit = make_kit(kind)
    arena, page_bytes = kit.arena, kit.arena.geometry.page_bytes
    address = arena.tensor().data_ptr()
    assert not arena.tensor().any(), "old bytes of somebody else"
    kv = pieces(arena)
    kv[:] = 7
    arena.tensor()[-page_bytes:] = 5
    before = kit.held_bytes()
    assert ended(arena.unmap([1, 3]))
    assert before - kit.held_bytes() == 2 * 3 * 2 * page_bytes
    map_now(arena, 1)
    assert not kv[:, 1].any()
    assert (kv[:, 0] == 7).all()
    assert (kv[:, 2] == 7).all()
    assert (arena.tensor()[-page_bytes:] == 5).all(), "the zone stays"
    assert arena.tensor().data_ptr() == address


@pytest.mark.parametrize("kind", KINDS)
def test_segments_without_memory_take_none_at_first(kind: str) -> None:
    before = device_bytes(None) if kind == "null gpu" else 0
    kit = make_kit(kind, num_segments=8, num_mapped=2)
    page_bytes = kit.arena.geometry.page_bytes
    assert kit.held_bytes() - before <= 3 * 3 * 2 * page_bytes, "two segments and the zone, which is mapped three times"
    map_now(kit.arena, 5)
    kv = pieces(kit.arena)
    assert not kv[:, 5].any()
    kv[:, 5] = 1
    assert kit.held_bytes() - before <= 4 * 3 * 2 * page_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_engine_gave_back_another_takes_and_sees_nothing_of_it(kind: str) -> None:
    one = make_kit(kind)
    other = make_kit(kind, num_mapped=2)
    secret = pieces(one.arena)
    secret[:] = 7
    for segment in (1, 2, 3):
        assert ended(one.arena.unmap([segment]))
        new = 2 + segment % 2  # the other's first two are its own, and what comes goes again
        map_now(other.arena, new)
        assert not pieces(other.arena)[:, new].any()
        pieces(other.arena)[:, new] = 9
        assert (secret[:, 0] == 7).all()
        assert ended(other.arena.unmap([new]))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_unmapped_before_what_reads_it_has_ended(kind: str) -> None:
    kit = make_kit(kind)
    arena, store = kit.arena, kit.gate()
    kv = pieces(arena)
    kv[:] = 7
    event = arena.unmap([2], after=[store])
    other = arena.unmap([3])
    assert not event.is_done()
    assert (kv[:, 2] == 7).all()
    again = arena.prepare_map([2])
    assert not again.is_done(), "a late unmap would wipe new KV"
    store.end(TransferError("it has failed, and has ended"))
    assert all(map(ended, (event, other, again)))
    assert event.error is None
    arena.map([2])
    assert not kv[:, 2].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_without_memory_can_be_unmapped_which_does_nothing(kind: str) -> None:
    """Where one rank could not map it, all give it back."""
    kit = make_kit(kind, num_mapped=2)
    before = kit.held_bytes()
    event = kit.arena.unmap([3])
    assert ended(event)
    assert event.error is None
    assert kit.held_bytes() == before
    map_now(kit.arena, 3)
    assert not pieces(kit.arena)[:, 3].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_prepared_and_is_not_wanted_any_more_is_given_back(kind: str) -> None:
    kit = make_kit(kind, num_mapped=2)
    assert ended(kit.arena.prepare_map([3]))
    assert ended(kit.arena.unmap([3]))
    map_now(kit.arena, 3)
    assert not pieces(kit.arena)[:, 3].any()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("huge pages", "guards")])
def test_hundreds_of_moves_leave_every_byte_where_it_belongs(kind: str) -> None:
    kit, rng = make_kit(kind, num_segments=6, num_mapped=6), random.Random(0)
    kv = pieces(kit.arena)
    written = dict.fromkeys(range(6), 0)
    for move in range(10_000 if kind == "small pages" else 300):
        segment = rng.randrange(1, 6)
        if segment not in written:
            map_now(kit.arena, segment)
            assert not kv[:, segment].any(), "old bytes"
            written[segment] = 0
        elif rng.random() < 0.5:
            del written[segment]
            kit.arena.unmap([segment])
        else:
            written[segment] = move % 100 + 1
            kv[:, segment] = written[segment]
        other = rng.choice(list(written))
        assert (kv[:, other] == written[other]).all()


# The CPU's --------------------------------------------------------------------------------------------------------


def test_a_copy_that_is_lost_may_still_write_so_its_segment_is_not_given_back() -> None:
    arena = make_arena(SMALL)
    pieces(arena)[:] = 7
    lost = CopyEvent()
    lost.end(LostCopyError("it has not ended"))
    event = arena.unmap([2], after=[lost])
    assert ended(event)
    assert isinstance(event.error, LostCopyError)
    assert (pieces(arena)[:, 2] == 7).all()
    for event in (arena.prepare_map([1, 2]), arena.unmap([2]), arena.prepare_map([2])):
        assert ended(event), "however often it is asked"
        assert isinstance(event.error, LostCopyError)


def test_memory_that_could_not_be_given_back_is_not_mapped_again_with_old_bytes_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(address: int, num_bytes: int) -> None:
        raise MemoryError("no")

    arena = make_arena(SMALL)
    pieces(arena)[:] = 7
    with monkeypatch.context() as patch:
        patch.setattr(libc, "give_back", refuse)
        arena.unmap([1])
        for again in (arena.prepare_map([1]), arena.prepare_map([1])):
            assert ended(again)
            assert isinstance(again.error, MemoryError)
    arena.unmap([1])
    map_now(arena, 1)
    assert not pieces(arena)[:, 1].any(), "the second try gave it back"


def test_memory_stays_until_the_last_order_about_it_is_carried_out() -> None:
    """Else it would be given back in the middle of whatever is at that address by then."""
    arena = make_arena(SMALL, num_segments=4096, num_mapped=2)  # larger than what is soon mapped in its place
    store = CopyEvent()
    event = arena.unmap([1], after=[store])
    address, num_bytes = arena.tensor().data_ptr(), arena.geometry.virtual_bytes
    thread = arena._thread
    del arena
    gc.collect()
    assert is_mapped(address, num_bytes)
    store.end()
    assert ended(event)
    assert event.error is None
    thread.join(WAIT_S)
    gc.collect()
    assert not is_mapped(address, num_bytes)


def test_what_was_not_prepared_cannot_be_mapped() -> None:
    arena = make_arena(SMALL)
    arena.unmap([1])
    with pytest.raises(AssertionError, match="not prepared"):
        arena.map([1])


def test_the_thread_ends_with_its_arena() -> None:
    arena = make_arena(SMALL)
    thread = arena._thread
    assert thread.is_alive()
    del arena
    gc.collect()
    thread.join(WAIT_S)
    assert not thread.is_alive()


@pytest.mark.parametrize(("before", "segment"), [("", 2), ("assert ended(arena.unmap([1]))", 1)])
def test_a_process_that_reads_a_guarded_segment_is_killed(before: str, segment: int) -> None:
    program = (
        "from tests.cpu.device.test_elastic_arena import make_arena, ended, pieces, SMALL\n"
        "arena = make_arena(SMALL, num_mapped=2, guards=True)\n"
        f"{before}\n"
        "print(pieces(arena)[:, 0].sum().item(), flush=True)\n"
        f"pieces(arena)[:, {segment}].sum().item()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("0\n", -signal.SIGSEGV), done.stderr


# CUDA's -----------------------------------------------------------------------------------------------------------


def test_a_full_device_says_so_and_keeps_nothing() -> None:
    kit = make_kit("cuda", num_mapped=1, cuMemCreate=1 + 3 + 2)  # the zone, a segment, and not all of another
    before = kit.held_bytes()
    event = kit.arena.prepare_map([2])
    assert ended(event)
    assert isinstance(event.error, MemoryError)
    assert kit.bindings is not None
    assert not kit.bindings.handles
    assert kit.held_bytes() == before
    map_now(kit.arena, 2)


def test_an_engine_for_which_the_device_has_no_room_says_what_it_wanted() -> None:
    with pytest.raises(MemoryError, match=r"zone and 4 segments .* take 26MiB, .* \(cuMemCreate: CUDA_ERROR_OUT_OF_M"):
        make_kit("cuda", cuMemCreate=3)


def test_a_mapping_that_the_driver_refuses_is_undone() -> None:
    kit = make_kit("cuda", num_mapped=1, cuMemMap=3 + 3 + 4)  # the zone, a segment, another, and not all of a third
    before = kit.held_bytes()
    assert ended(kit.arena.prepare_map([2, 3]))
    with pytest.raises(MemoryError):
        kit.arena.map([2, 3])
    assert kit.bindings is not None
    assert not kit.bindings.handles
    assert kit.held_bytes() == before
    map_now(kit.arena, 2, 3)


def test_device_memory_goes_back_with_the_last_tensor_prepared_segments_too() -> None:
    kit = make_kit("cuda", num_mapped=2)
    assert ended(kit.arena.prepare_map([3]))
    store = kit.gate()
    event = kit.arena.unmap([1], after=[store])
    bindings, kit.arena = kit.bindings, None  # type: ignore[assignment]
    gc.collect()
    assert bindings is not None
    assert bindings.reserved, "an order is not carried out yet"
    store.end()
    assert ended(event)
    wait_until(lambda: bindings.holds_nothing)


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(1_000):
        gc.collect()
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("it does not come to that")
