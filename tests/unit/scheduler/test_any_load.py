"""Policy and ledger together, over whole lives of requests: everybody is served, and nothing is promised twice."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerkv.scheduler.policy import PolicyLimits
from tests.fakes.tiny_scheduler import BLOCK_TOKENS, Job, TinyScheduler

POOL = 20
LONGEST = POOL * BLOCK_TOKENS
"""Tokens that the pool holds: vLLM's `max_model_len` is no more than that."""


@st.composite
def loads(draw: st.DrawFn) -> list[Job]:
    jobs = []
    for i in range(draw(st.integers(1, 9))):
        num_prompt = draw(st.integers(1, 260))
        jobs.append(
            Job(
                f"r{i}",
                num_prompt,
                draw(st.integers(1, min(60, LONGEST - num_prompt))),
                arrival_step=draw(st.integers(0, 30)),
                ttft_s=draw(st.sampled_from((0.05, 1.0, 20.0))),
                tpot_s=draw(st.sampled_from((0.005, 0.05))),
                can_layer=draw(st.integers(0, 4)) > 0,
            )
        )
    return jobs


def steps_one_by_one(jobs: list[Job]) -> int:
    """Steps if each ran alone, 16 prompt tokens at a time."""
    return sum(job.arrival_step + job.num_prompt // 16 + job.num_output + 10 for job in jobs)


engines = st.fixed_dictionaries(
    {
        "zone_blocks": st.sampled_from((0, 2, 8, 24)),
        "num_host_blocks": st.sampled_from((0, 6, 20, 100)),
        "budget_tokens": st.sampled_from((16, 64, 512)),
        "slots": st.sampled_from((1, 3, 16)),
        "mode": st.sampled_from(("auto", "auto", "resident", "layered")),
        "streamed_decode": st.booleans(),
        "frees_are_deferred": st.booleans(),
    }
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(loads(), engines)
def test_every_load_is_served_whatever_the_memory(jobs: list[Job], engine: dict[str, Any]) -> None:
    limits = PolicyLimits(max_overtakes=8, min_prefill_tokens=16)
    scheduler = TinyScheduler(jobs, pool_blocks=POOL, limits=limits, **engine)
    scheduler.run(max_steps=3 * steps_one_by_one(jobs) + 200)
    assert not scheduler.refused
    assert set(scheduler.finished_at) == {job.name for job in jobs}


def crowd(num_jobs: int, num_prompt: int = 160, num_output: int = 64, **changes: Any) -> list[Job]:
    return [Job(f"r{i}", num_prompt, num_output, arrival_step=i, **changes) for i in range(num_jobs)]


def test_first_tokens_come_as_fast_as_prefill_allows_though_the_pool_holds_one_request() -> None:
    """The point of it all: twelve prompts that fill the pool one at a time, each with 64 tokens to decode."""
    layerkv = TinyScheduler(crowd(12), zone_blocks=24, num_host_blocks=300, budget_tokens=256)
    layerkv.run(max_steps=5_000)
    stock = TinyScheduler(crowd(12), mode="resident", zone_blocks=24, num_host_blocks=300, budget_tokens=256)
    stock.run(max_steps=5_000)
    assert max(layerkv.served_at.values()) < 40
    assert max(stock.served_at.values()) > 10 * max(layerkv.served_at.values())
    assert layerkv.num_recomputes == 0
    assert max(layerkv.finished_at.values()) < 1.1 * max(stock.finished_at.values())


def test_residents_are_parked_instead_of_computed_again() -> None:
    """Four prompts fit together, their outputs do not."""
    jobs = crowd(4, num_prompt=64, num_output=100)
    with_host = TinyScheduler(jobs, mode="resident", limits=PolicyLimits(headroom_tokens=0))
    with_host.run(max_steps=5_000)
    without_host = TinyScheduler(jobs, mode="resident", num_host_blocks=0, limits=PolicyLimits(headroom_tokens=0))
    without_host.run(max_steps=5_000)
    assert with_host.num_recomputes == 0
    assert with_host.ledger.counters.parks > 0
    assert without_host.num_recomputes > 0
    assert without_host.ledger.counters.parks == 0


def test_headroom_keeps_requests_from_coming_and_going() -> None:
    jobs = crowd(10, num_prompt=60, num_output=120)
    parks = {}
    for headroom_tokens in (0, 32):
        scheduler = TinyScheduler(jobs, num_host_blocks=200, limits=PolicyLimits(headroom_tokens=headroom_tokens))
        scheduler.run(max_steps=20_000)
        parks[headroom_tokens] = scheduler.ledger.counters.parks
    assert parks[32] < parks[0]
    assert parks[32] <= 2 * len(jobs), "each is parked after its first token, and hardly ever again"


@pytest.mark.parametrize("mode", ["auto", "layered", "resident"])
def test_a_large_request_is_served_among_small_ones_that_never_end(mode: str) -> None:
    large = Job("large", 290, 5, arrival_step=5, can_layer=False, ttft_s=1.0)
    small = [Job(f"s{i}", 30, 8, arrival_step=i, ttft_s=0.02) for i in range(900)]
    scheduler = TinyScheduler([large, *small], mode=mode, num_host_blocks=200, limits=PolicyLimits(max_overtakes=10))
    while "large" not in scheduler.served_at:
        assert scheduler.step < 800, "the large request starves"
        scheduler.one_step()


def test_a_prompt_gets_through_the_zone_while_earlier_ones_wait_for_the_pool() -> None:
    jobs = [Job("running", 300, 19), Job("long", 290, 5, arrival_step=8, can_layer=False), Job("short", 40, 5, 9)]
    scheduler = TinyScheduler(jobs)
    scheduler.run(max_steps=500)
    assert scheduler.served_at["short"] <= 11
    assert scheduler.served_at["long"] >= scheduler.finished_at["running"]
