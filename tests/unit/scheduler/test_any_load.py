"""Controller, policy and ledger together, over whole lives of requests: everybody is served, nothing promised twice.

What is checked after every step is in `tests/fakes/tiny_scheduler.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.reasons import Event, LogEntry, Reason
from layerkv.sim.engine import SimRequest
from tests.fakes.tiny_scheduler import BLOCK_TOKENS, TinyScheduler, TinyStock, job, policy, profile

POOL = 20
LONGEST = POOL * BLOCK_TOKENS
"""Tokens that the pool holds: vLLM's `max_model_len` is no more than that."""


@st.composite
def loads(draw: st.DrawFn) -> list[SimRequest]:
    jobs = []
    ranks = draw(st.sampled_from(((0,), (0,), (0, 1, 100))))
    for i in range(draw(st.integers(1, 9))):
        num_prompt = draw(st.integers(1, 260))
        max_tokens = draw(st.integers(1, min(60, LONGEST - num_prompt)))
        jobs.append(
            job(
                f"r{i}",
                num_prompt,
                draw(st.integers(1, max_tokens)),
                draw(st.integers(0, 30)) * 0.01,
                max_tokens=max_tokens,
                can_layer=draw(st.integers(0, 4)) > 0,
                rank=draw(st.sampled_from(ranks)),
                name=draw(st.sampled_from(("chat", "batch"))),
                ttft_s=draw(st.sampled_from((0.05, 1.0, 20.0))),
                tpot_s=draw(st.sampled_from((0.005, 0.05))),
                weight=draw(st.sampled_from((1.0, 1.0, 4.0))),
                max_stall_s=draw(st.sampled_from((None, None, 0.1))),
            )
        )
    return jobs


def steps_one_by_one(jobs: list[SimRequest]) -> int:
    """Steps if each ran alone, 16 prompt tokens at a time."""
    return sum(30 + r.prompt_tokens // 16 + r.output_tokens + 10 for r in jobs)


engines = st.fixed_dictionaries(
    {
        "zone_blocks": st.sampled_from((0, 2, 8, 24)),
        "num_host_blocks": st.sampled_from((0, 6, 20, 100)),
        "budget_tokens": st.sampled_from((16, 64, 512)),
        "slots": st.sampled_from((1, 3, 16)),
        "mode": st.sampled_from(("auto", "auto", "resident", "layered")),
        "frees_are_deferred": st.booleans(),
        "stride": st.sampled_from((1, 1, 4)),
        "is_measured": st.booleans(),
    }
)
policies = st.fixed_dictionaries(
    {
        "streamed_decode": st.booleans(),
        "policy": st.sampled_from(("fluid", "fluid", "slo", "arrival")),
        "length_prediction": st.sampled_from(("quantile", "none")),
    }
).map(lambda changes: policy(**changes))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(loads(), engines, policies)
def test_every_load_is_served_whatever_the_memory(jobs: list[SimRequest], engine: dict[str, Any], slo: Any) -> None:
    limits = PolicyLimits(max_overtakes=8, min_prefill_tokens=16)
    scheduler = TinyScheduler(jobs, pool_blocks=POOL, limits=limits, slo=slo, **engine)
    outcome = scheduler.run(max_steps=6 * steps_one_by_one(jobs) + 200)
    assert not scheduler.refused
    assert {r.request_id: r.output_tokens for r in outcome.requests} == {r.request_id: r.output_tokens for r in jobs}
    assert all(r.arrival_s < r.first_token_s <= r.finish_s for r in outcome.requests)
    scheduler.check_is_empty()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(loads(), engines)
def test_the_stock_engine_serves_every_load_too_and_makes_the_same_tokens(
    jobs: list[SimRequest], engine: dict[str, Any]
) -> None:
    names = ("budget_tokens", "slots", "frees_are_deferred")
    outcome = TinyStock(jobs, pool_blocks=POOL, **{name: engine[name] for name in names}).run(max_steps=50_000)
    assert {r.request_id: r.output_tokens for r in outcome.requests} == {r.request_id: r.output_tokens for r in jobs}
    assert all(r.arrival_s < r.first_token_s <= r.finish_s for r in outcome.requests)
    assert sum(r.num_recomputes for r in outcome.requests) == outcome.preemptions
    assert outcome.gaps.num == sum(r.output_tokens - 1 for r in jobs)


def crowd(num_jobs: int, num_prompt: int = 160, num_output: int = 64, **changes: Any) -> list[SimRequest]:
    return [job(f"r{i}", num_prompt, num_output, i * 0.01, **changes) for i in range(num_jobs)]


def test_first_tokens_come_as_fast_as_prefill_allows_though_the_pool_holds_one_request() -> None:
    """The point of it all: twelve prompts that fill the pool one at a time, each with 64 tokens to decode."""
    memory = {"num_host_blocks": 300, "budget_tokens": 256}
    layerkv = TinyScheduler(crowd(12, ttft_s=2.0), zone_blocks=24, **memory)
    layered = layerkv.run(max_steps=5_000)
    stock = TinyStock(crowd(12, ttft_s=2.0), **memory).run(max_steps=5_000)
    slowest, stocks_slowest = (max(r.ttft_s or 0.0 for r in outcome.requests) for outcome in (layered, stock))
    assert stocks_slowest > 5 * slowest
    assert layered.preemptions == 0
    assert layered.end_s < 1.2 * stock.end_s


def test_stock_preempts_where_residents_are_parked_instead() -> None:
    """Four prompts fit together, their outputs do not."""
    jobs = crowd(4, num_prompt=64, num_output=100)
    limits = PolicyLimits(headroom_tokens=0)
    short = [replace(r, max_tokens=10) for r in jobs]  # so that no forecast keeps anybody out
    parking = TinyScheduler(short, mode="resident", limits=limits).run(max_steps=5_000)
    without_host = TinyScheduler(short, mode="resident", num_host_blocks=0, limits=limits).run(max_steps=5_000)
    stock = TinyStock(jobs).run(max_steps=5_000)
    assert (parking.parks > 0, parking.preemptions) == (True, 0)
    assert (without_host.parks, without_host.preemptions > 0) == (0, True)
    assert (stock.parks, stock.preemptions > 0) == (0, True)
    assert {r.output_tokens for outcome in (parking, without_host, stock) for r in outcome.requests} == {100}


def test_who_is_computed_again_where_copies_are_dear_is_counted_as_such() -> None:
    jobs = [replace(r, max_tokens=10) for r in crowd(4, num_prompt=64, num_output=100)]
    dear = TinyScheduler(
        jobs, mode="resident", limits=PolicyLimits(headroom_tokens=0, rescue_steps=0), costs=profile(block_copy_s=0.05)
    ).run(max_steps=5_000)
    assert (dear.parks, dear.preemptions > 0) == (0, True)
    assert dear.reasons[Reason.RECOMPUTE_CHEAPER] == dear.preemptions == sum(r.num_recomputes for r in dear.requests)


def test_only_classes_that_ask_for_it_are_refused() -> None:
    """Thirty prompts at once, each of which takes 26 ms of the second that they all have."""
    jobs = [job(f"r{i}", 256, 5, ttft_s=0.3, overload="reject" if i % 2 else "queue", max_tokens=5) for i in range(30)]
    scheduler = TinyScheduler(jobs, num_host_blocks=300, budget_tokens=512)
    outcome = scheduler.run(max_steps=5_000)
    assert scheduler.refused
    assert all(int(name[1:]) % 2 for name in scheduler.refused)
    assert outcome.figures()["refused"] == len(scheduler.refused) == outcome.reasons[Reason.OVERLOAD] / 2
    assert {r.output_tokens for r in outcome.requests if r.request_id not in scheduler.refused} == {5}
    scheduler.check_is_empty()


@pytest.mark.parametrize("mode", ["auto", "layered", "resident"])
@pytest.mark.parametrize("slots", [1, 16])
@pytest.mark.parametrize(
    "large", [{"can_layer": False, "ttft_s": 1.0}, {"can_layer": False, "ttft_s": 0.001}, {"ttft_s": 0.001}]
)
def test_a_large_request_is_served_among_small_ones_that_never_end(
    mode: str, slots: int, large: dict[str, Any]
) -> None:
    """It cannot run layered, or cannot be on time, or both; the others can."""
    jobs = [job("large", 280, 5, 0.05, **large)]
    jobs += [job(f"s{i}", 30, 8, i * 0.015, ttft_s=1e4, can_layer=i % 3 > 0) for i in range(2_000)]
    scheduler = TinyScheduler(jobs, mode=mode, num_host_blocks=200, slots=slots, limits=PolicyLimits(max_overtakes=10))
    while "large" not in scheduler.first_tokens:
        assert len(scheduler.outcomes) < 200, "the large request starves"
        scheduler.advance()


def test_a_prompt_gets_through_the_zone_while_earlier_ones_wait_for_the_pool() -> None:
    jobs = [job("running", 300, 19), job("long", 290, 5, 0.08, can_layer=False), job("short", 40, 5, 0.09)]
    scheduler = TinyScheduler(jobs)
    scheduler.run(max_steps=500)
    assert scheduler.first_tokens["short"] < 0.2
    assert scheduler.first_tokens["long"] >= scheduler.finished["running"]


@pytest.mark.parametrize("frees_are_deferred", [False, True])
def test_a_lone_request_is_served_though_every_step_leaves_nothing_to_compute(frees_are_deferred: bool) -> None:
    """Regression: parked after its first token it left a step empty, and the clock had nothing to wait for."""
    outcome = TinyScheduler([job("a", 20, 3)], mode="layered", frees_are_deferred=frees_are_deferred).run(100)
    assert (outcome.parks, outcome.fetches, outcome.requests[0].output_tokens) == (1, 1, 3)


def test_the_decision_log_tells_each_life_from_arrival_to_end() -> None:
    scheduler = TinyScheduler(crowd(6), keep_log=True, num_host_blocks=100)
    scheduler.run(max_steps=5_000)
    log = scheduler.controller.take_log()
    assert [entry.time_s for entry in log] == sorted(entry.time_s for entry in log)
    for name in (f"r{i}" for i in range(6)):
        events = [entry.event for entry in log if entry.request_id == name]
        assert (events[0], events[-1]) == (Event.ARRIVED, Event.FINISHED)
        assert events.count(Event.FIRST_TOKEN) == 1
        assert events.count(Event.PARKED) == events.count(Event.FETCHED)


def test_the_facts_in_the_decision_log_are_those_that_its_documentation_names() -> None:
    """Some are refused, and some wait in mid-stream: the pool holds one at a time, and each is read as fast as it is
    made."""
    jobs = [job(f"r{i}", 256, 30, ttft_s=0.3, tpot_s=0.01, overload="reject") for i in range(30)]
    scheduler = TinyScheduler(jobs, keep_log=True, num_host_blocks=300, budget_tokens=512, zone_blocks=24)
    scheduler.run(max_steps=5_000)
    assert scheduler.refused
    named = set(re.findall(r"``(\w+)``", (LogEntry.__doc__ or "").split("facts: ")[1]))
    assert {fact for entry in scheduler.controller.take_log() for fact in entry.facts} == named
