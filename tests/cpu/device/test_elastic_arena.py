"""Arenas whose pool grows and shrinks: what is given back is really free, and nobody's old bytes are ever seen."""

from __future__ import annotations

import gc
import random

import pytest
import torch

from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentLayout
from layerkv.device import libc
from layerkv.device.base import ElasticArena
from layerkv.device.copy_event import CopyEvent
from layerkv.device.elastic_mmap_arena import ElasticMmapArena
from layerkv.errors import LostCopyError, TransferError

WAIT_S = 60.0
MIB = 1 << 20
SMALL, HUGE = 4096, 2 * MIB


def make_arena(page_bytes: int, *, num_segments: int = 4, num_mapped: int = 4) -> ElasticMmapArena:
    """Two blocks to a segment, three layers, a zone of two blocks that all share."""
    geometry = KVGeometry(
        num_layers=3, page_bytes=page_bytes, block_tokens=16, pool_blocks=2 * num_segments, zone_blocks=2, lanes=1
    )
    return ElasticMmapArena(geometry, SegmentLayout(2, num_segments), num_mapped=num_mapped)


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


@pytest.mark.parametrize("page_bytes", [SMALL, HUGE])
def test_what_is_unmapped_is_free_and_what_comes_back_is_zero(page_bytes: int) -> None:
    arena = make_arena(page_bytes)
    address = arena.tensor().data_ptr()
    kv = pieces(arena)
    kv[:] = 7
    arena.tensor()[-page_bytes:] = 5
    before = resident_bytes(arena)
    assert ended(arena.unmap([1, 3]))
    assert before - resident_bytes(arena) == 2 * 3 * 2 * page_bytes
    map_now(arena, 1)
    assert not kv[:, 1].any()
    assert (kv[:, 0] == 7).all()
    assert (kv[:, 2] == 7).all()
    assert (arena.tensor()[-page_bytes:] == 5).all(), "the zone stays"
    assert arena.tensor().data_ptr() == address


@pytest.mark.parametrize("page_bytes", [SMALL, HUGE])
def test_segments_without_memory_take_none_at_first(page_bytes: int) -> None:
    arena = make_arena(page_bytes, num_segments=8, num_mapped=2)
    assert resident_bytes(arena) <= 3 * 2 * 2 * page_bytes
    map_now(arena, 5)
    kv = pieces(arena)
    kv[:, 5] = 1
    assert resident_bytes(arena) <= 3 * 3 * 2 * page_bytes


def test_nothing_is_unmapped_before_what_reads_it_has_ended() -> None:
    arena = make_arena(SMALL)
    kv = pieces(arena)
    kv[:] = 7
    store = CopyEvent()
    event = arena.unmap([2], after=[store])
    other = arena.unmap([3])
    assert not event.is_done()
    assert (kv[:, 2] == 7).all()
    again = arena.prepare_map([2])
    assert not again.is_done(), "a late unmap would wipe new KV"
    store.end(TransferError("it has failed, and has ended"))
    assert all(map(ended, (event, other, again)))
    arena.map([2])
    assert not kv[:, 2].any()


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


def test_ten_thousand_moves_leave_every_byte_where_it_belongs() -> None:
    arena, rng = make_arena(SMALL, num_segments=9), random.Random(0)
    kv = pieces(arena)
    written = dict.fromkeys(range(9), 0)
    for move in range(10_000):
        segment = rng.randrange(1, 9)
        if segment not in written:
            map_now(arena, segment)
            assert not kv[:, segment].any(), "old bytes"
            written[segment] = 0
        elif rng.random() < 0.5:
            del written[segment]
            arena.unmap([segment])
        else:
            written[segment] = move % 100 + 1
            kv[:, segment] = written[segment]
        other = rng.choice(list(written))
        assert (kv[:, other] == written[other]).all()
