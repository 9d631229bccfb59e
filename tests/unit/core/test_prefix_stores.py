"""The ledger: stores of cached prefixes run in the background, and a step waits for them only where it must."""

from __future__ import annotations

from layerkv.core.prefix_stores import SETTLE_IDLE_STEPS
from layerkv.core.transfer import StepPlan
from tests.fakes.tiny_ledger import TOKENS, finished, layered, make_ledger, pairs, resident


def test_a_step_that_writes_other_blocks_waits_for_no_prefix() -> None:
    ledger = make_ledger()
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    ledger.gave_out([6, 7])
    plan = ledger.take_plan(1)
    assert (set(pairs(plan.ahead)), plan.parks, plan.settle) == ({4, 5}, (), False)
    ledger.gave_out([8])
    assert ledger.is_idle


def test_a_block_that_is_given_out_in_the_step_in_which_it_came_free_is_stored_first() -> None:
    ledger = make_ledger()
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    ledger.gave_out([5])
    plan = ledger.take_plan(1)
    assert (set(pairs(plan.parks)), plan.ahead, plan.settle) == ({4, 5}, (), False)
    ledger.gave_out([4, 5])
    assert ledger.is_idle, "that step has stored them"


def test_the_step_that_gives_a_block_out_later_settles_once() -> None:
    ledger = make_ledger()
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    ledger.take_plan(1)
    ledger.gave_out([5])
    assert not ledger.is_idle
    assert ledger.take_plan(1) == StepPlan(settle=True, num_tokens=1)
    ledger.gave_out([4])
    assert ledger.is_idle


def test_what_a_settling_step_stores_itself_is_under_way_after_it() -> None:
    ledger = make_ledger()
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    ledger.take_plan(1)
    finished(ledger, "b", (6,), ["h2"], TOKENS)
    ledger.gave_out([4])
    plan = ledger.take_plan(1)
    assert (set(pairs(plan.ahead)), plan.settle) == ({6}, True)
    ledger.gave_out([6])
    assert ledger.take_plan(1).settle


def test_a_park_into_a_prefixs_host_block_comes_after_the_prefixs_store() -> None:
    ledger = make_ledger(num_host_blocks=2)
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    ledger.take_plan(1)
    resident(ledger, "r")
    ledger.park("r", (6,), TOKENS)
    plan = ledger.take_plan(1)
    assert (set(pairs(plan.parks)), plan.settle) == ({6}, True)


def test_a_layered_store_into_a_prefixs_host_block_comes_after_the_prefixs_store() -> None:
    ledger = make_ledger(num_host_blocks=3)
    table = layered(ledger, "x", 2)
    finished(ledger, "a", (4,), ["h0"], TOKENS)
    more = (*table, *ledger.zone.take("x", 1))
    ledger.step_layered("x", more, num_computed=2 * TOKENS, num_scheduled=1)
    plan = ledger.take_plan(1)
    assert set(pairs(plan.stores).values()) == set(pairs(plan.parks).values()), "the prefix has given way already"
    assert (set(pairs(plan.parks)), plan.ahead) == ({4}, ())


def test_when_there_has_been_nothing_to_copy_for_a_while_a_step_settles_and_nobody_looks_any_more() -> None:
    ledger = make_ledger()
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    ledger.take_plan(1)
    for _ in range(SETTLE_IDLE_STEPS - 1):
        ledger.pass_idle_step()
    finished(ledger, "b", (6,), ["h2"], TOKENS)
    assert not ledger.take_plan(1).settle, "another store begins: its time begins anew"
    for _ in range(SETTLE_IDLE_STEPS):
        assert ledger.is_idle
        assert ledger.stores_prefixes
        ledger.pass_idle_step()
    assert ledger.take_plan(1) == StepPlan(settle=True, num_tokens=1)
    assert not ledger.stores_prefixes
    for _ in range(2 * SETTLE_IDLE_STEPS):
        ledger.pass_idle_step()
        assert ledger.is_idle, "there is nothing to settle"
