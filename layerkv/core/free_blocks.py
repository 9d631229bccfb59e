"""The free blocks of a pool in segments: which one is handed out next (scheduler process).

With prefix caching nearly every free block caches something, so the order of eviction *is* the order of allocation, and
the least recently used blocks lie everywhere: an engine of which most is free could give nearly none of it back. Here
the cache gives way segment by segment: of the segments that hold the oldest cached blocks, the one that caches fewest
younger ones loses its old ones. Requests that begin together then lie together, and so does what they leave.

Ids only: hashes, and who uses a block, are the caller's. It tells two kinds of free blocks apart, as vLLM does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from math import ceil

from layerkv.core.ranking import Ranking
from layerkv.core.segments import SegmentLayout

OLD_SHARE = 1 / 16
"""Share of cached blocks, the least recently used, that may give way before others that are older. Not measured: chosen
by simulation (2026-11-29, no result file; tests/unit/core/test_free_blocks_packing.py has the loads): an eighth costs
0.09 of the hit rate where much does not fit the cache, a sixteenth 0.06."""


class FreeBlocks:
    """Blocks ``[0, num_segments * segment_blocks)``: each is in use, free, or withheld. All are in use at first.

    A free block is *loose*, to be handed out next, or *cached*: a request that begins alike may want it. Blocks of
    a segment that is not in service are *withheld*: neither handed out nor counted.

    What is done to blocks is O(1) for each, what is done to a segment O(its blocks). Not thread-safe.

    Invariant: the old blocks are less recently used than all others that are cached. They are made up to
    :data:`OLD_SHARE` of them, rounded up, whenever some give way.
    """

    def __init__(self, layout: SegmentLayout) -> None:
        self.layout = layout
        self.num_free = 0
        """Blocks that can be taken."""
        self.num_empty_segments = 0
        """Segments in service of which no block is in use: they can be given back at once."""
        segments = range(layout.num_segments)
        self._num_used = [layout.segment_blocks for _ in segments]
        self._loose: list[dict[int, None]] = [{} for _ in segments]  # the next one to go last
        self._withheld: dict[int, dict[int, None]] = {}  # by segment not in service
        self._old: list[dict[int, None]] = [{} for _ in segments]  # cached blocks ...
        self._num_old = 0
        self._young: OrderedDict[int, None] = OrderedDict()  # ... and younger ones, least recently used first
        self._num_young = [0 for _ in segments]
        self._with_loose = Ranking(layout.segment_blocks)  # most blocks in use first
        self._with_old = Ranking(layout.segment_blocks)  # fewest young blocks first

    def num_used(self, segment: int) -> int:
        """Blocks of the segment that are in use."""
        return self._num_used[segment]

    def emptiest(self) -> list[int]:
        """The segments in service, those with fewest blocks in use first: the order in which they are given back."""
        in_service = (segment for segment in range(self.layout.num_segments) if segment not in self._withheld)
        return sorted(in_service, key=lambda segment: (self._num_used[segment], -segment))

    def take(self, num_blocks: int) -> list[int]:
        """Hand out blocks: loose ones of the fullest segment first; without any, cached ones become loose.

        Those that are not taken can still be hit (:meth:`remove`). What a block caches the caller knows.
        """
        assert num_blocks <= self.num_free, f"{num_blocks} blocks wanted, {self.num_free} free"
        taken: list[int] = []
        while (missing := num_blocks - len(taken)) > 0:
            if (segment := self._with_loose.first()) is None:
                self._loosen()
                continue
            loose = self._loose[segment]
            count = min(missing, len(loose))
            taken += [loose.popitem()[0] for _ in range(count)]
            self._now_used(segment, count)
        return taken

    def remove(self, block: int) -> None:
        """A free or withheld block is in use again: a request begins with what it caches.

        Raises:
            KeyError: it is in use.
        """
        segment = self.layout.segment_of(block)
        if (withheld := self._withheld.get(segment)) is not None:
            del withheld[block]
            self._num_used[segment] += 1
            return
        if block in self._loose[segment]:
            del self._loose[segment][block]
        else:
            self._uncache(segment, block)
        self._now_used(segment, 1)

    def put_cached(self, blocks: Sequence[int]) -> None:
        """Blocks that cache something are not in use any more: the first of them gives way first, after all others."""
        for segment, mine in self._by_segment(blocks):
            if (withheld := self._withheld.get(segment)) is not None:
                withheld.update(dict.fromkeys(mine))
            else:
                self._num_young[segment] += len(mine)
            self._now_free(segment, len(mine))
        if self._withheld:
            blocks = [block for block in blocks if self.layout.segment_of(block) not in self._withheld]
        self._young.update(dict.fromkeys(blocks))

    def put_loose(self, blocks: Sequence[int]) -> None:
        """Blocks that cache nothing are not in use any more: the first of them goes first, before all others."""
        for segment, mine in self._by_segment(blocks):
            self._withheld.get(segment, self._loose[segment]).update(dict.fromkeys(reversed(mine)))
            self._now_free(segment, len(mine))

    def withhold(self, segment: int) -> None:
        """The segment goes out of service.

        The caller evicts what its blocks cache, those in use among them; and once more when none is in use, because a
        request that goes on caches what it fills.
        """
        assert segment not in self._withheld, f"segment {segment} is withheld already"
        loose = self._loose[segment]
        for block in self.layout.blocks(segment):
            if block in self._old[segment] or block in self._young:
                self._uncache(segment, block)
                loose[block] = None
        self._withheld[segment], self._loose[segment] = loose, {}
        self.num_free -= len(loose)
        self.num_empty_segments -= self._num_used[segment] == 0
        self._rank(segment)

    def restore(self, segment: int) -> None:
        """A withheld segment is in service again, or for the first time; its free blocks cache nothing."""
        self._loose[segment] = self._withheld.pop(segment)
        self.num_free += len(self._loose[segment])
        self.num_empty_segments += self._num_used[segment] == 0
        self._rank(segment)

    def free_ids(self) -> list[int]:
        """All free blocks, in no particular order. O(pool)."""
        return [*self._young, *(block for blocks in (*self._old, *self._loose) for block in blocks)]

    def check(self) -> None:
        """Assert that every block is in one place and every count is right (tests call it after every operation)."""
        assert self.num_free == len(self.free_ids()) == len(set(self.free_ids()))
        num_empty = 0
        for segment, blocks in ((s, set(self.layout.blocks(s))) for s in range(self.layout.num_segments)):
            loose, withheld = self._loose[segment], self._withheld.get(segment, {})
            old, young = self._old[segment], blocks & self._young.keys()
            assert {*loose, *withheld, *old} <= blocks
            assert not (loose or old or young) or segment not in self._withheld
            assert self._num_used[segment] == len(blocks) - len(loose) - len(old) - len(young) - len(withheld)
            num_empty += segment not in self._withheld and self._num_used[segment] == 0
            assert self._num_young[segment] == len(young)
            assert (segment in self._with_loose) == bool(loose)
            assert (segment in self._with_old) == bool(old)
        assert self.num_empty_segments == num_empty
        assert self._num_old == sum(map(len, self._old))

    def _by_segment(self, blocks: Sequence[int]) -> Iterable[tuple[int, list[int]]]:
        found: dict[int, list[int]] = {}
        segment_blocks = self.layout.segment_blocks
        for block in blocks:
            found.setdefault(block // segment_blocks, []).append(block)
        return found.items()

    def _now_used(self, segment: int, count: int) -> None:
        self.num_empty_segments -= self._num_used[segment] == 0
        self._num_used[segment] += count
        self.num_free -= count
        self._rank(segment)

    def _now_free(self, segment: int, count: int) -> None:
        self._num_used[segment] -= count
        if segment not in self._withheld:
            self.num_free += count
            self.num_empty_segments += self._num_used[segment] == 0
            self._rank(segment)

    def _rank(self, segment: int) -> None:
        if self._loose[segment]:
            self._with_loose.put(segment, self._num_used[segment])
        else:
            self._with_loose.discard(segment)
        if self._old[segment]:
            self._with_old.put(segment, self.layout.segment_blocks - self._num_young[segment])
        else:
            self._with_old.discard(segment)

    def _loosen(self) -> None:
        """The old blocks of one segment are handed out next, the least recently used first."""
        self._age()
        segment = self._with_old.first()
        assert segment is not None
        old = self._old[segment]
        self._num_old -= len(old)
        self._loose[segment].update(dict.fromkeys(reversed(old)))
        old.clear()
        self._rank(segment)

    def _age(self) -> None:
        """As many cached blocks are old as should be."""
        missing = max(ceil((self._num_old + len(self._young)) * OLD_SHARE) - self._num_old, 0)
        aged = [self._young.popitem(last=False)[0] for _ in range(missing)]
        self._num_old += missing
        for segment, mine in self._by_segment(aged):
            self._old[segment].update(dict.fromkeys(mine))
            self._num_young[segment] -= len(mine)
            self._rank(segment)

    def _uncache(self, segment: int, block: int) -> None:
        if block in self._young:
            del self._young[block]
            self._num_young[segment] -= 1
        else:
            del self._old[segment][block]
            self._num_old -= 1
