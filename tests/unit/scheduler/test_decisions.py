"""What every decision keeps to, over snapshots of any kind.

The promises one by one are in the files beside this one; whole lives of requests in `test_any_load.py`.
"""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerkv.config import PolicyName
from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.policy import decide
from layerkv.scheduler.prefill import late_prompts
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.snapshot import LayeredRequest, PrefixHit, Snapshot
from tests.fakes.snapshots import BLOCK, HOST, NOW_S, POOL, ZONE, changed, cost, parked, prompt, resident, snapshot

MOST = PolicyLimits().max_overtakes
deadlines = st.floats(90, 110)
RELIEVING = (Reason.POOL_SHORT, Reason.RECOMPUTE_CHEAPER)
"""Whoever leaves for these makes room in the same step."""


Data = st.DataObject
POLICIES: tuple[PolicyName, ...] = ("fluid", "slo", "arrival")


@st.composite
def snapshots(draw: st.DrawFn, policy: PolicyName) -> Snapshot:
    """Anything an engine may look like, with books that agree: what is held and what is free make up the whole."""
    free = draw(st.integers(0, POOL))
    residents = []
    for i in range(draw(st.integers(0, 5))):
        num_blocks = draw(st.integers(1, 20))
        residents.append(
            resident(
                f"r{i}",
                draw(deadlines),
                num_blocks=num_blocks,
                num_tokens=num_blocks * BLOCK,
                num_stored=draw(st.integers(0, num_blocks)),
                steps_resident=draw(st.integers(0, 100)),
                can_park=draw(st.booleans()),
                weight=draw(st.sampled_from((1.0, 4.0))),
                tokens_left=draw(st.sampled_from((1, 20, 500))),
                dry_s=draw(deadlines),
                tpot_s=draw(st.sampled_from((0.005, 0.05, 1.0))),
                resident_s=draw(st.sampled_from((0.0, 0.3, 10.0))),
            )
        )
    free_zone = ZONE
    layered = []
    for i in range(draw(st.integers(0, 3))):
        in_zone, done = draw(st.integers(1, max(free_zone // 2, 1))), draw(st.booleans())
        in_pool = draw(st.integers(0, 10))
        free_zone -= in_zone
        needs = done and draw(st.booleans())
        layered.append(LayeredRequest(f"l{i}", done, in_zone + in_pool, in_zone, needs, needs))
    waiting = [
        prompt(
            f"w{i}",
            draw(st.integers(1, 130)),
            draw(deadlines),
            can_layer=draw(st.integers(0, 3)) > 0,
            weight=draw(st.sampled_from((1.0, 4.0))),
            tokens_left=draw(st.sampled_from((1, 100))),
            may_refuse=draw(st.booleans()),
        )
        for i in range(draw(st.integers(0, 6)))
    ]
    hits = {}
    for w in waiting[: draw(st.integers(0, 4))]:
        num_hits = draw(st.integers(0, min(w.num_blocks - 1, POOL)))
        on_host = draw(st.integers(0, w.num_blocks - 1 - num_hits))
        held = draw(st.integers(0, on_host))
        hits[w.request_id] = PrefixHit(num_hits, draw(st.integers(0, min(num_hits, free))), on_host, held)
    in_host = [
        parked(
            f"p{i}",
            draw(deadlines),
            draw(st.integers(1, POOL)),
            tokens_left=draw(st.sampled_from((1, 100))),
            dry_s=draw(deadlines),
            tpot_s=draw(st.sampled_from((0.005, 0.05, 1.0))),
            is_fresh=draw(st.booleans()),
        )
        for i in range(draw(st.integers(0, 5)))
    ]
    free_host = draw(st.integers(0, HOST))
    return snapshot(
        mode=draw(st.sampled_from(("auto", "resident", "layered"))),
        streamed_decode=draw(st.booleans()),
        policy=policy,
        frees_are_deferred=draw(st.booleans()),
        free_blocks=free,
        growth_blocks=draw(st.integers(0, 12)),
        reserved_blocks=draw(st.integers(0, 30)),
        free_zone_blocks=draw(st.integers(0, free_zone)),
        free_host_blocks=free_host,
        free_slots=draw(st.integers(-1, 6)),
        budget_tokens=draw(st.sampled_from((16, 512, 4096))),
        decode_tokens=draw(st.integers(0, 16)),
        prefilling_tokens=draw(st.sampled_from((0, 0, 100, 5000))),
        decode_slack_s=draw(st.sampled_from((float("inf"), 0.5, 0.01, 0.0))),
        steps_without_prefill=draw(st.sampled_from((0, 8))),
        can_exchange=draw(st.booleans()),
        can_store_ahead=draw(st.booleans()),
        token_s=draw(st.sampled_from((0.0, 0.01, 0.1))),
        loading_blocks=draw(st.sampled_from((0, 0, 10, 500))),
        cost=draw(st.sampled_from((None, cost(), cost(block_copy_s=0.05)))),
        num_resident=len(residents),
        waiting=sorted(waiting, key=lambda w: (w.deadline_s < NOW_S, w.deadline_s)),
        parked=sorted(in_host, key=lambda p: (p.deadline_s < NOW_S, p.deadline_s)),
        resident=residents,
        layered=layered,
        hits=hits,
        overtaken={view.request_id: draw(st.sampled_from((0, 0, MOST))) for view in (*in_host[:2], *waiting[:2])},
    )


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=120)
@given(data=st.data())
def test_no_decision_gives_out_more_than_there_is(policy: PolicyName, data: Data) -> None:
    s = data.draw(snapshots(policy))
    d = decide(s)
    gone = {*d.park, *d.recompute}
    at_once = RELIEVING if s.engine.frees_are_deferred else (*RELIEVING, Reason.TURN_OVER)
    victims = [r for r in s.load.resident if r.request_id in gone and d.reasons[r.request_id] in at_once]
    leavers = [r for r in s.load.layered if r.request_id in gone]
    stayers = [r for r in s.load.layered if r.request_id not in gone]
    blocks = {view.request_id: view.num_blocks for view in (*s.lines.waiting, *s.lines.parked)}
    hits = {name: s.lines.hits.get(name, PrefixHit()) for name in blocks}
    resident_ids = [*d.fetch, *(a.request_id for a in d.admit if not a.layered)]
    layered = [a for a in d.admit if a.layered]

    from_pool = sum(blocks[r] - hits[r].num_blocks + hits[r].num_evictable for r in resident_ids)
    from_pool += sum(hits[a.request_id].num_evictable for a in layered)
    in_pool = (
        s.engine.free_blocks - s.engine.reserved_blocks - s.load.growth_blocks + sum(r.num_blocks for r in victims)
    )
    assert from_pool == 0 or from_pool <= in_pool

    from_zone = sum(a.zone_blocks for a in layered) + sum(r.needs_zone_block for r in stayers)
    in_zone = s.engine.free_zone_blocks + (
        0 if s.engine.frees_are_deferred else sum(r.num_zone_blocks for r in leavers)
    )
    assert not layered or from_zone <= in_zone
    for admission in layered:
        hit = hits[admission.request_id]
        assert admission.zone_blocks == blocks[admission.request_id] - hit.num_blocks > 0

    early = sum(blocks[a.request_id] - hits[a.request_id].num_host_held for a in layered)
    from_host = early + sum(r.needs_host_block for r in stayers)
    stored = {r.request_id: 0 if r.request_id in d.drop_copy else r.num_stored for r in s.load.resident}
    from_host += sum(r.num_blocks - stored[r.request_id] for r in s.load.resident if r.request_id in d.park)
    from_host += sum(ahead.num_blocks for ahead in d.store_ahead)
    in_host = s.engine.free_host_blocks + sum(r.num_stored for r in s.load.resident if r.request_id in d.drop_copy)
    assert from_host == 0 or from_host <= in_host, "all of it has to be stored in this step or the next"
    whole = {r.request_id: r.num_tokens // BLOCK for r in s.load.resident}
    assert all(0 < ahead.num_blocks <= whole[ahead.request_id] - stored[ahead.request_id] for ahead in d.store_ahead)

    assert len(resident_ids) + len(layered) <= max(s.engine.free_slots + len(gone), 0)
    assert 0 <= d.prefill_tokens <= max(s.engine.budget_tokens - s.load.decode_tokens, 0)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=120)
@given(data=st.data())
def test_every_decision_is_about_the_right_requests_each_once_and_in_order(policy: PolicyName, data: Data) -> None:
    s = data.draw(snapshots(policy))
    d = decide(s)
    admits, refused = [a.request_id for a in d.admit], [r.request_id for r in d.refuse]
    late = late_prompts(s, s.lines.waiting, d.prefill_tokens)
    late |= {
        view.request_id for view in (*s.lines.waiting, *s.lines.parked) if s.slo_scheduling and view.deadline_s < NOW_S
    }
    overdue = {
        view.request_id
        for view in (*s.lines.waiting, *s.lines.parked)
        if s.lines.overtaken.get(view.request_id, 0) >= MOST
    }
    turn = {  # of those overtaken too often, deadlines alone decide
        view.request_id: (view.request_id not in overdue, view.request_id in late - overdue, view.deadline_s)
        for view in (*s.lines.waiting, *s.lines.parked)
    }
    if policy != "fluid":  # its order, and who takes whose place, is in test_fluid_claims.py and test_rotate.py
        assert sorted(d.fetch, key=lambda r: turn[r]) == list(d.fetch), "on time before late, by deadline"
    if late:
        assert sorted(admits, key=lambda r: turn[r]) == admits, "on time before late, by deadline"
    assert set(admits) | set(refused) <= {w.request_id for w in s.lines.waiting}
    assert set(d.fetch) <= {p.request_id for p in s.lines.parked}
    may_leave = {r.request_id for r in s.load.resident if r.can_park}
    done = {r.request_id for r in s.load.layered if r.prefill_done}
    stored_ahead = [ahead.request_id for ahead in d.store_ahead]
    assert {*d.recompute, *stored_ahead} <= may_leave
    assert set(d.park) <= may_leave | done
    everybody = [*admits, *refused, *d.fetch, *d.park, *d.recompute, *stored_ahead]
    assert len(set(everybody)) == len(everybody)
    assert set(d.drop_copy) <= {r.request_id for r in s.load.resident if r.num_stored}
    assert not set(d.drop_copy) & set(stored_ahead), "what gives way is not stored again"
    assert len(set(d.drop_copy)) == len(d.drop_copy)
    assert not set(d.overtaken) & {*admits, *d.fetch}, "who is served was not overtaken"
    assert len(set(d.overtaken)) == len(d.overtaken)
    for a in d.admit:
        w = next(w for w in s.lines.waiting if w.request_id == a.request_id)
        assert not a.layered or (w.can_layer and s.shape.mode != "resident")


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=120)
@given(data=st.data())
def test_everybody_who_was_looked_at_is_told_why(policy: PolicyName, data: Data) -> None:
    s = data.draw(snapshots(policy))
    d = decide(s)
    acted = {*d.park, *d.recompute, *d.fetch, *(a.request_id for a in d.admit), *(r.request_id for r in d.refuse)}
    assert set(d.reasons) == acted
    assert {r.request_id: r.reason for r in d.refuse}.items() <= d.reasons.items()
    assert set(d.waits) == {view.request_id for view in (*s.lines.waiting, *s.lines.parked)} - acted


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=120)
@given(data=st.data())
def test_nobody_enters_the_pool_in_a_step_that_takes_residents_out_of_it(policy: PolicyName, data: Data) -> None:
    s = data.draw(snapshots(policy))
    d = decide(s)
    if any(reason in RELIEVING for reason in d.reasons.values()):
        assert d.fetch == ()
        assert all(a.layered for a in d.admit)
        assert not d.made_room


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=120)
@given(data=st.data())
def test_the_same_snapshot_gives_the_same_decision_and_is_not_changed(policy: PolicyName, data: Data) -> None:
    s = data.draw(snapshots(policy))
    before = copy.deepcopy(s)
    first = decide(s)
    assert s == before
    assert decide(before) == first


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=120)
@given(data=st.data())
def test_with_the_engine_empty_somebody_starts_if_anybody_can(policy: PolicyName, data: Data) -> None:
    """Nothing runs and all memory is free: if nothing is decided now, nothing ever will be."""
    s = data.draw(snapshots(policy))
    s = changed(
        s,
        free_blocks=POOL,
        growth_blocks=0,
        reserved_blocks=0,
        free_zone_blocks=ZONE,
        free_slots=max(s.engine.free_slots, 1),
        decode_tokens=0,
        decode_slack_s=float("inf"),
        prefilling_tokens=0,
        num_resident=0,
        resident=(),
        layered=(),
        loading_blocks=0,
        hits={},
    )
    d = decide(s)
    if s.lines.waiting or s.lines.parked:
        assert d.fetch or d.admit or d.refuse
