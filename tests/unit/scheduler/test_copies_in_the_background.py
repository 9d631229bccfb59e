"""Residents are written through to host memory while they run, and what they keep there gives way to who needs it."""

from __future__ import annotations

from typing import Any

import pytest

from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.policy import decide
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.snapshot import PrefixHit, ResidentRequest, Snapshot, StoreAhead
from tests.fakes.snapshots import BLOCK, HOST, NOW_S, POOL, changed, cost, prompt, resident, snapshot

MOST = PolicyLimits().max_overtakes


def stream(name: str, buffer_s: float = 20.0, num_blocks: int = 10, **changes: Any) -> ResidentRequest:
    """A resident that flows, and has had its slice."""
    dry_s = NOW_S + buffer_s
    view = resident(name, dry_s + 1.0, dry_s=dry_s, tpot_s=1.0, tokens_left=100, resident_s=10.0)
    return view._replace(**{"num_blocks": num_blocks, "num_tokens": num_blocks * BLOCK, **changes})


def running(*residents: ResidentRequest, **changes: Any) -> Snapshot:
    """A pool that is half full, and steps of 10 ms: eight milliseconds of copies in four of them, 16 blocks."""
    state: dict[str, Any] = {
        "policy": "fluid",
        "cost": cost(),
        "free_blocks": POOL // 2,
        "resident": list(residents),
        "num_resident": len(residents),
    }
    return snapshot(**{**state, **changes})


# Written through --------------------------------------------------------------------------------------------------


def test_the_next_victims_next_blocks_are_copied_at_a_bounded_share_of_the_link() -> None:
    second, first = stream("second", 20.0, tokens_left=50), stream("first", 20.0, num_stored=1)
    assert decide(running(second, first)).store_ahead == (StoreAhead("first", 9), StoreAhead("second", 7))
    dear = running(second, first, cost=cost(block_copy_s=0.004))
    assert decide(dear).store_ahead == (StoreAhead("first", 2),)
    dearest = running(second, first, cost=cost(block_copy_s=0.5))
    assert decide(dearest).store_ahead == (StoreAhead("first", 1),), "one block at least"


def test_only_whole_blocks_that_are_not_there_yet_are_copied() -> None:
    half = stream("half", num_tokens=9 * BLOCK + 15)
    stored = stream("stored", num_stored=10)
    assert decide(running(stored, half)).store_ahead == (StoreAhead("half", 9),)
    assert decide(running(stored, half._replace(num_stored=9))).store_ahead == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"free_blocks": POOL // 2 + 1},
        {"can_store_ahead": False},
        {"cost": None},
        {"num_resident": 1, "resident": [stream("alone")]},
        {"resident": [stream("a", can_park=False), stream("b", can_park=False)]},
        {"free_host_blocks": HOST // 4},
    ],
)
def test_nothing_is_copied_without_need_or_room(changes: dict[str, Any]) -> None:
    pair = (stream("a"), stream("b"))
    assert decide(running(*pair)).store_ahead
    assert decide(changed(running(*pair), **changes)).store_ahead == ()


def test_a_quarter_of_host_memory_is_left_to_those_who_need_it_at_once() -> None:
    s = running(stream("a"), stream("b"), free_host_blocks=HOST // 4 + 3)
    assert decide(s).store_ahead == (StoreAhead("a", 3),)


def test_nothing_is_copied_into_the_room_that_the_first_prompt_in_line_waits_for() -> None:
    pair = stream("a", resident_s=0.1), stream("b", resident_s=0.1)
    s = running(*pair, waiting=[prompt("large", 75)], free_host_blocks=74, free_blocks=39)
    s = changed(s, hits={"large": PrefixHit(36)})
    assert decide(s).waits == {"large": Reason.HOST_FULL}
    assert decide(s).store_ahead == ()
    assert decide(changed(s, waiting=[])).store_ahead


def test_who_is_parked_in_this_step_or_gives_its_copy_up_is_not_written_through() -> None:
    s = running(stream("a", tokens_left=900), stream("b"), free_blocks=0, growth_blocks=1)
    assert decide(s).park == ("a",)
    assert decide(s).store_ahead == (StoreAhead("b", 10),)
    kept = running(stream("a", num_stored=5), stream("b"), free_host_blocks=0, host_blocks=16)
    assert decide(kept).drop_copy == ("a",)
    assert "a" not in [ahead.request_id for ahead in decide(kept).store_ahead]


# Give way ---------------------------------------------------------------------------------------------------------


def test_copies_give_way_the_largest_first_until_the_first_prompt_has_room() -> None:
    three = [stream("small", num_stored=2), stream("large", num_stored=9), stream("middle", num_stored=6)]
    s = running(*three, free_host_blocks=20)
    assert decide(s).drop_copy == (), "an eighth of host memory is free"
    for blocks, dropped in ((20, ()), (21, ("large",)), (29, ("large",)), (30, ("large", "middle")), (36, None)):
        d = decide(changed(s, waiting=[prompt("a", blocks), prompt("b", 90)]))
        assert d.drop_copy == (("large", "middle", "small") if dropped is None else dropped)


def test_a_few_free_blocks_are_kept_for_parks_and_as_many_as_the_step_s_growth() -> None:
    s = running(stream("a", num_stored=9), stream("b", num_stored=3), free_host_blocks=HOST // 8)
    assert decide(s).drop_copy == ()
    assert decide(changed(s, free_host_blocks=HOST // 8 - 1)).drop_copy == ("a",)
    assert decide(changed(s, growth_blocks=HOST // 8 + 1)).drop_copy == ("a",)


def test_who_has_no_copy_cannot_give_way() -> None:
    assert decide(running(stream("a"), stream("b"), free_host_blocks=0)).drop_copy == ()


def test_a_prompt_starts_in_the_step_in_which_copies_give_way_to_it() -> None:
    s = running(
        stream("a", num_stored=9),
        stream("b", num_stored=8),
        free_blocks=0,
        free_host_blocks=15,
        waiting=[prompt("w", 24)],
    )
    d = decide(s)
    assert (d.drop_copy, [(a.request_id, a.layered) for a in d.admit]) == (("a",), [("w", True)])


def test_who_gave_its_copy_up_and_is_parked_in_the_same_step_stores_all_of_it() -> None:
    """Eight of its ten blocks come free, and ten are taken: there must be room for those too."""
    s = running(stream("a", num_stored=8), stream("b", can_park=False), free_blocks=0, growth_blocks=1)
    s = changed(s, host_blocks=80)
    for free, parks, gives_up in ((9, ("a",), ()), (2, ("a",), ()), (1, (), ("a",))):
        d = decide(changed(s, free_host_blocks=free))
        assert (d.drop_copy, d.park, d.recompute) == (("a",), parks, gives_up)
