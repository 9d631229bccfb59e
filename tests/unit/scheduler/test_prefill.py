"""How much prefill a step may do, and who of the waiting is given up as late."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.core.cost import StepWork
from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.policy import decide
from layerkv.scheduler.prefill import ROUND_TOKENS, late_prompts, prefill_budget, step_seconds
from layerkv.scheduler.snapshot import Snapshot, WaitingRequest
from tests.fakes.snapshots import NOW_S, admitted, changed, cost, prompt, snapshot

LIMITS = PolicyLimits()


def budget(s: Snapshot) -> int:
    return prefill_budget(
        s, slack_s=s.load.decode_slack_s, min_tokens=LIMITS.min_prefill_tokens, max_idle_steps=LIMITS.max_idle_steps
    )


# The budget -----------------------------------------------------------------------------------------------------------


@given(
    slack_s=st.floats(0.0, 0.3),
    num_decodes=st.integers(0, 200),
    budget_tokens=st.integers(1, 4096),
    step_s=st.sampled_from((0.0, 0.01)),
    pair_s=st.sampled_from((0.0, 1e-8)),
    mode=st.sampled_from(("auto", "layered")),
)
def test_the_budget_is_the_largest_round_number_whose_step_fits_the_slack(
    slack_s: float, num_decodes: int, budget_tokens: int, step_s: float, pair_s: float, mode: Any
) -> None:
    costs = cost(step_s=step_s, pair_s=pair_s)
    s = snapshot(decode_slack_s=slack_s, decode_tokens=num_decodes, budget_tokens=budget_tokens, cost=costs, mode=mode)
    found, most = budget(s), max(budget_tokens - num_decodes, 0)
    assert found == decide(s).prefill_tokens
    if found:
        assert step_seconds(s, costs, found) <= slack_s
    if found != most:
        assert found % ROUND_TOKENS == 0
        assert step_seconds(s, costs, min(found + ROUND_TOKENS, most)) > slack_s


@pytest.mark.parametrize(
    ("slack_s", "expected"),
    [
        (math.inf, 2000),  # nobody decodes
        (10.0, 2000),
        (0.1148 + 1e-9, 1000 // 64 * 64),  # 10 ms the step, 4.8 ms the decodes, 100 ms for 1000 prompt tokens
        (0.0212 + 1e-9, 64),
        (0.0211, 0),
        (0.0, 0),
    ],
)
def test_prefill_takes_what_decodes_leave_of_the_slack(slack_s: float, expected: int) -> None:
    assert budget(snapshot(decode_slack_s=slack_s, decode_tokens=48, cost=cost())) == expected


def test_without_costs_the_slack_means_nothing() -> None:
    assert budget(snapshot(decode_slack_s=0.0, decode_tokens=48)) == 2000


def test_prefill_never_stops_for_longer_than_it_may() -> None:
    s = snapshot(decode_slack_s=0.0, decode_tokens=48, cost=cost())
    before = changed(s, steps_without_prefill=LIMITS.max_idle_steps - 1)
    after = changed(s, steps_without_prefill=LIMITS.max_idle_steps)
    assert budget(before) == 0
    assert budget(after) == LIMITS.min_prefill_tokens
    assert budget(changed(after, decode_tokens=2000)) == 48, "no more than the step has"
    assert budget(changed(after, decode_slack_s=0.1148)) == 960, "no less than the slack allows"


def test_decodes_come_before_prefill_in_a_full_step() -> None:
    assert budget(snapshot(decode_tokens=2048)) == 0
    assert budget(snapshot(decode_tokens=5000, decode_slack_s=0.0, cost=cost(), steps_without_prefill=99)) == 0


def test_stores_of_layered_prompts_limit_the_budget_when_the_link_is_slow() -> None:
    """LayerKV's Eq. 4: 16 tokens take 1.6 ms to compute, and their block 16 ms to store."""
    s = snapshot(decode_slack_s=0.2, decode_tokens=1, cost=cost(block_copy_s=0.016), mode="auto")
    assert budget(s) == 1856
    assert budget(changed(s, mode="layered")) == 192


def test_prompts_under_way_come_before_new_ones() -> None:
    s = snapshot(waiting=[prompt("a", 4)], budget_tokens=600)
    assert admitted(decide(changed(s, prefilling_tokens=599))) == [("a", False)]
    assert admitted(decide(changed(s, prefilling_tokens=600))) == []


def test_no_more_prompts_are_started_than_the_step_computes() -> None:
    s = snapshot(waiting=[prompt(f"w{i}", 10) for i in range(8)], budget_tokens=400)
    assert [name for name, _ in admitted(decide(s))] == ["w0", "w1", "w2"], "160 tokens each, the third in part"


# Who will be late -----------------------------------------------------------------------------------------------------

BARE = cost(step_s=0.0)
"""A step takes just as long as its prompt tokens: a prompt's prefill takes `prefill_cost_s`."""


def waits(*prompts: tuple[float, float], weights: tuple[float, ...] = ()) -> list[WaitingRequest]:
    """Prompts by seconds of prefill, and seconds until they are due."""
    views = [
        prompt(f"w{i}", 1, NOW_S + due_s, prefill_cost_s=prefill_s, weight=weights[i] if weights else 1.0)
        for i, (prefill_s, due_s) in enumerate(prompts)
    ]
    return sorted(views, key=lambda w: w.deadline_s)


def late(views: list[WaitingRequest], **changes: Any) -> set[str]:
    return late_prompts(snapshot(cost=BARE, **changes), views, 2048)


def can_all_be_on_time(views: tuple[WaitingRequest, ...]) -> bool:
    """Whether one after the other, by deadline, none ends after it is due: if any order does, this one does."""
    end_s = NOW_S
    for w in sorted(views, key=lambda w: w.deadline_s):
        end_s += w.prefill_cost_s
        if end_s > w.deadline_s:
            return False
    return True


sixty_fourths = st.integers(1, 200).map(lambda n: n / 64)


@given(st.lists(st.tuples(sixty_fourths, sixty_fourths), max_size=7))
def test_as_many_as_can_be_are_on_time(prompts: list[tuple[float, float]]) -> None:
    """Against every subset (sizes are sums of powers of two, so that no rounding decides)."""
    views = waits(*prompts)
    most = max(n for n in range(len(views) + 1) if any(can_all_be_on_time(some) for some in combinations(views, n)))
    late_ids = late(views)
    assert len(views) - len(late_ids) == most
    assert can_all_be_on_time(tuple(w for w in views if w.request_id not in late_ids))


@given(st.lists(st.tuples(sixty_fourths, sixty_fourths), min_size=1, max_size=7), st.sampled_from((0.25, 1.0, 8.0)))
def test_a_weight_that_all_share_changes_nothing(prompts: list[tuple[float, float]], weight: float) -> None:
    assert late(waits(*prompts)) == late(waits(*prompts, weights=(weight,) * len(prompts)))


def test_of_two_that_cannot_both_be_on_time_the_lighter_per_second_is_late() -> None:
    assert late(waits((1.0, 1.5), (1.0, 1.75))) == {"w0"}
    assert late(waits((1.0, 1.5), (1.0, 1.75), weights=(4.0, 1.0))) == {"w1"}
    assert late(waits((1.5, 1.5), (0.5, 1.75))) == {"w0"}, "three times the time"
    assert late(waits((1.5, 1.5), (0.5, 1.75), weights=(4.0, 1.0))) == {"w1"}, "but four times the weight"


def test_whose_deadline_has_passed_is_late_and_takes_no_time_from_the_others() -> None:
    assert late(waits((50.0, -0.5), (1.0, 1.0))) == {"w0"}


def test_prompts_under_way_go_first() -> None:
    views = waits((1.0, 1.0))
    assert late(views) == set()
    assert late(views, prefilling_tokens=160) == {"w0"}


def test_decodes_stretch_prefill() -> None:
    """Steps of 2048 prompt tokens take 0.2048 s, and a fixed part as long again."""
    twice = snapshot(cost=cost(step_s=0.2048))
    assert late_prompts(twice, waits((1.0, 2.1)), 2048) == set()
    assert late_prompts(twice, waits((1.0, 1.9)), 2048) == {"w0"}


def test_an_online_correction_counts() -> None:
    slower = snapshot(cost=BARE._replace(prefill_factor=2.0))
    assert late_prompts(slower, waits((1.0, 2.0)), 2048) == set()
    assert late_prompts(slower, waits((1.0, 1.9)), 2048) == {"w0"}


def test_without_costs_only_what_has_passed_is_late_and_without_objectives_nothing() -> None:
    views = waits((50.0, -0.5), (50.0, 1.0))
    assert late_prompts(snapshot(), views, 2048) == {"w0"}
    assert late_prompts(snapshot(cost=BARE, slo_scheduling=False), views, 2048) == set()


def test_how_long_prompts_can_be_put_off_is_said_of_those_on_time_and_of_nobody_else() -> None:
    spare_s: dict[str, float] = {}
    views = waits((0.5, 9.0), (1.0, 1.2), (2.0, 2.1), (9.0, 9.5), (0.1, -1.0))
    views.sort(key=lambda w: w.deadline_s)
    late = late_prompts(snapshot(cost=BARE), views, 2048, spare_s)
    assert len(late) > 1
    assert spare_s.keys() == {w.request_id for w in views} - late


def test_a_step_is_predicted_with_those_who_decode() -> None:
    s = snapshot(decode_tokens=48, decode_context=1000, cost=cost())
    assert step_seconds(s, cost(), 0) == cost().step_s(StepWork(num_decodes=48, decode_context=1000))
    assert step_seconds(s, cost(), 100) == pytest.approx(0.01 + 148 * 1e-4)
