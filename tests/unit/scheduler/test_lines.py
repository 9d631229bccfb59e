"""The two lines, for compute and for pool blocks: who comes first, and that nobody starves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.policy import decide
from layerkv.scheduler.reasons import Reason, Resource
from layerkv.scheduler.snapshot import LayeredRequest, ParkedRequest, WaitingRequest
from layerkv.scheduler.tracker import DeadlineQueue
from tests.fakes.snapshots import NOW_S, POOL, admitted, changed, cost, crowd, parked, prompt, resident, snapshot

MOST = PolicyLimits().max_overtakes

# The line for pool blocks ---------------------------------------------------------------------------------------------


def test_fetches_go_by_deadline_and_keep_headroom() -> None:
    s = snapshot(parked=[parked("urgent", 101.0), parked("later", 102.0)], **crowd(2))
    assert decide(changed(s, free_blocks=30)).fetch == ("urgent", "later")
    assert decide(changed(s, free_blocks=14)).fetch == ("urgent",)
    assert decide(changed(s, free_blocks=10)).fetch == ()
    assert decide(changed(s, free_blocks=10, num_resident=0, resident=())).fetch == ("urgent",)


def test_who_can_still_be_on_time_is_fetched_before_who_cannot() -> None:
    s = snapshot(parked=[parked("on time", 101.0), parked("late", 99.0)], **crowd(2))
    assert decide(changed(s, free_blocks=14)).fetch == ("on time",)
    assert decide(changed(s, free_blocks=14)).waits == {"late": Reason.POOL_FULL}
    arrival_order = changed(s, free_blocks=14, slo_scheduling=False)
    assert decide(arrival_order).fetch == ("late",), "without objectives, whoever came first"


def test_a_rank_goes_before_being_on_time() -> None:
    s = snapshot(parked=[parked("on time", 101.0, rank=1), parked("late", 99.0, rank=0)], free_blocks=14, **crowd(2))
    assert decide(s).fetch == ("late",)


def test_parked_requests_and_prompts_for_the_pool_share_one_line() -> None:
    waiting = [prompt("prompt", 10, 102.0, can_layer=False)]
    in_host = [parked("first", 101.0), parked("last", 103.0)]
    s = snapshot(waiting=waiting, parked=in_host, mode="resident", **crowd(1))
    by_room = {free: decide(changed(s, free_blocks=free)) for free in (14, 26, 38)}
    assert [(d.fetch, admitted(d)) for d in by_room.values()] == [
        (("first",), []),
        (("first",), [("prompt", False)]),
        (("first", "last"), [("prompt", False)]),
    ]


@pytest.mark.parametrize(("residents", "headroom_blocks"), [(0, 0), (1, 4), (3, 8), (4, 10)])
def test_headroom_is_kept_for_all_residents_and_the_one_who_comes(residents: int, headroom_blocks: int) -> None:
    """Two blocks are 32 tokens: with a step in flight and one to come, nobody is in want at once."""
    limits = PolicyLimits(headroom_tokens=32)
    s = snapshot(parked=[parked("p", blocks=20)], **crowd(residents))
    assert decide(changed(s, free_blocks=20 + headroom_blocks), limits).fetch == ("p",)
    assert decide(changed(s, free_blocks=20 + headroom_blocks - 1), limits).fetch == ()
    prompts = changed(s, parked=(), waiting=[prompt("w", 20)])
    assert admitted(decide(changed(prompts, free_blocks=20 + headroom_blocks), limits)) == [("w", False)]
    assert admitted(decide(changed(prompts, free_blocks=20 + headroom_blocks - 1), limits)) == [("w", True)]


def test_a_fetch_waits_if_the_forecast_says_that_it_would_soon_be_parked_again() -> None:
    """Two residents of 10 blocks that grow by 40 blocks each: 20 more fit now, not then."""
    grows = [resident(f"r{i}", tokens_left=640) for i in range(2)]
    s = snapshot(parked=[parked("p", blocks=20, tokens_left=640)], resident=grows, num_resident=2, free_blocks=80)
    assert decide(s).fetch == ()
    assert decide(changed(s, parked=[parked("p", blocks=1, tokens_left=1)])).fetch == ("p",)
    shorter = [r._replace(tokens_left=64) for r in grows]
    assert decide(changed(s, resident=shorter, parked=[parked("p", blocks=20, tokens_left=64)])).fetch == ("p",)


@pytest.mark.parametrize(("limits", "most_tokens"), [(PolicyLimits(), 373), (PolicyLimits(overcommit=1.0), 320)])
def test_by_the_forecast_the_pool_may_be_filled_a_tenth_more_than_it_holds(
    limits: PolicyLimits, most_tokens: int
) -> None:
    """Two residents of 10 blocks and a claim of 20 that all grow alike: 20 tokens each are 60 blocks, 23 are 70."""

    def fetches(tokens_left: int) -> tuple[str, ...]:
        residents = [resident(f"r{i}", tokens_left=tokens_left) for i in range(2)]
        claim = parked("p", blocks=20, tokens_left=tokens_left)
        s = snapshot(parked=[claim], resident=residents, num_resident=2, free_blocks=POOL - 20)
        return decide(s, limits).fetch

    assert fetches(most_tokens) == ("p",)
    assert fetches(most_tokens + 1) == ()


def test_blocks_promised_to_others_are_not_free() -> None:
    s = snapshot(parked=[parked("p", blocks=20)], free_blocks=30)
    assert decide(changed(s, reserved_blocks=6, growth_blocks=4)).fetch == ("p",)
    assert decide(changed(s, reserved_blocks=7, growth_blocks=4)).fetch == ()
    assert decide(changed(s, reserved_blocks=6, growth_blocks=5)).fetch == ()


def test_while_a_claim_on_the_pool_is_not_served_prompts_do_not_take_from_it() -> None:
    s = snapshot(waiting=[prompt("a", 4)], parked=[parked("p", blocks=60)], free_blocks=50, **crowd(3))
    assert admitted(decide(s)) == [("a", True)]
    assert decide(s).reasons["a"] is Reason.POOL_CONTENDED
    assert admitted(decide(changed(s, parked=()))) == [("a", False)]


def test_being_overtaken_is_counted_only_when_it_happens() -> None:
    large, small = parked("large", 101.0, 60), parked("small", 102.0, 10)
    s = snapshot(parked=[large, small], free_blocks=40, **crowd(3))
    assert (decide(s).fetch, decide(s).overtaken) == (("small",), ("large",))
    assert decide(changed(s, parked=[large])).overtaken == ()
    assert decide(changed(s, free_blocks=POOL)).overtaken == ()


def test_a_smaller_claim_overtakes_only_so_often() -> None:
    s = snapshot(parked=[parked("large", 101.0, 60), parked("small", 102.0)], free_blocks=40, **crowd(3))
    assert decide(changed(s, overtaken={"large": MOST - 1})).fetch == ("small",)
    stopped = decide(changed(s, overtaken={"large": MOST}))
    assert (stopped.fetch, stopped.overtaken) == ((), ())
    assert stopped.waits == {"large": Reason.POOL_FULL, "small": Reason.BEHIND_OVERDUE}


def test_a_late_claim_is_overtaken_only_so_often() -> None:
    s = snapshot(parked=[parked("on time", 101.0), parked("late", 99.0)], free_blocks=16, **crowd(2))
    assert (decide(s).fetch, decide(s).overtaken) == (("on time",), ("late",))
    assert decide(changed(s, overtaken={"late": MOST - 1})).fetch == ("on time",)
    assert decide(changed(s, overtaken={"late": MOST})).fetch == ("late",)


@pytest.mark.parametrize("first_size", [5, 60, 100])
@pytest.mark.parametrize("first_due_s", [0.0, 101.0])
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_every_claim_is_served_in_a_bounded_number_of_steps(
    first_due_s: float, first_size: int, sizes: list[int]
) -> None:
    """A pool of 100 blocks, requests that each run 5 steps, and new claims on time for as long as the first waits."""
    limits = PolicyLimits(max_overtakes=4)
    in_host = [ParkedRequest("first", first_due_s, first_size)]
    running: dict[str, tuple[int, int]] = {}
    overtaken: dict[str, int] = {}
    for step in range(100):
        in_host.append(ParkedRequest(f"n{step}", 102.0 + step, sizes[step % len(sizes)]))
        running = {r: (blocks, left - 1) for r, (blocks, left) in running.items() if left > 1}
        used = sum(blocks for blocks, _ in running.values())
        s = snapshot(
            parked=sorted(in_host, key=lambda p: (p.deadline_s < NOW_S, p.deadline_s)),
            free_blocks=100 - used,
            resident=[resident(r, num_blocks=blocks, tokens_left=1) for r, (blocks, _) in running.items()],
            num_resident=len(running),
            overtaken=overtaken,
        )
        decision = decide(s, limits)
        for request_id in decision.overtaken:
            overtaken[request_id] = overtaken.get(request_id, 0) + 1
        if "first" in decision.fetch:
            return
        size = {p.request_id: p.num_blocks for p in in_host}
        running |= {r: (size[r], 5) for r in decision.fetch}
        in_host = [p for p in in_host if p.request_id not in decision.fetch]
    raise AssertionError("the first claim was never served")


# The line for compute -------------------------------------------------------------------------------------------------


def test_prompts_that_can_be_on_time_start_before_those_that_cannot() -> None:
    waiting = [prompt("on time", 10, 101.0), prompt("late", 10, 99.0)]
    s = snapshot(waiting=waiting, budget_tokens=160)
    assert admitted(decide(s)) == [("on time", False)]
    assert decide(s).waits == {"late": Reason.LATE}
    assert decide(s).overtaken == ("late",)
    both = decide(changed(s, budget_tokens=2048))
    assert admitted(both) == [("on time", False), ("late", False)]
    assert both.overtaken == ()


def test_who_will_be_late_by_moore_hodgson_stands_behind_too() -> None:
    """The first would take 2 s of the 1 s it has; those behind it have time enough without it."""
    long = prompt("long", 10, 101.0, prefill_cost_s=2.0)
    s = snapshot(waiting=[long, prompt("short", 10, 101.5)], budget_tokens=160, cost=cost(step_s=0.0))
    assert admitted(decide(s)) == [("short", False)]
    assert decide(changed(s, cost=None)).admit[0].request_id == "long"


def test_a_late_prompt_is_overtaken_only_so_often() -> None:
    waiting = [prompt("on time", 10, 101.0), prompt("late", 10, 99.0)]
    s = snapshot(waiting=waiting, budget_tokens=160)
    assert admitted(decide(changed(s, overtaken={"late": MOST - 1}))) == [("on time", False)]
    assert admitted(decide(changed(s, overtaken={"late": MOST}))) == [("late", False)]


def test_nobody_passes_a_prompt_that_was_overtaken_too_often() -> None:
    """It waits for the zone; the others would fit."""
    waiting = [prompt("small", 2, 101.0), prompt("late", 30, 99.0)]
    s = snapshot(waiting=waiting, free_blocks=0, free_zone_blocks=20, **crowd(3))
    assert admitted(decide(s)) == [("small", True)]
    stopped = decide(changed(s, overtaken={"late": MOST}))
    assert admitted(stopped) == []
    assert stopped.waits == {"late": Reason.ZONE_FULL, "small": Reason.BEHIND_OVERDUE}
    assert stopped.behind == {"small": Resource.ZONE}


def test_a_prompt_that_waits_for_the_zone_while_others_pass_into_the_pool_is_overtaken_though_nobody_is_late() -> None:
    """Regression: it was counted only once its own deadline had passed."""
    waiting = [prompt("large", 35, 101.0), prompt("small", 2, 102.0)]
    s = snapshot(waiting=waiting, free_blocks=20, free_zone_blocks=30, **crowd(3))
    assert (admitted(decide(s)), decide(s).overtaken) == ([("small", False)], ("large",))
    assert admitted(decide(changed(s, overtaken={"large": MOST - 1}))) == [("small", False)]
    stopped = decide(changed(s, overtaken={"large": MOST}))
    assert admitted(stopped) == []
    assert stopped.waits == {"large": Reason.ZONE_FULL, "small": Reason.BEHIND_OVERDUE}


def test_who_was_overtaken_too_often_comes_first_though_nobody_is_late() -> None:
    """Regression: those due earlier kept passing it for as long as all of them were on time."""
    long = prompt("long", 30, 130.0, most_blocks=120, can_layer=True)
    waiting = [prompt("a", 10, 101.0), prompt("b", 10, 102.0), long]
    s = snapshot(waiting=waiting, long_contexts=True, zone_blocks=200, free_zone_blocks=130, host_blocks=200)
    s = changed(s, free_host_blocks=130, free_blocks=0, **crowd(3))
    assert [name for name, _ in admitted(decide(s))] == ["a", "b"]
    assert admitted(decide(changed(s, overtaken={"long": MOST})))[0] == ("long", True)


def test_those_overtaken_too_often_come_in_order_of_their_deadlines() -> None:
    waiting = [prompt("on time", 10, 101.0), prompt("late", 10, 99.0)]
    s = snapshot(waiting=waiting, budget_tokens=160, overtaken={"on time": MOST, "late": MOST})
    assert admitted(decide(s)) == [("late", False)]


def test_nobody_passes_into_the_pool_before_a_prompt_longer_than_it_that_was_overtaken_too_often() -> None:
    """It stands only in the line for compute, and waits for host memory; fetches free that."""
    long = prompt("long", 30, 101.0, most_blocks=120)
    waiting = [long, prompt("pool only", 10, 102.0, can_layer=False)]
    s = snapshot(waiting=waiting, parked=[parked("p")], long_contexts=True, zone_blocks=200, free_zone_blocks=200)
    s = changed(s, host_blocks=200, free_host_blocks=100, **crowd(2))
    passing = decide(s)
    assert (passing.fetch, admitted(passing), passing.overtaken) == (("p",), [("pool only", False)], ("long",))
    stopped = decide(changed(s, overtaken={"long": MOST}))
    assert (stopped.fetch, admitted(stopped)) == (("p",), [])
    assert stopped.waits == {"long": Reason.HOST_FULL, "pool only": Reason.BEHIND_OVERDUE}
    assert stopped.behind == {"pool only": Resource.HOST_MEMORY}


@given(late_blocks=st.integers(1, 40), sizes=st.lists(st.integers(1, 10), min_size=1, max_size=5))
def test_a_late_prompt_starts_after_a_bounded_number_of_others(late_blocks: int, sizes: list[int]) -> None:
    """One prompt a step that is on time takes all of the step's tokens; each leaves the engine at once."""
    limits, overtaken = PolicyLimits(max_overtakes=4), {"late": 0}
    for step in range(10):
        size = sizes[step % len(sizes)]
        waiting = [prompt(f"w{step}", size, 101.0), prompt("late", late_blocks, 99.0)]
        decision = decide(snapshot(waiting=waiting, budget_tokens=size * 16, overtaken=overtaken), limits)
        for request_id in decision.overtaken:
            overtaken[request_id] += 1
        if "late" in dict(admitted(decision)):
            assert step == 4
            return
    raise AssertionError("the late prompt was never started")


def test_prompts_start_in_the_order_given_and_the_zone_is_not_overtaken() -> None:
    waiting = [prompt("big", 35), prompt("next", 30), prompt("small", 2)]
    decision = decide(snapshot(waiting=waiting, free_blocks=0, **crowd(4)))
    assert admitted(decision) == [("big", True)]
    assert decision.waits == {"next": Reason.ZONE_FULL, "small": Reason.BEHIND}


def test_the_zone_goes_by_deadline_while_the_pool_is_full() -> None:
    waiting = [prompt(name, 9, deadline_s) for name, deadline_s in (("a", 101), ("b", 102), ("c", 103), ("d", 104))]
    s = snapshot(waiting=waiting, free_blocks=2, **crowd(5))
    assert admitted(decide(s)) == [("a", True), ("b", True), ("c", True), ("d", True)]
    assert admitted(decide(changed(s, free_zone_blocks=20))) == [("a", True), ("b", True)]


def test_a_late_prompt_behind_one_that_waits_for_the_zone_waits_for_that_and_not_for_compute() -> None:
    waiting = [prompt("next", 30), prompt("late", 2, 99.0)]
    d = decide(snapshot(waiting=waiting, free_blocks=0, free_zone_blocks=20, **crowd(3)))
    assert d.waits == {"next": Reason.ZONE_FULL, "late": Reason.BEHIND}


def test_a_short_prompt_is_not_stuck_behind_one_that_only_the_pool_can_hold() -> None:
    waiting = [prompt("huge", 60), prompt("short", 2)]
    assert admitted(decide(snapshot(waiting=waiting, free_blocks=1, **crowd(4)))) == [("short", True)]


def test_host_memory_is_given_to_prompts_in_order_and_to_none_beyond() -> None:
    waiting = [prompt("a", 10), prompt("b", 10), prompt("c", 5)]
    s = snapshot(waiting=waiting, free_blocks=0, free_host_blocks=19, **crowd(3))
    assert admitted(decide(s)) == [("a", True)], "c would fit, but b is next"
    assert decide(s).waits == {"b": Reason.HOST_FULL, "c": Reason.BEHIND}
    assert decide(s).behind == {"c": Resource.HOST_MEMORY}


# Ranks ----------------------------------------------------------------------------------------------------------------


def test_a_rank_goes_before_having_been_overtaken_too_often() -> None:
    """Regression: an overdue prompt of the worst priority went before all others."""
    waiting = [prompt("first", 10, 101.0), prompt("overdue", 10, 99.0, rank=100)]
    s = snapshot(waiting=waiting, budget_tokens=160, overtaken={"overdue": MOST})
    assert admitted(decide(s)) == [("first", False)]
    in_host = [parked("first", 101.0), parked("overdue", 99.0, rank=100)]
    s = snapshot(parked=in_host, free_blocks=14, overtaken={"overdue": MOST}, **crowd(2))
    assert decide(s).fetch == ("first",)


BESIDE_THE_BEST = (
    ("due first", 101.0, {}),
    ("overdue", 101.0, {"beside": MOST}),
    ("late and overdue", 99.0, {"beside": MOST}),
    ("due first beside one overdue", 101.0, {"last": MOST}),
)
"""What stands beside a request of best rank that is due at 102 s, when that is due, and who was overtaken."""


@pytest.mark.parametrize(
    ("beside_s", "overtaken"), [row[1:] for row in BESIDE_THE_BEST], ids=[r[0] for r in BESIDE_THE_BEST]
)
def test_the_best_rank_is_first_in_both_lines_whoever_else_is_late_or_overdue(
    beside_s: float, overtaken: dict[str, int]
) -> None:
    """The worse rank stands at both ends of either line if ranks are left out of the order."""
    worse = (("beside", beside_s), ("last", 103.0), ("late", 98.0))
    waiting = [prompt("best", 10, 102.0), *(prompt(name, 10, due_s, rank=1) for name, due_s in worse)]
    s = snapshot(waiting=waiting, budget_tokens=160, overtaken=overtaken)
    assert admitted(decide(s)) == [("best", False)]
    in_host = [parked("best", 102.0), *(parked(name, due_s, rank=1) for name, due_s in worse)]
    s = snapshot(parked=in_host, free_blocks=14, overtaken=overtaken, **crowd(2))
    assert decide(s).fetch == ("best",)


def test_within_a_worse_rank_who_was_overtaken_too_often_comes_first_as_well() -> None:
    waiting = [prompt("best", 10, 102.0), prompt("other", 10, 101.0, rank=1), prompt("overdue", 10, 103.0, rank=1)]
    s = snapshot(waiting=waiting, budget_tokens=320, overtaken={"overdue": MOST})
    assert admitted(decide(s)) == [("best", False), ("overdue", False)]


def test_to_be_passed_by_a_better_rank_is_not_to_be_overtaken() -> None:
    waiting = [prompt("first", 10, 101.0), prompt("worse", 10, 99.0, rank=1), prompt("worst", 10, 98.0, rank=2)]
    decision = decide(snapshot(waiting=waiting, budget_tokens=160))
    assert (admitted(decision), decision.overtaken) == ([("first", False)], ())
    parks = [parked("first", 101.0), parked("worse", 99.0, rank=1)]
    decision = decide(snapshot(parked=parks, free_blocks=14, **crowd(2)))
    assert (decision.fetch, decision.overtaken) == (("first",), ())


def test_while_a_claim_of_better_rank_waits_for_the_pool_worse_ones_take_none_of_it() -> None:
    """The worse prompt gets its first token through the zone, which the claim does not want."""
    in_host = [parked("large", 101.0, 60), parked("small", 102.0, 10, rank=1)]
    waiting = [prompt("w", 4, rank=1)]
    decision = decide(snapshot(parked=in_host, waiting=waiting, free_blocks=40, **crowd(3)))
    assert (decision.fetch, admitted(decision)) == ((), [("w", True)])
    assert decision.waits == {"large": Reason.POOL_FULL, "small": Reason.BEHIND_RANK}
    kept = decide(snapshot(parked=in_host, waiting=waiting, free_blocks=40, free_slots=1, **crowd(3)))
    assert kept.waits == {"large": Reason.POOL_FULL, "small": Reason.BEHIND_RANK, "w": Reason.BEHIND_RANK}
    assert kept.behind == {"small": Resource.POOL, "w": Resource.SLOT}


def test_while_a_prompt_of_better_rank_waits_for_room_worse_ones_take_none() -> None:
    waiting = [prompt("large", 35, 102.0), prompt("small", 2, 101.0, rank=1)]
    s = snapshot(waiting=waiting, parked=[parked("p", rank=1)], free_blocks=20, free_zone_blocks=30, **crowd(3))
    decision = decide(s)
    assert (admitted(decision), decision.fetch) == ([], ())
    assert decision.waits == {"large": Reason.ZONE_FULL, "small": Reason.BEHIND_RANK, "p": Reason.BEHIND_RANK}
    assert decision.behind == {"small": Resource.ZONE, "p": Resource.ZONE}


def test_a_prompt_of_better_rank_that_waits_for_tokens_only_keeps_nobody_out_of_the_pool() -> None:
    s = snapshot(waiting=[prompt("w")], parked=[parked("p", rank=1)], prefilling_tokens=2048, **crowd(1))
    assert (decide(s).fetch, decide(s).waits) == (("p",), {"w": Reason.NO_TOKENS_LEFT})


def test_a_prompt_longer_than_the_pool_waits_for_host_memory_that_worse_ranks_may_leave() -> None:
    """Else neither would ever go on."""
    long = prompt("long", 30, 101.0, most_blocks=120)
    s = snapshot(waiting=[long], parked=[parked("p", rank=1)], long_contexts=True, host_blocks=200)
    s = changed(s, zone_blocks=200, free_zone_blocks=200, free_host_blocks=100, **crowd(1))
    assert decide(s).waits == {"long": Reason.HOST_FULL}
    assert decide(s).fetch == ("p",)


def test_nobody_is_late_for_the_sake_of_a_worse_rank() -> None:
    """The first takes 0.9 of the second that all have; without it two others could be on time."""
    long = prompt("long", 10, 101.0, prefill_cost_s=0.9)
    others = [prompt(name, 10, 101.0, rank=1, prefill_cost_s=0.3) for name in ("a", "b")]
    s = snapshot(waiting=[long, *others], budget_tokens=160, cost=cost(step_s=0.0), prefilling_tokens=160)
    assert decide(s).waits == {"long": Reason.NO_TOKENS_LEFT, "a": Reason.BEHIND_RANK, "b": Reason.BEHIND_RANK}
    assert decide(s).behind == {"a": Resource.COMPUTE, "b": Resource.COMPUTE}
    same = [w._replace(rank=0) for w in (long, *others)]
    assert decide(changed(s, waiting=same)).waits["long"] is Reason.LATE


def test_of_residents_those_of_worst_rank_are_parked_first() -> None:
    residents = [resident("recent", steps_resident=1, rank=1), resident("old"), resident("other")]
    s = snapshot(resident=residents, num_resident=3, growth_blocks=5, free_blocks=0)
    assert decide(s).park == ("recent",)


# Slots ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overtaken", [{}, {"either": MOST}, {"pool only": MOST}, {"either": MOST, "pool only": MOST}])
def test_the_last_slot_goes_to_somebody_when_a_prompt_of_each_kind_waits_for_it(overtaken: dict[str, int]) -> None:
    """Regression: one was promised the slot in its line, and the other, in front of it in the other line, barred it."""
    waiting = [prompt("either", deadline_s=101), prompt("pool only", deadline_s=102, can_layer=False)]
    assert len(decide(snapshot(waiting=waiting, free_slots=1, overtaken=overtaken)).admit) == 1


def test_a_prompt_overtaken_too_often_gets_the_next_slot_though_others_claim_the_pool() -> None:
    waiting = [prompt("either", 10, 99.0)]
    s = snapshot(waiting=waiting, parked=[parked("p")], free_slots=1, mode="layered")
    assert (decide(s).fetch, admitted(decide(s))) == (("p",), [])
    decision = decide(changed(s, overtaken={"either": MOST}))
    assert decision.fetch == ()
    assert [a.request_id for a in decision.admit] == ["either"]


def test_a_prompt_overtaken_too_often_gets_the_pool_when_host_memory_will_never_have_room() -> None:
    """Regression: it waited for host blocks, whose owner waited for the pool, which was kept for a third."""
    waiting = [prompt("either", 15, 99.0), prompt("pool only", 15, 98.0, can_layer=False)]
    s = snapshot(waiting=waiting, parked=[parked("p", 97.0)], free_host_blocks=0, mode="layered")
    decision = decide(changed(s, overtaken={"either": MOST, "pool only": MOST}))
    assert set(admitted(decision)) == {("either", False), ("pool only", False)}


def test_a_full_engine_admits_nobody() -> None:
    waiting, in_host = [prompt("a"), prompt("b", can_layer=False)], [parked("p", blocks=5)]
    decision = decide(snapshot(waiting=waiting, parked=in_host, free_slots=0))
    assert (decision.admit, decision.fetch) == ((), ())
    assert decision.waits == {"a": Reason.NO_SLOT, "p": Reason.NO_SLOT, "b": Reason.NO_SLOT}


def test_the_slots_of_those_who_leave_the_zone_are_used_at_once() -> None:
    layered = [LayeredRequest("done", prefill_done=True, num_blocks=5, num_zone_blocks=5)]
    assert admitted(decide(snapshot(waiting=[prompt("a")], layered=layered, free_slots=0))) == [("a", False)]


# What is looked at ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "limit"), [("waiting", "scan"), ("parked", "scan_parked")])
def test_only_the_head_of_a_line_is_looked_at(line: str, limit: str) -> None:
    views: list[Any] = [(prompt if line == "waiting" else parked)(f"x{i}", blocks=1) for i in range(6)]
    limits = PolicyLimits(**{limit: 4})
    decision = decide(snapshot(**{line: views}), limits)
    assert set(decision.reasons) | set(decision.waits) == {"x0", "x1", "x2", "x3"}


def test_among_any_number_of_prompts_on_time_late_ones_are_seen_and_counted() -> None:
    """What the controller hands over, the policy looks at: or the late would starve unseen."""
    queue: DeadlineQueue[WaitingRequest] = DeadlineQueue()
    for i in range(200):
        queue.add(prompt(f"on time {i}", blocks=1, deadline_s=NOW_S + 1 + i))
    for i in range(20):
        queue.add(prompt(f"late {i}", blocks=1, deadline_s=NOW_S - 20 + i))
    s = snapshot(waiting=queue.head(PolicyLimits().scan, NOW_S), budget_tokens=64)
    decision = decide(s)
    assert set(decision.waits) | set(decision.reasons) == {w.request_id for w in s.lines.waiting}
    assert decision.overtaken == ("late 0",)
