"""Which segments come and go before a step, and who leaves those that go."""

from __future__ import annotations

from typing import Any

import pytest

from layerkv.scheduler.elastic import MOST_LEAVING, PoolView, Resize, resize
from layerkv.scheduler.policy import decide
from layerkv.scheduler.reasons import Reason
from tests.fakes.snapshots import admitted, changed, cost, parked, prompt, resident, snapshot

BUSY = PoolView(
    segment_blocks=10,
    ceiling=40,
    limit=20,
    in_service=[(segment, 5) for segment in range(1, 10)],
    leaving=(),
    num_arriving=0,
    num_releasing=0,
    used_blocks=50,
    free_blocks=50,
    kept_blocks=0,
    wanted_blocks=0,
    parkable_blocks=0,
    ahead=0,
    idle_s=0.0,
    idle_after_s=2.0,
)


def resized(**changes: Any) -> Resize:
    return resize(BUSY._replace(**changes))


def test_with_blocks_for_all_nothing_moves_whatever_the_limit() -> None:
    for limit in (10, 20, 40):
        decided = resized(limit=limit)
        assert (decided.arrive, decided.leave, decided.stay, decided.vacate) == (0, (), (), ())
        assert (decided.need, decided.like) == (5, 10), "what is there is of use for caches"


def test_while_there_are_requests_it_likes_to_be_allowed_what_the_next_one_needs() -> None:
    assert resized(ahead=3).like == 13
    assert resized(ahead=3).arrive == 0, "nothing is held ahead"
    assert resized(ahead=3, wanted_blocks=75).like == 16
    for idle_s in (0.1, 2.0):
        assert resized(ahead=3, idle_s=idle_s).like == resized(idle_s=idle_s).like


@pytest.mark.parametrize(
    ("changes", "arrive"),
    [
        ({"wanted_blocks": 51}, 1),
        ({"wanted_blocks": 75}, 3),
        ({"wanted_blocks": 75, "num_arriving": 2}, 1),
        ({"wanted_blocks": 30, "kept_blocks": 30}, 1),
        ({"wanted_blocks": 900}, 10),
        ({"wanted_blocks": 900, "limit": 10}, 0),
        ({"wanted_blocks": 900, "num_releasing": 8}, 2),
    ],
)
def test_it_grows_by_what_those_who_wait_lack_and_as_the_limit_allows(changes: dict[str, int], arrive: int) -> None:
    assert resized(**changes).arrive == arrive


def test_the_emptiest_leave_first_a_few_in_a_step_and_then_nothing_arrives() -> None:
    used = [0, 9, 3, 0, 8]
    segments = list(enumerate(used, start=1))
    decided = resized(in_service=segments, limit=3, used_blocks=30, free_blocks=30, wanted_blocks=500)
    assert decided.leave == (4, 1, 3), "of equally empty ones the highest"
    assert decided.vacate == (3,)
    assert decided.arrive == 0
    many = [(segment, 0) for segment in range(1, 30)]
    assert len(resized(in_service=many, limit=1).leave) == MOST_LEAVING


def test_blocks_that_prompts_under_way_count_on_do_not_leave() -> None:
    assert len(resized(limit=5, kept_blocks=41).leave) == 1
    assert resized(limit=5, kept_blocks=46).leave == ()
    assert len(resized(limit=5, kept_blocks=0, free_blocks=0).leave) == 5, "who decodes is parked for want of blocks"


def test_a_full_segment_leaves_though_more_is_counted_on_than_is_free() -> None:
    """Else nothing would, as long as anybody is on the way back from host memory."""
    decided = resized(in_service=[(1, 4), (2, 10), (3, 10)], limit=2, used_blocks=25, free_blocks=6, kept_blocks=9)
    assert (decided.leave, decided.vacate) == ((3, 2), (3, 2))


def test_a_fuller_segment_leaves_where_an_emptier_one_must_stay_and_the_rest_is_owed() -> None:
    decided = resized(in_service=[(1, 0), (2, 8), (3, 9)], limit=1, used_blocks=18, free_blocks=22, kept_blocks=18)
    assert decided.leave == (2, 3), "with 4 blocks to spare, 2 and 1 leave"
    assert decided.owed_blocks == 10


def test_what_leaves_stays_if_it_may_the_fullest_first() -> None:
    leaving = [(10, 2), (11, 7), (12, 4)]
    decided = resized(leaving=leaving, limit=12)
    assert decided.stay == (11, 12)
    assert decided.vacate == (10,)
    assert resized(leaving=leaving, limit=10).stay == ()


def test_an_engine_that_nobody_uses_keeps_one_segment() -> None:
    empty = {"in_service": [(segment, 0) for segment in range(1, 4)], "used_blocks": 1, "free_blocks": 39}
    assert resized(**empty, idle_s=1.9).leave == ()
    decided = resized(**empty, idle_s=2.0)
    assert len(decided.leave) == 3
    assert (decided.need, decided.like, decided.can_leave) == (1, 1, 0)


def test_an_engine_without_requests_gives_back_all_at_once() -> None:
    empty = {"in_service": [(segment, 0) for segment in range(1, 31)], "used_blocks": 1, "free_blocks": 300, "limit": 3}
    assert len(resized(**empty, idle_s=0.0).leave) == MOST_LEAVING
    assert len(resized(**empty, idle_s=0.1).leave) == 31 - 3


@pytest.mark.parametrize(
    ("wanted", "parkable", "need", "can_leave"),
    [
        (10_000, 0, 40, 5),  # half of what it holds is free, whoever waits for it
        (10_000, 20, 40, 7),
        (10_000, 21, 40, 7),  # nobody can have a part of a segment
        (10_000, 50, 40, 9),
        (0, 0, 5, 0),
        (0, 50, 5, 4),
        (0, 10_000, 5, 4),
    ],
)
def test_free_blocks_and_those_of_who_can_be_parked_can_leave(
    wanted: int, parkable: int, need: int, can_leave: int
) -> None:
    decided = resized(wanted_blocks=wanted, parkable_blocks=parkable)
    assert (decided.need, decided.can_leave) == (need, can_leave)


# Who leaves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["slo", "fluid"])
def test_who_has_blocks_in_memory_that_leaves_is_parked(policy: str) -> None:
    s = snapshot(
        policy=policy, cost=cost(), resident=[resident("a", 10), resident("b", 10)], num_resident=2, vacating={"a": 4}
    )
    decision = decide(s)
    assert decision.park == ("a",)
    assert decision.reasons["a"] is Reason.SEGMENT_LEAVES
    assert decide(changed(s, vacating={})).park == ()


def test_without_room_in_host_memory_they_go_on_where_they_are() -> None:
    s = snapshot(resident=[resident("a", 10), resident("b", 10)], num_resident=2, vacating={"a": 4, "b": 4})
    decision = decide(changed(s, free_host_blocks=10))
    assert len(decision.park) == 1
    assert decision.recompute == ()
    assert decide(changed(s, free_host_blocks=9)).park == ()


@pytest.mark.parametrize("policy", ["slo", "fluid"])
def test_to_compare_with_they_wait_or_give_their_kv_up(policy: str) -> None:
    both = [resident("a", 10), resident("b", 10)]
    s = snapshot(policy=policy, cost=cost(), resident=both, num_resident=2, vacating={"a": 4})
    waiting = decide(changed(s, give="wait"))
    assert (waiting.park, waiting.recompute) == ((), ())
    recomputing = decide(changed(s, give="recompute"))
    assert (recomputing.park, recomputing.recompute) == ((), ("a",))
    assert recomputing.reasons["a"] is Reason.SEGMENT_LEAVES
    without_host = changed(s, give="recompute", free_host_blocks=0)
    assert decide(without_host).recompute == ("a",), "it needs no host memory"


@pytest.mark.parametrize("give", ["park", "wait", "recompute"])
def test_whom_a_recompute_would_end_is_parked_whatever_is_compared(give: str) -> None:
    s = snapshot(
        resident=[resident("a", 10, cannot_recompute=True), resident("b", 10)],
        num_resident=2,
        vacating={"a": 4, "b": 4},
    )
    decision = decide(changed(s, give=give))
    assert "a" not in decision.recompute
    assert ("a" in decision.park) is (give != "wait")
    assert ("b" in decision.recompute) is (give == "recompute")
    paused = decide(changed(s, give=give, is_paused=True))
    assert paused.recompute == ()


@pytest.mark.parametrize("give", ["park", "recompute"])
def test_blocks_that_they_leave_relieve_a_pool_that_is_short(give: str) -> None:
    both = {"resident": [resident("a", 10), resident("b", 10)], "num_resident": 2, "growth_blocks": 2, "free_blocks": 0}
    decision = decide(changed(snapshot(**both, vacating={"a": 4}, blocks_in_service=20), give=give))
    assert (*decision.park, *decision.recompute) == ("a",), "six of its blocks are in memory that stays"


def test_while_they_leave_nobody_comes_in_by_that_door() -> None:
    s = snapshot(resident=[resident("a", 10)], num_resident=1, vacating={"a": 4}, parked=[parked("p", 5)])
    assert decide(s).fetch == ()
    assert decide(changed(s, vacating={})).fetch == ("p",)


def test_nobody_new_counts_on_blocks_that_are_owed() -> None:
    s = snapshot(cost=cost(), waiting=[prompt("p", 10)], parked=[parked("q", 10)], free_blocks=25)
    assert decide(s).fetch == ("q",)
    assert admitted(decide(s)) == [("p", False)]
    owed = decide(changed(s, owed_blocks=20))
    assert owed.fetch == ()
    assert ("p", False) not in admitted(owed)


def test_of_a_pool_that_has_shrunk_the_last_leaves_too_when_it_needs_more() -> None:
    both = {"resident": [resident("a", 10), resident("b", 10)], "num_resident": 2, "growth_blocks": 2, "free_blocks": 0}
    assert decide(snapshot(**both, vacating={"a": 10})).park == ("a",), "the other is the last one"
    shrunk = snapshot(**both, vacating={"a": 10}, blocks_in_service=20)
    assert sorted(decide(shrunk).park) == ["a", "b"], "none of the first one's blocks come free"
    assert len(decide(changed(shrunk, vacating={"a": 2})).park) == 1, "what others can have of it suffices"


def test_at_rest_an_engine_needs_what_it_holds_and_offers_nothing():
    decided = Resize(arrive=3, leave=(4,), stay=(5,), vacate=(4,), need=7, like=9, can_leave=6, owed_blocks=2)
    assert decided.at_rest(8) == Resize(leave=(4,), stay=(5,), vacate=(4,), need=8, like=8, owed_blocks=2)
