"""A virtual engine behind front ends that refuse under overload: gate, words and decisions are those of production."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from layerkv.config import SloPolicy
from layerkv.core.cost import StepWork
from layerkv.scheduler.admission import Backlog, would_be_late
from layerkv.scheduler.backlog import Word
from layerkv.sim.engine import EngineSetup, Live, Scheduled, SimRequest
from layerkv.sim.layered import LayeredEngine

WORD_INTERVAL_S = 0.05


class GatedEngine(LayeredEngine):
    """Requests come in at one of several front ends in turn, which hear the engine's words late."""

    def __init__(
        self,
        setup: EngineSetup,
        requests: Iterable[SimRequest],
        policy: SloPolicy,
        *,
        num_front_ends: int = 1,
        word_delay_s: float = 0.05,
        has_gate: bool = True,
        **more: Any,
    ) -> None:
        super().__init__(setup, requests, policy, refuses_late=False, **more)
        self.front_ends = [Backlog() for _ in range(num_front_ends)]
        for front_end in self.front_ends:
            front_end.expect(0, num_front_ends)
        self.turned_away: list[str] = []
        self.num_words = 0
        self._has_gate = has_gate
        self._word_delay_s = word_delay_s
        self._on_their_way: deque[tuple[float, Word]] = deque()
        self._num_came = 0
        self._taken_in_s = self._last_word_s = 0.0
        self._owes_word = False

    def arrive(self, live: Live) -> None:
        slo, at_s = live.request.slo, live.request.arrival_s
        while self._on_their_way and self._on_their_way[0][0] <= at_s:
            heard_s, word = self._on_their_way.popleft()
            for front_end in self.front_ends:
                front_end.note(0, word, heard_s)
        front_end = self.front_ends[self._num_came % len(self.front_ends)]
        self._num_came += 1
        is_late = slo.overload == "reject" and would_be_late(slo, front_end.meets(slo, at_s))
        if is_late and self._has_gate:
            self.turned_away.append(live.request_id)
            self.end(live, None)
            return
        front_end.let_in(slo, at_s)
        self._owes_word = True
        super().arrive(live)

    def schedule(self) -> Scheduled:
        self._taken_in_s = self.now_s
        return super().schedule()

    def stepped(self, work: StepWork, seconds: float, firsts: Sequence[Live]) -> None:
        super().stepped(work, seconds, firsts)
        has_prompts = self.controller.has_prompts()
        is_due = self.now_s - self._last_word_s >= WORD_INTERVAL_S
        if not self._owes_word or (has_prompts and not is_due):
            return
        word = self.controller.word(self._taken_in_s, self.now_s)
        if word is not None:
            self._last_word_s, self._owes_word = self.now_s, has_prompts
            self.num_words += 1
            self._on_their_way.append((self.now_s + self._word_delay_s, word))
