"""Who is overtaken in either line, and by whom, over whole random loads: the bound that the documentation states."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.snapshot import Decision, ParkedRequest, Snapshot, WaitingRequest
from layerkv.sim.engine import SimRequest
from tests.fakes.tiny_scheduler import BLOCK_TOKENS, TinyScheduler, job, policy

MOST = 2
POOL = 20
LONGEST = POOL * BLOCK_TOKENS

WAITS_FOR_COMPUTE = (Reason.NO_TOKENS_LEFT, Reason.LATE, Reason.BEHIND_RANK)
"""Why a prompt waits that only the pool can hold, though it could have its blocks."""

View = WaitingRequest | ParkedRequest


class WatchedScheduler(TinyScheduler):
    """Counts, beside every decision and knowing nothing of how it is taken, who is overtaken.

    A request is overtaken in a step that starts another of its line and rank, or of a worse one, with a later
    deadline, and not itself. Each such step has a culprit: somebody who stood no later than it and was left behind
    too. So there are no more of them than ``MOST`` for each that stood there during its wait, itself included, and
    again for each time that one which had started came back to wait.

    And a prompt never starts while one of better rank is left behind, nor is a parked request of worse rank fetched
    while one of better rank stays parked.
    """

    def __init__(self, jobs: Iterable[SimRequest], **engine: Any) -> None:
        super().__init__(jobs, limits=PolicyLimits(max_overtakes=MOST, min_prefill_tokens=16), **engine)
        self.num_overtakes: dict[tuple[str, str], int] = defaultdict(int)
        self._num_stays: dict[str, int] = defaultdict(int)
        self._before: dict[tuple[str, str], set[tuple[str, int]]] = defaultdict(set)

    def _decide(self) -> tuple[Snapshot, Decision]:
        waiting, parked = list(self.controller.waiting.views), list(self.controller.parked.views)
        snapshot, decision = super()._decide()
        admitted = {admission.request_id for admission in decision.admit}
        self._watch("compute", waiting, waiting, admitted)
        prompts = [w for w in waiting if not self._can_layer(w)]
        claims = [*parked, *(w for w in prompts if decision.waits.get(w.request_id) not in WAITS_FOR_COMPUTE)]
        self._watch("pool", claims, [*parked, *waiting], admitted | set(decision.fetch))
        for views, started in ((waiting, admitted), (parked, set(decision.fetch))):
            worst = max((view.rank for view in views if view.request_id in started), default=-10)
            assert not [v for v in views if v.rank < worst and v.request_id not in started], "a better rank is passed"
        return snapshot, decision

    def _can_layer(self, w: WaitingRequest) -> bool:
        fits = w.num_blocks <= min(self.ledger.zone.num_blocks, self.setup.num_host_blocks)
        return w.can_layer and fits and self.controller.shape.mode != "resident"

    def _watch(self, line: str, views: list[Any], before: list[Any], started: Collection[str]) -> None:
        starts = [view for view in views if view.request_id in started]
        for view in starts:
            self._num_stays[view.request_id] += 1
        for view in views:
            stay = (line, view.request_id)
            if view.request_id in started:
                self.num_overtakes.pop(stay, None)
                self._before.pop(stay, None)
                continue
            self._before[stay] |= {
                (v.request_id, self._num_stays[v.request_id])
                for v in before
                if v.rank == view.rank and v.deadline_s <= view.deadline_s
            }
            self.num_overtakes[stay] += any(s.rank >= view.rank and s.deadline_s > view.deadline_s for s in starts)
            most = MOST * len(self._before[stay])
            assert self.num_overtakes[stay] <= most, f"{stay} was overtaken in more than {most} steps"


@st.composite
def loads(draw: st.DrawFn) -> list[SimRequest]:
    """Requests that come close together, of two ranks or one, some of which only the pool can hold."""
    ranks = draw(st.sampled_from(((0,), (0,), (0, 7), (-3, 0, 7))))
    jobs = []
    for i in range(draw(st.integers(2, 25))):
        num_prompt = draw(st.sampled_from((8, 30, 60, 120, 260)))
        max_tokens = draw(st.integers(1, min(40, LONGEST - num_prompt)))
        jobs.append(
            job(
                f"r{i}",
                num_prompt,
                draw(st.integers(1, max_tokens)),
                draw(st.integers(0, 60)) * 0.01,
                max_tokens=max_tokens,
                can_layer=draw(st.integers(0, 3)) > 0,
                rank=draw(st.sampled_from(ranks)),
                ttft_s=draw(st.sampled_from((0.02, 0.3, 2.0, 20.0))),
                tpot_s=draw(st.sampled_from((0.005, 0.05))),
            )
        )
    return jobs


engines = st.fixed_dictionaries(
    {
        "zone_blocks": st.sampled_from((0, 4, 8, 24)),
        "num_host_blocks": st.sampled_from((0, 20, 100)),
        "budget_tokens": st.sampled_from((16, 64, 256)),
        "slots": st.sampled_from((1, 3, 16)),
        "mode": st.sampled_from(("auto", "auto", "resident", "layered")),
        "frees_are_deferred": st.booleans(),
        "slo": st.sampled_from([policy(policy=name) for name in ("fluid", "fluid", "slo", "arrival")]),
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(loads(), engines)
def test_nobody_is_overtaken_more_often_than_documented_and_never_by_a_worse_rank(
    jobs: list[SimRequest], engine: dict[str, Any]
) -> None:
    scheduler = WatchedScheduler(jobs, pool_blocks=POOL, **engine)
    scheduler.run(max_steps=20_000)
    scheduler.check_is_empty()
