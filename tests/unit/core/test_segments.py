from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from layerkv.core.segments import MOST_SEGMENTS, SegmentMoves, SegmentState, SegmentTable, layout_for_blocks

MIB = 1 << 20
ARRIVING, MAPPED, LEAVING = SegmentState.ARRIVING, SegmentState.MAPPED, SegmentState.LEAVING
RELEASING, UNMAPPED = SegmentState.RELEASING, SegmentState.UNMAPPED


@pytest.mark.parametrize(
    ("page_kib", "layers", "kv_gib", "segment_mib", "segments"),
    [
        (64, 32, 56.6, 128, 452),  # Llama-8B, TP 1
        (8, 80, 54.5, 160, 348),  # Llama-70B, TP 8
        (64, 28, 70.4, 168, 429),  # Qwen3-0.6B
        (8, 24, 70.6, 144, 502),  # Qwen2.5-0.5B
        (12, 30, 71.4, 180, 406),  # three KV heads: a page that is no power of two, pieces of 6 MiB
    ],
)
def test_sizes_of_models_on_a_device_of_80_gb(
    page_kib: int, layers: int, kv_gib: float, segment_mib: int, segments: int
) -> None:
    page = page_kib << 10
    layout = layout_for_blocks(int(kv_gib * (1 << 30)) // (page * layers), page_bytes=page, granule_bytes=2 * MIB)
    assert layout.segment_blocks * page * layers == segment_mib * MIB
    assert layout.num_segments == segments


@given(st.integers(1, 10**6), st.integers(1, 4096), st.integers(0, 12))
def test_pieces_are_whole_granules_and_segments_are_as_small_as_can_be(
    ceiling: int, page_bytes: int, granule_bits: int
) -> None:
    granule = 1 << granule_bits
    layout = layout_for_blocks(ceiling, page_bytes=page_bytes, granule_bytes=granule)
    assert layout.segment_blocks * page_bytes % granule == 0
    assert layout.num_segments <= MOST_SEGMENTS
    smaller = [n for n in range(1, layout.segment_blocks) if n * page_bytes % granule == 0]
    assert all(ceiling > n * MOST_SEGMENTS for n in smaller[-1:])
    assert ceiling - layout.num_segments * layout.segment_blocks < layout.segment_blocks


def test_blocks_and_segments_name_each_other() -> None:
    layout = layout_for_blocks(40, page_bytes=512, granule_bytes=4096)
    assert (layout.segment_blocks, layout.num_segments) == (8, 5)
    assert list(layout.blocks(2)) == list(range(16, 24))
    assert [layout.segment_of(block) for block in (15, 16, 23, 24)] == [1, 2, 2, 3]
    assert [layout.num_segments_for(blocks) for blocks in (0, 1, 8, 9)] == [0, 1, 1, 2]


def test_a_segment_is_in_service_when_every_rank_has_mapped_it() -> None:
    table = SegmentTable(4, num_ranks=2, num_mapped=1)
    assert table.arrive(1) == [], "no more than the limit"
    table.limit = 3
    assert table.arrive(5) == [1, 2]
    assert table.num_held == 3
    assert table.take_moves() == SegmentMoves(maps=(1, 2))
    assert table.take_moves() == SegmentMoves()
    assert table.answer(1, 1) is ARRIVING
    assert table.answer(1, 0) is MAPPED
    assert table.all_in(MAPPED) == [0, 1]


def test_a_segment_is_held_until_every_rank_has_unmapped_it() -> None:
    table = SegmentTable(3, num_ranks=3, num_mapped=3)
    table.leave([1, 2])
    assert table.take_moves() == SegmentMoves(), "blocks of it may be in use"
    table.release([2])
    table.limit = 2
    assert table.take_moves() == SegmentMoves(unmaps=(2,))
    for rank in (0, 1):
        assert table.answer(2, rank) is RELEASING
        assert table.num_held == 3
    assert table.answer(2, 2) is UNMAPPED
    assert table.num_held == 2
    table.stay([1])
    assert table.all_in(MAPPED) == [0, 1]


def test_a_map_that_fails_on_one_rank_is_rolled_back_on_all_and_held_until_then() -> None:
    table = SegmentTable(2, num_ranks=3, num_mapped=1)
    table.limit = 2
    table.arrive(1)
    table.take_moves()
    assert table.answer(1, 0) is ARRIVING
    assert table.answer(1, 1, has_failed=True) is ARRIVING, "rank 2 may still be mapping"
    assert table.answer(1, 2) is RELEASING
    assert table.num_held == 2
    assert table.arrive(1) == []
    assert table.take_moves() == SegmentMoves(unmaps=(1,))
    assert [table.answer(1, rank) for rank in (2, 1, 0)] == [RELEASING, RELEASING, UNMAPPED]
    assert table.num_held == 1
    assert table.arrive(1) == [1]


def test_memory_that_comes_by_the_first_touch_is_in_service_at_once_and_the_next_plan_says_so() -> None:
    table = SegmentTable(4, num_ranks=2, num_mapped=1)
    assert table.put(2) == [], "no more than the limit"
    table.limit = 3
    assert table.put(5) == [1, 2]
    assert (table.all_in(MAPPED), table.num_held, table.is_moving) == ([0, 1, 2], 3, False)
    table.leave([1, 2])
    table.release([2])
    assert table.take_moves() == SegmentMoves(maps=(1,), unmaps=(2,))
    assert table.take_moves() == SegmentMoves()
    assert [table.answer(2, rank) for rank in (0, 1)] == [RELEASING, UNMAPPED]
    assert table.put(1) == [2]
    assert table.take_moves() == SegmentMoves(maps=(2,))


def test_what_breaks_the_order_of_moves_is_a_bug_of_ours() -> None:
    table = SegmentTable(3, num_ranks=2, num_mapped=2)
    with pytest.raises(AssertionError, match="null block"):
        table.leave([0])
    with pytest.raises(AssertionError):
        table.release([1])  # in service
    table.leave([1])
    table.release([1])
    with pytest.raises(AssertionError, match="not planned"):
        table.answer(1, 0)
    table.take_moves()
    with pytest.raises(AssertionError, match="cannot fail"):
        table.answer(1, 0, has_failed=True)
    with pytest.raises(AssertionError, match="twice"):
        table.answer(1, 0)


class Segments(RuleBasedStateMachine):
    """The table beside what each rank really has mapped; ranks do what plans say, late and in any order of ranks."""

    @initialize(num_segments=st.integers(2, 9), num_ranks=st.integers(1, 3), is_put=st.booleans(), data=st.data())
    def begin(self, num_segments: int, num_ranks: int, is_put: bool, data: st.DataObject) -> None:
        self.is_put = is_put
        """Whether memory comes by the first touch: ranks are told of it, and do not answer."""
        num_mapped = data.draw(st.integers(1, num_segments))
        self.table = SegmentTable(num_segments, num_ranks=num_ranks, num_mapped=num_mapped)
        self.mapped = [set(range(num_mapped)) for _ in range(num_ranks)]
        self.orders: list[list[tuple[int, bool]]] = [[] for _ in range(num_ranks)]
        self.held = num_mapped

    @rule(limit=st.integers(0, 9))
    def limit(self, limit: int) -> None:
        self.table.limit = limit

    @rule(count=st.integers(0, 4))
    def arrive(self, count: int) -> None:
        begun = self.table.put(count) if self.is_put else self.table.arrive(count)
        for mapped in self.mapped if self.is_put else ():
            assert mapped.isdisjoint(begun), "a rank still gives it back"
            mapped.update(begun)
        assert not begun or self.table.num_held <= self.table.limit
        self.held += len(begun)

    @rule(data=st.data())
    def leave_stay_or_release(self, data: st.DataObject) -> None:
        can_leave, leaving = self.table.all_in(MAPPED)[1:], self.table.all_in(LEAVING)
        if can_leave:
            self.table.leave(data.draw(st.sets(st.sampled_from(can_leave), max_size=3)))
        if leaving:
            which = data.draw(st.sets(st.sampled_from(leaving)))
            (self.table.release if data.draw(st.booleans()) else self.table.stay)(which)

    @rule()
    def plan(self) -> None:
        moves = self.table.take_moves()
        maps = () if self.is_put else moves.maps
        for orders in self.orders:
            orders += [(segment, True) for segment in maps] + [(segment, False) for segment in moves.unmaps]

    @precondition(lambda self: any(self.orders))
    @rule(data=st.data())
    def a_rank_acts(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from([rank for rank, orders in enumerate(self.orders) if orders]))
        segment, is_map = self.orders[rank].pop(0)
        has_failed = is_map and data.draw(st.integers(0, 4)) == 0
        if is_map and not has_failed:
            assert segment not in self.mapped[rank]
            self.mapped[rank].add(segment)
        if not is_map:
            self.mapped[rank].discard(segment)
        state = self.table.answer(segment, rank, has_failed=has_failed)
        self.held -= state is UNMAPPED

    @invariant()
    def what_is_in_service_has_memory_and_what_has_memory_is_held(self) -> None:
        if not hasattr(self, "table"):
            return
        self.table.check()
        assert self.table.num_held == self.held
        usable = {*self.table.all_in(MAPPED), *self.table.all_in(LEAVING)}
        for mapped in self.mapped:
            assert usable <= mapped
            assert not mapped & set(self.table.all_in(UNMAPPED))


Segments.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestSegments = Segments.TestCase
