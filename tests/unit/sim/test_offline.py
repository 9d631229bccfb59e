"""What could be fluid with the load known beforehand: cases to reckon by hand, bound and schedule of random ones."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerkv.config import SloClass
from layerkv.core.cost import Curve
from layerkv.sim.config import SimConfig
from layerkv.sim.engine import SimRequest
from layerkv.sim.offline import Need, lines_below, most_fluid, needs_of, offline, offline_schedule, select
from layerkv.sim.run import make_engine, requests_of
from tests.unit.sim.test_run import CHAT, simulation


def need(at: float, due: float, *whole: float, prompt: float = 0.0) -> Need:
    return Need(at, due, due, (prompt,) * len(whole), whole, 0.0, 0.0)


def test_a_request_needs_its_prompt_its_tokens_and_its_share_of_each_step_that_it_decodes_in() -> None:
    config = simulation(kv_tokens=4096)
    slo = SloClass(name="chat", ttft_s=1.0, tpot_s=0.1, max_lag_s=0.5)
    (found,) = needs_of(config, [SimRequest("a", 3.0, 100, 3, 3, slo)])
    # A step takes 10 ms, 0.1 ms for each request and each token of up to 1024, 0.5 us for each token that is read.
    lines = lines_below(config.profile, 1024)
    assert lines == [
        (0.0, pytest.approx((0.01 + 0.1024) / 1024)),
        (pytest.approx(0.0101), 0.0),
        (pytest.approx(0.01), pytest.approx(1e-4)),
    ]
    read = 101 + 102
    for (fixed_s, each_s), prompt_s, whole_s in zip(lines, found.prompt_s, found.whole_s, strict=True):
        assert prompt_s == pytest.approx(100 * each_s + 1e-4 + 1e-8 * 5050)
        assert whole_s == pytest.approx(prompt_s + 2 * (each_s + 1e-4) + read * (fixed_s / 4096 + 5e-7))
    assert found.decode_s == pytest.approx(2 * (0.01 + 2e-4) + read * 5e-7)
    assert (found.arrival_s, found.first_due_s, found.last_due_s) == (3.0, 4.0, pytest.approx(4.7))


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 1000)), min_size=1, max_size=8), st.integers(1, 2048))
def test_no_line_is_above_what_a_step_takes(points: list[tuple[int, int]], most: int) -> None:
    at, curve = 0, [(0.0, 0.0)]
    for width, rise in points:
        at += width
        curve.append((at, curve[-1][1] + rise / 1000))
    profile = replace(simulation().profile, tokens=Curve(curve))
    for fixed_s, each_s in lines_below(profile, most):
        assert fixed_s >= 0
        assert each_s >= 0
        for num in range(1, most + 1):
            assert fixed_s + num * each_s <= (profile.step_s + profile.tokens(num)) * (1 + 1e-9)


def test_without_a_reader_there_is_no_lag_and_without_a_tpot_no_end() -> None:
    whole = SloClass(name="whole", ttft_s=1.0, tpot_s=0.1, stream=False)
    batch = SloClass(name="batch", ttft_s=1.0, tpot_s=math.inf)
    load = [SimRequest("a", 0.0, 100, 3, 3, whole), SimRequest("b", 0.0, 100, 3, 3, batch)]
    found = needs_of(simulation(), load)
    assert [each.last_due_s for each in found] == [pytest.approx(1.2), math.inf]
    assert most_fluid(found) == 2


def test_of_those_that_share_an_interval_only_so_many_fit_and_the_small_ones_are_counted() -> None:
    assert most_fluid([need(0, 10, size) for size in (4, 4, 4)]) == 2
    assert most_fluid([need(0, 10, size) for size in (9, 2, 2, 2, 2, 2)]) == 5
    assert most_fluid([need(0, 10, 1, size) for size in (4, 4, 4)]) == 2


def test_intervals_apart_from_each_other_add_up() -> None:
    early, late = [need(0, 10, 6), need(0, 10, 6)], [need(20, 30, 6), need(20, 30, 6)]
    assert most_fluid(early + late) == 2


def test_what_is_too_much_for_the_engine_alone_is_fluid_in_no_schedule() -> None:
    assert most_fluid([need(0, 10, 11, prompt=11)]) == 0
    assert most_fluid([Need(0, 1, 2, (0,), (1,), decode_s=3, decode_due_s=2)]) == 0


def jobs(most: int) -> st.SearchStrategy[list[Need]]:
    job = st.tuples(st.integers(0, 20), st.integers(1, 12), st.integers(1, 6), st.integers(0, 6))
    return st.lists(job.map(lambda j: need(j[0], j[0] + j[1], j[2], j[3])), min_size=1, max_size=most)


def is_feasible(chosen: tuple[Need, ...], sizes: list[float]) -> bool:
    """Whether one machine that may change over at any time ends each by its deadline: earliest deadline first."""
    left = dict(enumerate(sizes))
    now = 0.0
    while left:
        here = [i for i in left if chosen[i].arrival_s <= now]
        if not here:
            now = min(chosen[i].arrival_s for i in left)
            continue
        i = min(here, key=lambda i: chosen[i].last_due_s)
        later = [chosen[j].arrival_s for j in left if chosen[j].arrival_s > now]
        ran = min(left[i], min(later, default=math.inf) - now)
        now += ran
        left[i] -= ran
        if left[i] <= 1e-9:
            if now > chosen[i].last_due_s + 1e-9:
                return False
            del left[i]
    return True


@settings(deadline=None)
@given(jobs(7))
def test_the_bound_is_never_below_what_a_machine_could_do(needs: list[Need]) -> None:
    best = max(
        num
        for num in range(len(needs) + 1)
        for chosen in combinations(needs, num)
        if is_feasible(chosen, [each.whole_s[0] for each in chosen])
        and is_feasible(chosen, [each.whole_s[1] for each in chosen])
    )
    assert best <= most_fluid(needs)


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=7))
def test_as_many_as_can_be_are_selected_where_all_come_at_once(sizes: list[tuple[int, int]]) -> None:
    needs = [need(0, due, size) for due, size in sizes]
    best = max(
        num
        for num in range(len(needs) + 1)
        for chosen in combinations(needs, num)
        if is_feasible(chosen, [each.whole_s[0] for each in chosen])
    )
    assert len(select(needs, 1.0)) == best


def overloaded(seed: int) -> tuple[SimConfig, list[SimRequest]]:
    rng = Random(seed)
    config = simulation(CHAT, rate=rng.choice([8.0, 16.0, 40.0]), requests=80, kv_tokens=rng.choice([1500, 3000]))
    return config, requests_of(config, config.rates[0], seed)


@pytest.mark.parametrize("seed", range(2))
def test_no_policy_keeps_more_fluid_than_the_bound_or_than_the_schedule_of_all(seed: int) -> None:
    config, load = overloaded(seed)
    found = offline(config, load)
    assert found.requests == len(load)
    for name in ("stock", "layerkv", "layerkv-no-slo"):
        fluid = sum(request.is_fluid for request in make_engine(config, name, load).run().requests)
        assert fluid <= found.bound
        if name != "layerkv-no-slo":
            assert fluid <= found.schedule
    assert found.schedule <= found.bound


def test_in_overload_those_selected_are_more_than_anybody_serves_who_takes_all() -> None:
    config = simulation(rate=40.0, requests=150)
    load = requests_of(config, 40.0, 0)
    online = max(
        sum(request.is_fluid for request in make_engine(config, name, load).run().requests)
        for name in ("stock", "layerkv")
    )
    assert offline_schedule(config, load) > 1.2 * online
    assert most_fluid(needs_of(config, load)) < len(load)
