"""Prompts that only the pool can take, where others run layered: not later than first come, first served has them."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from layerkv.scheduler.fluid import LEAST_SLICE_S
from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.policy import decide
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.snapshot import Snapshot
from layerkv.sim.engine import SimRequest
from layerkv.sim.outcome import SimOutcome
from tests.fakes.snapshots import NOW_S, POOL, cost, parked, prompt, resident, snapshot
from tests.fakes.tiny_scheduler import BLOCK_TOKENS, TinyScheduler, TinyStock, job, policy

POOL_BLOCKS, ZONE_BLOCKS = 40, 8
LONG_TOKENS = 2 * ZONE_BLOCKS * BLOCK_TOKENS
TTFT_S = 1.0


def state(**changes: Any) -> Snapshot:
    """A pool without a free block, whose resident has had its slice, and streams that are due."""
    residents = [resident(f"r{i}", dry_s=NOW_S, tpot_s=1.0, tokens_left=500, resident_s=10.0) for i in range(3)]
    full = {"policy": "fluid", "cost": cost(), "free_blocks": 0, "resident": residents, "num_resident": 3}
    return snapshot(**{**full, "parked": [parked("due", dry_s=NOW_S)], "can_store_ahead": False, **changes})


def waiting(ticket_blocks: float, **changes: Any) -> Any:
    return prompt("long", 12, NOW_S + 5.0, can_layer=False, ticket_blocks=ticket_blocks, **changes)


def test_it_takes_the_place_of_whoever_has_had_a_slice_when_by_arrival_it_would_be_there() -> None:
    turn = 30 + POOL + 10  # gone, in the pool, parked
    d = decide(state(waiting=[waiting(turn)], gone_blocks=30))
    assert d.park[:2] == ("r0", "r1")
    assert [a.request_id for a in d.admit] == ["long"]
    d = decide(state(waiting=[waiting(turn + 1)], gone_blocks=30))
    assert d.waits["long"] is Reason.POOL_FULL
    assert not d.admit


def test_until_it_has_its_blocks_nobody_else_gets_any() -> None:
    residents = [resident("r", dry_s=NOW_S, tpot_s=1.0, tokens_left=500, resident_s=0.0)]  # within its slice
    full = {"free_blocks": 12, "resident": residents, "num_resident": 1}
    assert decide(state(waiting=[waiting(POOL + 100)], **full)).fetch == ("due",)
    d = decide(state(waiting=[waiting(POOL)], **full))
    assert (d.park, d.fetch) == ((), ())
    assert d.waits == {"long": Reason.POOL_FULL, "due": Reason.BEHIND_OVERDUE}


def test_first_tokens_through_the_zone_go_on_meanwhile() -> None:
    short = prompt("short", 2, NOW_S + 5.0, ticket_blocks=POOL + 200)
    d = decide(state(waiting=[waiting(POOL), short], resident=[], num_resident=1, free_blocks=12))
    assert [(a.request_id, a.layered) for a in d.admit] == [("short", True)]


def test_it_is_computed_before_others_though_it_is_late() -> None:
    late = waiting(POOL)._replace(deadline_s=NOW_S - 1.0)
    others = [prompt(f"p{i}", 8, NOW_S + 5.0) for i in range(10)]
    d = decide(state(waiting=[*others, late], free_blocks=POOL, resident=[], num_resident=0, parked=[]))
    assert d.admit[0].request_id == "long"


def test_where_nobody_runs_layered_objectives_alone_decide() -> None:
    for none in ({"zone_blocks": 0}, {"host_blocks": 0}):
        s = state(waiting=[waiting(POOL)], **none)
        assert decide(s).waits["long"] is Reason.POOL_FULL, none


@st.composite
def loads(draw: st.DrawFn) -> list[SimRequest]:
    """Up to three times what the engine can serve, for a while; some prompts are longer than the zone."""
    every_s = draw(st.sampled_from((0.03, 0.06, 0.12)))
    return [
        job(
            f"r{i}",
            LONG_TOKENS if draw(st.integers(0, 5)) == 0 else draw(st.integers(16, ZONE_BLOCKS * BLOCK_TOKENS)),
            draw(st.integers(10, 60)),
            i * every_s,
            ttft_s=TTFT_S,
            tpot_s=0.2,
        )
        for i in range(draw(st.integers(20, 50)))
    ]


def first_tokens(outcome: SimOutcome) -> dict[str, float]:
    return {r.request_id: r.ttft_s or 0.0 for r in outcome.requests if r.prompt_tokens == LONG_TOKENS}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(loads(), st.booleans())
def test_its_first_token_is_not_later_than_stocks_by_more_than_two_slices(
    jobs: list[SimRequest], frees_are_deferred: bool
) -> None:
    memory = {"pool_blocks": POOL_BLOCKS, "num_host_blocks": 400, "budget_tokens": 256, "slots": 64}
    layerkv = TinyScheduler(
        jobs, slo=policy(), zone_blocks=ZONE_BLOCKS, frees_are_deferred=frees_are_deferred, **memory
    )
    mine = first_tokens(layerkv.run(max_steps=20_000))
    stock = first_tokens(TinyStock(jobs, **memory).run(max_steps=20_000))
    for name, ttft_s in stock.items():
        assert mine[name] <= ttft_s + 2 * LEAST_SLICE_S, name


@st.composite
def crowds(draw: st.DrawFn) -> list[SimRequest]:
    """Short prompts in such numbers that more are parked than a decision looks at; one in 16 only the pool takes."""
    every_s = draw(st.sampled_from((0.005, 0.01, 0.03)))
    num_output = draw(st.integers(20, 50))
    return [
        job(
            f"r{i}",
            LONG_TOKENS if i % 16 == 15 else draw(st.integers(8, 64)),
            num_output,
            i * every_s,
            ttft_s=TTFT_S,
            tpot_s=0.2,
        )
        for i in range(112)
    ]


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(crowds())
def test_nor_while_more_are_parked_than_a_decision_looks_at(jobs: list[SimRequest]) -> None:
    memory = {"pool_blocks": POOL_BLOCKS, "num_host_blocks": 4000, "budget_tokens": 256, "slots": 256}
    layerkv = TinyScheduler(jobs, slo=policy(), zone_blocks=ZONE_BLOCKS, **memory)
    most_parked = 0
    while layerkv.to_come or layerkv.num_under_way:
        assert layerkv.step < 20_000
        layerkv.advance()
        most_parked = max(most_parked, layerkv.controller.num_parked)
    assume(most_parked > PolicyLimits().scan_parked)
    mine = first_tokens(layerkv.outcome())
    for name, ttft_s in first_tokens(TinyStock(jobs, **memory).run(max_steps=20_000)).items():
        assert mine[name] <= ttft_s + 2 * LEAST_SLICE_S, name
