"""Rotation: who makes room for a claim that is due, when, and for whom nobody does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerkv.scheduler.fluid import LEAST_SLICE_S, MOST_LOADS_S, SPARE_FOR_LOST_S
from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.policy import decide
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.rules.rotate import (
    MOST_SWAPS,
    MOST_VAIN,
    SPARE_FOR_FLOWING_S,
    SPARE_FOR_FRESH_S,
)
from layerkv.scheduler.slots import SOON_S, SOON_STEPS
from layerkv.scheduler.snapshot import ParkedRequest, ResidentRequest, Snapshot
from tests.fakes.snapshots import NOW_S, POOL, changed, cost, parked, prompt, resident, snapshot

MOST = PolicyLimits().max_overtakes
LOAD_S = 0.005
"""Of ten blocks."""
STEP_S = 0.0102
"""Of two requests."""
BLOCKS, BLOCKS_LOAD_S = 14, 0.007
"""Enough for ten, and for what each resident needs soon."""
LOST = {"deadline_s": NOW_S - 0.1, "dry_s": NOW_S - 1.0}


def stream(name: str, buffer_s: float = 0.0, **changes: Any) -> ParkedRequest:
    """A parked stream of ten blocks whose reader has so much left to read."""
    dry_s = NOW_S + buffer_s
    return parked(name, dry_s + 1.0, dry_s=dry_s, tpot_s=1.0, tokens_left=500)._replace(**changes)


def flowing(name: str, buffer_s: float = 5.0, **changes: Any) -> ResidentRequest:
    """The same in the pool, with a few blocks more. It has had its slice, and is stored but for its last block."""
    dry_s, num_blocks = NOW_S + buffer_s, changes.get("num_blocks", BLOCKS)
    view = resident(name, dry_s + 1.0, dry_s=dry_s, tpot_s=1.0, tokens_left=500, resident_s=10.0)
    return view._replace(**{"num_blocks": num_blocks, "num_stored": num_blocks - 1, **changes})


def full(*parts: ResidentRequest | ParkedRequest, **changes: Any) -> Snapshot:
    """A pool without a free block, in which these and one that may not be parked have their places."""
    residents = [view for view in parts if isinstance(view, ResidentRequest)]
    residents.append(flowing("other", can_park=False))
    state: dict[str, Any] = {
        "policy": "fluid",
        "cost": cost(),
        "free_blocks": 0,
        "resident": residents,
        "num_resident": len(residents),
        "decode_tokens": 2,
        "parked": [view for view in parts if isinstance(view, ParkedRequest)],
        "can_store_ahead": False,
    }
    return snapshot(**{**state, **changes})


def test_a_resident_with_enough_to_read_makes_room_for_a_claim_that_is_due_in_the_same_step() -> None:
    d = decide(full(flowing("r"), stream("claim")))
    assert (d.park, d.fetch) == (("r",), ("claim",))
    assert d.reasons == {"r": Reason.TURN_OVER, "claim": Reason.ITS_TURN}


def test_where_frees_are_deferred_the_claim_gets_its_blocks_in_a_later_step() -> None:
    d = decide(full(flowing("r"), stream("claim"), frees_are_deferred=True))
    assert (d.park, d.fetch) == (("r",), ())
    assert d.reasons == {"r": Reason.TURN_OVER}
    assert d.waits == {"claim": Reason.POOL_FULL}
    assert d.room_for == ("claim",)


def test_blocks_on_their_way_back_count_as_room() -> None:
    assert decide(full(flowing("r"), stream("claim"), freeing_blocks=POOL)).park == ()


def test_while_nothing_is_known_of_costs_nobody_rotates() -> None:
    assert decide(full(flowing("r"), stream("claim"), cost=None)).park == ()


def test_room_is_made_for_a_claim_that_is_due_soon_and_not_before() -> None:
    soon_s = SOON_S + SOON_STEPS * STEP_S + LOAD_S
    r = flowing("r")
    assert decide(full(r, stream("claim", soon_s - 0.001))).park == ("r",)
    assert decide(full(r, stream("claim", soon_s + 0.001))).park == ()


def test_the_resident_s_reader_must_have_more_than_the_claim_s_by_the_time_of_both_loads() -> None:
    for buffer_s, parks in ((SPARE_FOR_FLOWING_S - 0.001, ()), (SPARE_FOR_FLOWING_S + 0.001, ("r",))):
        for claims_s in (0.0, 0.05):
            r = flowing("r", buffer_s + claims_s + BLOCKS_LOAD_S)
            assert decide(full(r, stream("claim", claims_s))).park == parks


@pytest.mark.parametrize(
    ("claim", "least_s"),
    [
        (stream("claim", is_fresh=True), SPARE_FOR_FRESH_S),
        (stream("claim", **LOST), SPARE_FOR_LOST_S),
        (stream("claim", **LOST, is_fresh=True), SPARE_FOR_LOST_S),
    ],
)
def test_more_must_be_left_for_a_second_token_and_most_for_a_stream_that_is_lost(
    claim: ParkedRequest, least_s: float
) -> None:
    for buffer_s, parks in ((least_s - 0.001, ()), (least_s + 0.001, ("r",))):
        assert decide(full(flowing("r", buffer_s + BLOCKS_LOAD_S), claim)).park == parks


def test_a_stream_that_is_lost_makes_room_for_any_that_flows_and_for_no_lost_one() -> None:
    lost = flowing("r", **LOST)
    assert decide(full(lost, stream("claim"))).park == ("r",)
    assert decide(full(lost, stream("claim", is_fresh=True))).park == ("r",)
    assert decide(full(lost, stream("claim", **LOST))).park == ()
    lost_with_plenty = lost._replace(dry_s=NOW_S + SPARE_FOR_LOST_S + 1.0)
    assert decide(full(lost_with_plenty, stream("claim", **LOST))).park == (), "it runs to its end"
    assert decide(full(lost_with_plenty, stream("claim", **LOST), overtaken={"claim": MOST})).park == ("r",)


def test_a_stream_that_is_held_makes_room_like_one_that_is_lost() -> None:
    """All of the pool's time is asked for twice, and the resident needs most of it to its end."""
    r = flowing("r", 0.0, num_blocks=64, tpot_s=0.01, tokens_left=900)
    claim = stream("claim", num_blocks=60, tpot_s=0.01)
    assert decide(full(r, claim)).park == ("r",)
    assert decide(full(r._replace(tokens_left=400), claim)).park == (), "then the claim is held"


def test_a_resident_within_its_slice_or_of_better_rank_makes_no_room() -> None:
    r = flowing("r")
    assert decide(full(r._replace(resident_s=LEAST_SLICE_S - 0.01), stream("claim"))).park == ()
    assert decide(full(r._replace(rank=-1), stream("claim"))).park == ()
    assert decide(full(r._replace(rank=1), stream("claim"))).park == ("r",)
    assert decide(full(r._replace(can_park=False), stream("claim"))).park == ()


def test_a_resident_whose_rest_has_no_room_in_host_memory_makes_none() -> None:
    r = flowing("r", num_stored=0)
    s = full(r, stream("claim"), host_blocks=80)  # a copy gives way only below ten free blocks
    assert decide(changed(s, free_host_blocks=14)).park == ("r",)
    assert decide(changed(s, free_host_blocks=13)).park == ()
    stored = [r._replace(num_stored=2), s.load.resident[1]]
    assert decide(changed(s, free_host_blocks=12, resident=stored)).park == ("r",)


def test_residents_that_leave_together_need_room_in_host_memory_together() -> None:
    small = [flowing(f"r{i}", num_blocks=8, num_stored=0) for i in range(2)]
    s = full(*small, stream("claim"), host_blocks=80)
    assert len(decide(changed(s, free_host_blocks=16)).park) == 2
    assert decide(changed(s, free_host_blocks=15)).park == ()


def test_an_overdue_claim_takes_the_place_of_any_that_has_had_its_slice() -> None:
    """Even of one that flows with nothing to spare, or is about to end; though it is itself lost, or not due yet."""
    r = flowing("r", 0.0, tokens_left=1)
    for claim in (stream("claim", **LOST), stream("claim", 9.0)):
        s = full(r, claim)
        assert decide(s).park == ()
        assert decide(changed(s, overtaken={"claim": MOST - 1})).park == ()
        assert decide(changed(s, overtaken={"claim": MOST})).fetch == ("claim",)
    within = full(r._replace(resident_s=0.1), stream("claim"), overtaken={"claim": MOST})
    assert decide(within).park == ()
    assert decide(changed(within, resident=[r._replace(rank=-1), within.load.resident[1]])).park == ()


def test_an_overdue_claim_takes_the_place_of_the_last_resident_too() -> None:
    alone = {"resident": [flowing("r", num_blocks=90)], "num_resident": 1, "decode_tokens": 1}
    s = changed(full(stream("claim", num_blocks=50)), **alone)
    assert decide(s).park == (), "somebody stays"
    assert decide(changed(s, overtaken={"claim": MOST})).park == ("r",)


def test_nobody_leaves_if_all_that_may_are_not_enough() -> None:
    small = [flowing(f"r{i}", num_blocks=4) for i in range(4)]
    assert decide(full(*small[:2], stream("claim"))).park == ()
    assert len(decide(full(*small[:3], stream("claim"))).park) == 3
    assert len(decide(full(*small, stream("claim"))).park) == 3, "and no more than it takes"


def test_blocks_that_are_free_already_are_not_taken_from_anybody() -> None:
    small = [flowing(f"r{i}", num_blocks=6) for i in range(3)]
    assert len(decide(full(*small, stream("claim"), free_blocks=9)).park) == 1
    assert decide(full(*small, stream("claim"), free_blocks=15)).park == ()
    assert decide(full(*small, stream("claim"), free_blocks=15)).fetch == ("claim",)


def test_a_slot_is_made_free_as_well_as_blocks_are() -> None:
    s = full(flowing("r", num_blocks=2), stream("claim"), free_blocks=50, free_slots=0)
    d = decide(s)
    assert (d.park, d.fetch) == (("r",), ("claim",))
    assert decide(changed(s, free_slots=1)).park == ()


def test_blocks_that_leave_for_one_claim_are_not_there_for_the_next() -> None:
    """Each of the residents is enough for one claim."""
    pair = [flowing("r0"), flowing("r1")]
    d = decide(full(*pair, stream("c0"), stream("c1")))
    assert (set(d.park), d.fetch) == ({"r0", "r1"}, ("c0", "c1"))
    d = decide(full(pair[0], stream("c0"), stream("c1")))
    assert (d.park, d.fetch) == (("r0",), ("c0",))
    assert d.waits == {"c1": Reason.POOL_FULL}
    d = decide(full(*pair, stream("c0"), stream("c1"), frees_are_deferred=True))
    assert (set(d.park), d.fetch) == ({"r0", "r1"}, ()), "for the next step, and for both"


def test_a_step_swaps_a_few_and_no_more() -> None:
    crowd = [flowing(f"r{i}", num_blocks=13) for i in range(9)]
    d = decide(full(*crowd, *(stream(f"c{i}") for i in range(9))))
    assert len(d.park) == len(d.fetch) == MOST_SWAPS


def test_a_step_gives_up_after_so_many_claims_for_which_nobody_can_leave() -> None:
    large = [stream(f"c{i:02}", 0.001 * i, num_blocks=90) for i in range(MOST_VAIN)]
    small = stream("small", 0.05)
    assert decide(full(flowing("r"), *large[1:], small)).park == ("r",)
    assert decide(full(flowing("r"), *large, small)).park == ()


def test_a_fetch_waits_while_the_link_is_busy_and_nobody_leaves_for_it() -> None:
    most = int(MOST_LOADS_S / 0.0005)
    claim = stream("claim", num_blocks=10)
    s = full(flowing("r"), claim, free_blocks=50)
    assert decide(changed(s, loading_blocks=most - 10)).fetch == ("claim",)
    d = decide(changed(s, loading_blocks=most - 9))
    assert (d.park, d.fetch, d.waits) == ((), (), {"claim": Reason.LINK_BUSY})


def test_one_step_begins_no_more_loads_than_the_link_carries_soon_but_always_one() -> None:
    s = full(stream("c0", num_blocks=150), stream("c1", num_blocks=100), stream("c2", num_blocks=90), free_blocks=POOL)
    s = changed(s, pool_blocks=1000, free_blocks=1000)
    d = decide(s)
    assert d.fetch == ("c0",)
    assert d.waits == {"c1": Reason.LINK_BUSY, "c2": Reason.LINK_BUSY}
    assert decide(changed(s, parked=[stream("large", num_blocks=500)])).fetch == ("large",), "or it never came in"


def test_a_prompt_that_needs_the_pool_has_room_made_too() -> None:
    prompts = [prompt("w", 10, NOW_S + 0.05, can_layer=False)]
    r = flowing("r")
    d = decide(full(r, waiting=prompts))
    assert (d.park, [a.request_id for a in d.admit]) == (("r",), ["w"])
    assert decide(full(flowing("r", 0.4), waiting=prompts)).park == ()
    assert decide(full(r, waiting=[prompts[0]._replace(deadline_s=NOW_S + 9.0)])).park == ()


def test_while_residents_leave_for_want_of_blocks_nobody_rotates() -> None:
    s = full(flowing("r"), flowing("r2"), stream("claim"), growth_blocks=1)
    d = decide(s)
    assert (len(d.park), d.fetch) == (1, ())
    assert Reason.TURN_OVER not in d.reasons.values()


def test_while_a_better_rank_waits_for_the_pool_no_worse_one_has_room_made() -> None:
    better = stream("better", num_blocks=90, rank=-1)
    d = decide(full(flowing("r"), better, stream("claim")))
    assert d.park == ()
    assert d.waits == {"better": Reason.POOL_FULL, "claim": Reason.BEHIND_RANK}


buffers = st.floats(-2.0, 12.0)


@settings(max_examples=200)
@given(
    residents=st.lists(st.tuples(buffers, st.integers(5, 30), st.floats(0, 3), st.booleans()), min_size=1, max_size=6),
    claims=st.lists(st.tuples(buffers, st.integers(5, 40), st.booleans(), st.booleans()), max_size=6),
    free=st.integers(0, 30),
    deferred=st.booleans(),
)
def test_every_swap_gains_unless_somebody_was_overtaken_too_often(
    residents: list[tuple[Any, ...]], claims: list[tuple[Any, ...]], free: int, deferred: bool
) -> None:
    """Whoever leaves has had its slice, and is lost while some claim flows, or has more to read than some claim."""
    parts: list[ResidentRequest | ParkedRequest] = []
    for i, (buffer_s, num_blocks, resident_s, is_lost) in enumerate(residents):
        r = flowing(f"r{i}", buffer_s, num_blocks=num_blocks, num_stored=num_blocks, resident_s=resident_s)
        parts.append(r._replace(**LOST) if is_lost else r)
    for i, (buffer_s, num_blocks, is_fresh, is_lost) in enumerate(claims):
        p = stream(f"c{i}", buffer_s, num_blocks=num_blocks, is_fresh=is_fresh)
        parts.append(p._replace(**LOST) if is_lost else p)
    s = full(*parts, free_blocks=free, frees_are_deferred=deferred)
    d = decide(s)
    leaving = [r for r in s.load.resident if d.reasons.get(r.request_id) is Reason.TURN_OVER]
    due = [p for p in s.lines.parked if p.dry_s - NOW_S < SOON_S + SOON_STEPS * 0.02 + 0.03 or p.deadline_s < NOW_S]
    for r in leaving:
        assert r.resident_s >= LEAST_SLICE_S
        is_lost = r.deadline_s < NOW_S
        spare_s = max(r.dry_s - NOW_S, 0.0)
        gains = [
            (is_lost and p.deadline_s >= NOW_S)
            or spare_s > (SPARE_FOR_LOST_S if p.deadline_s < NOW_S else max(p.dry_s - NOW_S, 0.0) + SPARE_FOR_FLOWING_S)
            for p in due
        ]
        assert any(gains), (r, due)
    assert len(leaving) <= len(s.load.resident) - 1
    if leaving and not deferred:
        assert d.fetch, "nobody leaves in vain"
