from __future__ import annotations

from math import ceil

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from layerkv.core.free_blocks import OLD_SHARE, FreeBlocks
from layerkv.core.ranking import Ranking
from layerkv.core.segments import SegmentLayout


def pool(num_segments: int, segment_blocks: int = 4) -> FreeBlocks:
    """All blocks free, but for the null block."""
    free = FreeBlocks(SegmentLayout(segment_blocks, num_segments))
    free.put_loose(range(1, num_segments * segment_blocks))
    return free


def test_loose_blocks_come_from_the_fullest_segment() -> None:
    free = pool(3)
    assert free.take(3) == [1, 2, 3], "segment 0 has the null block in use"
    assert free.take(6) == [4, 5, 6, 7, 8, 9]
    free.put_loose([2, 5, 6])
    assert free.take(4) == [2, 5, 6, 10], "of equally full ones the lowest"
    free.check()


def test_of_the_segments_with_old_blocks_the_one_with_fewest_young_ones_loses_its_old_ones() -> None:
    free = FreeBlocks(SegmentLayout(10, 3))
    free.put_cached([20, 10, 11, 21, *range(22, 30)])  # least recently used first
    free.put_cached(range(8))
    assert free.take(1) == [10], "20 and 10 are the oldest; segment 1 caches one younger block, segment 2 nine"
    assert free.take(1) == [11]
    assert free.take(1) == [20]
    free.put_cached([20])
    free.put_loose([10])
    assert free.take(1) == [10], "what caches nothing goes first"
    free.check()


def test_what_became_loose_can_be_hit_until_it_is_handed_out() -> None:
    free = FreeBlocks(SegmentLayout(20, 1))
    free.put_cached(range(20))
    assert free.take(1) == [0]
    free.remove(1)
    assert free.take(1) == [2]
    free.check()


def test_a_segment_that_is_withheld_is_neither_handed_out_nor_counted() -> None:
    free = pool(3)
    free.take(5)  # 1, 2, 3 and 4, 5
    free.put_cached([5])
    free.withhold(1)
    assert free.num_free == 4
    assert free.take(4) == [8, 9, 10, 11]
    free.put_cached([4])
    assert (free.num_free, free.num_used(1)) == (0, 0)
    free.restore(1)
    assert sorted(free.take(4)) == [4, 5, 6, 7]
    free.check()


def test_a_request_may_still_begin_with_what_another_has_cached_in_a_segment_that_leaves() -> None:
    free = pool(2)
    free.take(7)
    free.withhold(1)
    free.put_cached([4, 5, 6, 7])
    free.remove(6)
    assert free.num_used(1) == 1
    free.check()
    with pytest.raises(KeyError):
        free.remove(6)


def test_segments_leave_in_the_order_of_blocks_in_use_and_the_empty_ones_are_counted() -> None:
    free = pool(4)
    free.take(6)
    assert free.num_empty_segments == 2
    assert free.emptiest() == [3, 2, 1, 0]
    free.withhold(3)
    assert free.num_empty_segments == 1
    assert free.emptiest() == [2, 1, 0]
    free.restore(3)
    assert free.num_empty_segments == 2


def test_the_first_of_a_ranking() -> None:
    ranking = Ranking(70)
    assert ranking.first() is None
    for segment, level in ((1, 5), (2, 69), (3, 70), (2, 5), (4, 5)):
        ranking.put(segment, level)
    ranking.discard(3)
    ranking.discard(3)
    assert 3 not in ranking
    assert ranking.first() == 1
    ranking.put(1, 0)
    assert ranking.first() == 2


class Blocks(RuleBasedStateMachine):
    """Free blocks beside plain lists, whose answer to who goes next is worked out anew each time."""

    @initialize(num_segments=st.integers(1, 6), segment_blocks=st.integers(1, 6))
    def begin(self, num_segments: int, segment_blocks: int) -> None:
        self.layout = SegmentLayout(segment_blocks, num_segments)
        self.free = FreeBlocks(self.layout)
        self.used = list(range(num_segments * segment_blocks))
        self.loose: list[int] = []
        self.cached: list[int] = []  # least recently used first
        self.num_old = 0  # leading ones of the cached
        self.withheld: set[int] = set()

    def uncache(self, gone: list[int]) -> None:
        self.num_old -= sum(block in gone for block in self.cached[: self.num_old])
        self.cached = [block for block in self.cached if block not in gone]

    def can_go(self, blocks: list[int]) -> list[int]:
        return [block for block in blocks if self.layout.segment_of(block) not in self.withheld]

    def fullness(self, block: int) -> int:
        return len(set(self.layout.blocks(self.layout.segment_of(block))) & set(self.used))

    @rule(data=st.data(), is_cached=st.booleans())
    def put(self, data: st.DataObject, is_cached: bool) -> None:
        if self.used:
            blocks = data.draw(st.lists(st.sampled_from(self.used), unique=True, max_size=8))
            (self.free.put_cached if is_cached else self.free.put_loose)(blocks)
            self.used = [block for block in self.used if block not in blocks]
            (self.cached if is_cached else self.loose).extend(blocks)

    @rule(count=st.integers(0, 6))
    def take(self, count: int) -> None:
        for _ in range(min(count, self.free.num_free)):
            loose, cached = self.can_go(self.loose), self.can_go(self.cached)
            if not loose:
                self.num_old = max(self.num_old, ceil(len(cached) * OLD_SHARE))
                old = cached[: self.num_old]
                young = [self.layout.segment_of(block) for block in cached[len(old) :]]
                fewest = min(young.count(self.layout.segment_of(block)) for block in old)
            [block] = self.free.take(1)
            if loose:
                assert block in loose
                assert self.fullness(block) == max(map(self.fullness, loose))
                self.loose.remove(block)
            else:
                segment = self.layout.segment_of(block)
                assert young.count(segment) == fewest
                gone = [other for other in old if self.layout.segment_of(other) == segment]
                assert block == gone[0]
                self.uncache(gone)
                self.loose += gone[1:]
            self.used.append(block)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if free := self.loose + self.cached:
            block = data.draw(st.sampled_from(free))
            self.free.remove(block)
            self.loose = [other for other in self.loose if other != block]
            self.uncache([block])
            self.used.append(block)

    @rule(data=st.data())
    def withhold_or_restore(self, data: st.DataObject) -> None:
        segment = data.draw(st.integers(0, self.layout.num_segments - 1))
        if segment in self.withheld:
            self.free.restore(segment)
            self.withheld.remove(segment)
        else:
            self.free.withhold(segment)
            self.withheld.add(segment)
        mine = [block for block in self.cached if self.layout.segment_of(block) == segment]
        self.uncache(mine)
        self.loose += mine

    @invariant()
    def agrees_with_the_lists(self) -> None:
        if not hasattr(self, "free"):
            return
        self.free.check()
        assert sorted(self.free.free_ids()) == sorted(self.can_go(self.loose + self.cached))


Blocks.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestBlocks = Blocks.TestCase
