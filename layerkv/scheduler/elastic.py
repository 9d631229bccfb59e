"""How large the pool should be: which segments come and go before a step, and what the engine asks for.

Pure: a view of the pool in, a :class:`Resize` out. What must be given back goes first, and only what must: a limit that
was lowered, or an engine that nobody uses. Growth comes last, and only for requests that the pool in service cannot
hold. So a need that rises and falls moves nothing: what came stays until somebody else needs it.

All sizes are segments, but where blocks are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LOOK_EVERY_S = 0.05
"""Seconds between two looks at memory that need not change, and between two words to the broker. Not measured: chosen
by trials of a prototype (2026-11-22, no result file): looks in every step cost 4 % of the time to the last token."""

MOST_LEAVING = 8
"""Segments that may go out of service before one step. Not measured: chosen by trials of a prototype (2026-11-22, no
result file): 43 of 64 blocks in one step made it 1.27 times as long as the median."""

GROWTH_TOKENS = 64
"""Tokens that each running request is given room for ahead of time. Not measured: chosen by judgement, to be more steps
than a segment takes to come."""


class PoolView(NamedTuple):
    """The pool before a step, and who uses it.

    Attributes:
        segment_blocks: Blocks of a segment.
        ceiling: Segments that there are.
        limit: Segments that may be held.
        in_service: Those in service but for segment 0; of each its number and its blocks in use,
        leaving: and the same of those that leave and are not empty.
        num_arriving: Segments on their way in,
        num_releasing: and out: held, but nobody's any more.
        used_blocks: Blocks in use, the null block and those in segments that leave included.
        free_blocks: Free blocks in service.
        kept_blocks: Of those, blocks promised to prompts under way and to who comes back from host memory.
        wanted_blocks: Blocks that those who wait, those who are parked, and the growth of those who run need besides.
        parkable_blocks: Blocks in use that could be given up without losing anything: host memory has room.
        ahead: Segments of the longest request: while there are requests, it likes to be allowed so many more.
        idle_s: Seconds since the engine last had requests; 0 while it has any.
        idle_after_s: After so many it gives back all but segment 0.
    """

    segment_blocks: int
    ceiling: int
    limit: int
    in_service: Sequence[tuple[int, int]]
    leaving: Sequence[tuple[int, int]]
    num_arriving: int
    num_releasing: int
    used_blocks: int
    free_blocks: int
    kept_blocks: int
    wanted_blocks: int
    parkable_blocks: int
    ahead: int
    idle_s: float
    idle_after_s: float

    @property
    def num_staying(self) -> int:
        """Segments that will be held if nothing more is done."""
        return 1 + len(self.in_service) + self.num_arriving

    @property
    def num_held(self) -> int:
        """Segments whose memory nobody else can have."""
        return self.num_staying + len(self.leaving) + self.num_releasing

    @property
    def is_idle(self) -> bool:
        """Whether nobody has used the engine for so long that it gives memory back."""
        return self.idle_s >= self.idle_after_s


class Resize(NamedTuple):
    """What to do before the step, and what to ask for.

    Attributes:
        arrive: Segments to map, as many as may be held.
        leave: Segments that go out of service.
        stay: Leaving segments that are wanted again.
        vacate: Segments that leave and have blocks in use: whose they are should be parked.
        need: Segments that requests need, those that wait and are parked included.
        like: Segments that are of use: besides those needed, what is there, for caches; and while there are requests
            some for the next one, which would wait a step for them if it asked when it comes.
        can_leave: Of those needed and held, what could be given up without losing anything: free blocks, and those of
            requests that could be parked.
        owed_blocks: Blocks in service that should be given back and cannot be yet: nobody new may count on them.
    """

    arrive: int = 0
    leave: tuple[int, ...] = ()
    stay: tuple[int, ...] = ()
    vacate: tuple[int, ...] = ()
    need: int = 1
    like: int = 1
    can_leave: int = 0
    owed_blocks: int = 0

    def at_rest(self, num_held: int) -> Resize:
        """The same of an engine that is paused and has no requests: nobody is parked or let in until it goes on, and
        nothing wakes it, so what it holds it needs."""
        return self._replace(arrive=0, need=num_held, like=num_held, can_leave=0)


def resize(pool: PoolView) -> Resize:
    """Choose what comes and goes before one step."""
    target = 1 if pool.is_idle else max(min(pool.limit, pool.ceiling), 1)
    excess = max(pool.num_staying - target, 0)
    leave = _leavers(pool, excess)
    stay = () if leave else _stayers(pool, target - pool.num_staying)
    wanted = _segments(pool.used_blocks + pool.kept_blocks + pool.wanted_blocks, pool.segment_blocks)
    need = max(min(wanted, pool.ceiling), 1)
    leaving = [*(segment for segment, _ in pool.leaving if segment not in stay), *leave]
    num_used = dict((*pool.in_service, *pool.leaving))
    staying = pool.num_staying - len(leave) + len(stay)
    stuck = max(_segments(pool.used_blocks - pool.parkable_blocks, pool.segment_blocks), 1)
    return Resize(
        arrive=0 if leave or pool.is_idle else _newcomers(pool, target - pool.num_held, len(stay)),
        leave=leave,
        stay=stay,
        vacate=tuple(segment for segment in leaving if num_used[segment]),
        need=need,
        like=max(need, 1 if pool.is_idle else staying) + (0 if pool.idle_s else pool.ahead),
        can_leave=max(min(pool.num_held, need) - stuck, 0),
        owed_blocks=(excess - len(leave)) * pool.segment_blocks,
    )


def _leavers(pool: PoolView, excess: int) -> tuple[int, ...]:
    """The emptiest segments, and no free blocks that prompts under way count on: a fuller one has fewer of them. Of an
    engine without requests all at once: there is no step that could become long."""
    chosen: list[int] = []
    most = excess if pool.idle_s else min(excess, MOST_LEAVING)
    spare = pool.free_blocks - pool.kept_blocks
    for segment, num_used in sorted(pool.in_service, key=lambda entry: (entry[1], -entry[0])):
        if len(chosen) >= most:
            break
        num_free = pool.segment_blocks - num_used
        if num_free > max(spare, 0) and pool.kept_blocks:  # a full one takes nobody's blocks away
            continue
        spare -= num_free
        chosen.append(segment)
    return tuple(chosen)


def _stayers(pool: PoolView, room: int) -> tuple[int, ...]:
    """Leaving segments with most blocks in use: those would be parked."""
    if room <= 0:
        return ()
    fullest = sorted(pool.leaving, key=lambda entry: -entry[1])
    return tuple(segment for segment, _ in fullest[:room])


def _newcomers(pool: PoolView, room: int, num_staying: int) -> int:
    """As many as those who want blocks lack, and as may be held."""
    coming = (pool.num_arriving + num_staying) * pool.segment_blocks
    missing = pool.wanted_blocks + pool.kept_blocks - pool.free_blocks - coming
    return max(min(_segments(missing, pool.segment_blocks), room), 0)


def _segments(num_blocks: int, segment_blocks: int) -> int:
    return -(-num_blocks // segment_blocks)
