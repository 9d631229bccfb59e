"""How long a request that came now would wait for its prefill: the engine's part of refusal under overload.

The scheduler tells the front ends a :class:`Word` now and then; :mod:`layerkv.scheduler.admission` is what they make
of it. Prefill is reckoned here in *nominal* seconds, a prompt's cost by the profile alone. How many of those pass in a
second is observed: decodes take their share of every step and limit the budget, prompts wait for the pool, caches
hold a part of them, and a profile may be of another scale. All of that shows in the pace and in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

from layerkv.config import SloClass, SloPolicy
from layerkv.scheduler.snapshot import WaitingRequest
from layerkv.scheduler.tracker import DeadlineQueue

PACE_MEMORY_S = 2.0
"""What was observed counts for so long. From 1 to 4 s, refusals in the simulated overloads were about the same. Not
measured: chosen by the simulated overloads (2026-11-28, no result file)."""
PRIOR_S = 0.25
"""The predicted pace counts as much as an observation of so long. Not measured: chosen by judgement."""
DEMAND_MEMORY_S = 5.0
"""For so long what has come counts towards how much a class asks for. Not measured: chosen by judgement."""
LEAST_SHARE = 0.05
"""Of the pace, what a class is left with at least, however much those due sooner ask for. Not measured: chosen by
judgement."""
LATE_SHARE = 1 / 8
"""Of late prompts whose class has longer, what those due sooner leave room for: else they would never be served. Not
measured: chosen by judgement."""
MOST_LATE = 1024
"""Late prompts that are looked at: with so many, nobody is let in anyway. Not measured: chosen by judgement."""


class ClassWait(NamedTuple):
    """What a request of a class that came now would meet.

    Attributes:
        wait_s: Seconds until its own prefill begins; 0 of a class that is not refused.
        request_s: Seconds that a request of this class holds up those behind it, on average.
    """

    wait_s: float
    request_s: float


class Word(NamedTuple):
    """What an engine tells its front ends.

    Attributes:
        age_s: How long ago the engine last took requests in: later ones are not in it.
        classes: Every class of the policy, by name.
    """

    age_s: float
    classes: dict[str, ClassWait]


class Pace:
    """Nominal seconds of prefill done per second, while there was more to do than was done."""

    def __init__(self) -> None:
        self._started_s = self._done_s = self._observed_s = 0.0
        self._seen_s: float | None = None
        self._seen_done_s = 0.0
        self._ran_out = self._is_held_back = False

    def started(self, cost_s: float, *, was_last: bool) -> None:
        """A prompt of this cost has been given compute; ``was_last``: nobody waits behind it."""
        self._started_s += cost_s
        self._ran_out |= was_last

    def gave_up(self, rest_s: float) -> None:
        """A prompt that has begun is not computed further: what it still cost has not been done, and will not be."""
        self._started_s -= rest_s

    def look(self, now_s: float, under_way_s: float) -> None:
        """Before a step: what prompts that have begun still cost."""
        done_s = self._started_s - under_way_s
        if self._seen_s is not None and now_s > self._seen_s:
            passed_s = now_s - self._seen_s
            fade = math.exp(-passed_s / PACE_MEMORY_S)
            self._done_s *= fade
            self._observed_s *= fade
            if not self._is_held_back and (under_way_s > 0 or not self._ran_out):
                self._done_s += max(done_s - self._seen_done_s, 0.0)
                self._observed_s += passed_s
        self._seen_s, self._seen_done_s, self._ran_out, self._is_held_back = now_s, done_s, False, False

    def rest(self) -> None:
        """Nothing is to be prefilled: the time until the next look says nothing."""
        self._ran_out = True

    def hold_back(self) -> None:
        """Prompts get less of the step than they could, because none is in a hurry: its time says nothing."""
        self._is_held_back = True

    def per_second(self, expected: float) -> float:
        """The pace, between what was observed and what is expected."""
        return (self._done_s + PRIOR_S * expected) / (self._observed_s + PRIOR_S)


@dataclass(slots=True)
class _Demand:
    """What has come of one class lately, fading."""

    cost_s: float = 0.0
    count: float = 0.0
    at_s: float = 0.0

    def add(self, cost_s: float, now_s: float) -> None:
        fade = self._fade(now_s)
        self.cost_s, self.count, self.at_s = self.cost_s * fade + cost_s, self.count * fade + 1, now_s

    def per_second(self, now_s: float) -> float:
        return self.cost_s * self._fade(now_s) / DEMAND_MEMORY_S

    def mean_s(self) -> float:
        return self.cost_s / self.count if self.count else 0.0

    def _fade(self, now_s: float) -> float:
        return math.exp(-max(now_s - self.at_s, 0.0) / DEMAND_MEMORY_S)


class PrefillLine:
    """What the estimate remembers between steps. One per engine."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._under_way_s = 0.0
        self._demands: dict[str, _Demand] = {}

    @property
    def is_busy(self) -> bool:
        """Whether prompts were under way at the last look."""
        return self._under_way_s > 0

    def came(self, slo: SloClass, cost_s: float, now_s: float) -> None:
        """A request has come in."""
        self._demands.setdefault(slo.name, _Demand()).add(cost_s, now_s)

    def started(self, cost_s: float, *, was_last: bool) -> None:
        """A prompt of this cost has been given compute; ``was_last``: nobody waits behind it."""
        self._pace.started(cost_s, was_last=was_last)

    def gave_up(self, rest_s: float) -> None:
        """A prompt that has begun is not computed further; ``rest_s``: what it still cost when last looked at."""
        self._pace.gave_up(rest_s)

    def look(self, now_s: float, under_way_s: float) -> None:
        """Before a step: what prompts that have begun still cost."""
        self._under_way_s = under_way_s
        self._pace.look(now_s, under_way_s)

    def hold_back(self) -> None:
        """Prompts get less of the next step than they could, because none is in a hurry."""
        self._pace.hold_back()

    def rest(self) -> None:
        """No prompt waits or is under way."""
        self._under_way_s = 0.0
        self._pace.rest()

    def word(
        self,
        policy: SloPolicy,
        waiting: DeadlineQueue[WaitingRequest],
        slo_of: Callable[[str], SloClass],
        put_behind: AbstractSet[str],
        *,
        now_s: float,
        age_s: float,
        expected_pace: float,
    ) -> Word:
        """What requests that came now would meet, by class.

        Args:
            policy: The classes.
            waiting: The line.
            slo_of: Class of a request in it.
            put_behind: Who in it cannot be on time, by the last decision, and so is served behind those that can.
            now_s: Current time.
            age_s: See :class:`Word`.
            expected_pace: Nominal seconds of prefill per second by the cost model, as the engine is now.
        """
        pace = max(self._pace.per_second(expected_pace), 1e-9)
        late = [w for w in waiting.late(now_s, MOST_LATE) if w.request_id not in put_behind]
        late += [w for request_id in put_behind if (w := waiting.view(request_id)) is not None]
        late_costs = [(slo_of(w.request_id), w.prefill_cost_s) for w in late]
        classes: dict[str, ClassWait] = {}
        for slo in policy.classes.values():
            wait_s = 0.0
            if slo.overload == "reject":
                ahead_s = self._under_way_s
                if policy.slo_scheduling:
                    due = waiting.due_before(now_s, now_s + slo.ttft_s)
                    ahead_s += sum(w.prefill_cost_s for w in due if w.request_id not in put_behind)
                    ahead_s += _late_s(slo, late_costs)
                    sooner = sum(
                        self._per_second(other, now_s) for other in policy.classes.values() if other.ttft_s < slo.ttft_s
                    )
                else:  # in order of arrival
                    ahead_s += sum(w.prefill_cost_s for w in waiting.views)
                    sooner = 0.0
                wait_s = ahead_s / max(pace - sooner, LEAST_SHARE * pace)
            classes[slo.name] = ClassWait(wait_s, self._mean_s(slo) / pace)
        return Word(age_s, classes)

    def _per_second(self, slo: SloClass, now_s: float) -> float:
        """What a class asks for of the pace: with those due sooner that will come, a request waits longer."""
        demand = self._demands.get(slo.name)
        return 0.0 if demand is None else demand.per_second(now_s)

    def _mean_s(self, slo: SloClass) -> float:
        demand = self._demands.get(slo.name)
        return 0.0 if demand is None else demand.mean_s()


def _late_s(slo: SloClass, late: list[tuple[SloClass, float]]) -> float:
    """What a newcomer of a class leaves room for of those let in before that are late.

    They are served behind all that can be on time. If newcomers took all the pace, whoever has become late would be
    very late. Who was let in to wait as long as it takes (``overload: queue``) does not count.
    """
    return sum(
        cost_s * (1.0 if other.ttft_s <= slo.ttft_s else LATE_SHARE)
        for other, cost_s in late
        if other.overload == "reject"
    )
