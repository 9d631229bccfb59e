"""How several engines share one memory: who should have how much (pure functions; the broker's, and the simulator's).

The same division serves device memory and host memory. All sizes are bytes; each engine has whole segments of its own.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

RATE_MEMORY_S = 60.0
"""How far back tokens count in an engine's rate. Not measured: taken from Prism's KVPR (arXiv 2505.04021), which is
over a window of that length."""

LEAST_WEIGHT = 1e-9
"""Weight of an engine that makes no tokens. Derived: any number above zero, so that it comes after all that do."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What one engine has, and asks for.

    Attributes:
        segment_bytes: What its memory comes and goes in.
        floor: What it gets when it needs that much, before anybody gets more.
        ceiling: More it cannot use.
        held: Has memory now, what is coming or leaving included.
        need: Requests need it: those that run, wait or are parked.
        like: Would be of use: caches, what it has mapped, and what the next request would need.
        can_leave: Of what is needed and held, what could be given up without losing anything: free, or of requests that
            could be parked.
        weight: Its share among others, see :func:`token_pressure`.
        has_requests: Whether there are any: one without holds caches at most.
    """

    segment_bytes: int
    floor: int
    ceiling: int
    held: int = 0
    need: int = 0
    like: int = 0
    can_leave: int = 0
    weight: float = 1.0
    has_requests: bool = True

    def whole(self, num_bytes: int) -> int:
        """So many bytes in whole segments, rounded up, but never above the ceiling."""
        segments = min(-(-num_bytes // self.segment_bytes), self.ceiling // self.segment_bytes)
        return max(segments, 0) * self.segment_bytes


class TokenRate:
    """Tokens per second of the time in which an engine has requests; what is longer ago counts less.

    Over all time, an engine that a burst has just woken would have next to none for a minute, and get its memory last.
    """

    def __init__(self) -> None:
        self._tokens = self._busy_s = self._seen_s = 0.0
        self._was_busy = False

    def note(self, num_tokens: int, now_s: float, *, is_busy: bool) -> None:
        """So many tokens since the last call, whose word on whether there are requests holds until this one."""
        seconds = max(now_s - self._seen_s, 0.0)
        left = math.exp(-seconds / RATE_MEMORY_S)
        self._tokens = self._tokens * left + num_tokens
        self._busy_s = self._busy_s * left + (RATE_MEMORY_S * (1 - left) if self._was_busy else 0.0)
        self._seen_s, self._was_busy = now_s, is_busy

    @property
    def per_s(self) -> float:
        """Tokens per second; of less than a second as if it had been one: what has just begun says little yet."""
        return self._tokens / max(self._busy_s, 1.0)


def token_pressure(token_rate: float, token_bytes: int, tpot_s: float, weight: float = 1.0) -> float:
    """An engine's weight: bytes of KV that it must make room for per second, over the time a reader allows for a token.

    Prism's KV pressure ratio (KVPR) is this over what the engine has got, and who has the highest gets the next bytes.
    """
    return max(weight * token_rate * token_bytes / tpot_s, LEAST_WEIGHT)


def divide(wishes: Mapping[str, Wish], capacity: int) -> dict[str, int]:
    """What each engine should have, in whole segments, together at most ``capacity``.

    First floors as far as they are needed, then what cannot leave, then needs, then what is held and liked, then other
    likes: for those nobody gives up what it has. Within each a segment at a time goes to whoever has got least by
    weight; one whose next segment does not fit gets no more. So an engine may get less than what cannot leave, where
    others' floors need it: it gives that back as its requests end.
    """
    got = dict.fromkeys(wishes, 0)
    left = capacity
    for wanted in (_entitled, _stuck, _needed, _kept, _liked):
        goals = {engine: wanted(wish) for engine, wish in wishes.items()}
        line = [(got[engine] / wish.weight, engine) for engine, wish in wishes.items() if got[engine] < goals[engine]]
        heapq.heapify(line)
        while line:
            _, engine = heapq.heappop(line)
            wish = wishes[engine]
            if wish.segment_bytes > left:
                continue
            got[engine] += wish.segment_bytes
            left -= wish.segment_bytes
            if got[engine] < goals[engine]:
                heapq.heappush(line, (got[engine] / wish.weight, engine))
    return got


def _entitled(wish: Wish) -> int:
    return wish.whole(min(wish.floor, wish.need))


def _stuck(wish: Wish) -> int:
    return wish.whole(min(wish.held, wish.need) - wish.can_leave)


def _needed(wish: Wish) -> int:
    return wish.whole(wish.need)


def _kept(wish: Wish) -> int:
    return wish.whole(max(wish.need, min(wish.held, wish.like)))


def _liked(wish: Wish) -> int:
    return wish.whole(max(wish.need, wish.like))
