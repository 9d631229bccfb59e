"""An allocator of integer ids that prefers contiguous runs, used for host blocks and for the lane zone.

Contiguous ids make long copies: one memcpy or one DMA descriptor per run instead of one per block.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from layerkv.errors import CapacityError


class RunAllocator:
    """Hands out ids of ``[first, first + count)``. Not thread-safe.

    Invariant: the free runs are disjoint, sorted and never adjacent, and an id is free or taken, never both.
    """

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.count = count
        self._runs: list[tuple[int, int]] = [(first, count)] if count else []  # (start, length), sorted
        self.num_free = count

    def take(self, num_ids: int) -> list[int]:
        """Take ``num_ids`` ids: the tightest single run that holds them, else the longest runs first.

        Raises:
            CapacityError: fewer are free; nothing was taken.
        """
        if num_ids > self.num_free:
            raise CapacityError(f"{num_ids} blocks wanted, {self.num_free} of {self.count} free")
        if num_ids == 0:
            return []
        fitting = [run for run in self._runs if run[1] >= num_ids]
        if fitting:
            return self._cut(min(fitting, key=lambda run: run[1]), num_ids)
        taken: list[int] = []
        for run in sorted(self._runs, key=lambda run: -run[1]):
            taken += self._cut(run, min(run[1], num_ids - len(taken)))
            if len(taken) == num_ids:
                break
        return taken

    def give_back(self, ids: Iterable[int]) -> None:
        """Return ids taken before.

        Raises:
            ValueError: an id is out of range or already free.
        """
        for start, length in _as_runs(ids):
            self._insert(start, length)

    def take_out(self, ids: range) -> list[int]:
        """Take those of a stretch of ids that are free; which those were, ascending."""
        taken: list[int] = []
        kept: list[tuple[int, int]] = []
        for start, length in self._runs:
            first, end = max(start, ids.start), min(start + length, ids.stop)
            if first >= end:
                kept.append((start, length))
                continue
            taken += range(first, end)
            if start < first:
                kept.append((start, first - start))
            if end < start + length:
                kept.append((end, start + length - end))
        self._runs = kept
        self.num_free -= len(taken)
        return taken

    def is_free(self, block: int) -> bool:
        """Whether ``block`` is not taken."""
        at = bisect_left(self._runs, (block + 1, 0)) - 1
        return at >= 0 and self._runs[at][0] <= block < sum(self._runs[at])

    def check(self) -> None:
        """Assert the class invariant (tests call it after every operation)."""
        assert sum(length for _, length in self._runs) == self.num_free
        for start, length in self._runs:
            assert length > 0
            assert self.first <= start
            assert start + length <= self.first + self.count
        for (start, length), (following, _) in zip(self._runs, self._runs[1:], strict=False):
            assert start + length < following, "adjacent or overlapping free runs"

    def _cut(self, run: tuple[int, int], num_ids: int) -> list[int]:
        start, length = run
        at = bisect_left(self._runs, run)
        if num_ids == length:
            del self._runs[at]
        else:
            self._runs[at] = (start + num_ids, length - num_ids)
        self.num_free -= num_ids
        return list(range(start, start + num_ids))

    def _insert(self, start: int, length: int) -> None:
        end = start + length
        if start < self.first or end > self.first + self.count:
            raise ValueError(f"block {start}..{end - 1} is outside {self.first}..{self.first + self.count - 1}")
        at = bisect_left(self._runs, (start, 0))
        before = self._runs[at - 1] if at else None
        after = self._runs[at] if at < len(self._runs) else None
        if (before and sum(before) > start) or (after and after[0] < end):
            raise ValueError(f"block {start}..{end - 1} is given back twice")
        self.num_free += length
        if before and sum(before) == start:
            start, at = before[0], at - 1
            del self._runs[at]
        if after and after[0] == end:
            end = sum(after)
            del self._runs[at]
        insort(self._runs, (start, end - start))


def _as_runs(ids: Iterable[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for block in sorted(ids):
        if runs and runs[-1][0] + runs[-1][1] == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs
