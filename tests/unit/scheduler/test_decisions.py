"""What every decision keeps to, over snapshots of any kind; and cases at the edges of the policy's promises.

The promises one by one are in `tests/unit/test_policy.py`; whole lives of requests in `test_any_load.py`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerkv.scheduler.policy import PolicyLimits, decide, prefill_budget
from layerkv.scheduler.snapshot import (
    Decision,
    LayeredRequest,
    ParkedRequest,
    PrefixHit,
    ResidentRequest,
    Snapshot,
    WaitingRequest,
)

BLOCK = 16
POOL, ZONE, HOST = 100, 40, 120
IDLE = Snapshot(
    now_s=100.0,
    mode="auto",
    streamed_decode=False,
    block_tokens=BLOCK,
    pool_blocks=POOL,
    free_blocks=POOL,
    growth_blocks=0,
    reserved_blocks=0,
    zone_blocks=ZONE,
    free_zone_blocks=ZONE,
    host_blocks=HOST,
    free_host_blocks=HOST,
    free_slots=16,
    budget_tokens=2048,
)


def snapshot(**changes: Any) -> Snapshot:
    """An idle engine with room for everything."""
    return replace(IDLE, **changes)


def prompt(name: str, blocks: int = 10, deadline_s: float = 101.0, **changes: Any) -> WaitingRequest:
    return WaitingRequest(name, deadline_s, blocks * BLOCK, blocks, **changes)


def resident(name: str, deadline_s: float = 105.0, **changes: Any) -> ResidentRequest:
    return replace(ResidentRequest(name, deadline_s, num_blocks=10, steps_resident=100), **changes)


def admitted(decision: Decision) -> list[tuple[str, bool]]:
    return [(admission.request_id, admission.layered) for admission in decision.admit]


# Any snapshot -----------------------------------------------------------------------------------------------------

deadlines = st.floats(90, 110)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Anything an engine may look like, with books that agree: what is held and what is free make up the whole."""
    free = draw(st.integers(0, POOL))
    growth = draw(st.integers(0, 12))
    residents = [
        ResidentRequest(
            f"r{i}",
            draw(deadlines),
            num_blocks=draw(st.integers(1, 20)),
            steps_resident=draw(st.integers(0, 100)),
            can_park=draw(st.booleans()),
            weight=draw(st.sampled_from((1.0, 4.0))),
        )
        for i in range(draw(st.integers(0, 5)))
    ]
    free_zone = ZONE
    layered = []
    for i in range(draw(st.integers(0, 3))):
        in_zone, done = draw(st.integers(1, max(free_zone // 2, 1))), draw(st.booleans())
        in_pool = draw(st.integers(0, 10))
        free_zone -= in_zone
        needs = done and draw(st.booleans())
        layered.append(LayeredRequest(f"l{i}", done, in_zone + in_pool, in_zone, needs, needs))
    waiting = [
        prompt(f"w{i}", draw(st.integers(1, 130)), draw(deadlines), can_layer=draw(st.integers(0, 3)) > 0)
        for i in range(draw(st.integers(0, 6)))
    ]
    hits = {}
    for w in waiting[: draw(st.integers(0, 4))]:
        num_hits = draw(st.integers(0, min(w.num_blocks - 1, POOL)))
        hits[w.request_id] = PrefixHit(num_hits, draw(st.integers(0, min(num_hits, free))))
    parked = [
        ParkedRequest(f"p{i}", draw(deadlines), draw(st.integers(1, POOL))) for i in range(draw(st.integers(0, 5)))
    ]
    return snapshot(
        mode=draw(st.sampled_from(("auto", "resident", "layered"))),
        streamed_decode=draw(st.booleans()),
        frees_are_deferred=draw(st.booleans()),
        free_blocks=free,
        growth_blocks=growth,
        reserved_blocks=draw(st.integers(0, 30)),
        free_zone_blocks=draw(st.integers(0, free_zone)),
        free_host_blocks=draw(st.integers(0, HOST)),
        free_slots=draw(st.integers(-1, 6)),
        budget_tokens=draw(st.sampled_from((16, 512, 4096))),
        decode_tokens=draw(st.integers(0, 16)),
        prefilling_tokens=draw(st.sampled_from((0, 0, 100, 5000))),
        decode_slack_s=draw(st.sampled_from((float("inf"), 0.5, 0.01, -1.0))),
        prefill_s_per_token=draw(st.sampled_from((0.0, 1e-4))),
        num_resident=len(residents),
        waiting=sorted(waiting, key=lambda w: w.deadline_s),
        parked=sorted(parked, key=lambda p: p.deadline_s),
        resident=residents if growth > free else (),
        layered=layered,
        hits=hits,
        overtaken={p.request_id: draw(st.sampled_from((0, 64))) for p in parked[:1]},
    )


@settings(max_examples=400)
@given(snapshots())
def test_no_decision_gives_out_more_than_there_is(s: Snapshot) -> None:
    d = decide(s)
    parked = set(d.park)
    victims = [r for r in s.resident if r.request_id in parked]
    leavers = [r for r in s.layered if r.request_id in parked]
    stayers = [r for r in s.layered if r.request_id not in parked]
    blocks = {view.request_id: view.num_blocks for view in (*s.waiting, *s.parked)}
    hits = {name: s.hits.get(name, PrefixHit()) for name in blocks}
    resident_ids = [*d.fetch, *(a.request_id for a in d.admit if not a.layered)]
    layered = [a for a in d.admit if a.layered]

    from_pool = sum(blocks[r] - hits[r].num_blocks + hits[r].num_evictable for r in resident_ids)
    from_pool += sum(hits[a.request_id].num_evictable for a in layered)
    in_pool = s.free_blocks - s.reserved_blocks - s.growth_blocks + sum(r.num_blocks for r in victims)
    assert from_pool == 0 or from_pool <= in_pool

    from_zone = sum(a.zone_blocks for a in layered) + sum(r.needs_zone_block for r in stayers)
    in_zone = s.free_zone_blocks + (0 if s.frees_are_deferred else sum(r.num_zone_blocks for r in leavers))
    assert not layered or from_zone <= in_zone
    for admission in layered:
        hit = hits[admission.request_id]
        assert admission.zone_blocks == blocks[admission.request_id] - hit.num_blocks > 0

    from_host = sum(blocks[a.request_id] for a in layered) + sum(r.num_blocks for r in victims)
    from_host += sum(r.needs_host_block for r in stayers)
    assert from_host <= s.free_host_blocks, "all of it has to be stored in this step or the next"

    assert len(resident_ids) + len(layered) <= max(s.free_slots + len(d.park), 0)
    assert 0 <= d.prefill_tokens <= max(s.budget_tokens - s.decode_tokens, 0)


@settings(max_examples=400)
@given(snapshots())
def test_every_decision_is_about_the_right_requests_each_once_and_in_order(s: Snapshot) -> None:
    d = decide(s)
    waiting, parked = [w.request_id for w in s.waiting], [p.request_id for p in s.parked]
    admits, refused = [a.request_id for a in d.admit], [request_id for request_id, _ in d.refuse]
    assert [r for r in waiting if r in admits] == admits, "by deadline"
    assert [r for r in parked if r in d.fetch] == list(d.fetch), "by deadline"
    assert not set(admits) & set(refused)
    assert set(refused) <= set(waiting)
    assert len(set(d.park)) == len(d.park)
    by_id = {r.request_id: r for r in (*s.resident, *s.layered)}
    for request_id in d.park:
        r = by_id[request_id]
        assert r.prefill_done if isinstance(r, LayeredRequest) else r.can_park
    for a in d.admit:
        w = next(w for w in s.waiting if w.request_id == a.request_id)
        assert not a.layered or (w.can_layer and s.mode != "resident")
    assert d.overtaken is None or d.overtaken not in (*admits, *d.fetch)


@settings(max_examples=300)
@given(snapshots())
def test_nobody_enters_the_pool_in_a_step_that_parks_residents(s: Snapshot) -> None:
    d = decide(s)
    if any(r.request_id in d.park for r in s.resident):
        assert d.fetch == ()
        assert all(a.layered for a in d.admit)


@settings(max_examples=300)
@given(snapshots())
def test_the_same_snapshot_gives_the_same_decision_and_is_not_changed(s: Snapshot) -> None:
    before = copy.deepcopy(s)
    first = decide(s)
    assert s == before
    assert decide(before) == first


@settings(max_examples=300)
@given(snapshots())
def test_with_the_engine_empty_somebody_starts_if_anybody_can(s: Snapshot) -> None:
    """Nothing runs and all memory is free: if nothing is decided now, nothing ever will be."""
    s = replace(
        s,
        free_blocks=POOL,
        growth_blocks=0,
        reserved_blocks=0,
        free_zone_blocks=ZONE,
        free_slots=max(s.free_slots, 1),
        decode_tokens=0,
        prefilling_tokens=0,
        num_resident=0,
        resident=(),
        layered=(),
        hits={},
    )
    d = decide(s)
    if s.waiting or s.parked:
        assert d.fetch or d.admit or d.refuse


# Slots ------------------------------------------------------------------------------------------------------------


def test_the_last_slot_goes_to_somebody_when_a_prompt_of_each_kind_waits_for_it() -> None:
    """Regression: the prompt that only the pool can hold got the slot, the loop ended before it, and nobody started."""
    waiting = [prompt("either", deadline_s=101), prompt("pool-only", deadline_s=102, can_layer=False)]
    assert len(decide(snapshot(waiting=waiting, free_slots=1)).admit) == 1


def test_a_full_engine_admits_nobody() -> None:
    waiting, parked = [prompt("a"), prompt("b", can_layer=False)], [ParkedRequest("p", 99.0, 5)]
    decision = decide(snapshot(waiting=waiting, parked=parked, free_slots=0))
    assert (decision.admit, decision.fetch) == ((), ())


def test_the_slots_of_those_who_leave_the_zone_are_used_at_once() -> None:
    layered = [LayeredRequest("done", prefill_done=True, num_blocks=5, num_zone_blocks=5)]
    assert admitted(decide(snapshot(waiting=[prompt("a")], layered=layered, free_slots=0))) == [("a", False)]


# Order ------------------------------------------------------------------------------------------------------------


def test_the_zone_goes_by_deadline_while_the_pool_is_full() -> None:
    waiting = [prompt(name, 9, deadline_s) for name, deadline_s in (("a", 100), ("b", 101), ("c", 102), ("d", 103))]
    decision = decide(snapshot(waiting=waiting, free_blocks=2, num_resident=5))
    assert admitted(decision) == [("a", True), ("b", True), ("c", True), ("d", True)]
    decision = decide(snapshot(waiting=waiting, free_blocks=2, num_resident=5, free_zone_blocks=20))
    assert admitted(decision) == [("a", True), ("b", True)]


def test_parked_requests_and_prompts_for_the_pool_share_one_queue_by_deadline() -> None:
    waiting = [prompt("prompt", 10, 95.0, can_layer=False)]
    parked = [ParkedRequest("first", 90.0, 10), ParkedRequest("last", 99.0, 10)]
    s = snapshot(waiting=waiting, parked=parked, num_resident=1, mode="resident")
    by_room = {free: decide(replace(s, free_blocks=free)) for free in (14, 26, 38)}
    assert [(d.fetch, admitted(d)) for d in by_room.values()] == [
        (("first",), []),
        (("first",), [("prompt", False)]),
        (("first", "last"), [("prompt", False)]),
    ]


def test_while_a_claim_on_the_pool_is_not_served_prompts_do_not_take_from_it() -> None:
    s = snapshot(waiting=[prompt("a", 4)], parked=[ParkedRequest("p", 99.0, 60)], free_blocks=50, num_resident=3)
    assert admitted(decide(s)) == [("a", True)]
    assert admitted(decide(replace(s, parked=()))) == [("a", False)]


def test_being_overtaken_is_counted_only_when_it_happens() -> None:
    large, small = ParkedRequest("large", 90.0, 60), ParkedRequest("small", 91.0, 10)
    s = snapshot(parked=[large, small], free_blocks=40, num_resident=3)
    assert decide(s).overtaken == "large"
    assert decide(replace(s, parked=[large])).overtaken is None
    assert decide(replace(s, free_blocks=POOL)).overtaken is None
    stopped = decide(replace(s, overtaken={"large": 64}))
    assert (stopped.fetch, stopped.overtaken) == ((), None)
    assert decide(replace(s, overtaken={"large": 63})).fetch == ("small",)


@pytest.mark.parametrize(("residents", "headroom_blocks"), [(0, 0), (1, 4), (3, 8), (4, 10)])
def test_headroom_is_kept_for_all_residents_and_the_one_who_comes(residents: int, headroom_blocks: int) -> None:
    s = snapshot(parked=[ParkedRequest("p", 99.0, 20)], num_resident=residents)
    assert decide(replace(s, free_blocks=20 + headroom_blocks)).fetch == ("p",)
    assert decide(replace(s, free_blocks=20 + headroom_blocks - 1)).fetch == ()
    prompts = replace(s, parked=(), waiting=[prompt("w", 20)])
    assert admitted(decide(replace(prompts, free_blocks=20 + headroom_blocks))) == [("w", False)]
    assert admitted(decide(replace(prompts, free_blocks=20 + headroom_blocks - 1))) == [("w", True)]


def test_blocks_promised_to_others_are_not_free() -> None:
    s = snapshot(parked=[ParkedRequest("p", 99.0, 20)], free_blocks=30)
    assert decide(replace(s, reserved_blocks=6, growth_blocks=4)).fetch == ("p",)
    assert decide(replace(s, reserved_blocks=7, growth_blocks=4)).fetch == ()
    assert decide(replace(s, reserved_blocks=6, growth_blocks=5)).fetch == ()


# The zone ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debt", [{"reserved_blocks": 5}, {"growth_blocks": 5}])
def test_a_prompt_goes_to_the_zone_though_the_pool_owes_blocks(debt: dict[str, int]) -> None:
    """A layered prompt without prefix hits takes nothing from the pool: what the pool lacks is not its affair."""
    immovable = [resident("r", can_park=False)]
    s = snapshot(waiting=[prompt("a")], free_blocks=2, num_resident=1, resident=immovable, **debt)
    assert admitted(decide(s)) == [("a", True)]


def test_prefix_hits_that_nobody_holds_cost_pool_blocks() -> None:
    s = snapshot(waiting=[prompt("a", 30)], free_blocks=9, num_resident=3)
    assert admitted(decide(replace(s, hits={"a": PrefixHit(20, 9)}))) == [("a", True)]
    assert admitted(decide(replace(s, hits={"a": PrefixHit(20, 10)}))) == []
    assert admitted(decide(replace(s, hits={"a": PrefixHit(20, 0)}, free_blocks=18))) == [("a", False)]


def test_prefix_hits_make_a_prompt_fit_the_zone_that_would_not_without() -> None:
    s = snapshot(waiting=[prompt("a", 60)], free_blocks=9, num_resident=3)
    assert admitted(decide(s)) == []
    [admission] = decide(replace(s, hits={"a": PrefixHit(25, 0)})).admit
    assert (admission.layered, admission.zone_blocks) == (True, 35)


def test_a_long_prompt_may_begin_with_half_a_step_but_not_with_less() -> None:
    s = snapshot(waiting=[prompt("a", 40)], free_blocks=0, num_resident=3, budget_tokens=200)
    assert admitted(decide(replace(s, prefilling_tokens=100))) == [("a", True)]
    assert admitted(decide(replace(s, prefilling_tokens=101))) == []


def test_host_memory_is_given_to_prompts_in_order_and_to_none_beyond() -> None:
    waiting = [prompt("a", 10), prompt("b", 10), prompt("c", 5)]
    s = snapshot(waiting=waiting, free_blocks=0, num_resident=3, free_host_blocks=19)
    assert admitted(decide(s)) == [("a", True)], "c would fit, but b is next"


def test_streamed_decode_leaves_when_the_zone_has_no_next_block() -> None:
    needy = LayeredRequest("r", True, 6, num_zone_blocks=5, needs_zone_block=True)
    s = snapshot(streamed_decode=True, layered=[needy], free_blocks=2, num_resident=3, free_zone_blocks=1)
    assert decide(s).park == ()
    assert decide(replace(s, free_zone_blocks=0)).park == ("r",)


def test_streamed_decode_takes_its_next_blocks_before_prompts_do() -> None:
    needy = [LayeredRequest(f"r{i}", True, 6, 5, needs_zone_block=True, needs_host_block=True) for i in range(2)]
    waiting = [prompt("first", 8), prompt("second", 3)]
    s = snapshot(streamed_decode=True, layered=needy, waiting=waiting, free_blocks=0, num_resident=3)
    assert admitted(decide(replace(s, free_zone_blocks=13))) == [("first", True), ("second", True)]
    assert admitted(decide(replace(s, free_zone_blocks=12))) == [("first", True)]
    assert admitted(decide(replace(s, free_host_blocks=12))) == [("first", True)]


# Parking residents ------------------------------------------------------------------------------------------------


def test_no_more_residents_are_parked_than_the_growth_needs() -> None:
    residents = [resident(f"r{i}", 100 + i) for i in range(6)]
    s = snapshot(free_blocks=1, num_resident=6, resident=residents)
    assert decide(replace(s, growth_blocks=2)).park == ("r5",)
    assert decide(replace(s, growth_blocks=11)).park == ("r5",)
    assert decide(replace(s, growth_blocks=12)).park == ("r5", "r4")


def test_of_several_residents_one_always_goes_on() -> None:
    residents = [resident(f"r{i}", 100 + i) for i in range(3)]
    s = snapshot(free_blocks=0, growth_blocks=50, num_resident=3, resident=residents)
    assert decide(s).park == ("r2", "r1")


def test_who_must_not_be_parked_is_not() -> None:
    residents = [resident("a", 105, can_park=False), resident("b", 101), resident("c", 102)]
    assert decide(snapshot(free_blocks=0, growth_blocks=1, num_resident=3, resident=residents)).park == ("c",)


def test_who_does_not_fit_host_memory_is_passed_over_for_one_who_does() -> None:
    residents = [resident("large", 109, num_blocks=30), resident("small", 101, num_blocks=4), resident("x", 100)]
    s = snapshot(free_blocks=0, growth_blocks=1, num_resident=3, resident=residents, free_host_blocks=8)
    assert decide(s).park == ("small",)


def test_while_residents_leave_a_prompt_still_gets_through_the_zone() -> None:
    residents = [resident("a", 101), resident("b", 102)]
    s = snapshot(waiting=[prompt("w")], free_blocks=0, growth_blocks=1, num_resident=2, resident=residents)
    assert decide(s).park == ("b",)
    assert admitted(decide(s)) == [("w", True)]


# Prefill budget ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slack_s", "s_per_token", "expected"),
    [
        (float("inf"), 1e-4, 2000),  # nobody decodes
        (0.1, 0.0, 2000),  # cost not known yet
        (0.1, 1e-4, 1000),
        (10.0, 1e-4, 2000),
        (0.01, 1e-4, 512),
        (0.0, 1e-4, 512),
        (-3.0, 1e-4, 512),
    ],
)
def test_the_prefill_budget_is_the_slack_over_the_cost_within_its_bounds(
    slack_s: float, s_per_token: float, expected: int
) -> None:
    s = snapshot(decode_slack_s=slack_s, prefill_s_per_token=s_per_token, decode_tokens=48)
    assert prefill_budget(s, PolicyLimits()) == decide(s).prefill_tokens == expected


def test_decodes_come_before_prefill_in_a_full_step() -> None:
    assert decide(snapshot(decode_tokens=2048)).prefill_tokens == 0
    assert decide(snapshot(decode_tokens=5000, decode_slack_s=-1.0, prefill_s_per_token=1e-4)).prefill_tokens == 0
    s = snapshot(decode_tokens=2000, decode_slack_s=-1.0, prefill_s_per_token=1e-4)
    assert decide(s).prefill_tokens == 48, "no more than the step has, whatever the least is"


def test_prompts_under_way_come_before_new_ones() -> None:
    s = snapshot(waiting=[prompt("a", 4)], decode_slack_s=0.06, prefill_s_per_token=1e-4)  # 600 tokens
    assert admitted(decide(replace(s, prefilling_tokens=599))) == [("a", False)]
    assert admitted(decide(replace(s, prefilling_tokens=600))) == []


def test_no_more_prompts_are_started_than_the_step_computes() -> None:
    s = snapshot(waiting=[prompt(f"w{i}", 10) for i in range(8)], budget_tokens=400)
    assert [name for name, _ in admitted(decide(s))] == ["w0", "w1", "w2"], "160 tokens each, the third in part"


# Never ------------------------------------------------------------------------------------------------------------


def test_a_prompt_too_long_for_the_pool_is_refused_in_resident_mode_and_if_it_cannot_be_layered() -> None:
    long = prompt("a", POOL + 1)
    for s in (snapshot(waiting=[long], mode="resident"), snapshot(waiting=[replace(long, can_layer=False)])):
        assert [request_id for request_id, _ in decide(s).refuse] == ["a"]
    assert decide(snapshot(waiting=[prompt("a", POOL)], mode="resident")).refuse == ()


def test_a_prompt_longer_than_the_pool_runs_only_where_it_may_decode_in_the_zone() -> None:
    """Parked after its first token it could never be fetched: it would hang, and hold up every other claim."""
    s = snapshot(waiting=[prompt("a", 30)], pool_blocks=20, free_blocks=20)
    assert admitted(decide(replace(s, streamed_decode=True))) == [("a", True)]
    decision = decide(s)
    assert decision.admit == ()
    assert [request_id for request_id, _ in decision.refuse] == ["a"]


def test_a_refused_prompt_does_not_keep_the_next_one_waiting() -> None:
    decision = decide(snapshot(waiting=[prompt("never", POOL + 50, 90.0), prompt("a", 5, 99.0)]))
    assert [admission.request_id for admission in decision.admit] == ["a"]
    assert [request_id for request_id, _ in decision.refuse] == ["never"]
