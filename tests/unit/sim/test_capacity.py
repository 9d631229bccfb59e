"""The search for the highest fluid rate, on made-up answers and on a small simulation."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from layerkv.config import SloClass, SloPolicy
from layerkv.sim.capacity import (
    FLUID_SHARE,
    MOST_DOUBLINGS,
    MOST_REQUESTS,
    RUNGS_PER_DOUBLING,
    capacity_report,
    find_capacity,
    fluid_share,
    highest_rung,
    num_requests_of,
    rate_of,
)
from tests.unit.sim.test_run import simulation

TOP = MOST_DOUBLINGS * RUNGS_PER_DOUBLING


@pytest.mark.parametrize("last", range(-TOP, TOP, 5))
def test_the_search_finds_the_last_fluid_rung_wherever_it_is_in_few_runs(last: int) -> None:
    tried: list[int] = []

    def is_fluid(rung: int) -> bool:
        tried.append(rung)
        return rung <= last

    assert highest_rung(is_fluid) == last
    assert len(tried) <= 1 + MOST_DOUBLINGS + 4


def test_a_load_that_is_always_fluid_ends_at_the_highest_rung_and_one_that_never_is_at_none() -> None:
    assert highest_rung(lambda rung: True) == TOP
    assert highest_rung(lambda rung: False) is None


def test_of_several_stretches_of_fluid_rates_the_end_of_one_is_found() -> None:
    fluid = {*range(-20, 5), *range(9, 12), *range(40, 44)}
    found = highest_rung(fluid.__contains__)
    assert found in fluid
    assert found + 1 not in fluid


def test_rungs_are_five_per_cent_apart_and_the_first_is_the_rate_itself() -> None:
    assert rate_of(0.123456, 0) == 0.123456
    assert rate_of(2.5, RUNGS_PER_DOUBLING) == 5.0
    assert rate_of(2.5, 1) / 2.5 == pytest.approx(1.05, abs=0.002)


def test_capacity_is_a_fluid_rate_and_the_next_rung_is_not() -> None:
    config = simulation(requests=80, rates=(1.0, 4.0, 9.0))
    found = find_capacity(config, ("stock", "oracle"))
    for name, rate in found.rates.items():
        assert found.shares[rate][name] >= FLUID_SHARE
        above = [shares[name] for each, shares in found.shares.items() if each > rate and name in shares]
        assert above[0] < FLUID_SHARE
    assert found.rates["stock"] < found.rates["oracle"]
    assert 4.0 in found.shares  # where it began
    report = json.loads(json.dumps(capacity_report(config, found), allow_nan=False))
    assert report["schema"] == 1
    assert report["fluid_capacity_rps"] == found.rates
    assert [row["rate"] for row in report["rates"]] == sorted(found.shares)


def test_a_load_that_no_rate_makes_fluid_has_a_capacity_of_nothing() -> None:
    config = simulation(requests=5)
    hopeless = SloClass(name="chat", ttft_s=1e-6, tpot_s=1.0)
    config = replace(config, policy=SloPolicy(classes={"chat": hopeless}, default_class="chat"))
    found = find_capacity(config, ("stock",))
    assert found.rates == {"stock": 0.0}


def test_the_share_at_a_rate_is_the_median_over_the_seeds() -> None:
    config = simulation(requests=60, seeds=(0, 1, 2))
    each = [fluid_share(replace(config, seeds=(seed,)), "stock", 6.0) for seed in config.seeds]
    assert len(set(each)) > 1
    assert fluid_share(config, "stock", 6.0) == sorted(each)[1]


def test_a_long_load_is_cut() -> None:
    assert num_requests_of(simulation(requests=100_000)) == MOST_REQUESTS
    assert num_requests_of(simulation(requests=30)) == 30
