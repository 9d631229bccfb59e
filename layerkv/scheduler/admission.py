"""Who is let in: what a front end knows of how long its engines would keep a new request waiting.

An engine's word is old when it is used: it left out what came during the engine's last step, and whatever has been let
in since. So a front end adds its own admissions, from the time on of which the engine knew, at what the engine says
that a request of their class costs. Of other front ends it knows nothing: connections are spread evenly over them, so
it takes each of its own for as many as there are front ends; the next word, a few steps later, puts that right.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from layerkv.config import SloClass
from layerkv.scheduler.backlog import ClassWait, Word

FORGET_S = 5.0
"""An engine that has something to do says so at every step: what was let in longer ago, it has dealt with. Not
measured: chosen by judgement."""
CERTAIN_SHARE = 0.7
"""Of its TTFT, how long a request may be expected to wait: those who begin before it decode when its turn comes, and
its prefill goes more slowly then. In the simulated overloads, 0.6 to 0.9 trade those let in against those late. Not
measured: chosen by the simulated overloads (2026-11-28, no result file)."""

_NOTHING = ClassWait(0.0, 0.0)


class Backlog:
    """The newest word of each engine, and what was let in here since. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._words: dict[int, tuple[float, Word]] = {}
        self._engines: set[int] = set()
        self._let_in: deque[tuple[float, SloClass, int]] = deque()
        self._num_front_ends = 1
        self._count_refusal: Callable[[str], None] = lambda _: None

    def count_refusals_with(self, count: Callable[[str], None]) -> None:
        """From now on, `count` gets the class of every refused request."""
        self._count_refusal = count

    def refuse(self, slo_class: str) -> None:
        """A request of this class is refused."""
        self._count_refusal(slo_class)

    def expect(self, engine: int, num_front_ends: int = 1) -> None:
        """There is this engine, and so many front ends send it requests; while it says nothing, it is idle."""
        with self._lock:
            self._engines.add(engine)
            self._num_front_ends = num_front_ends

    def note(self, engine: int, word: Word, now_s: float) -> None:
        """An engine says what a new request would meet."""
        with self._lock:
            self._engines.add(engine)
            self._words[engine] = (now_s, word)
            known_s = min(said_s - said.age_s for said_s, said in self._words.values())
            self._forget(max(known_s, now_s - FORGET_S))

    def let_in(self, slo: SloClass, now_s: float, num_answers: int = 1) -> None:
        """A request is let in; the engine gets one for each answer that it asks for."""
        with self._lock:
            if self._words:  # before the first, what a request costs is not known
                self._let_in.append((now_s, slo, num_answers))
                self._forget(now_s - FORGET_S)

    def meets(self, slo: SloClass, now_s: float) -> ClassWait:
        """What a request of this class would meet at the engine that has the least to do."""
        with self._lock:
            return min((self._at(engine, slo, now_s) for engine in self._engines), default=_NOTHING)

    def _at(self, engine: int, slo: SloClass, now_s: float) -> ClassWait:
        """What it said, less a second per second since then, and what was let in that goes before this one."""
        said = self._words.get(engine)
        if said is None:
            return _NOTHING
        at_s, word = said
        known_s = at_s - word.age_s
        wait_s, request_s = word.classes.get(slo.name, _NOTHING)
        share = self._num_front_ends / len(self._engines)
        for let_in_s, other, num_answers in self._let_in:
            if let_in_s <= known_s or let_in_s + other.ttft_s > now_s + slo.ttft_s:
                continue
            if let_in_s > at_s:
                wait_s = max(wait_s - (let_in_s - at_s), 0.0)
                at_s = let_in_s
            wait_s += word.classes.get(other.name, _NOTHING).request_s * num_answers * share
        return ClassWait(max(wait_s - (now_s - at_s), 0.0), request_s)

    def _forget(self, until_s: float) -> None:
        while self._let_in and self._let_in[0][0] <= until_s:
            self._let_in.popleft()


def would_be_late(slo: SloClass, meets: ClassWait) -> bool:
    """Whether a request of this class would have its first token late; never if it would begin at once."""
    return meets.wait_s > max(CERTAIN_SHARE * slo.ttft_s - meets.request_s, 0.0)
