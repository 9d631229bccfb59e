"""How much host memory should be in service, and what the engine asks for, where a broker divides it.

Pure, as :mod:`layerkv.scheduler.elastic` is for the pool. Host memory is *needed* by everybody who might be parked:
without room there, nobody gives pool memory up at once. Cached prefixes are of use and are not needed, so they give way
first; what is parked stays until it is fetched. All sizes are segments, but where blocks are named.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from layerkv.scheduler.elastic import MOST_LEAVING

SPARE_PART = 8
"""Cached prefixes grow into memory that nobody needs by one of so many parts at a time. Not measured: chosen by
judgement: prefixes of some requests at a time, and no more than that asked for in vain."""


class HostView(NamedTuple):
    """Host memory before a step, and who uses it.

    Attributes:
        segment_blocks: Host blocks of a segment.
        ceiling: Segments that there are.
        floor: Segments that hold the longest request.
        limit: Segments that may be held; None: nobody divides host memory, and all of them may.
        num_staying: Segments in service.
        num_held: Those, and those that leave: their memory is nobody else's.
        kept_blocks: Blocks of requests that are parked, in the zone or being fetched.
        cached_blocks: Blocks that cache prefixes and belong to no request.
        wanted_blocks: Blocks that residents would take if they were parked, and waiting prompts if they ran layered.
        is_idle: Whether nobody has used the engine for so long that it gives memory back.
        used_segments: Segments in service that hold or cache anything, the first among them; only asked for when idle.
    """

    segment_blocks: int
    ceiling: int
    floor: int
    limit: int | None
    num_staying: int
    num_held: int
    kept_blocks: int
    cached_blocks: int
    wanted_blocks: int
    is_idle: bool
    used_segments: int = 0


class HostResize(NamedTuple):
    """What to do before the step, and what to ask for.

    Attributes:
        target: Segments to be in service.
        need: Segments that requests need, those included that wait or might be parked.
        like: Segments that are of use: besides those needed, what caches prefixes, and room for more of those.
        can_leave: Of those needed and held, what could be given up without losing anything.
    """

    target: int
    need: int
    like: int
    can_leave: int

    def at_rest(self, num_kept: int) -> HostResize:
        """As :meth:`layerkv.scheduler.elastic.Resize.at_rest`, of segments held that are not being given back."""
        return self._replace(need=num_kept, like=num_kept, can_leave=0)


class HostSegment(NamedTuple):
    """A segment in service: its blocks that requests cannot do without, those of residents' copies, and how late the
    last of its cached prefixes would give way (-1: it has none)."""

    segment: int
    num_kept: int
    num_copied: int
    newest: int

    @property
    def is_used(self) -> bool:
        """Whether it holds or caches anything."""
        return self.num_kept > 0 or self.num_copied > 0 or self.newest >= 0


def resize_host(host: HostView) -> HostResize:
    """How many segments should be in service before one step.

    A need that falls gives nothing back. An engine that nobody uses keeps prefixes up to its floor, which is its own
    whenever it needs it; it sleeps then, and could not give the rest back when others need that.
    """
    need = _within(host.kept_blocks if host.is_idle else host.kept_blocks + host.wanted_blocks, host)
    stuck = _within(host.kept_blocks, host)
    if host.is_idle:
        of_use = max(_within(host.kept_blocks + host.cached_blocks, host), host.used_segments)  # none of them is full
        target = max(min(of_use, host.floor), need)
    else:
        of_use = _within(host.kept_blocks + host.wanted_blocks + host.cached_blocks, host)
        with_room = of_use + max(host.num_staying // SPARE_PART, 1)
        target = max(min(with_room, host.ceiling), host.floor, host.num_staying)
    like = target
    target = host.ceiling if host.limit is None else max(min(target, host.limit), 1)
    return HostResize(target, need, like, can_leave=max(min(host.num_held, need) - stuck, 0))


def leavers(segments: Iterable[HostSegment], excess: int, *, parks_stay: bool = False) -> tuple[int, ...]:
    """Which of them go out of service: of those without blocks that requests hold, the one whose prefixes are least
    worth first; then those with fewest blocks that requests cannot do without.

    Args:
        segments: Those in service, but for the one that never leaves.
        excess: So many are too many.
        parks_stay: Whether those stay that have such blocks: held all the same, and by then of use for more.
    """
    may_leave = [its for its in segments if not (parks_stay and its.num_kept)]
    may_leave.sort(key=lambda its: (its.num_kept, its.num_copied, its.newest, -its.segment))
    return tuple(its.segment for its in may_leave[: min(excess, MOST_LEAVING)])


def _within(num_blocks: int, host: HostView) -> int:
    return max(min(-(-num_blocks // host.segment_blocks), host.ceiling), 1)
