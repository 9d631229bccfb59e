from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from layerkv.core.runs import RunAllocator
from layerkv.errors import CapacityError


def num_runs(ids: list[int]) -> int:
    return len(ids) and 1 + sum(b != a + 1 for a, b in pairwise(ids))


def test_the_tightest_run_that_holds_them_is_taken() -> None:
    ids = RunAllocator(100, 12)
    assert ids.take(12) == list(range(100, 112))
    ids.give_back([100, 101, 102, 103, 105, 106, 108, 109, 110])  # runs of 4, 2 and 3
    assert ids.take(3) == [108, 109, 110]
    assert ids.take(2) == [105, 106]
    assert ids.take(1) == [100]


def test_without_a_run_that_holds_them_the_longest_are_taken_first() -> None:
    ids = RunAllocator(0, 12)
    ids.take(12)
    ids.give_back([0, 2, 3, 4, 6, 7, 9])
    assert ids.take(5) == [2, 3, 4, 6, 7]
    assert ids.take(2) == [0, 9]


def test_what_is_given_back_grows_together_in_any_order() -> None:
    ids = RunAllocator(5, 9)
    taken = ids.take(9)
    for block in (9, 5, 13, 7, 11, 6, 12, 8, 10):
        ids.give_back([block])
        ids.check()
    assert ids.take(9) == taken


def test_taking_none_takes_none() -> None:
    ids = RunAllocator(0, 0)
    assert ids.take(0) == []
    ids.check()


@pytest.mark.parametrize("ids", [[9], [20], [15], [10, 10], [10, 11, 13, 11]], ids=str)
def test_a_block_that_is_free_or_unknown_cannot_be_given_back(ids: list[int]) -> None:
    allocator = RunAllocator(10, 10)
    assert allocator.take(5) == [10, 11, 12, 13, 14]
    with pytest.raises(ValueError, match="block"):
        allocator.give_back(ids)
    allocator.check()


class Runs(RuleBasedStateMachine):
    """The allocator beside a plain set."""

    @initialize(first=st.integers(0, 50), count=st.integers(0, 40))
    def begin(self, first: int, count: int) -> None:
        self.runs = RunAllocator(first, count)
        self.ids = range(first, first + count)
        self.taken: set[int] = set()

    @rule(num_ids=st.integers(0, 12))
    def take(self, num_ids: int) -> None:
        free = [block for block in self.ids if block not in self.taken]
        if num_ids > len(free):
            with pytest.raises(CapacityError):
                self.runs.take(num_ids)
            return
        ids = self.runs.take(num_ids)
        assert len(ids) == len(set(ids)) == num_ids
        assert set(ids) <= set(free)
        windows = [free[i : i + num_ids] for i in range(len(free) - num_ids + 1)]
        if num_ids and any(num_runs(window) == 1 for window in windows):
            assert num_runs(ids) == 1, "a contiguous run was there and was not used"
        self.taken |= set(ids)

    @rule(data=st.data())
    def take_out(self, data: st.DataObject) -> None:
        first, end = sorted(data.draw(st.integers(self.ids.start - 1, self.ids.stop + 1)) for _ in range(2))
        free = [block for block in self.ids if block not in self.taken and first <= block < end]
        assert self.runs.take_out(range(first, end)) == free
        self.taken |= set(free)

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        if self.taken:
            ids = data.draw(st.lists(st.sampled_from(sorted(self.taken)), unique=True))
            self.runs.give_back(ids)
            self.taken -= set(ids)

    @rule(data=st.data())
    def give_back_what_is_free(self, data: st.DataObject) -> None:
        free = [block for block in range(self.ids.start - 1, self.ids.stop + 1) if block not in self.taken]
        with pytest.raises(ValueError, match="block"):
            self.runs.give_back([data.draw(st.sampled_from(free))])

    @invariant()
    def agrees_with_the_set(self) -> None:
        if not hasattr(self, "runs"):
            return
        self.runs.check()
        assert self.runs.num_free == len(self.ids) - len(self.taken)
        for block in range(self.ids.start - 1, self.ids.stop + 1):
            assert self.runs.is_free(block) == (block in self.ids and block not in self.taken)


Runs.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestRuns = Runs.TestCase
