"""RESIDENT if that hurts nobody, LAYERED if that helps somebody, and never at all for a prompt that cannot run here."""

from __future__ import annotations

from typing import Any

import pytest

from layerkv.core.groups import Group
from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.policy import decide
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.refusals import refusal_text
from layerkv.scheduler.snapshot import LayeredRequest, PrefixHit, Snapshot
from tests.fakes.snapshots import BLOCK, POOL, admitted, changed, cost, crowd, parked, prompt, resident, snapshot

# The pool or the zone -------------------------------------------------------------------------------------------------


def test_a_prompt_runs_resident_when_everything_fits() -> None:
    decision = decide(snapshot(waiting=[prompt("a")]))
    assert admitted(decision) == [("a", False)]
    assert decision.reasons == {"a": Reason.FITS}


def test_a_prompt_runs_layered_when_the_pool_is_full() -> None:
    decision = decide(snapshot(waiting=[prompt("a")], free_blocks=3, **crowd(4)))
    assert admitted(decision) == [("a", True)]
    assert decision.reasons == {"a": Reason.POOL_CONTENDED}


def test_a_prompt_runs_layered_when_by_the_forecast_the_pool_will_be_full() -> None:
    grows = [resident(f"r{i}", tokens_left=640) for i in range(2)]  # by 40 blocks each
    s = snapshot(waiting=[prompt("a", 20, tokens_left=640)], resident=grows, num_resident=2, free_blocks=80)
    assert admitted(decide(s)) == [("a", True)]
    assert admitted(decide(changed(s, waiting=[prompt("a", 1, tokens_left=1)]))) == [("a", False)]


def test_modes_mean_what_they_say() -> None:
    full = snapshot(waiting=[prompt("a")], free_blocks=2, **crowd(3))
    assert admitted(decide(changed(full, mode="resident"))) == []
    assert decide(changed(full, mode="resident")).waits == {"a": Reason.POOL_FULL}
    assert admitted(decide(snapshot(waiting=[prompt("a")], mode="layered"))) == [("a", True)]


def test_with_host_memory_full_a_prompt_runs_as_in_stock_vllm() -> None:
    s = snapshot(waiting=[prompt("a")], free_host_blocks=2, mode="layered")
    assert admitted(decide(s)) == [("a", False)]
    assert decide(s).reasons == {"a": Reason.HOST_FULL_RESIDENT}
    full = changed(s, free_blocks=2, num_resident=3)
    assert admitted(decide(full)) == []
    assert decide(full).waits == {"a": Reason.HOST_FULL}


def test_a_prompt_is_not_layered_if_pool_blocks_come_sooner_than_its_copies_would_take() -> None:
    """A resident of 10 blocks ends in 3 steps, 30 ms; the prompt's 10 blocks take 5 ms or half a second to fetch."""
    s = snapshot(waiting=[prompt("a")], free_blocks=4, **crowd(1, tokens_left=3))
    slow, fast = cost(block_copy_s=0.05), cost()
    assert decide(changed(s, cost=slow)).waits == {"a": Reason.WAIT_IS_SHORTER}
    assert admitted(decide(changed(s, cost=fast))) == [("a", True)]
    assert admitted(decide(s)) == [("a", True)], "costs are not known"
    assert admitted(decide(changed(s, cost=slow, mode="layered"))) == [("a", True)]


@pytest.mark.parametrize(
    "changes",
    [
        {"waiting": [prompt("a", deadline_s=100.04)]},  # 30 ms, and 16 ms of prefill
        {"parked": [parked("first")]},  # the blocks will go to another
        crowd(1, tokens_left=3, num_blocks=2),  # not enough of them
    ],
)
def test_waiting_for_pool_blocks_must_be_in_time_and_of_use(changes: dict[str, Any]) -> None:
    s = snapshot(
        **{
            "waiting": [prompt("a")],
            "free_blocks": 4,
            "cost": cost(block_copy_s=0.05),
            **crowd(1, tokens_left=3),
            **changes,
        }
    )
    assert admitted(decide(s)) == [("a", True)]


STATES = {
    "groups": (Group(BLOCK, 1), Group(1 << 20, 1, window=2, is_state=True, most_blocks=1)),
    "zone_block_tokens": BLOCK,
}


@pytest.mark.parametrize(
    "takes", [STATES, {"hits": {"a": PrefixHit(num_blocks=1, num_evictable=1)}}], ids=["states", "hits"]
)
def test_nobody_passes_who_is_next_in_the_pool_by_the_blocks_that_layered_prompts_take_there(
    takes: dict[str, Any],
) -> None:
    """It needs all of the pool, and there would always be one prompt more."""
    first = parked("first", blocks=POOL)
    s = snapshot(waiting=[prompt("a")], parked=[first], free_blocks=POOL - 1, **takes)
    assert admitted(decide(s)) == [("a", True)]
    overdue = changed(s, overtaken={"first": PolicyLimits().max_overtakes})
    assert admitted(decide(overdue)) == []
    assert decide(overdue).waits["a"] is Reason.BEHIND_OVERDUE
    assert decide(changed(overdue, free_blocks=POOL)).fetch == ("first",)
    without = changed(overdue, hits={}, groups=())
    assert admitted(decide(without)) == [("a", True)], "the zone is no part of the pool"


# A step's tokens ------------------------------------------------------------------------------------------------------


def test_a_layered_prompt_is_not_begun_with_a_small_rest_of_the_budget() -> None:
    s = snapshot(waiting=[prompt("a", 30)], free_blocks=0, prefilling_tokens=1700, **crowd(4))
    assert admitted(decide(s)) == []
    assert decide(s).waits == {"a": Reason.SMALL_REST}


def test_a_long_prompt_may_begin_with_half_a_step_but_not_with_less() -> None:
    s = snapshot(waiting=[prompt("a", 40)], free_blocks=0, budget_tokens=200, **crowd(3))
    assert admitted(decide(changed(s, prefilling_tokens=100))) == [("a", True)]
    assert admitted(decide(changed(s, prefilling_tokens=101))) == []


def test_without_tokens_left_nobody_starts() -> None:
    decision = decide(snapshot(waiting=[prompt("a"), prompt("late", deadline_s=99.0)], prefilling_tokens=2048))
    assert admitted(decision) == []
    assert decision.waits == {"a": Reason.NO_TOKENS_LEFT, "late": Reason.LATE}


def test_what_host_memory_has_of_a_prompt_leaves_tokens_to_the_next_one_if_it_is_loaded() -> None:
    """Wherever it starts."""
    s = snapshot(waiting=[prompt("a", 20), prompt("b", 10)], budget_tokens=320)
    assert admitted(decide(s)) == [("a", False)]
    found = changed(s, hits={"a": PrefixHit(num_host_blocks=1)})
    assert admitted(decide(found)) == [("a", False), ("b", False)]
    layered = changed(found, free_blocks=0, budget_tokens=304 + 159, **crowd(3))
    assert admitted(decide(layered)) == [("a", True)]
    assert admitted(decide(changed(layered, budget_tokens=304 + 160))) == [("a", True), ("b", True)]


def test_a_layered_prompt_takes_no_free_host_blocks_for_what_others_hold_of_its_beginning() -> None:
    s = snapshot(waiting=[prompt("a", 20), prompt("b", 20)], free_blocks=0, free_host_blocks=25, **crowd(3))
    assert admitted(decide(s)) == [("a", True)]
    hits = {name: PrefixHit(num_host_blocks=10, num_host_held=held) for name, held in (("a", 10), ("b", 5))}
    assert admitted(decide(changed(s, hits=hits))) == [("a", True), ("b", True)]
    assert admitted(decide(changed(s, hits=hits, free_host_blocks=24))) == [("a", True)]
    assert decide(changed(s, hits=hits)).admit[1].host_blocks == 20, "its table has a place for each"


# The zone -------------------------------------------------------------------------------------------------------------


def test_zone_blocks_serve_the_next_prompt_in_the_same_step_unless_frees_are_deferred() -> None:
    layered = [LayeredRequest("done", prefill_done=True, num_blocks=30, num_zone_blocks=30)]
    s = snapshot(layered=layered, waiting=[prompt("a", 20)], free_blocks=0, free_zone_blocks=10, **crowd(3))
    assert admitted(decide(s)) == [("a", True)]
    deferred = decide(changed(s, frees_are_deferred=True))
    assert admitted(deferred) == []
    assert deferred.waits == {"a": Reason.ZONE_FULL}


@pytest.mark.parametrize("debt", [{"reserved_blocks": 5}, {"growth_blocks": 5}])
def test_a_prompt_goes_to_the_zone_though_the_pool_owes_blocks(debt: dict[str, int]) -> None:
    """A layered prompt without prefix hits takes nothing from the pool: what the pool lacks is not its affair."""
    s = snapshot(waiting=[prompt("a")], free_blocks=2, **crowd(1), **debt)
    assert admitted(decide(s)) == [("a", True)]


def test_prefix_hits_count_for_what_they_are() -> None:
    s = snapshot(waiting=[prompt("a", 50)], free_blocks=8, hits={"a": PrefixHit(20, 5)}, **crowd(2))
    [admission] = decide(s).admit
    assert (admission.layered, admission.zone_blocks) == (True, 30)


def test_prefix_hits_that_nobody_holds_cost_pool_blocks() -> None:
    s = snapshot(waiting=[prompt("a", 30)], free_blocks=9, **crowd(3))
    assert admitted(decide(changed(s, hits={"a": PrefixHit(20, 9)}))) == [("a", True)]
    assert admitted(decide(changed(s, hits={"a": PrefixHit(20, 10)}))) == []
    assert admitted(decide(changed(s, hits={"a": PrefixHit(20, 0)}, free_blocks=18))) == [("a", False)]


def test_prefix_hits_make_a_prompt_fit_the_zone_that_would_not_without() -> None:
    s = snapshot(waiting=[prompt("a", 60)], free_blocks=9, **crowd(3))
    assert admitted(decide(s)) == []
    [admission] = decide(changed(s, hits={"a": PrefixHit(25, 0)})).admit
    assert (admission.layered, admission.zone_blocks) == (True, 35)


# Refusals -------------------------------------------------------------------------------------------------------------


def refused(s: Snapshot) -> dict[str, Reason]:
    return {refusal.request_id: refusal.reason for refusal in decide(s).refuse}


def test_a_prompt_that_can_never_run_is_refused_and_told_why_and_what_to_raise() -> None:
    s = snapshot(waiting=[prompt("a", 101)])
    decision = decide(s)
    assert decision.admit == ()
    [refusal] = decision.refuse
    assert refusal == ("a", Reason.NEVER_FITS)
    assert "101 KV blocks" in refusal_text(s, refusal)
    assert "host_memory" in refusal_text(s, refusal)


def test_a_prompt_too_long_for_the_pool_is_refused_in_resident_mode_and_if_it_cannot_be_layered() -> None:
    long = prompt("a", POOL + 1)
    assert refused(snapshot(waiting=[long], mode="resident")) == {"a": Reason.NEVER_FITS}
    assert refused(snapshot(waiting=[long._replace(can_layer=False)])) == {"a": Reason.NEVER_FITS}
    assert refused(snapshot(waiting=[prompt("a", POOL)], mode="resident")) == {}


def test_a_prompt_longer_than_the_pool_runs_only_where_it_may_decode_in_the_zone() -> None:
    """Parked after its first token it could never be fetched: it would hang, and hold up every other claim."""
    s = snapshot(waiting=[prompt("a", 30)], pool_blocks=20, free_blocks=20)
    assert admitted(decide(changed(s, long_contexts=True))) == [("a", True)]
    assert decide(s).admit == ()
    assert refused(s) == {"a": Reason.NEVER_FITS}


def test_a_refused_prompt_does_not_keep_the_next_one_waiting() -> None:
    s = snapshot(waiting=[prompt("never", POOL + 50, 101.0), prompt("a", 5, 102.0)])
    assert [admission.request_id for admission in decide(s).admit] == ["a"]
    assert refused(s) == {"never": Reason.NEVER_FITS}


def test_a_late_prompt_is_refused_only_where_its_class_asks_for_that() -> None:
    late = prompt("late", deadline_s=97.5)
    s = snapshot(waiting=[late._replace(may_refuse=True)])
    assert refused(s) == {"late": Reason.OVERLOAD}
    assert "2.5 s late already" in refusal_text(s, decide(s).refuse[0])
    assert refused(snapshot(waiting=[late])) == {}
    assert refused(snapshot(waiting=[prompt("on time", may_refuse=True)])) == {}
    assert refused(changed(s, slo_scheduling=False)) == {}


def test_a_prompt_that_is_going_to_be_late_is_refused_before_it_is() -> None:
    late = prompt("late", deadline_s=101.0, prefill_cost_s=2.0, may_refuse=True)
    s = snapshot(waiting=[late], cost=cost(step_s=0.0))
    assert refused(s) == {"late": Reason.OVERLOAD}
    assert "late already" not in refusal_text(s, decide(s).refuse[0])
    assert refused(changed(s, waiting=[late._replace(deadline_s=103.0)])) == {}


# Longer than the pool ------------------------------------------------------------------------------------------------

BIG = 2 * POOL


def streaming(**changes: Any) -> Snapshot:
    """An engine whose zone and host memory hold a request that is twice as long as the pool."""
    wide = {"zone_blocks": 300, "free_zone_blocks": 300, "host_blocks": 300, "free_host_blocks": 300}
    return snapshot(**{**wide, "long_contexts": True, "budget_tokens": 10_000, **changes})


@pytest.mark.parametrize("blocks", [10, BIG])
def test_what_may_outgrow_the_pool_runs_layered_with_room_for_all_of_it(blocks: int) -> None:
    decision = decide(streaming(waiting=[prompt("a", blocks, most_blocks=BIG)]))
    [admission] = decision.admit
    assert (admission.layered, admission.zone_blocks, admission.host_blocks) == (True, BIG, BIG)


def test_what_is_not_expected_to_outgrow_the_pool_starts_there() -> None:
    assert admitted(decide(streaming(waiting=[prompt("a")]))) == [("a", False)]


def test_what_may_outgrow_the_pool_waits_for_zone_and_host_memory_and_never_goes_to_the_pool() -> None:
    waiting = [prompt("a", 10, most_blocks=BIG)]
    assert decide(streaming(waiting=waiting, free_zone_blocks=BIG - 1)).waits == {"a": Reason.ZONE_FULL}
    assert decide(streaming(waiting=waiting, free_host_blocks=BIG - 1)).waits == {"a": Reason.HOST_FULL}
    overtaken = streaming(waiting=waiting, free_zone_blocks=BIG - 1, overtaken={"a": 1000})
    assert admitted(decide(overtaken)) == []


def test_what_may_outgrow_the_pool_is_refused_where_nothing_could_ever_hold_it() -> None:
    for changes in ({"long_contexts": False}, {"zone_blocks": BIG - 1}, {"host_blocks": BIG - 1}):
        s = streaming(waiting=[prompt("a", 10, most_blocks=BIG)], **changes)
        [refusal] = decide(s).refuse
        assert refusal.reason is Reason.NEVER_FITS
        assert f"may need {BIG} KV blocks" in refusal_text(s, refusal)


def test_who_may_outgrow_the_pool_decodes_in_the_zone_whatever_happens() -> None:
    stays = LayeredRequest("a", True, 10, num_zone_blocks=10, needs_zone_block=True, outgrows_pool=True)
    for changes in ({}, {"long_contexts": False}, {"free_zone_blocks": 0, "waiting": [prompt("b")]}):
        assert decide(streaming(layered=[stays], **changes)).park == ()


def test_who_has_outgrown_the_pool_unexpectedly_is_not_parked_either() -> None:
    grown = LayeredRequest("a", True, POOL + 1, num_zone_blocks=POOL + 1)
    assert decide(streaming(layered=[grown])).park == ()
    assert decide(streaming(layered=[grown._replace(num_blocks=POOL)])).park == ("a",)


def test_what_outgrows_the_pool_may_be_overtaken_so_often_and_no_more() -> None:
    waiting = [prompt("long", 10, most_blocks=BIG), prompt("short", deadline_s=102.0)]
    s = streaming(waiting=waiting, free_zone_blocks=BIG - 1, slo_scheduling=False)
    assert decide(s).overtaken == ("long",)
    assert admitted(decide(s)) == [("short", False)]
    assert admitted(decide(changed(s, overtaken={"long": 64}))) == []
