"""Requests longer than the pool take turns in the zone, with each other and with prompts that need it.

What is checked after every step is in `tests/fakes/tiny_scheduler.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.policy import decide
from layerkv.scheduler.reasons import Event, Reason
from layerkv.scheduler.snapshot import LayeredRequest, ParkedRequest, Snapshot
from layerkv.sim.engine import SimRequest
from tests.fakes.snapshots import NOW_S, admitted, changed, cost, crowd, parked, prompt, resident, snapshot
from tests.fakes.tiny_scheduler import BLOCK_TOKENS, TinyScheduler, job, policy

POOL, ZONE = 20, 32
LONG = (POOL + 4) * BLOCK_TOKENS
"""A prompt that the pool does not hold; the zone holds one such request at a time."""
MEMORY: dict[str, Any] = {
    "pool_blocks": POOL,
    "zone_blocks": ZONE,
    "num_host_blocks": 400,
    "budget_tokens": 512,
    "long_contexts": True,
}


def mixed(num: int, **slo: Any) -> list[SimRequest]:
    """As many at once; every third one is longer than the pool."""
    return [job(f"r{i}", LONG if i % 3 == 1 else 100, 40, **slo) for i in range(num)]


@pytest.mark.parametrize("frees_are_deferred", [False, True])
def test_prompts_do_not_wait_for_requests_that_decode_in_the_zone(frees_are_deferred: bool) -> None:
    jobs = mixed(12, ttft_s=2.0)
    turns = TinyScheduler(jobs, **MEMORY, frees_are_deferred=frees_are_deferred).run(max_steps=5_000)
    held = TinyScheduler(jobs, **MEMORY, frees_are_deferred=frees_are_deferred, slo=policy(policy="slo"))
    by_mean = held.run(max_steps=5_000)
    last, last_by_mean = (max(r.ttft_s or 0.0 for r in outcome.requests) for outcome in (turns, by_mean))
    assert last < 0.7 * last_by_mean, "a request in the zone to its end holds up those behind it"
    assert turns.end_s <= 1.1 * by_mean.end_s, "a turn costs a step or two where frees are deferred"
    assert turns.preemptions == 0


def test_several_longer_than_the_pool_take_turns_by_what_their_readers_have() -> None:
    """Tokens are read more slowly than made, so both readers are served, and nobody leaves for less than a gain."""
    jobs = [job(f"r{i}", LONG, 100, tpot_s=0.2, ttft_s=5.0) for i in range(2)]
    scheduler = TinyScheduler(jobs, **MEMORY, keep_log=True)
    outcome = scheduler.run(max_steps=5_000)
    log = scheduler.controller.take_log()
    for r in outcome.requests:
        assert r.tally.reader.lag_s == pytest.approx(0.0, abs=0.05)
    assert 3 <= sum(r.num_parks for r in outcome.requests) <= 20
    events = [(entry.event, entry.reason) for entry in log if entry.event in (Event.PARKED, Event.BACK_IN_ZONE)]
    assert set(events) == {(Event.PARKED, Reason.ZONE_TURN_OVER), (Event.BACK_IN_ZONE, Reason.ZONE_TURN)}


def test_who_is_parked_keeps_the_host_blocks_of_tokens_to_come() -> None:
    """Two have room in host memory for one and a half: the second waits for the first, and neither for ever."""
    jobs = [job(f"r{i}", LONG, 60, i * 0.01) for i in range(2)]
    scheduler = TinyScheduler(jobs, **{**MEMORY, "num_host_blocks": 45})
    outcome = scheduler.run(max_steps=5_000)
    first, second = sorted(outcome.requests, key=lambda r: r.request_id)
    assert second.first_token_s > first.finish_s
    scheduler.check_is_empty()


def test_one_that_prompts_overtake_again_and_again_gets_its_slice() -> None:
    """Prompts that need the zone come without end, all on time; the long one ends before they do."""
    crowd = [job(f"p{i}", 300, 1, 0.2 + i * 0.04, ttft_s=0.6) for i in range(400)]
    long = job("long", LONG, 30, ttft_s=5.0, tpot_s=0.001)
    limits = PolicyLimits(max_overtakes=8)
    scheduler = TinyScheduler([long, *crowd], **{**MEMORY, "pool_blocks": 19}, limits=limits)
    outcome = scheduler.run(max_steps=20_000)
    ends = {r.request_id: r.finish_s for r in outcome.requests}
    assert ends["long"] < ends["p399"]


# Single decisions -----------------------------------------------------------------------------------------------------

LONGEST = 120
"""Blocks of a request that outgrows the pool of 100."""


def long_parked(name: str, **changes: Any) -> ParkedRequest:
    view = parked(name, NOW_S + 10, blocks=110, zone_blocks=LONGEST)
    return view._replace(**{"dry_s": NOW_S + 9, **changes})


def in_zone(name: str, **changes: Any) -> LayeredRequest:
    view = LayeredRequest(name, True, 110, 110, outgrows_pool=True, room_blocks=LONGEST, deadline_s=NOW_S + 10)
    return view._replace(**{"dry_s": NOW_S + 1, **changes})


def scene(**changes: Any) -> Snapshot:
    """A zone for one long request and a half; the pool is full of others."""
    sizes = {"zone_blocks": 180, "free_zone_blocks": 180, "host_blocks": 900, "free_host_blocks": 600}
    full = {"policy": "fluid", "long_contexts": True, "free_blocks": 5, "cost": cost(), **crowd(3)}
    return snapshot(**{**sizes, **full, **changes})


def back(s: Snapshot) -> list[str]:
    return [admission.request_id for admission in decide(s).back_to_zone]


def test_who_runs_dry_first_comes_back_first() -> None:
    parked_long = [long_parked("lost", deadline_s=NOW_S - 1), long_parked("a"), long_parked("b", dry_s=NOW_S + 2)]
    decision = decide(scene(parked_long=parked_long))
    assert [a.request_id for a in decision.back_to_zone] == ["b"]
    assert decision.reasons == {"b": Reason.ZONE_TURN}
    assert decision.waits == {"lost": Reason.ZONE_FULL, "a": Reason.ZONE_FULL}
    assert back(scene(parked_long=parked_long, free_slots=0)) == []


def test_a_prompt_takes_the_zone_of_who_has_had_a_slice() -> None:
    s = scene(free_zone_blocks=60, layered=[in_zone("r")], waiting=[prompt("w", 80, NOW_S + 5)])
    decision = decide(s)
    assert decision.reasons["r"] is Reason.ZONE_TURN_OVER
    assert admitted(decision) == [("w", True)]
    later = decide(changed(s, frees_are_deferred=True))
    assert later.park == ("r",)
    assert later.admit == ()
    assert decide(changed(s, frees_are_deferred=True, freeing_zone_blocks=110)).park == ()
    for stays in (in_zone("r", in_zone_s=0.1), in_zone("r", has_run=False), in_zone("r", rank=-1)):
        assert decide(changed(s, layered=[stays])).park == ()
    assert decide(changed(s, policy="slo")).park == ()


def test_a_late_prompt_takes_it_only_of_who_is_lost_or_has_enough_to_read() -> None:
    s = scene(free_zone_blocks=60, waiting=[prompt("w", 80, NOW_S - 5)])
    assert decide(changed(s, layered=[in_zone("r", dry_s=NOW_S + 0.4)])).park == ()
    for leaves in (in_zone("r"), in_zone("r", dry_s=NOW_S, deadline_s=NOW_S - 1)):
        assert decide(changed(s, layered=[leaves])).park == ("r",)


def test_a_reader_about_to_run_dry_takes_it_of_one_that_is_not() -> None:
    due = long_parked("p", dry_s=NOW_S + 0.02)
    s = scene(free_zone_blocks=60, parked_long=[due])
    decision = decide(changed(s, layered=[in_zone("r")]))
    assert decision.park == ("r",)
    assert [a.request_id for a in decision.back_to_zone] == ["p"]
    assert decide(changed(s, layered=[in_zone("r", dry_s=NOW_S + 0.1)])).park == ()
    later = decide(changed(s, layered=[in_zone("r")], frees_are_deferred=True))
    assert later.back_to_zone == ()
    assert later.room_for == ("p",)
    not_yet = changed(s, layered=[in_zone("r")], parked_long=[due._replace(dry_s=NOW_S + 3)])
    assert decide(not_yet).park == ()


def test_nobody_comes_back_while_a_prompt_is_to_have_the_zone_unless_it_can_wait_no_longer() -> None:
    waiting = [prompt("w", 170, NOW_S + 5)]
    s = scene(free_zone_blocks=130, layered=[LayeredRequest("prefills", False, 50, 50)], waiting=waiting)
    can_wait = long_parked("p")
    assert decide(changed(s, parked_long=[can_wait])).waits["p"] is Reason.BEHIND
    assert back(changed(s, parked_long=[can_wait])) == []
    assert back(changed(s, parked_long=[can_wait._replace(deadline_s=NOW_S + 0.05)])) == ["p"]
    assert back(changed(s, parked_long=[can_wait], promised={"p"})) == ["p"]
    assert back(changed(s, parked_long=[can_wait], overtaken={"p": PolicyLimits().max_overtakes})) == ["p"]
    assert back(changed(s, parked_long=[can_wait._replace(rank=-1)])) == ["p"]
    assert back(changed(s, parked_long=[can_wait._replace(rank=1, deadline_s=NOW_S + 0.05)])) == []
    assert back(changed(s, parked_long=[can_wait], free_host_blocks=10)) == ["p"], "the prompt waits for other things"


def test_no_prompt_takes_any_of_the_zone_before_one_that_can_wait_no_longer() -> None:
    overdue = {"p": PolicyLimits().max_overtakes}
    s = scene(free_zone_blocks=90, parked_long=[long_parked("p")], waiting=[prompt("w", 80, NOW_S + 5)])
    assert admitted(decide(s)) == [("w", True)]
    assert decide(s).overtaken == ()
    assert decide(changed(s, waiting=[prompt("w", 80, NOW_S + 15)])).overtaken == ("p",)
    decision = decide(changed(s, overtaken=overdue))
    assert decision.admit == ()
    assert decision.waits == {"p": Reason.ZONE_FULL, "w": Reason.BEHIND}


# Whole loads ----------------------------------------------------------------------------------------------------------


@st.composite
def loads(draw: st.DrawFn) -> list[SimRequest]:
    jobs = []
    ranks = draw(st.sampled_from(((0,), (0,), (0, 1))))
    for i in range(draw(st.integers(1, 8))):
        is_long = draw(st.booleans())
        num_prompt = draw(st.integers(250, 420) if is_long else st.integers(1, 200))
        max_tokens = draw(st.integers(1, min(80, ZONE * BLOCK_TOKENS - num_prompt)))
        jobs.append(
            job(
                f"r{i}",
                num_prompt,
                draw(st.integers(1, max_tokens)),
                draw(st.integers(0, 60)) * 0.01,
                max_tokens=max_tokens,
                rank=draw(st.sampled_from(ranks)),
                ttft_s=draw(st.sampled_from((0.05, 1.0, 20.0))),
                tpot_s=draw(st.sampled_from((0.005, 0.05, 0.3))),
                weight=draw(st.sampled_from((1.0, 4.0))),
            )
        )
    return jobs


engines = st.fixed_dictionaries(
    {
        "zone_blocks": st.sampled_from((ZONE, 48)),
        "num_host_blocks": st.sampled_from((ZONE, 50, 90, 300)),
        "budget_tokens": st.sampled_from((16, 64, 512)),
        "slots": st.sampled_from((1, 3, 16)),
        "frees_are_deferred": st.booleans(),
        "stride": st.sampled_from((1, 1, 4)),
        "is_measured": st.booleans(),
    }
)
policies = st.fixed_dictionaries(
    {
        "streamed_decode": st.booleans(),
        "policy": st.sampled_from(("fluid", "fluid", "fluid", "slo", "arrival")),
        "length_prediction": st.sampled_from(("quantile", "none")),
    }
).map(lambda changes: policy(**changes))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(loads(), engines, policies)
def test_every_load_is_served_though_some_of_it_is_longer_than_the_pool(
    jobs: list[SimRequest], engine: dict[str, Any], slo: Any
) -> None:
    limits = PolicyLimits(max_overtakes=8, min_prefill_tokens=16)
    scheduler = TinyScheduler(jobs, pool_blocks=POOL, long_contexts=True, limits=limits, slo=slo, **engine)
    outcome = scheduler.run(max_steps=20_000)
    assert not scheduler.refused
    assert {r.request_id: r.output_tokens for r in outcome.requests} == {r.request_id: r.output_tokens for r in jobs}
    scheduler.check_is_empty()


def test_one_that_is_due_takes_the_slot_that_a_stream_lends() -> None:
    """Else it, and with it every prompt that needs the zone, would wait until somebody ends."""
    rich = resident("rich", NOW_S + 10, dry_s=NOW_S + 9, can_park=False, can_pause=True)
    due = long_parked("due", dry_s=NOW_S, deadline_s=NOW_S + 0.01)
    s = scene(free_slots=0, resident=[rich], num_resident=1, parked_long=[due], waiting=[prompt("p")])
    decision = decide(s)
    assert back(s) == ["due"]
    assert "rich" in decision.pause
    later = due._replace(dry_s=NOW_S + 9, deadline_s=NOW_S + 10)
    assert not back(changed(s, parked_long=[later]))
