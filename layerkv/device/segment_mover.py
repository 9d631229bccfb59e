"""Carries out on one rank what plans say of segments, and tells what has ended: the scheduler counts on every rank.

One per worker and memory (KV, host). The thread that runs the model calls it, once at the beginning of a step with
moves and once at the end of every step. Rules, by the number they have in the docs:

11. a segment has memory before any step uses it: a map is told when it is done, and nobody uses the segment before
    every rank has told so. Memory that comes by the first touch is there in the step that says so.
12. a segment's memory is given back after the compute of all steps before and after every store submitted so far, those
    in the background and those of the step that says so among them.
13. a segment that is mapped again is prepared after what is still being given back of it, which would wipe new KV; one
    that comes by the first touch comes back when every rank has told that it is given back.

No step waits for a move: the device prepares and gives back in the background, however many steps that takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from layerkv.device.base import ElasticArena, Event, SegmentMemory, TouchedMemory, of_same_kind
from layerkv.errors import TransferError


class EndedMove(NamedTuple):
    """This rank's part of a segment's move is over.

    Attributes:
        segment: The segment.
        error: Why it could not be mapped: nothing of it has memory here. None after success, and of every unmap.
    """

    segment: int
    error: MemoryError | None = None


class Mover(Protocol):
    """What a step begins with segments, and what has ended of it."""

    @property
    def num_under_way(self) -> int:
        """Moves that were begun and are not told yet."""

    def begin_maps(self, segments: Sequence[int]) -> None:
        """Before the copies of the step that says so: these come."""

    def begin_unmaps(self, segments: Sequence[int], after: Callable[[], Sequence[Event]]) -> None:
        """Give these back when the copies of the step that says so are submitted.

        Args:
            segments: Nothing in that step uses them, but stores that it begins.
            after: Tells what they come after (rule 12).
        """

    def take_ended(self, wait_s: float = 0.0) -> list[EndedMove]:
        """Moves that have ended since the last call.

        Args:
            wait_s: Block that long for the oldest one: for steps without compute, which would only spin.

        Raises:
            LostCopyError: a copy of a segment that leaves has not ended: its memory is not given back.
            TransferError: the device does not take a segment's memory back.
        """


class _Leaving:
    """What goes, of any memory."""

    def __init__(self, memory: SegmentMemory, wait_host: Callable[[Event, float], bool]) -> None:
        self._memory = memory
        self._wait_host = wait_host
        self._leaving: dict[int, Event] = {}

    @property
    def num_under_way(self) -> int:
        return len(self._leaving)

    def begin_unmaps(self, segments: Sequence[int], after: Callable[[], Sequence[Event]]) -> None:
        if not segments:
            return
        assert self._leaving.keys().isdisjoint(segments), f"segments {segments} leave already"
        given_back = self._memory.unmap(segments, after=after())
        self._leaving.update(dict.fromkeys(segments, given_back))

    def take_ended(self, wait_s: float = 0.0) -> list[EndedMove]:
        if not self.num_under_way:
            return []
        if wait_s > 0:
            self._wait_host(self._oldest(), wait_s)
        return self._take_ended()

    def _oldest(self) -> Event:
        return next(iter(self._leaving.values()))

    def _take_ended(self) -> list[EndedMove]:
        ended = []
        for segment, given_back in _take_done(self._leaving):
            if (error := given_back.error) is not None:
                raise _not_given_back(segment, error) from error
            ended.append(EndedMove(segment))
        return ended


class TouchedSegments(_Leaving):
    """Of memory that comes by the first touch: the step that says so may use it, and nobody is told.

    Args:
        memory: Whose segments come and go.
        wait_host: Blocks this thread until an event ends or so many seconds are over (a transfer engine's).
    """

    def __init__(self, memory: TouchedMemory, wait_host: Callable[[Event, float], bool]) -> None:
        super().__init__(memory, wait_host)
        self._touched = memory

    def begin_maps(self, segments: Sequence[int]) -> None:
        """Put these into service."""
        assert self._leaving.keys().isdisjoint(segments), f"segments {segments} are still being given back"  # rule 13
        if segments:
            self._touched.put(segments)


class SegmentMover(_Leaving):
    """Of memory that is got and mapped first; what is mapped has memory from the call on that tells so.

    Args:
        arena: Whose segments move.
        wait_host: As of :class:`TouchedSegments`.
    """

    def __init__(self, arena: ElasticArena, wait_host: Callable[[Event, float], bool]) -> None:
        super().__init__(arena, wait_host)
        self._arena = arena
        self._arriving: dict[int, Event] = {}

    @property
    def num_under_way(self) -> int:
        return len(self._arriving) + len(self._leaving)

    def begin_maps(self, segments: Sequence[int]) -> None:
        """Get memory for these: nothing in the step that says so uses them."""
        for segment in segments:  # one by one: where one does not fit, another may
            assert segment not in self._arriving, f"segment {segment} is on its way already"
            self._arriving[segment] = self._arena.prepare_map([segment])  # rule 13

    def _oldest(self) -> Event:
        return next(iter((*self._arriving.values(), *self._leaving.values())))

    def _take_ended(self) -> list[EndedMove]:
        return [*self._take_mapped(), *super()._take_ended()]

    def _take_mapped(self) -> list[EndedMove]:
        ended = []
        for segment, prepared in _take_done(self._arriving):
            error = prepared.error
            if error is None:
                try:
                    self._arena.map([segment])  # rule 11: told after that
                except MemoryError as refused:
                    error = refused
            if error is not None and not isinstance(error, MemoryError):
                raise _not_given_back(segment, error) from error
            ended.append(EndedMove(segment, error))
        return ended


def _take_done(events: dict[int, Event]) -> list[tuple[int, Event]]:
    done = [(segment, event) for segment, event in events.items() if event.is_done()]
    for segment, _ in done:
        del events[segment]
    return done


def _not_given_back(segment: int, error: BaseException) -> TransferError:
    return of_same_kind(error)(f"the memory of segment {segment} is not given back: {error}")
