"""The ledger: prefixes of requests that ended stay in host memory, and give way to requests."""

from __future__ import annotations

import pytest

from layerkv.core.transfer import StepPlan
from layerkv.errors import CapacityError
from tests.fakes.tiny_ledger import (
    RESIDENT,
    TOKENS,
    finished,
    layered,
    make_ledger,
    pairs,
    resident,
)


def test_the_whole_blocks_of_a_request_that_ends_are_stored_and_nobody_holds_them() -> None:
    ledger = make_ledger()
    finished(ledger, "a", (4, 5, 6), ["h0", "h1"], 2 * TOKENS + 3)
    assert ledger.num_host_blocks_used == 0
    assert set(pairs(ledger.take_plan(0).parks)) == {4, 5}
    assert ledger.host.num_free == ledger.host.count
    ledger.check()


def test_only_what_no_prefix_has_is_stored() -> None:
    ledger = make_ledger()
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    ledger.take_plan(0)
    finished(ledger, "b", (4, 5, 7), ["h0", "h1", "h2"], 3 * TOKENS)
    assert set(pairs(ledger.take_plan(0).parks)) == {7}
    assert ledger.counters.prefix_stored_blocks == 3


def test_a_prompt_that_begins_alike_loads_what_the_device_has_not() -> None:
    ledger = make_ledger()
    hashes = ["h0", "h1", "h2"]
    finished(ledger, "a", (4, 5, 6), hashes, 3 * TOKENS)
    kept = pairs(ledger.take_plan(0).parks)
    ledger.add("b")
    assert ledger.num_prefix_blocks("b", [*hashes, "h3"], range(1, 4)) == 2
    ledger.load_prefix("b", (4, 8, 9, 10), [*hashes, "h3"], range(1, 3))
    assert ledger.residency["b"] is RESIDENT
    plan = ledger.take_plan(5)
    assert pairs(plan.hits) == {8: kept[5], 9: kept[6]}
    assert plan.has_copies
    ledger.check()


def test_who_is_to_run_layered_or_runs_already_finds_no_prefix() -> None:
    ledger = make_ledger()
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    layered(ledger, "b", 3)
    ledger.add("c")
    ledger.admit_layered("c", table_blocks=2, zone_blocks=2)
    assert [ledger.num_prefix_blocks(request_id, ["h0", "h1"], range(2)) for request_id in "bc"] == [0, 0]


def test_requests_come_before_prefixes() -> None:
    ledger = make_ledger(num_host_blocks=3)
    finished(ledger, "a", (4, 5, 6), ["h0", "h1", "h2"], 3 * TOKENS)
    ledger.take_plan(0)
    layered(ledger, "b", 2)
    assert ledger.num_host_blocks_used == 2
    ledger.add("c")
    assert ledger.num_prefix_blocks("c", ["h0", "h1", "h2"], range(3)) == 1
    ledger.check()


def test_a_prefix_that_is_loaded_in_this_step_gives_way_to_nobody_before_it() -> None:
    ledger = make_ledger(num_host_blocks=3)
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    ledger.take_plan(0)
    ledger.add("b")
    ledger.load_prefix("b", (8, 9), ["h0", "h1"], range(2))
    with pytest.raises(CapacityError):
        ledger.host.take(2)
    ledger.take_plan(1)
    assert len(ledger.host.take(3)) == 3


def test_as_much_of_a_prefix_is_kept_as_host_memory_has_room_for() -> None:
    ledger = make_ledger(num_host_blocks=3)
    layered(ledger, "x", 2)
    finished(ledger, "a", (4, 5, 6), ["h0", "h1", "h2"], 3 * TOKENS)
    assert set(pairs(ledger.take_plan(0).parks)) == {4}
    ledger.check()


def test_two_copies_of_one_plan_never_write_the_same_host_block() -> None:
    ledger = make_ledger(num_host_blocks=6)
    for name, first in (("a", 1), ("b", 5), ("c", 9)):
        finished(ledger, name, tuple(range(first, first + 4)), [f"{name}{i}" for i in range(4)], 4 * TOKENS)
    resident(ledger, "r")
    with pytest.raises(CapacityError):
        ledger.store_ahead("r", (13, 14), 2 * TOKENS)
    plan = ledger.take_plan(1)
    written = [run.host_block + i for run in plan.parks + plan.ahead for i in range(run.num_blocks)]
    assert len(written) == len(set(written)) == 6


def test_a_longer_prefix_does_not_push_its_own_beginning_out() -> None:
    ledger = make_ledger(num_host_blocks=10)
    turn = [f"t{i}" for i in range(10)]
    finished(ledger, "1", tuple(range(1, 6)), turn[:5], 5 * TOKENS)
    ledger.take_plan(0)
    finished(ledger, "x", tuple(range(6, 11)), [f"x{i}" for i in range(5)], 5 * TOKENS)
    ledger.take_plan(0)
    finished(ledger, "2", tuple(range(1, 11)), turn, 10 * TOKENS)
    ledger.take_plan(0)
    ledger.add("3")
    assert ledger.num_prefix_blocks("3", turn, range(10)) == 10
    ledger.check()


def test_what_was_being_loaded_when_a_load_failed_does_not_become_a_prefix() -> None:
    ledger = make_ledger()
    ledger.add("a")
    ledger.started("a")
    ledger.park("a", (4, 5, 6), 2 * TOKENS + 1)
    ledger.fetch("a", (7, 8, 9), 0)
    ledger.take_plan(0)
    ledger.forget_prefixes()
    ledger.complete_fetch("a", ["h0", "h1"])
    assert (ledger.num_host_blocks_used, ledger.host.num_cached) == (0, 0)
    ledger.check()


def test_what_a_parked_request_has_in_host_memory_is_kept_without_another_copy() -> None:
    ledger = make_ledger()
    ledger.add("a")
    ledger.started("a")
    ledger.park("a", (4, 5, 6), 2 * TOKENS + 1)
    ledger.take_plan(0)
    ledger.finish("a", hashes=["h0", "h1"], block_ids=(), num_computed=0)
    assert ledger.take_plan(0) == StepPlan()
    ledger.add("b")
    assert ledger.num_prefix_blocks("b", ["h0", "h1"], range(2)) == 2
    assert ledger.num_host_blocks_used == 0
    ledger.check()


def test_a_fetched_requests_copy_stays_as_a_prefix() -> None:
    ledger = make_ledger()
    ledger.add("a")
    ledger.started("a")
    ledger.park("a", (4, 5, 6), 2 * TOKENS + 1)
    ledger.fetch("a", (7, 8, 9), 0)
    ledger.take_plan(0)
    ledger.complete_fetch("a", ["h0", "h1"])
    assert (ledger.num_host_blocks_used, ledger.host.num_cached) == (0, 2)
    ledger.finish("a", hashes=["h0", "h1"], block_ids=(7, 8, 9), num_computed=2 * TOKENS + 3)
    assert ledger.take_plan(0).parks == ()
    ledger.check()


def test_what_was_stored_ahead_becomes_a_prefix_and_the_next_step_settles() -> None:
    ledger = make_ledger()
    resident(ledger, "r")
    ledger.store_ahead("r", (1, 2, 3), 2 * TOKENS)
    ledger.take_plan(1)
    ledger.finish("r", hashes=["h0", "h1", "h2"], block_ids=(1, 2, 3), num_computed=3 * TOKENS)
    plan = ledger.take_plan(1)
    assert plan.settle
    assert set(pairs(plan.parks)) == {3}
    assert ledger.host.num_cached == 3
    ledger.check()


def test_a_request_that_ended_just_before_a_reset_leaves_no_prefix() -> None:
    """The engine is idle, so nothing has stored its blocks yet: the next step does, into blocks that nobody finds."""
    ledger = make_ledger()
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    ledger.forget_prefixes()
    ledger.take_plan(0)
    ledger.add("b")
    assert ledger.num_prefix_blocks("b", ["h0", "h1"], range(2)) == 0
    assert (ledger.num_host_blocks_used, ledger.host.num_free) == (0, ledger.host.count)
    ledger.check()


def test_forgotten_prefixes_are_free_blocks() -> None:
    ledger = make_ledger()
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    ledger.take_plan(0)
    ledger.forget_prefixes()
    ledger.add("b")
    assert ledger.num_prefix_blocks("b", ["h0", "h1"], range(2)) == 0
    assert (ledger.host.num_cached, ledger.host.num_free) == (0, ledger.host.count)
    ledger.check()
