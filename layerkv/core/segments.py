"""Which runs of pool blocks have memory, and on its way to which state each of them is (scheduler process).

A *segment* is a run of block ids whose memory comes and goes as one. In each layer's range it has one *piece*, a whole
multiple of the device's *granule*, so that pieces are what the device maps and unmaps. All ranks move the same segments
in the same steps, and each acknowledges every move; until all of them have, a segment is *held*: whoever divides the
memory of a device must count it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from math import ceil, gcd

MOST_SEGMENTS = 512
"""Segments of a pool at its largest. Not measured: chosen by design: fewer would be coarse beside one request (4,096
tokens where a rank has one KV head), more cost driver calls and passes over segments and buy nothing."""


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """How a pool is divided into segments. Immutable; lives as long as the engine.

    Attributes:
        segment_blocks: Block ids of a segment.
        num_segments: Segments of the pool at its ceiling.
    """

    segment_blocks: int
    num_segments: int

    def segment_of(self, block: int) -> int:
        """The segment of a pool block."""
        return block // self.segment_blocks

    def blocks(self, segment: int) -> range:
        """The block ids of a segment."""
        return range(segment * self.segment_blocks, (segment + 1) * self.segment_blocks)

    def num_segments_for(self, num_blocks: int) -> int:
        """Segments that hold so many blocks."""
        return ceil(num_blocks / self.segment_blocks)


@dataclass(frozen=True)
class SegmentPlan:
    """How an engine's pool comes and goes, as scheduler and workers must know it alike. Lives as long as the engine.

    Attributes:
        layout: Of the pool at its ceiling; whoever has a geometry has all its segments as pool blocks.
        num_mapped: Segments with memory at the start, the lowest.
        by_touch: Whether memory comes by the first touch, which cannot fail: a segment is in service in the step that
            names it. Otherwise ranks map it, and it is when all of them have answered.
    """

    layout: SegmentLayout
    num_mapped: int
    by_touch: bool = False


def layout_for_blocks(
    ceiling_blocks: int, *, page_bytes: int, granule_bytes: int, most_segments: int = MOST_SEGMENTS
) -> SegmentLayout:
    """Divide a pool: the smallest legal segment, times the least factor that leaves at most ``most_segments``.

    A pool that is no whole number of segments loses its rest; one of less than a segment has none.

    Args:
        ceiling_blocks: Blocks of the pool at its largest.
        page_bytes: Bytes of one block in one layer.
        granule_bytes: What the device maps by; a piece is a whole multiple of it.
        most_segments: See :data:`MOST_SEGMENTS`.
    """
    legal_blocks = granule_bytes // gcd(granule_bytes, page_bytes)
    segment_blocks = legal_blocks * max(ceil(ceiling_blocks / (legal_blocks * most_segments)), 1)
    return SegmentLayout(segment_blocks, ceiling_blocks // segment_blocks)


class SegmentState(Enum):
    """What a segment is for the pool and for whoever counts memory.

    UNMAPPED -> ARRIVING -> MAPPED -> LEAVING -> RELEASING -> UNMAPPED; a map that failed goes from ARRIVING to
    RELEASING, and a segment that is wanted again from LEAVING to MAPPED. Memory that comes by the first touch goes from
    UNMAPPED to MAPPED.
    """

    UNMAPPED = "unmapped"
    """Has no memory on any rank, and is not held."""
    ARRIVING = "arriving"
    """Ranks were told to map it, or will be with the next plan; not all have answered."""
    MAPPED = "mapped"
    """Has memory on every rank: its blocks are in service."""
    LEAVING = "leaving"
    """Has memory; no block of it is handed out any more, and some are still in use."""
    RELEASING = "releasing"
    """Nobody uses it. Ranks were told to unmap it, or will be; not all have acknowledged that."""


@dataclass(frozen=True, slots=True)
class SegmentMoves:
    """What every rank begins with one step, ids ascending. The step uses none of them, but for copies that it begins
    with, after which ``unmaps`` come, and for ``maps`` whose memory comes by the first touch."""

    maps: tuple[int, ...] = ()
    unmaps: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.maps or self.unmaps)


class SegmentTable:
    """The states of all segments of one memory of an engine. Segment 0 never leaves: in the pool, it has vLLM's null
    block. Not thread-safe.

    Invariants: a move is begun only when every rank has answered the one before, so an answer is never taken for
    another move's; :attr:`num_held` never grows beyond :attr:`limit`, and falls only when all ranks have unmapped.
    """

    def __init__(self, num_segments: int, *, num_ranks: int, num_mapped: int) -> None:
        assert 1 <= num_mapped <= num_segments
        self.num_ranks = num_ranks
        self.limit = num_mapped
        """Segments that may be held. What is held already stays when it is lowered, until it is told to leave."""
        self._states = [SegmentState.UNMAPPED] * num_segments
        self._states[:num_mapped] = [SegmentState.MAPPED] * num_mapped
        self._in: dict[SegmentState, set[int]] = {state: set() for state in SegmentState}  # asked about in every step
        self._in[SegmentState.MAPPED].update(range(num_mapped))
        self._in[SegmentState.UNMAPPED].update(range(num_mapped, num_segments))
        self._answered: dict[int, set[int]] = {}  # segment under way -> ranks
        self._failed: set[int] = set()  # arriving segments that a rank could not map
        self._unplanned: dict[int, None] = {}  # arriving or releasing, and no rank knows yet
        self._put: set[int] = set()  # mapped at once since the last plan

    def state(self, segment: int) -> SegmentState:
        """What the segment is now."""
        return self._states[segment]

    def all_in(self, state: SegmentState) -> list[int]:
        """The segments of that state, ascending."""
        return sorted(self._in[state])

    @property
    def num_held(self) -> int:
        """Segments whose memory nobody else can have."""
        return len(self._states) - len(self._in[SegmentState.UNMAPPED])

    @property
    def is_moving(self) -> bool:
        """Whether ranks have something to do, or will have with the next plan."""
        return bool(self._in[SegmentState.ARRIVING] or self._in[SegmentState.RELEASING])

    @property
    def is_leaving(self) -> bool:
        """Whether somebody uses blocks of segments that are out of service."""
        return bool(self._in[SegmentState.LEAVING])

    def arrive(self, num_segments: int) -> list[int]:
        """Begin to map up to so many segments, the lowest first: as many as there are and as the limit allows.

        Returns:
            Those that were begun; the next plan names them.
        """
        room = max(min(num_segments, self.limit - self.num_held), 0)
        begun = self.all_in(SegmentState.UNMAPPED)[:room]
        for segment in begun:
            self._begin(segment, SegmentState.ARRIVING)
        return begun

    def put(self, num_segments: int) -> list[int]:
        """As :meth:`arrive`, of memory that comes by the first touch: they are mapped at once, and nobody answers.

        Returns:
            Those that were put into service; the next plan names them, for ranks to know.
        """
        room = max(min(num_segments, self.limit - self.num_held), 0)
        put = self.all_in(SegmentState.UNMAPPED)[:room]
        for segment in put:
            self._set(segment, SegmentState.MAPPED)
        self._put.update(put)
        return put

    def leave(self, segments: Iterable[int]) -> None:
        """Mapped segments go out of service."""
        for segment in segments:
            assert segment != 0, "segment 0 has the null block"
            self._go(segment, SegmentState.MAPPED, SegmentState.LEAVING)

    def stay(self, segments: Iterable[int]) -> None:
        """Leaving segments are wanted again."""
        for segment in segments:
            self._go(segment, SegmentState.LEAVING, SegmentState.MAPPED)

    def release(self, segments: Iterable[int]) -> None:
        """Begin to unmap leaving segments of which no block is in use; the next plan names them."""
        for segment in segments:
            assert self._states[segment] is SegmentState.LEAVING, (segment, self._states[segment])
            self._begin(segment, SegmentState.RELEASING)

    def take_moves(self) -> SegmentMoves:
        """What was begun since the last plan. It must go into the next one: ranks act on nothing else."""
        unplanned = sorted((*self._unplanned, *(self._put - self._unplanned.keys())))
        self._unplanned.clear()
        self._put.clear()
        comes = SegmentState.ARRIVING, SegmentState.MAPPED, SegmentState.LEAVING
        return SegmentMoves(
            tuple(segment for segment in unplanned if self._states[segment] in comes),
            tuple(segment for segment in unplanned if self._states[segment] is SegmentState.RELEASING),
        )

    def answer(self, segment: int, rank: int, *, has_failed: bool = False) -> SegmentState:
        """A rank has done its part of the segment's move, or could not map it and has nothing of it mapped.

        When all have answered, the segment is mapped or unmapped; or, where one has failed, the others give it back,
        and it is held until they have.

        Returns:
            The state now. ``MAPPED``: its blocks may go into service.
        """
        state = self._states[segment]
        assert segment not in self._unplanned, f"segment {segment}: answered by rank {rank}, and not planned"
        answered = self._answered[segment]
        assert rank not in answered, f"segment {segment}: answered twice by rank {rank}"
        answered.add(rank)
        if has_failed:
            assert state is SegmentState.ARRIVING, f"segment {segment}: an unmap cannot fail"
            self._failed.add(segment)
        if len(answered) < self.num_ranks:
            return state
        del self._answered[segment]
        if segment in self._failed:
            self._failed.remove(segment)
            self._begin(segment, SegmentState.RELEASING)
        else:
            is_arriving = state is SegmentState.ARRIVING
            self._set(segment, SegmentState.MAPPED if is_arriving else SegmentState.UNMAPPED)
        return self._states[segment]

    def check(self) -> None:
        """Assert that states and outstanding answers agree (tests call it after every operation)."""
        under_way = {*self.all_in(SegmentState.ARRIVING), *self.all_in(SegmentState.RELEASING)}
        assert under_way == self._answered.keys()
        assert self._unplanned.keys() <= under_way
        assert not any(self._answered[segment] for segment in self._unplanned)
        assert not any(self._states[segment] is SegmentState.UNMAPPED for segment in self._put)
        assert all(len(ranks) < self.num_ranks for ranks in self._answered.values())
        assert self._failed <= set(self.all_in(SegmentState.ARRIVING))
        assert self._states[0] is SegmentState.MAPPED
        for state, segments in self._in.items():
            assert segments == {segment for segment, its in enumerate(self._states) if its is state}

    def _set(self, segment: int, state: SegmentState) -> None:
        self._in[self._states[segment]].remove(segment)
        self._in[state].add(segment)
        self._states[segment] = state

    def _begin(self, segment: int, state: SegmentState) -> None:
        self._set(segment, state)
        self._answered[segment] = set()
        self._unplanned[segment] = None

    def _go(self, segment: int, before: SegmentState, after: SegmentState) -> None:
        assert self._states[segment] is before, (segment, self._states[segment])
        self._set(segment, after)
