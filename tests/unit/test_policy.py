"""The policy, by its promises: who comes first, who gets the pool, who must leave, and that nobody starves."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.scheduler.policy import PolicyLimits, decide
from layerkv.scheduler.snapshot import (
    Decision,
    LayeredRequest,
    ParkedRequest,
    PrefixHit,
    ResidentRequest,
    Snapshot,
    WaitingRequest,
)

BLOCK = 32


def snapshot(**changes: Any) -> Snapshot:
    """An idle engine with room for everything."""
    return replace(
        Snapshot(
            now_s=100.0,
            mode="auto",
            streamed_decode=False,
            block_tokens=BLOCK,
            pool_blocks=100,
            free_blocks=100,
            growth_blocks=0,
            reserved_blocks=0,
            zone_blocks=40,
            free_zone_blocks=40,
            host_blocks=500,
            free_host_blocks=500,
            free_slots=16,
            budget_tokens=2048,
        ),
        **changes,
    )


def prompt(name: str, blocks: int = 10, deadline_s: float = 101.0, **changes: Any) -> WaitingRequest:
    return WaitingRequest(name, deadline_s, blocks * BLOCK, blocks, **changes)


def admitted(decision: Decision) -> list[tuple[str, bool]]:
    return [(admission.request_id, admission.layered) for admission in decision.admit]


def test_a_prompt_runs_resident_when_everything_fits() -> None:
    assert admitted(decide(snapshot(waiting=[prompt("a")]))) == [("a", False)]


def test_a_prompt_runs_layered_when_the_pool_is_full() -> None:
    assert admitted(decide(snapshot(waiting=[prompt("a")], free_blocks=3, num_resident=4))) == [("a", True)]


def test_prompts_start_in_the_order_given_and_the_zone_is_not_overtaken() -> None:
    waiting = [prompt("big", 35), prompt("next", 30), prompt("small", 2)]
    assert admitted(decide(snapshot(waiting=waiting, free_blocks=0, num_resident=4))) == [("big", True)]


def test_a_short_prompt_is_not_stuck_behind_one_that_only_the_pool_can_hold() -> None:
    waiting = [prompt("huge", 60), prompt("short", 2)]
    assert admitted(decide(snapshot(waiting=waiting, free_blocks=1, num_resident=4))) == [("short", True)]


def test_prefix_hits_count_for_what_they_are() -> None:
    s = snapshot(waiting=[prompt("a", 50)], free_blocks=8, num_resident=2, hits={"a": PrefixHit(20, 5)})
    decision = decide(s)
    assert decision.admit[0].layered
    assert decision.admit[0].zone_blocks == 30


def test_prefill_fits_the_smallest_decode_slack_but_never_stops() -> None:
    slack = snapshot(decode_slack_s=0.1, prefill_s_per_token=0.0001)
    assert decide(slack).prefill_tokens == 1000
    assert decide(replace(slack, decode_slack_s=-5.0)).prefill_tokens == PolicyLimits().min_prefill_tokens
    assert decide(replace(slack, decode_slack_s=float("inf"), decode_tokens=48)).prefill_tokens == 2000


def test_a_layered_prompt_is_not_begun_with_a_small_rest_of_the_budget() -> None:
    s = snapshot(waiting=[prompt("a", 30)], free_blocks=0, num_resident=4, prefilling_tokens=1500)
    assert admitted(decide(s)) == []


def test_layered_requests_leave_the_zone_after_their_first_token() -> None:
    layered = [
        LayeredRequest("done", prefill_done=True, num_blocks=5),
        LayeredRequest("on", prefill_done=False, num_blocks=5),
    ]
    assert decide(snapshot(layered=layered)).park == ("done",)


def test_their_zone_blocks_serve_the_next_prompt_in_the_same_step_unless_frees_are_deferred() -> None:
    layered = [LayeredRequest("done", prefill_done=True, num_blocks=30, num_zone_blocks=30)]
    s = snapshot(layered=layered, waiting=[prompt("a", 20)], free_blocks=0, free_zone_blocks=10, num_resident=3)
    assert admitted(decide(s)) == [("a", True)]
    assert admitted(decide(replace(s, frees_are_deferred=True))) == []


def test_streamed_decode_goes_on_until_pool_or_waiting_prompts_speak_against_it() -> None:
    layered = [LayeredRequest("r", prefill_done=True, num_blocks=5, num_zone_blocks=5)]
    s = snapshot(streamed_decode=True, layered=layered, free_blocks=2, num_resident=3, free_zone_blocks=10)
    assert decide(s).park == ()
    assert decide(replace(s, free_blocks=50)).park == ("r",)
    assert decide(replace(s, waiting=[prompt("a", 20)])).park == ("r",)
    needy = replace(layered[0], needs_host_block=True)
    assert decide(replace(s, layered=[needy], free_host_blocks=0)).park == ("r",)


def resident(name: str, deadline_s: float, **changes: Any) -> ResidentRequest:
    return replace(ResidentRequest(name, deadline_s, num_blocks=10, steps_resident=100), **changes)


def test_the_resident_with_most_laxity_is_parked_first_and_the_fresh_ones_last() -> None:
    residents = [resident("late", 99.0), resident("ahead", 140.0), resident("fresh", 200.0, steps_resident=1)]
    s = snapshot(free_blocks=0, growth_blocks=3, num_resident=3, resident=residents)
    assert decide(s).park == ("ahead",)
    assert decide(replace(s, growth_blocks=15)).park == ("ahead", "late")


def test_less_weight_is_parked_before_more_laxity() -> None:
    residents = [resident("vip", 200.0, weight=4), resident("batch", 101.0, weight=1)]
    assert decide(snapshot(free_blocks=0, growth_blocks=1, num_resident=2, resident=residents)).park == ("batch",)


def test_nobody_is_parked_without_host_memory() -> None:
    s = snapshot(
        free_blocks=0,
        growth_blocks=1,
        num_resident=2,
        free_host_blocks=4,
        resident=[resident("a", 1), resident("b", 2)],
    )
    assert decide(s).park == ()


def test_a_step_that_parks_for_room_fetches_nobody() -> None:
    s = snapshot(
        free_blocks=1,
        growth_blocks=2,
        num_resident=2,
        resident=[resident("a", 1), resident("b", 2)],
        parked=[ParkedRequest("p", 90.0, 1)],
    )
    assert decide(s).park
    assert decide(s).fetch == ()


def test_fetches_go_by_deadline_and_keep_headroom() -> None:
    parked = [ParkedRequest("urgent", 90.0, 10), ParkedRequest("later", 95.0, 10)]
    assert decide(snapshot(parked=parked, free_blocks=30, num_resident=2)).fetch == ("urgent", "later")
    assert decide(snapshot(parked=parked, free_blocks=14, num_resident=2)).fetch == ("urgent",)
    assert decide(snapshot(parked=parked, free_blocks=12, num_resident=2)).fetch == ()
    assert decide(snapshot(parked=parked, free_blocks=10, num_resident=0)).fetch == ("urgent",)


def test_a_smaller_claim_overtakes_only_so_often() -> None:
    parked = [ParkedRequest("large", 90.0, 50), ParkedRequest("small", 95.0, 5)]
    s = snapshot(parked=parked, free_blocks=20, num_resident=2)
    assert decide(s).fetch == ("small",)
    assert decide(s).overtaken == "large"
    assert decide(replace(s, overtaken={"large": PolicyLimits().max_overtakes})).fetch == ()


def test_with_host_memory_full_a_prompt_waits_for_the_pool_as_in_stock_vllm() -> None:
    s = snapshot(waiting=[prompt("a")], free_host_blocks=2, mode="layered")
    assert admitted(decide(s)) == [("a", False)]
    assert admitted(decide(replace(s, free_blocks=2, num_resident=3))) == []


def test_the_last_slot_is_used_by_whoever_was_granted_it() -> None:
    waiting = [prompt("first", deadline_s=101.0), prompt("pool only", deadline_s=102.0, can_layer=False)]
    assert len(decide(snapshot(waiting=waiting, free_slots=1)).admit) == 1


def test_modes_mean_what_they_say() -> None:
    full = snapshot(waiting=[prompt("a")], free_blocks=2, num_resident=3)
    assert admitted(decide(replace(full, mode="resident"))) == []
    assert admitted(decide(snapshot(waiting=[prompt("a")], mode="layered"))) == [("a", True)]


def test_a_prompt_that_can_never_run_is_refused_with_the_reason() -> None:
    decision = decide(snapshot(waiting=[prompt("a", 101)], zone_blocks=40))
    assert decision.admit == ()
    [(request_id, reason)] = decision.refuse
    assert request_id == "a"
    assert "101 KV blocks" in reason
    assert "host_memory" in reason


prompts = st.lists(st.tuples(st.integers(1, 60), st.floats(90, 110), st.booleans()), max_size=8)
parks = st.lists(st.tuples(st.integers(1, 60), st.floats(90, 110)), max_size=8)


@given(
    prompts,
    parks,
    st.fixed_dictionaries(
        {
            "free_blocks": st.integers(0, 100),
            "reserved_blocks": st.integers(0, 20),
            "growth_blocks": st.integers(0, 5),
            "free_zone_blocks": st.integers(0, 40),
            "free_host_blocks": st.integers(0, 100),
            "free_slots": st.integers(0, 5),
            "num_resident": st.integers(0, 5),
            "mode": st.sampled_from(("auto", "resident", "layered")),
        }
    ),
)
def test_a_decision_never_gives_out_more_than_there_is_and_changes_nothing(
    waiting: Any, parked: Any, rest: dict[str, Any]
) -> None:
    s = snapshot(
        waiting=sorted(
            (prompt(f"w{i}", b, d, can_layer=c) for i, (b, d, c) in enumerate(waiting)), key=lambda w: w.deadline_s
        ),
        parked=sorted((ParkedRequest(f"p{i}", d, b) for i, (b, d) in enumerate(parked)), key=lambda p: p.deadline_s),
        **rest,
    )
    before = copy.deepcopy(s)
    decision = decide(s)
    assert decision == decide(s)
    assert s == before
    size = {r.request_id: r.num_blocks for r in (*s.waiting, *s.parked)}
    in_pool = [*decision.fetch, *(a.request_id for a in decision.admit if not a.layered)]
    layered = [a for a in decision.admit if a.layered]
    if in_pool:
        assert sum(size[r] for r in in_pool) <= s.free_blocks - s.reserved_blocks - s.growth_blocks
    assert sum(a.zone_blocks for a in layered) <= s.free_zone_blocks
    assert sum(size[a.request_id] for a in layered) <= s.free_host_blocks
    assert len(in_pool) + len(layered) <= max(s.free_slots, 0)
    assert len(set(in_pool)) == len(in_pool)


@pytest.mark.parametrize("first_size", [5, 60, 100])
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_every_claim_is_served_in_a_bounded_number_of_steps(first_size: int, sizes: list[int]) -> None:
    """A pool of 100 blocks, requests that each run 5 steps, and new small claims for as long as the first waits."""
    limits = PolicyLimits(max_overtakes=4)
    parked = [ParkedRequest("first", 0.0, first_size)]
    running: dict[str, tuple[int, int]] = {}
    overtaken: dict[str, int] = {}
    for step in range(200):
        parked.append(ParkedRequest(f"n{step}", 1.0 + step, sizes[step % len(sizes)]))
        running = {r: (blocks, left - 1) for r, (blocks, left) in running.items() if left > 1}
        used = sum(blocks for blocks, _ in running.values())
        s = snapshot(
            parked=sorted(parked, key=lambda p: p.deadline_s),
            free_blocks=100 - used,
            num_resident=len(running),
            overtaken=overtaken,
        )
        decision = decide(s, limits)
        if decision.overtaken:
            overtaken[decision.overtaken] = overtaken.get(decision.overtaken, 0) + 1
        if "first" in decision.fetch:
            return
        size = {p.request_id: p.num_blocks for p in parked}
        running |= {r: (size[r], 5) for r in decision.fetch}
        parked = [p for p in parked if p.request_id not in decision.fetch]
    raise AssertionError("the first claim was never served")
