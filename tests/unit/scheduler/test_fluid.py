"""The outlook of the fluid policy: who goes first, who leaves first, who is held, and how prefill is paced."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.scheduler.fluid import (
    HORIZON_S,
    LAST_S,
    LEAST_SLICE_S,
    POOL_SHARE,
    SPARE_FOR_LOST_S,
    START_BY_S,
    FluidOutlook,
)
from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.policy import decide
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.slots import PLENTY_S
from layerkv.scheduler.snapshot import ParkedRequest, ResidentRequest, Snapshot
from tests.fakes.snapshots import NOW_S, POOL, admitted, changed, cost, parked, prompt, resident, snapshot

MOST = PolicyLimits().max_overtakes


def fluid(**changes: Any) -> Snapshot:
    """An idle engine under the fluid policy that knows its costs: 10 ms a step, 0.5 ms a block copied."""
    return snapshot(**{"policy": "fluid", "cost": cost(), **changes})


def outlook(s: Snapshot) -> FluidOutlook:
    return FluidOutlook(s, PolicyLimits())


def stream(name: str, buffer_s: float, lag_s: float = 1.0, **changes: Any) -> ParkedRequest:
    """A parked stream whose reader has so much left to read, and so much lag left to spend."""
    view = parked(name, NOW_S + buffer_s + lag_s, dry_s=NOW_S + buffer_s, tpot_s=1.0, tokens_left=100)
    return view._replace(**changes)


def flowing(name: str, buffer_s: float, lag_s: float = 1.0, **changes: Any) -> ResidentRequest:
    """The same in the pool, where it has had its slice."""
    view = resident(
        name, NOW_S + buffer_s + lag_s, dry_s=NOW_S + buffer_s, tpot_s=1.0, tokens_left=100, resident_s=10.0
    )
    return view._replace(**changes)


LOST = {"deadline_s": NOW_S - 0.1, "dry_s": NOW_S - 1.0}

# Who comes in -----------------------------------------------------------------------------------------------------


def claims(s: Snapshot) -> list[str]:
    """The line for pool blocks, rank by rank."""
    return [claim.request_id for line, _ in outlook(s).ranks for claim in line]


def test_claims_due_soon_go_by_when_they_are_due_and_the_others_by_what_is_left_of_them() -> None:
    line = [
        stream("later, long", 2.0, tokens_left=900),
        stream("later, short", 3.0, tokens_left=20),
        stream("soon", 0.9, tokens_left=500),
        stream("sooner", 0.2, tokens_left=800),
    ]
    assert claims(fluid(parked=line)) == ["sooner", "soon", "later, short", "later, long"]


def test_a_claim_is_due_earlier_by_the_time_that_its_load_takes() -> None:
    """Twenty blocks more are 10 ms more."""
    line = [stream("small", 0.5), stream("large", 0.505, num_blocks=30), stream("large, later", 0.515, num_blocks=30)]
    assert claims(fluid(parked=line)) == ["large", "small", "large, later"]


def test_a_prompt_that_needs_the_pool_is_due_by_its_deadline_less_its_prefill() -> None:
    """1,600 tokens take 160 ms."""
    first = prompt("prompt", 100, NOW_S + 0.6, can_layer=False)
    s = fluid(waiting=[first], parked=[stream("before", 0.4), stream("after", 0.5)])
    assert claims(s) == ["before", "prompt", "after"]


def test_what_was_overtaken_too_often_comes_first_and_what_is_lost_last() -> None:
    line = [
        stream("soon", 0.1),
        stream("lost", 0.0, **LOST, tokens_left=1),
        stream("lost, but overdue", 0.0, **LOST, tokens_left=500),
        stream("overdue", 5.0, tokens_left=500),
        stream("later", SPARE_FOR_LOST_S - 0.1),
        stream("has plenty", SPARE_FOR_LOST_S + 0.1, tokens_left=1),
    ]
    s = fluid(parked=line, overtaken={"lost, but overdue": MOST, "overdue": MOST, "later": MOST - 1})
    assert claims(s) == ["lost, but overdue", "overdue", "soon", "later", "lost", "has plenty"]


def test_whom_room_was_made_for_goes_before_all_but_those_overtaken_too_often() -> None:
    line = [stream("soon", 0.1), stream("promised", 0.0, **LOST), stream("overdue", 5.0)]
    s = fluid(parked=line, overtaken={"overdue": MOST}, promised={"promised"})
    assert claims(s) == ["overdue", "promised", "soon"]


def test_while_streams_are_held_a_prompt_starts_no_sooner_than_it_must() -> None:
    crowded = [flowing(f"r{i}", 0.5, num_blocks=10, tpot_s=0.01) for i in range(20)]
    s = fluid(resident=crowded, num_resident=20, waiting=[prompt("can wait", 2, NOW_S + START_BY_S + 1.0)])
    assert outlook(s).held
    assert decide(s).waits == {"can wait": Reason.HELD}
    now = changed(s, waiting=[prompt("must start", 2, NOW_S + START_BY_S)])
    assert admitted(decide(now)) == [("must start", False)]
    assert admitted(decide(changed(s, resident=crowded[:5], num_resident=5))) == [("can wait", False)]


def test_a_prompt_that_nobody_passes_any_more_is_not_put_off_for_streams_that_are_held() -> None:
    """Else all others would wait for that too."""
    crowded = [flowing(f"r{i}", 0.5, num_blocks=10, tpot_s=0.01, can_park=False) for i in range(20)]
    line = [prompt("can wait", 2, NOW_S + START_BY_S + 1.0), prompt("behind", 2, NOW_S + START_BY_S + 2.0)]
    s = fluid(resident=crowded, num_resident=20, free_blocks=0, waiting=line)
    assert set(decide(s).waits.values()) == {Reason.HELD}
    assert admitted(decide(changed(s, overtaken={"can wait": MOST}))) == [("can wait", True)]


def test_with_nobody_running_no_prompt_is_put_off_for_streams_that_wait_for_it_by_rank() -> None:
    crowded = [stream(f"p{i}", 0.5, tpot_s=0.01, rank=1) for i in range(20)]
    s = fluid(parked=crowded, waiting=[prompt("better", 2, NOW_S + START_BY_S + 1.0)])
    assert outlook(s).held
    assert admitted(decide(s)) == [("better", False)]


def test_a_prompt_that_cannot_be_on_time_goes_behind_what_flows() -> None:
    """1,600 tokens take 160 ms."""
    late = prompt("late", 100, NOW_S + 0.1, can_layer=False)
    s = fluid(waiting=[late], parked=[stream("flows", 3.0)])
    assert claims(s) == ["flows", "late"]
    assert claims(changed(s, waiting=[late._replace(deadline_s=NOW_S + 0.3)])) == ["late", "flows"]


def test_of_those_that_are_lost_what_was_lost_first_goes_first() -> None:
    since = stream("since", 0.0, **LOST, tokens_left=9)
    first = since._replace(request_id="first", deadline_s=NOW_S - 5.0, tokens_left=90)
    assert claims(fluid(parked=[since, first])) == ["first", "since"]


def test_what_is_held_goes_behind_what_flows_and_before_what_is_lost() -> None:
    """The pool's time is asked for twice; the one with most of it to its end is held."""
    line = [
        stream("held", 0.0, num_blocks=60, tpot_s=0.01, tokens_left=5000),
        stream("flows", 0.5, num_blocks=60, tpot_s=0.01),
        stream("lost", 0.0, **LOST),
    ]
    s = fluid(parked=line)
    assert outlook(s).held == {"held"}
    assert claims(s) == ["flows", "held", "lost"]


def test_a_better_rank_goes_before_all_of_that() -> None:
    line = [
        stream("lost", 0.0, **LOST, rank=-1),
        stream("soon", 0.1),
        stream("overdue", 5.0),
        stream("worse", 0.0, rank=1),
    ]
    assert claims(fluid(parked=line, overtaken={"overdue": MOST})) == ["lost", "overdue", "soon", "worse"]


# Who goes out -----------------------------------------------------------------------------------------------------


def victims(*residents: ResidentRequest, **changes: Any) -> list[str]:
    s = fluid(resident=list(residents), num_resident=len(residents), decode_tokens=len(residents), **changes)
    return [r.request_id for r in outlook(s).victims]


def test_what_is_lost_leaves_first_then_what_has_plenty_to_read_then_the_rest() -> None:
    found = victims(
        flowing("little", 1.0),
        flowing("plenty", PLENTY_S + 1),
        flowing("lost", 0.0, **LOST),
        flowing("more", 3.0),
    )
    assert found == ["lost", "plenty", "more", "little"]


def test_where_readers_have_plenty_what_ends_first_stays() -> None:
    found = victims(
        flowing("short", PLENTY_S + 9, tokens_left=10),
        flowing("long", PLENTY_S + 1, tokens_left=900),
        flowing("middle", PLENTY_S + 5, tokens_left=100),
    )
    assert found == ["long", "middle", "short"]


def test_of_those_with_little_to_read_the_one_that_runs_dry_first_stays() -> None:
    assert victims(flowing("a", 0.5, tokens_left=900), flowing("b", 4.0, tokens_left=1)) == ["b", "a"]


def test_whoever_is_within_its_slice_leaves_after_all_that_are_not() -> None:
    found = victims(
        flowing("lost, came just now", 0.0, **LOST, resident_s=LEAST_SLICE_S - 0.01),
        flowing("flows", 0.5),
        flowing("plenty, came just now", 90.0, resident_s=0.0),
    )
    assert found == ["flows", "lost, came just now", "plenty, came just now"]


def test_whoever_has_not_run_since_it_came_in_leaves_last_for_its_copies_would_be_in_vain() -> None:
    """Regression: within their slices all were alike, and one was parked in the step in which its load had ended."""
    found = victims(
        flowing("new", 90.0, resident_s=0.0, has_run=False),
        flowing("slow to load", 91.0, resident_s=100.0, has_run=False),
        flowing("came just now", 0.5, resident_s=0.1),
    )
    assert found == ["came just now", "new", "slow to load"]


def test_the_weighty_and_the_better_rank_are_spared_and_whoever_may_not_be_parked_is() -> None:
    found = victims(
        flowing("heavy", 2.0, weight=4.0),
        flowing("light", 1.0),
        flowing("better", 0.0, **LOST, rank=-1),
        flowing("promised", 9.0, can_park=False),
    )
    assert found == ["light", "heavy", "better"]


@pytest.mark.parametrize(
    ("changes", "slice_s"),
    [
        ({"num_blocks": 10, "num_stored": 10}, LEAST_SLICE_S),  # 5 ms to load
        ({"num_blocks": 40, "num_stored": 40}, 0.4),  # 20 ms
        ({"num_blocks": 40, "num_stored": 20}, 1.0),  # and 10 ms for which three requests wait
    ],
)
def test_the_copies_of_a_turn_are_no_more_than_a_twentieth_of_its_slice(
    changes: dict[str, Any], slice_s: float
) -> None:
    others = [flowing("a", 50.0, resident_s=0.0, tokens_left=500), flowing("b", 50.0, resident_s=0.0, tokens_left=400)]
    for resident_s, is_over in ((slice_s - 0.01, False), (slice_s + 0.01, True)):
        it = flowing("it", 50.0, tokens_left=1, resident_s=resident_s, **changes)
        assert (victims(*others, it)[0] == "it") is is_over


# What is held -----------------------------------------------------------------------------------------------------


def held(*parts: ResidentRequest | ParkedRequest, **changes: Any) -> frozenset[str]:
    residents = [view for view in parts if isinstance(view, ResidentRequest)]
    return outlook(
        fluid(
            resident=residents,
            num_resident=len(residents),
            parked=[view for view in parts if isinstance(view, ParkedRequest)],
            **changes,
        )
    ).held


def test_nobody_is_held_while_the_pool_has_time_for_all() -> None:
    """Each needs its blocks for a tenth of the time."""
    line = [stream(f"s{i}", 0.0, num_blocks=90, tpot_s=0.1) for i in range(10)]
    assert held(*line) == frozenset()
    assert len(held(*line, stream("one too many", 0.0, num_blocks=90, tpot_s=0.1))) == 1


def test_nobody_is_held_who_has_no_reader_about_to_run_dry_or_is_lost_already() -> None:
    heavy = {"num_blocks": 80, "tpot_s": 0.01}
    assert held(stream("a", 0.0, **heavy), stream("later", HORIZON_S + 1, **heavy)) == frozenset()
    assert held(stream("a", 0.0, **heavy), stream("lost", 0.0, **heavy, **LOST)) == frozenset()
    assert len(held(stream("a", 0.0, **heavy), stream("b", 0.0, **heavy))) == 1


def test_what_readers_have_already_is_time_that_the_pool_need_not_give() -> None:
    """Two that need all of it: the second one only in the second half of the horizon."""
    heavy = {"num_blocks": 50, "tpot_s": 0.01}
    assert len(held(stream("a", 0.0, **heavy), stream("b", 0.5, **heavy))) == 1
    assert held(stream("a", 0.0, **heavy), stream("b", HORIZON_S / 2, **heavy)) == frozenset()


def test_the_one_is_held_that_needs_most_of_the_pool_to_its_end_by_weight() -> None:
    heavy = {"num_blocks": 60, "tpot_s": 0.01}
    assert held(stream("short", 0.0, **heavy, tokens_left=10), stream("long", 0.0, **heavy)) == {"long"}
    assert held(stream("short", 0.0, **heavy, tokens_left=10), stream("vip", 0.0, **heavy, weight=20.0)) == {"short"}
    slow = stream("slow reader", 0.0, num_blocks=80, tpot_s=0.02)
    assert held(stream("fast reader", 0.0, **heavy), slow) == {"fast reader"}


def test_residents_are_held_as_well_as_those_that_are_parked() -> None:
    heavy = {"num_blocks": 60, "tpot_s": 0.01}
    assert held(flowing("r", 0.0, **heavy, tokens_left=500), stream("p", 0.0, **heavy)) == {"r"}


def test_the_time_from_token_to_token_counts_and_not_that_of_a_bare_step() -> None:
    line = [stream(f"s{i}", 0.0, num_blocks=50, tpot_s=0.03) for i in range(3)]
    assert held(*line) == frozenset()
    assert len(held(*line, token_s=0.03)) == 2


def test_while_nothing_is_known_of_costs_nobody_is_held() -> None:
    assert held(*(stream(f"s{i}", 0.0, num_blocks=90, tpot_s=1e-4) for i in range(9)), cost=None) == frozenset()


@given(
    st.lists(
        st.tuples(
            st.floats(0, HORIZON_S + 2),
            st.integers(1, POOL),
            st.sampled_from((0.005, 0.02, 0.1)),
            st.integers(1, 500),
            st.sampled_from((1.0, 4.0)),
        ),
        max_size=9,
    )
)
def test_what_is_not_held_can_flow_together_and_everybody_is_needed_who_is(flows: list[tuple[Any, ...]]) -> None:
    """At every time within the horizon at which a reader runs dry, and at its end."""
    line = [
        stream(f"s{i}", buffer_s, num_blocks=num_blocks, tpot_s=tpot_s, tokens_left=left, weight=weight)
        for i, (buffer_s, num_blocks, tpot_s, left, weight) in enumerate(flows)
    ]

    def missing(some: list[ParkedRequest]) -> bool:
        some = [p for p in some if p.dry_s - NOW_S < HORIZON_S]
        for until_s in [*(p.dry_s - NOW_S for p in some), HORIZON_S]:
            wanted = sum(p.num_blocks * min(0.01 / p.tpot_s, 1) * max(until_s - (p.dry_s - NOW_S), 0.0) for p in some)
            if wanted > POOL * POOL_SHARE * until_s * (1 + 1e-6) + 1e-6:
                return True
        return False

    gone = held(*line)
    assert not missing([p for p in line if p.request_id not in gone])
    if not missing(line):
        need = sum(p.num_blocks * min(0.01 / p.tpot_s, 1) for p in line if p.dry_s - NOW_S < HORIZON_S)
        assert not gone or need > POOL * POOL_SHARE * (1 - 1e-6)
    same = [(p.num_blocks, p.tpot_s, p.weight) for p in line]
    if len(set(same)) == 1 and all(p.dry_s == line[0].dry_s for p in line):
        longest = sorted(line, key=lambda p: (-p.tokens_left, p.request_id))
        assert sorted(p.tokens_left for p in line if p.request_id in gone) == sorted(
            p.tokens_left for p in longest[: len(gone)]
        ), "and of equals, those with most left"


# Prefill ----------------------------------------------------------------------------------------------------------

PACED: dict[str, Any] = {"decode_tokens": 8, "decode_slack_s": 0.05, "num_resident": 8}
"""Readers have 50 ms: 384 prompt tokens beside their step."""


def test_prompts_take_no_more_of_a_step_than_the_smallest_buffer_allows() -> None:
    s = fluid(**PACED, waiting=[prompt("a", 100, NOW_S + 60.0)])
    tokens = decide(s).prefill_tokens
    assert 0 < tokens < 500
    assert decide(changed(s, waiting=[])).prefill_tokens == tokens
    assert decide(changed(s, decode_slack_s=0.1)).prefill_tokens > tokens


def test_a_prompt_that_would_be_late_is_not_held_back_for_readers() -> None:
    """1,600 tokens by steps of some 380 take 0.21 s, by one step 0.17 s."""
    s = fluid(**PACED, waiting=[prompt("a", 100, NOW_S + 0.19)])
    assert decide(s).prefill_tokens > decide(changed(s, waiting=[prompt("a", 100, NOW_S + 60.0)])).prefill_tokens


def test_prompts_that_are_late_whatever_is_done_do_not_make_readers_wait() -> None:
    paced = decide(fluid(**PACED, waiting=[])).prefill_tokens
    assert decide(fluid(**PACED, waiting=[prompt("a", 100, NOW_S + 0.1)])).prefill_tokens == paced
    assert decide(fluid(**PACED, waiting=[prompt("a", 100, NOW_S - 1.0)])).prefill_tokens == paced


def test_readers_of_parked_streams_that_flow_hold_prompts_back_too() -> None:
    """Without any lag or buffer left: there must be more steps, and so smaller ones."""
    s = fluid(**PACED, waiting=[prompt("a", 100, NOW_S + 60.0)])
    tokens = decide(s).prefill_tokens
    assert decide(changed(s, parked=[stream("dry", 0.0, lag_s=0.1)])).prefill_tokens < tokens
    assert decide(changed(s, parked=[stream("has enough", 1.0)])).prefill_tokens == tokens
    assert decide(changed(s, parked=[stream("lost", 0.0, **LOST)])).prefill_tokens == tokens
    assert decide(changed(s, parked=[stream("dry", 0.0, lag_s=0.1)], waiting=[])).prefill_tokens == tokens


def test_prefill_never_stops_for_long_whatever_readers_have() -> None:
    s = fluid(**{**PACED, "decode_slack_s": 0.0}, waiting=[prompt("a", 100, NOW_S - 1.0)])
    assert decide(s).prefill_tokens == 0
    limits = PolicyLimits()
    assert decide(changed(s, steps_without_prefill=limits.max_idle_steps)).prefill_tokens == limits.min_prefill_tokens


def test_whoever_ends_within_half_a_second_is_not_parked_for_a_claim() -> None:
    """A step with two requests takes 10.2 ms."""
    steps = int(LAST_S / 0.0102)
    claim = stream("claim", 0.0)
    for left, parks in ((steps + 1, ("r",)), (steps, ())):
        residents = [flowing("r", 5.0, tokens_left=left, num_blocks=90), flowing("other", 0.0, can_park=False)]
        s = fluid(parked=[claim], resident=residents, num_resident=2, decode_tokens=2, free_blocks=0)
        assert decide(s).park == parks
