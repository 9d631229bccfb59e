"""The ledger: prefixes of requests that ended stay in host memory, and give way to requests."""

from __future__ import annotations

import pytest

from layerkv.core.ledger import KVLedger
from layerkv.core.transfer import StepPlan
from layerkv.errors import CapacityError
from tests.fakes.tiny_ledger import (
    LAYERED,
    RESIDENT,
    TOKENS,
    books,
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
    plan = ledger.take_plan(0)
    assert (set(pairs(plan.ahead)), plan.parks, plan.settle) == ({4, 5}, (), False)
    assert ledger.host.num_free == ledger.host.count
    ledger.check()


def test_only_what_no_prefix_has_is_stored() -> None:
    ledger = make_ledger()
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    ledger.take_plan(0)
    finished(ledger, "b", (4, 5, 7), ["h0", "h1", "h2"], 3 * TOKENS)
    assert set(pairs(ledger.take_plan(0).ahead)) == {7}
    assert ledger.counters.prefix_stored_blocks == 3


def test_a_prompt_that_begins_alike_loads_what_the_device_has_not() -> None:
    ledger = make_ledger()
    hashes = ["h0", "h1", "h2"]
    finished(ledger, "a", (4, 5, 6), hashes, 3 * TOKENS)
    kept = pairs(ledger.take_plan(0).ahead)
    ledger.add("b")
    assert ledger.num_prefix_blocks("b", [*hashes, "h3"], range(1, 4)) == 2
    ledger.load_prefix("b", (4, 8, 9, 10), [*hashes, "h3"], range(1, 3))
    assert ledger.residency["b"] is RESIDENT
    plan = ledger.take_plan(5)
    assert pairs(plan.hits) == {8: kept[5], 9: kept[6]}
    assert plan.has_copies
    ledger.check()


def test_who_runs_already_finds_no_prefix() -> None:
    ledger = make_ledger()
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    layered(ledger, "b", 3)
    assert ledger.num_prefix_blocks("b", ["h0", "h1"], range(2)) == 0


def starts_with_a_prefix(
    ledger: KVLedger, request_id: str, num_blocks: int, hashes: list[str], num_local: int = 0
) -> tuple[int, ...]:
    """Admit and start a layered prompt of whose blocks host memory caches some; its block table."""
    ledger.add(request_id)
    ledger.admit_layered(request_id, table_blocks=num_blocks, zone_blocks=num_blocks - num_local, hashes=hashes)
    found = ledger.settle_prefix(request_id, hashes, num_local)
    table = (*range(1, 1 + num_local), *ledger.zone.take(request_id, num_blocks - num_local))
    ledger.load_prefix(request_id, table, hashes, range(num_local, num_local + found))
    return table


def test_a_layered_prompt_shares_what_is_cached_and_loads_it_first_into_all_layers_then_as_what_it_computed() -> None:
    ledger = make_ledger()
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    kept = pairs(ledger.take_plan(0).ahead)
    table = starts_with_a_prefix(ledger, "b", 4, ["h0", "h1", "h2"])
    assert ledger.residency["b"] is LAYERED
    assert ledger.num_host_blocks_used == 4
    ledger.step_layered("b", table, num_computed=2 * TOKENS, num_scheduled=5)
    plan = ledger.take_plan(5)
    assert pairs(plan.zone_hits) == {table[0]: kept[4], table[1]: kept[5]}
    assert not plan.loads
    assert not plan.hits
    assert set(pairs(plan.stores)) == set(table[2:4])
    ledger.step_layered("b", table, num_computed=2 * TOKENS + 5, num_scheduled=1)
    plan = ledger.take_plan(1)
    assert set(pairs(plan.loads)) == set(table)
    assert not plan.zone_hits
    assert ledger.counters.prefix_hit_blocks == 2
    assert ledger.counters.loaded_blocks == 2 + 4
    ledger.check()


def test_room_is_wanted_only_for_what_is_not_cached_and_a_refusal_changes_nothing() -> None:
    ledger = make_ledger(num_host_blocks=5)
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    ledger.take_plan(0)
    starts_with_a_prefix(ledger, "b", 4, ["h0", "h1"])
    assert ledger.host.num_free == 1
    ledger.add("c")
    before = books(ledger)
    with pytest.raises(CapacityError, match="2 blocks wanted, 1 free"):
        ledger.admit_layered("c", table_blocks=4, zone_blocks=4, hashes=["h0", "h1"])
    assert books(ledger) == before
    ledger.admit_layered("c", table_blocks=3, zone_blocks=3, hashes=["h0", "h1"])
    assert ledger.host.num_free == 0
    assert ledger.num_held_prefix_blocks(["h0", "h1"], range(2)) == 2
    ledger.check()


def test_a_hit_on_the_device_that_is_shared_too_is_not_stored_by_the_park() -> None:
    """More was on the device than was expected: the block is in the pool, and in host memory already."""
    ledger = make_ledger()
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    ledger.take_plan(0)
    ledger.add("b")
    ledger.admit_layered("b", table_blocks=3, zone_blocks=3, hashes=["h0", "h1"])
    assert ledger.settle_prefix("b", ["h0", "h1"], 1) == 1
    table = (4, *ledger.zone.take("b", 2))
    ledger.load_prefix("b", table, ["h0", "h1"], range(1, 2))
    ledger.step_layered("b", table, num_computed=2 * TOKENS, num_scheduled=2)
    assert set(pairs(ledger.take_plan(2).zone_hits)) == {table[1]}
    ledger.park("b", table, 2 * TOKENS + 2)
    ledger.zone.give_back(table[1:])
    assert ledger.take_plan(0).parks == ()
    ledger.check()


def test_what_a_prompt_shares_and_is_to_write_becomes_its_own_or_it_does_not_start() -> None:
    """It was to follow a hit on the device that is gone: the prompt computes all of it."""
    for num_host_blocks, is_short in ((5, False), (4, True)):
        ledger = make_ledger(num_host_blocks)
        finished(ledger, "a", (4, 5, 6), ["h0", "h1", "h2"], 3 * TOKENS)
        cached = pairs(ledger.take_plan(0).ahead)
        ledger.add("b")
        ledger.admit_layered("b", table_blocks=3, zone_blocks=2, hashes=["h0", "h1", "h2"])
        ledger.host._forget([cached[4]])
        taken = ledger.host.take(ledger.host.num_free - (0 if is_short else 2))
        assert ledger.settle_prefix("b", ["h0", "h1", "h2"], 0) == 0
        assert ledger.lacks_host_blocks("b") == is_short
        if not is_short:
            assert not {cached[5], cached[6]} & set(ledger.host_blocks_of("b"))
        ledger.cancel_layered("b")
        assert not ledger.lacks_host_blocks("b")
        ledger.host.give_back(taken)
        ledger.check()


@pytest.mark.parametrize("end", ["drop", "finish", "park and finish", "fetch", "fetch and finish"])
def test_who_shares_a_prefix_gives_it_back_however_it_ends(end: str) -> None:
    ledger = make_ledger()
    hashes = ["h0", "h1"]
    finished(ledger, "a", (4, 5), hashes, 2 * TOKENS)
    ledger.take_plan(0)
    table = starts_with_a_prefix(ledger, "b", 3, hashes)
    starts_with_a_prefix(ledger, "c", 3, hashes)
    ledger.step_layered("b", table, num_computed=2 * TOKENS, num_scheduled=2)
    ledger.take_plan(2)
    ledger.zone.give_back(table)
    if end == "drop":
        ledger.drop("b")
    elif end != "finish":
        ledger.park("b", table, 2 * TOKENS + 2)
    if "fetch" in end:
        ledger.fetch("b", (7, 8, 9), 0)
        ledger.take_plan(0)
        if "finish" in end:
            ledger.finish("b", hashes=hashes)
        ledger.complete_fetch("b", hashes)
    elif "finish" in end:
        ledger.finish("b", hashes=hashes)
    ledger.check()
    assert all(ledger.host.num_sharers(block) == 1 for block in ledger.host.find(hashes))
    ledger.drop("c")
    ledger.take_plan(0)
    assert (ledger.num_host_blocks_used, ledger.host.num_cached, ledger.host.num_free) == (0, 2, 12)
    ledger.check()


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
    assert set(pairs(ledger.take_plan(0).ahead)) == {4}
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


def test_what_was_stored_ahead_becomes_a_prefix_and_nobody_waits() -> None:
    ledger = make_ledger()
    resident(ledger, "r")
    ledger.store_ahead("r", (1, 2, 3), 2 * TOKENS)
    ledger.take_plan(1)
    ledger.finish("r", hashes=["h0", "h1", "h2"], block_ids=(1, 2, 3), num_computed=3 * TOKENS)
    plan = ledger.take_plan(1)
    assert (set(pairs(plan.ahead)), plan.parks, plan.settle) == ({3}, (), False)
    assert ledger.host.num_cached == 3
    ledger.gave_out([2])
    assert ledger.take_plan(1).settle, "its store ahead may not have read it"
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
