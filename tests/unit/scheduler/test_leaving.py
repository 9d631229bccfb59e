"""Who leaves the zone or the pool, and how: parked, computed again, for another's sake, or stored ahead."""

from __future__ import annotations

from typing import Any

import pytest

from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.policy import decide
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.snapshot import LayeredRequest, PrefixHit, StoreAhead
from tests.fakes.snapshots import BLOCK, HOST, NOW_S, ZONE, admitted, changed, cost, parked, prompt, resident, snapshot

MOST = PolicyLimits().max_overtakes

# The zone -------------------------------------------------------------------------------------------------------------


def test_layered_requests_leave_the_zone_after_their_first_token() -> None:
    layered = [
        LayeredRequest("done", prefill_done=True, num_blocks=5),
        LayeredRequest("on", prefill_done=False, num_blocks=5),
    ]
    decision = decide(snapshot(layered=layered))
    assert decision.park == ("done",)
    assert decision.reasons == {"done": Reason.FIRST_TOKEN_DONE}


def test_streamed_decode_goes_on_until_pool_or_waiting_prompts_speak_against_it() -> None:
    layered = [LayeredRequest("r", prefill_done=True, num_blocks=5, num_zone_blocks=5)]
    s = snapshot(streamed_decode=True, layered=layered, free_blocks=2, num_resident=3, free_zone_blocks=10)
    assert decide(s).park == ()
    assert decide(changed(s, free_blocks=50)).park == ("r",)
    assert decide(changed(s, waiting=[prompt("a", 20)])).park == ("r",)
    needy = layered[0]._replace(needs_host_block=True)
    assert decide(changed(s, layered=[needy], free_host_blocks=0)).park == ("r",)


def test_pool_blocks_for_one_that_leaves_the_zone_are_not_there_for_the_next() -> None:
    """Both would fit alone: the second goes on streaming instead of being parked for blocks that it will not get."""
    layered = [LayeredRequest(f"r{i}", prefill_done=True, num_blocks=5, num_zone_blocks=5) for i in range(2)]
    s = snapshot(streamed_decode=True, layered=layered, num_resident=3, free_zone_blocks=10)
    assert decide(changed(s, free_blocks=9)).park == ("r0",)
    assert decide(changed(s, free_blocks=10)).park == ("r0", "r1")


def test_streamed_decode_leaves_when_the_zone_has_no_next_block() -> None:
    needy = LayeredRequest("r", True, 6, num_zone_blocks=5, needs_zone_block=True)
    s = snapshot(streamed_decode=True, layered=[needy], free_blocks=2, num_resident=3, free_zone_blocks=1)
    assert decide(s).park == ()
    assert decide(changed(s, free_zone_blocks=0)).park == ("r",)


def test_who_is_longer_than_the_pool_starts_over_once_zone_or_host_memory_has_no_next_block() -> None:
    long = LayeredRequest("r", True, 101, num_zone_blocks=5, needs_zone_block=True, needs_host_block=True)
    s = snapshot(streamed_decode=True, layered=[long], pool_blocks=100, num_resident=1, free_zone_blocks=1)
    assert decide(s).recompute == ()
    for short in (changed(s, free_zone_blocks=0), changed(s, free_host_blocks=0)):
        assert decide(short).recompute == ("r",)
        assert decide(short).reasons == {"r": Reason.LONGER_THAN_POOL}
        assert decide(changed(short, is_paused=True)).recompute == ()
        assert decide(changed(short, layered=[long._replace(outgrows_pool=True)])).recompute == (), "it has its room"


def test_streamed_decode_takes_its_next_blocks_before_prompts_do() -> None:
    needy = [LayeredRequest(f"r{i}", True, 6, 5, needs_zone_block=True, needs_host_block=True) for i in range(2)]
    waiting = [prompt("first", 8), prompt("second", 3)]
    s = snapshot(streamed_decode=True, layered=needy, waiting=waiting, free_blocks=0, num_resident=3)
    assert admitted(decide(changed(s, free_zone_blocks=13))) == [("first", True), ("second", True)]
    assert admitted(decide(changed(s, free_zone_blocks=12))) == [("first", True)]
    assert admitted(decide(changed(s, free_host_blocks=12))) == [("first", True)]


def test_streamed_decode_ends_for_those_whose_loads_the_objectives_leave_no_time_for() -> None:
    """A step takes 10 ms and a block 0.5 ms to load: three times 8 blocks need an objective of 22 ms."""
    layered = [LayeredRequest(f"r{i}", True, 8, num_zone_blocks=8) for i in range(3)]
    s = snapshot(streamed_decode=True, layered=layered, free_blocks=0, num_resident=3, cost=cost())
    assert decide(changed(s, tightest_tpot_s=0.0221)).park == ()
    assert decide(changed(s, tightest_tpot_s=0.0201)).reasons == {"r2": Reason.STREAM_BUDGET}
    assert decide(changed(s, tightest_tpot_s=0.005)).park == ("r0", "r1", "r2")
    assert decide(changed(s, tightest_tpot_s=0.005, slo_scheduling=False)).park == ()


# The pool is short ----------------------------------------------------------------------------------------------------


def test_the_resident_with_most_laxity_is_parked_first_and_the_fresh_ones_last() -> None:
    residents = [resident("urgent", 101.0), resident("ahead", 140.0), resident("fresh", 200.0, steps_resident=1)]
    s = snapshot(free_blocks=0, growth_blocks=3, num_resident=3, resident=residents)
    assert decide(s).park == ("ahead",)
    assert decide(s).reasons == {"ahead": Reason.POOL_SHORT}
    assert decide(changed(s, growth_blocks=15)).park == ("ahead", "urgent")


def test_who_is_late_already_is_parked_before_who_can_be_on_time() -> None:
    residents = [resident("late", 99.0), resident("ahead", 140.0)]
    s = snapshot(free_blocks=0, growth_blocks=1, num_resident=2, resident=residents)
    assert decide(s).park == ("late",)
    assert decide(changed(s, slo_scheduling=False)).park == ("ahead",), "whoever came last"


def test_less_weight_is_parked_before_more_laxity() -> None:
    residents = [resident("vip", 200.0, weight=4), resident("batch", 101.0, weight=1)]
    assert decide(snapshot(free_blocks=0, growth_blocks=1, num_resident=2, resident=residents)).park == ("batch",)


def test_no_more_residents_are_parked_than_the_growth_needs() -> None:
    residents = [resident(f"r{i}", 101 + i) for i in range(6)]
    s = snapshot(free_blocks=1, num_resident=6, resident=residents)
    assert decide(changed(s, growth_blocks=1)).park == ()
    assert decide(changed(s, growth_blocks=2)).park == ("r5",)
    assert decide(changed(s, growth_blocks=11)).park == ("r5",)
    assert decide(changed(s, growth_blocks=12)).park == ("r5", "r4")


def test_of_several_residents_one_always_goes_on() -> None:
    residents = [resident(f"r{i}", 101 + i) for i in range(3)]
    s = snapshot(free_blocks=0, growth_blocks=50, num_resident=3, resident=residents)
    assert decide(s).park == ("r2", "r1")


def test_who_must_not_be_parked_is_not() -> None:
    residents = [resident("a", 105, can_park=False), resident("b", 101), resident("c", 102)]
    assert decide(snapshot(free_blocks=0, growth_blocks=1, num_resident=3, resident=residents)).park == ("c",)


def test_who_does_not_fit_host_memory_is_passed_over_for_one_who_does() -> None:
    residents = [resident("large", 109, num_blocks=30), resident("small", 101, num_blocks=4), resident("x", 100)]
    s = snapshot(free_blocks=0, growth_blocks=1, num_resident=3, resident=residents, free_host_blocks=8)
    assert decide(s).park == ("small",)
    assert decide(changed(s, free_host_blocks=3)).reasons == {"large": Reason.NO_ROOM_TO_PARK}
    assert decide(changed(s, free_host_blocks=3)).recompute == ("large",)
    assert decide(changed(s, free_host_blocks=3, is_paused=True)).reasons == {}, "it could not come back"
    stored = [residents[0]._replace(num_stored=22), *residents[1:]]
    assert decide(changed(s, resident=stored)).park == ("large",), "only what is not stored yet takes room"


def test_who_fills_the_pool_is_not_parked_for_it_could_never_be_fetched() -> None:
    """The last resident goes on, whatever is short, but for one that needs a block more than there are."""
    alone = snapshot(free_blocks=0, growth_blocks=1, num_resident=1, pool_blocks=40)
    assert decide(changed(alone, resident=[resident("a", 101, num_blocks=40)])).reasons == {
        "a": Reason.LONGER_THAN_POOL
    }
    assert decide(changed(alone, resident=[resident("a", 101, num_blocks=40)])).recompute == ("a",)
    paused = changed(alone, resident=[resident("a", 101, num_blocks=40)], is_paused=True)
    assert (decide(paused).park, decide(paused).recompute) == ((), ())


def test_who_fills_the_floor_and_needs_no_more_is_parked_from_a_pool_above_it() -> None:
    residents = [resident("large", 109, num_blocks=40), resident("x", 100)]
    above = {"pool_blocks": 40, "blocks_in_service": 60, "free_blocks": 0, "growth_blocks": 1}
    s = snapshot(**above, num_resident=2, resident=residents)
    assert decide(s).reasons == {"large": Reason.LONGER_THAN_POOL}
    assert decide(changed(s, longest_tokens=40 * BLOCK)).reasons == {"large": Reason.POOL_SHORT}


def test_a_step_that_parks_for_want_of_blocks_lets_nobody_into_the_pool() -> None:
    s = snapshot(
        free_blocks=1,
        growth_blocks=2,
        num_resident=2,
        resident=[resident("a", 101), resident("b", 102)],
        parked=[parked("p", blocks=1)],
        waiting=[prompt("w"), prompt("pool only", can_layer=False)],
    )
    decision = decide(s)
    assert decision.park == ("b",)
    assert decision.fetch == ()
    assert admitted(decision) == [("w", True)], "the zone is another door"
    assert decision.waits == {"p": Reason.VICTIMS_LEAVE, "pool only": Reason.VICTIMS_LEAVE}


def test_a_victim_is_computed_again_where_that_costs_less_than_two_copies() -> None:
    """160 tokens take 16 ms to compute; 10 blocks take 5 ms a copy, or 10."""
    residents = [resident("a", 101), resident("b", 102)]
    s = snapshot(free_blocks=0, growth_blocks=1, num_resident=2, resident=residents)
    fast, slow = changed(s, cost=cost()), changed(s, cost=cost(block_copy_s=0.001))
    assert (decide(fast).park, decide(fast).recompute) == (("b",), ())
    assert (decide(slow).park, decide(slow).recompute) == ((), ("b",))
    assert decide(slow).reasons == {"b": Reason.RECOMPUTE_CHEAPER}
    assert decide(changed(slow, free_host_blocks=0)).recompute == ("b",), "no host memory needed"
    stored = [residents[0], residents[1]._replace(num_stored=10)]
    assert decide(changed(slow, resident=stored)).park == ("b",), "one copy is left, of two"
    assert decide(changed(s, cost=None)).park == ("b",)


def test_who_could_not_be_computed_again_is_parked_even_where_that_is_dearer() -> None:
    """Regression: a seeded request gave its KV up of free will, and was refused in mid-stream for its length."""
    residents = [resident("a", 101), resident("b", 102, cannot_recompute=True)]
    s = snapshot(free_blocks=0, growth_blocks=1, num_resident=2, resident=residents, cost=cost(block_copy_s=0.001))
    assert (decide(s).park, decide(s).recompute) == (("b",), ())
    assert decide(s).reasons == {"b": Reason.POOL_SHORT}


def test_who_could_not_be_computed_again_gives_its_kv_up_after_all_others() -> None:
    residents = [resident("a", 101), resident("b", 102, cannot_recompute=True), resident("c", 100.5)]
    s = snapshot(free_blocks=0, growth_blocks=1, num_resident=3, resident=residents, free_host_blocks=0)
    assert decide(s).recompute == ("a",)
    assert decide(changed(s, cost=cost(block_copy_s=0.001))).recompute == ("a",)
    assert decide(changed(s, growth_blocks=11)).recompute == ("a", "c")
    only = [resident("a", 101, can_park=False), resident("b", 102, cannot_recompute=True)]
    assert decide(changed(s, resident=only)).recompute == ("b",), "or the pool would stay short"


# Making room ----------------------------------------------------------------------------------------------------------

URGENT = parked("claim", NOW_S + 0.03, weight=2.0)
"""Its latest time to go on is three steps away."""
ROOMY: dict[str, Any] = {
    "parked": [URGENT],
    "resident": [resident("patient", 105.0), resident("other", 100.02)],
    "num_resident": 2,
    "free_blocks": 4,
    "cost": cost(),
}


def test_room_is_made_for_a_claim_about_to_be_late_by_one_who_can_afford_it() -> None:
    decision = decide(snapshot(**ROOMY))
    assert decision.park == ("patient",)
    assert decision.made_room
    assert decision.reasons == {"patient": Reason.MAKES_ROOM}
    assert decision.waits == {"claim": Reason.POOL_FULL}, "its blocks are free with the next step"


def test_room_is_not_made_by_one_who_fills_the_pool() -> None:
    fills = [resident("patient", 105.0, num_blocks=40), resident("other", 100.02)]
    assert decide(snapshot(**{**ROOMY, "resident": fills, "pool_blocks": 41})).park == ("patient",)
    assert decide(snapshot(**{**ROOMY, "resident": fills, "pool_blocks": 40})).park == ()
    longest = {"pool_blocks": 40, "longest_tokens": 40 * BLOCK}
    assert decide(snapshot(**{**ROOMY, "resident": fills, **longest})).park == ("patient",), "it needs no more"


def test_room_is_made_by_one_who_is_late_anyway_and_weighs_less() -> None:
    s = snapshot(**{**ROOMY, "resident": [resident("late", 99.0), resident("other", 100.02)]})
    assert decide(s).park == ("late",)
    same_weight = [resident("late", 99.0, weight=2.0), resident("other", 100.02)]
    assert decide(changed(s, resident=same_weight)).park == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"parked": [URGENT._replace(deadline_s=NOW_S + 0.05)]},  # not urgent yet
        {"parked": [URGENT._replace(deadline_s=NOW_S - 0.01)]},  # late already
        {"parked": [URGENT._replace(tokens_left=1000)]},  # stays for 10 s, more than the patient one has
        {"parked": [URGENT._replace(num_blocks=18)]},  # both would have to leave
        {"parked": [URGENT._replace(rank=1)]},  # of worse rank than they
        {"can_exchange": False},  # the last exchange is still under way
        {"cost": None},
        {"slo_scheduling": False},
        {"free_host_blocks": 9},
        {"resident": [resident("patient", 100.02), resident("other", 100.02)]},  # would be late itself
        {"resident": [resident("patient", 105.0, steps_resident=31), resident("other", 100.02)]},  # came just now
        {"resident": [resident("patient", 105.0, can_park=False), resident("other", 100.02)]},
        {"free_blocks": 100, "free_slots": 0},  # it is not blocks that it waits for
    ],
)
def test_room_is_not_made_otherwise(changes: dict[str, Any]) -> None:
    decision = decide(snapshot(**{**ROOMY, **changes}))
    assert decision.park == ()
    assert not decision.made_room


# Storing ahead --------------------------------------------------------------------------------------------------------

GROWING: dict[str, Any] = {
    "resident": [resident("urgent", 101.0, tokens_left=200), resident("patient", 105.0, tokens_left=200)],
    "num_resident": 2,
    "free_blocks": 2,
}
"""In 64 steps they need 8 more blocks."""


def test_the_likeliest_victim_is_stored_ahead_when_the_pool_is_going_to_be_short() -> None:
    decision = decide(snapshot(**GROWING))
    assert decision.store_ahead == (StoreAhead("patient", 10),)
    assert decision.park == ()


def test_who_is_stored_to_the_half_is_not_stored_again_and_the_next_only_if_needed() -> None:
    s = snapshot(**GROWING)
    half = [s.load.resident[0], s.load.resident[1]._replace(num_stored=5)]
    assert decide(changed(s, resident=half)).store_ahead == ()
    less = [s.load.resident[0], s.load.resident[1]._replace(num_stored=4)]
    assert decide(changed(s, resident=less)).store_ahead == (StoreAhead("patient", 6),)
    small = [s.load.resident[0], s.load.resident[1]._replace(num_stored=5, num_blocks=3)]
    assert decide(changed(s, resident=small)).store_ahead == (StoreAhead("urgent", 10),), "three blocks are not enough"


@pytest.mark.parametrize(
    "changes",
    [
        {"free_blocks": 8},
        {"free_host_blocks": 9},
        {"num_resident": 1, "resident": GROWING["resident"][:1], "free_blocks": 0},
        {"resident": [r._replace(tokens_left=16) for r in GROWING["resident"]]},
        {"resident": [r._replace(can_park=False) for r in GROWING["resident"]]},
    ],
)
def test_nothing_is_stored_ahead_without_need_or_room(changes: dict[str, Any]) -> None:
    assert decide(snapshot(**{**GROWING, **changes})).store_ahead == ()


def test_nothing_is_stored_ahead_while_the_room_drains_for_one_overtaken_too_often() -> None:
    """It waits for host memory, which a store ahead would take again."""
    s = snapshot(**GROWING, waiting=[prompt("large", 75)], free_host_blocks=HOST // 2 + 10, zone_blocks=ZONE)
    s = changed(s, hits={"large": PrefixHit(36)})
    assert decide(s).waits == {"large": Reason.HOST_FULL}
    assert decide(s).store_ahead == (StoreAhead("patient", 10),)
    assert decide(changed(s, overtaken={"large": MOST})).store_ahead == ()


def test_nothing_is_stored_ahead_in_a_step_that_parks() -> None:
    decision = decide(snapshot(**{**GROWING, "free_blocks": 0, "growth_blocks": 1}))
    assert decision.park == ("patient",)
    assert decision.store_ahead == ()


def test_layered_requests_that_leave_do_not_count_as_residents_that_leave() -> None:
    s = snapshot(
        free_blocks=0,
        growth_blocks=3,
        num_resident=3,
        resident=[resident("a"), resident("b"), resident("c")],
        layered=[LayeredRequest("l0", True, 10), LayeredRequest("l1", True, 10)],
    )
    parked_now = decide(s).park
    assert parked_now[:2] == ("l0", "l1")
    assert len(parked_now) == 3


def test_of_two_ranks_the_worse_one_is_parked_whatever_the_laxity() -> None:
    vip = resident("vip", deadline_s=NOW_S + 1000, rank=-10)
    bulk = resident("bulk", deadline_s=NOW_S + 1, rank=10)
    other = resident("other", deadline_s=NOW_S + 1, rank=-10)
    s = snapshot(free_blocks=0, growth_blocks=1, num_resident=3, resident=[vip, bulk, other])
    assert decide(s).park == ("bulk",)


def test_while_paused_nobody_gives_up_kv_that_could_not_be_computed_again() -> None:
    s = snapshot(
        free_blocks=0,
        growth_blocks=1,
        num_resident=2,
        resident=[resident("a", num_tokens=1), resident("b", num_tokens=1)],
        cost=cost(),
        is_paused=True,
    )
    assert decide(s).recompute == ()
    assert len(decide(s).park) == 1
