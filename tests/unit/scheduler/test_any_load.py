"""Controller, policy and ledger together, over whole lives of requests: everybody is served, nothing promised twice.

What is checked after every step is in `tests/fakes/tiny_scheduler.py`.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerkv.scheduler.policy import PolicyLimits
from layerkv.sim.engine import SimRequest
from tests.fakes.tiny_scheduler import BLOCK_TOKENS, TinyScheduler, TinyStock, job, policy

POOL = 20
LONGEST = POOL * BLOCK_TOKENS
"""Tokens that the pool holds: vLLM's `max_model_len` is no more than that."""


@st.composite
def loads(draw: st.DrawFn) -> list[SimRequest]:
    jobs = []
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
        "slo_scheduling": st.sampled_from((True, True, False)),
        "length_prediction": st.sampled_from(("quantile", "none")),
        "adapt_host_share": st.booleans(),
    }
).map(lambda changes: policy(**changes))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
