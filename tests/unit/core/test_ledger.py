"""The ledger: what each operation plans, that a refused one changes nothing, and any life of any requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from layerkv.core.geometry import KVGeometry
from layerkv.core.ledger import KVLedger
from layerkv.core.residency import Residency
from layerkv.core.runs import RunAllocator
from layerkv.core.transfer import BlockRun, StepPlan
from layerkv.errors import CapacityError

WAITING, RESIDENT, LAYERED, PARKED, FETCHING = Residency
TOKENS = 4
POOL = 16
ZONE = 10


def make_ledger(num_host_blocks: int = 12) -> KVLedger:
    geometry = KVGeometry(num_layers=3, page_bytes=64, block_tokens=TOKENS, pool_blocks=POOL, zone_blocks=ZONE, lanes=1)
    return KVLedger(geometry, num_host_blocks)


def books(ledger: KVLedger) -> dict[str, Any]:
    """All that can be seen of a ledger from outside, but for the plan."""
    return {
        "residency": {request_id: ledger.residency[request_id] for request_id in ledger.residency},
        "counts": dict(ledger.residency.counts),
        "host": [ledger.host.is_free(block) for block in range(ledger.host.count)],
        "zone": (ledger.zone.num_available, ledger.zone.num_taken),
        "counters": asdict(ledger.counters),
        "layered": ledger.layered_ids,
        "idle": ledger.is_idle,
    }


def pairs(runs: tuple[BlockRun, ...]) -> dict[int, int]:
    """Host block of each device block."""
    return {run.device_block + i: run.host_block + i for run in runs for i in range(run.num_blocks)}


def layered(ledger: KVLedger, request_id: str, num_blocks: int, hits: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Admit and start a layered prompt; its block table."""
    ledger.add(request_id)
    ledger.admit_layered(request_id, table_blocks=num_blocks, zone_blocks=num_blocks - len(hits))
    table = (*hits, *ledger.zone.take(request_id, num_blocks - len(hits)))
    ledger.started(request_id)
    return table


# One request at a time --------------------------------------------------------------------------------------------


def test_a_layered_prompt_stores_what_it_writes_and_loads_what_it_wrote_before() -> None:
    ledger = make_ledger()
    table = layered(ledger, "a", 5)
    assert ledger.residency["a"] is LAYERED
    assert ledger.is_layered("a")
    ledger.step_layered("a", table, num_computed=0, num_scheduled=8)  # ends with a block
    first = ledger.take_plan(8)
    assert first.num_tokens == 8
    assert first.is_layered
    assert set(pairs(first.stores)) == set(table[:2])
    assert not first.loads
    ledger.step_layered("a", table, num_computed=8, num_scheduled=6)  # ends inside block 3
    second = ledger.take_plan(6)
    assert set(pairs(second.stores)) == set(table[2:4])
    assert pairs(second.loads) == pairs(first.stores)
    ledger.step_layered("a", table, num_computed=14, num_scheduled=6)  # begins inside block 3
    third = ledger.take_plan(6)
    assert set(pairs(third.stores)) == set(table[3:5])
    assert pairs(third.loads) == pairs(first.stores) | pairs(second.stores)
    assert pairs(third.stores).items() >= {(table[3], pairs(second.stores)[table[3]])}
    ledger.check()


def test_prefix_hits_of_a_layered_prompt_are_neither_stored_nor_loaded_while_it_runs() -> None:
    ledger = make_ledger()
    table = layered(ledger, "a", 5, hits=(3, 9))
    ledger.step_layered("a", table, num_computed=8, num_scheduled=5)
    plan = ledger.take_plan(5)
    assert set(pairs(plan.stores)) == set(table[2:4])
    assert not plan.loads
    ledger.step_layered("a", table, num_computed=13, num_scheduled=7)
    plan = ledger.take_plan(7)
    assert set(pairs(plan.loads)) == set(table[2:4])
    assert set(pairs(plan.stores)) == set(table[3:5])


def test_parking_a_layered_request_stores_only_its_prefix_hits() -> None:
    ledger = make_ledger()
    table = layered(ledger, "a", 5, hits=(3, 9))
    ledger.step_layered("a", table, num_computed=8, num_scheduled=12)
    stored = pairs(ledger.take_plan(12).stores)
    ledger.park("a", table, 20)
    ledger.zone.give_back(table[2:])
    assert not ledger.is_idle
    plan = ledger.take_plan(0)
    assert set(pairs(plan.parks)) == {3, 9}
    assert not plan.is_layered
    assert ledger.residency["a"] is PARKED
    assert not ledger.is_layered("a")
    assert ledger.parked_tokens("a") == 20
    ledger.fetch("a", (1, 2, 4, 5, 6, 7), 0)
    [fetch] = ledger.take_plan(0).fetches
    host_by_position = [*(pairs(plan.parks)[block] for block in (3, 9)), *(stored[block] for block in table[2:])]
    assert pairs(fetch.runs) == dict(zip((1, 2, 4, 5, 6), host_by_position, strict=True))
    ledger.check()


def test_parking_in_mid_prompt_gives_back_the_host_blocks_of_what_was_not_computed() -> None:
    ledger = make_ledger(num_host_blocks=6)
    table = layered(ledger, "a", 6)
    assert ledger.num_host_blocks_used == 6
    ledger.step_layered("a", table, num_computed=0, num_scheduled=9)
    ledger.park("a", table, 9)
    assert ledger.num_host_blocks_used == 3
    assert ledger.parked_tokens("a") == 9
    ledger.check()


def test_parking_a_resident_stores_all_it_has_computed() -> None:
    ledger = make_ledger()
    ledger.add("a")
    ledger.started("a")
    assert ledger.residency["a"] is RESIDENT
    ledger.park("a", (4, 2, 7, 11), 10)  # the fourth block is taken for tokens to come
    plan = ledger.take_plan(0)
    assert set(pairs(plan.parks)) == {4, 2, 7}
    assert ledger.num_host_blocks_used == 3
    ledger.check()


def test_a_fetch_loads_only_what_the_prefix_cache_has_not() -> None:
    ledger = make_ledger()
    ledger.add("a")
    ledger.started("a")
    ledger.park("a", (1, 2, 3, 4), 14)
    stored = pairs(ledger.take_plan(0).parks)
    ledger.fetch("a", (1, 2, 8, 9), 8)
    [fetch] = ledger.take_plan(0).fetches
    assert fetch.request_id == "a"
    assert pairs(fetch.runs) == {8: stored[3], 9: stored[4]}
    assert ledger.residency["a"] is FETCHING
    assert ledger.parked_tokens("a") == 0
    assert ledger.num_host_blocks_used == 4
    ledger.complete_fetch("a")
    assert ledger.residency["a"] is RESIDENT
    assert ledger.num_host_blocks_used == 0
    ledger.check()


def test_a_parked_request_whose_blocks_are_all_cached_resumes_without_a_copy() -> None:
    ledger = make_ledger()
    ledger.add("a")
    ledger.started("a")
    ledger.park("a", (1, 2), 8)
    ledger.take_plan(0)
    ledger.resume_without_fetch("a")
    assert ledger.residency["a"] is RESIDENT
    assert ledger.num_host_blocks_used == 0
    assert ledger.is_idle
    ledger.check()


def test_a_cancelled_admission_leaves_no_trace() -> None:
    ledger = make_ledger()
    ledger.add("a")
    before = books(ledger)
    ledger.admit_layered("a", table_blocks=6, zone_blocks=5)
    assert ledger.num_host_blocks_used == 6
    assert ledger.zone.num_available == ZONE - 5
    ledger.cancel_layered("a")
    assert books(ledger) == before
    ledger.check()


def test_a_plan_is_handed_out_once() -> None:
    ledger = make_ledger()
    ledger.add("a")
    ledger.started("a")
    assert ledger.is_idle
    ledger.park("a", (1,), 3)
    assert not ledger.is_idle
    assert ledger.take_plan(0).parks
    assert ledger.is_idle
    assert ledger.take_plan(7) == StepPlan(num_tokens=7)


def test_streamed_decode_takes_host_blocks_beyond_the_prompt_one_by_one() -> None:
    ledger = make_ledger()
    table = layered(ledger, "a", 2)
    ledger.step_layered("a", table, num_computed=0, num_scheduled=8)
    table += tuple(ledger.zone.take("a", 1))
    ledger.take_plan(8)
    for num_computed in range(8, 12):
        ledger.step_layered("a", table, num_computed=num_computed, num_scheduled=1)
        plan = ledger.take_plan(1)
        assert set(pairs(plan.stores)) == {table[2]}
        assert set(pairs(plan.loads)) == set(table[: 2 if num_computed == 8 else 3])
        assert ledger.num_host_blocks_used == 3
    ledger.check()


def test_streamed_decode_takes_its_next_host_block_from_a_prefix_kept_in_the_same_step() -> None:
    """Requests come before prefixes: the end of another request must not cost this one its next token."""
    ledger = make_ledger(num_host_blocks=4)
    table = layered(ledger, "a", 2)
    ledger.step_layered("a", table, num_computed=0, num_scheduled=8)
    ledger.take_plan(8)
    finished(ledger, "b", (4, 5), ["h0", "h1"], 2 * TOKENS)
    assert ledger.host.num_free == 0
    table += tuple(ledger.zone.take("a", 1))
    ledger.step_layered("a", table, num_computed=8, num_scheduled=1)
    assert set(pairs(ledger.take_plan(1).stores)) == {table[2]}
    assert (ledger.num_host_blocks_used, ledger.host.num_cached) == (3, 1)
    ledger.check()


def test_counters_count_blocks_and_events() -> None:
    ledger = make_ledger()
    table = layered(ledger, "a", 3, hits=(5,))
    ledger.step_layered("a", table, num_computed=4, num_scheduled=3)
    ledger.step_layered("a", table, num_computed=7, num_scheduled=4)
    ledger.park("a", table, 11)
    ledger.fetch("a", (1, 2, 3), 0)
    ledger.complete_fetch("a")
    ledger.drop("a")
    counters = ledger.counters
    assert (counters.layered_admissions, counters.parks, counters.fetches, counters.recomputes) == (1, 1, 1, 1)
    assert counters.stored_blocks == 1 + 2 + 1  # chunk, chunk, and the prefix hit at the park
    assert counters.loaded_blocks == 0 + 1 + 3


# Leaving ----------------------------------------------------------------------------------------------------------


def in_state(ledger: KVLedger, request_id: str, state: Residency) -> None:
    """Bring a new request of three blocks there, and give back the device blocks that it does not hold there."""
    if state in (WAITING, RESIDENT):
        ledger.add(request_id)
        if state is RESIDENT:
            ledger.started(request_id)
        return
    table = layered(ledger, request_id, 3)
    ledger.step_layered(request_id, table, num_computed=0, num_scheduled=11)
    ledger.zone.give_back(table)  # vLLM's part, whatever comes
    if state is LAYERED:
        return
    ledger.park(request_id, table, 11)
    if state is FETCHING:
        ledger.fetch(request_id, (1, 2, 3), 0)


@pytest.mark.parametrize("state", Residency)
def test_a_request_that_finishes_in_any_state_gives_everything_back(state: Residency) -> None:
    ledger = make_ledger()
    before = books(ledger)
    in_state(ledger, "a", state)
    ledger.take_plan(0)
    ledger.finish("a")
    ledger.check()
    assert "a" not in ledger.residency
    if state is FETCHING:
        assert ledger.num_host_blocks_used == 3, "a load still reads them"
        ledger.complete_fetch("a")
    ledger.check()
    after = books(ledger)
    assert {**after, "counters": None} == {**before, "counters": None}
    ledger.finish("a")  # a second abort is nothing
    assert books(ledger) == after


def test_a_request_admitted_and_never_started_gives_everything_back() -> None:
    ledger = make_ledger()
    ledger.add("a")
    ledger.admit_layered("a", table_blocks=4, zone_blocks=4)
    ledger.finish("a")
    assert ledger.num_host_blocks_used == 0
    assert ledger.zone.num_available == ZONE
    assert not ledger.layered_ids
    ledger.check()


@pytest.mark.parametrize("state", [RESIDENT, LAYERED, PARKED])
def test_a_dropped_request_waits_again_with_nothing(state: Residency) -> None:
    ledger = make_ledger()
    in_state(ledger, "a", state)
    ledger.take_plan(0)
    ledger.drop("a")
    assert ledger.residency["a"] is WAITING
    assert ledger.num_host_blocks_used == 0
    assert ledger.zone.num_available == ZONE
    assert ledger.counters.recomputes == 1
    ledger.check()


def test_dropping_a_request_that_waits_is_nothing() -> None:
    ledger = make_ledger()
    ledger.add("a")
    before = books(ledger)
    ledger.drop("a")
    assert books(ledger) == before


def test_a_report_about_a_request_that_is_not_fetching_is_nothing() -> None:
    ledger = make_ledger()
    in_state(ledger, "a", PARKED)
    before = books(ledger)
    ledger.complete_fetch("a")
    ledger.complete_fetch("nobody")
    assert books(ledger) == before


def test_a_request_is_not_dropped_while_a_load_reads_its_host_blocks() -> None:
    ledger = make_ledger(num_host_blocks=3)
    in_state(ledger, "a", FETCHING)
    ledger.take_plan(0)
    before = books(ledger)
    with pytest.raises(AssertionError, match="a is dropped while it is loaded"):
        ledger.drop("a")
    assert books(ledger) == before
    assert ledger.host.num_free == 0, "the load into pool blocks 1-3 still reads all three"


def test_a_new_request_with_the_id_of_one_that_left_while_fetching_keeps_its_own_host_blocks() -> None:
    ledger = make_ledger()
    in_state(ledger, "a", FETCHING)
    ledger.take_plan(0)
    ledger.finish("a")
    layered(ledger, "a", 4)
    assert ledger.num_host_blocks_used == 3 + 4
    ledger.check()
    ledger.complete_fetch("a")  # the old one's
    assert ledger.num_host_blocks_used == 4
    ledger.check()


# Stored ahead -----------------------------------------------------------------------------------------------------


def resident(ledger: KVLedger, request_id: str) -> None:
    ledger.add(request_id)
    ledger.started(request_id)


def test_what_was_stored_ahead_is_not_stored_again_by_the_park_which_waits_for_it() -> None:
    ledger = make_ledger()
    resident(ledger, "r")
    assert ledger.store_ahead("r", (1, 2, 3), 2 * TOKENS + 1) == 2
    ahead = ledger.take_plan(1)
    assert (set(pairs(ahead.ahead)), ahead.settle) == ({1, 2}, False)
    ledger.check()
    ledger.park("r", (1, 2, 3), 3 * TOKENS)
    plan = ledger.take_plan(1)
    assert (set(pairs(plan.parks)), plan.ahead, plan.settle) == ({3}, (), True)
    assert ledger.parked_tokens("r") == 3 * TOKENS
    ledger.fetch("r", (7, 8, 9, 10), 0)
    (fetch,) = ledger.take_plan(1).fetches
    found = {**pairs(ahead.ahead), **pairs(plan.parks)}
    assert pairs(fetch.runs) == {7: found[1], 8: found[2], 9: found[3]}
    ledger.check()


def test_more_is_stored_ahead_as_the_request_goes_on() -> None:
    ledger = make_ledger()
    resident(ledger, "r")
    ledger.store_ahead("r", (1, 2), 2 * TOKENS)
    ledger.take_plan(1)
    assert ledger.store_ahead("r", (1, 2, 3, 4), 4 * TOKENS - 1) == 3
    assert set(pairs(ledger.take_plan(1).ahead)) == {3}
    assert ledger.store_ahead("r", (1, 2, 3, 4), 4 * TOKENS - 1) == 3
    assert ledger.is_idle


@pytest.mark.parametrize("leave", [KVLedger.finish, KVLedger.drop])
def test_the_step_that_gives_host_blocks_of_a_background_store_away_settles(
    leave: Callable[[KVLedger, str], None],
) -> None:
    ledger = make_ledger()
    resident(ledger, "r")
    ledger.store_ahead("r", (1, 2), 2 * TOKENS)
    ledger.take_plan(1)
    leave(ledger, "r")
    assert ledger.num_host_blocks_used == 0
    assert not ledger.is_idle
    assert ledger.take_plan(1).settle
    assert ledger.is_idle


def test_a_background_store_that_was_never_sent_is_taken_back() -> None:
    ledger = make_ledger()
    resident(ledger, "r")
    ledger.store_ahead("r", (1, 2), 2 * TOKENS)
    ledger.finish("r")
    assert ledger.take_plan(1).ahead == ()
    resident(ledger, "s")
    ledger.store_ahead("s", (1, 2, 3), 2 * TOKENS)
    ledger.park("s", (1, 2, 3), 2 * TOKENS + 1)
    plan = ledger.take_plan(1)
    assert (set(pairs(plan.parks)), plan.ahead) == ({1, 2, 3}, ())


def test_no_host_memory_no_store_ahead() -> None:
    ledger = make_ledger(num_host_blocks=1)
    resident(ledger, "r")
    before = books(ledger)
    with pytest.raises(CapacityError):
        ledger.store_ahead("r", (1, 2), 2 * TOKENS)
    assert books(ledger) == before


# Prefixes that stay -----------------------------------------------------------------------------------------------


def finished(ledger: KVLedger, request_id: str, table: tuple[int, ...], hashes: list[str], num_computed: int) -> None:
    """A resident request that has computed so many tokens ends, and its whole blocks are kept."""
    ledger.add(request_id)
    ledger.started(request_id)
    ledger.finish(request_id, hashes=hashes, block_ids=table, num_computed=num_computed)


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
    kept = pairs(ledger.take_plan(0).parks)
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
        cached = pairs(ledger.take_plan(0).parks)
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


# No room: all or nothing ------------------------------------------------------------------------------------------


def no_zone(ledger: KVLedger) -> None:
    ledger.add("b")
    ledger.admit_layered("b", table_blocks=5, zone_blocks=ZONE)


def no_host(ledger: KVLedger) -> None:
    ledger.add("b")
    ledger.admit_layered("b", table_blocks=ledger.host.num_free + 1, zone_blocks=2)


def no_host_to_park(ledger: KVLedger) -> None:
    ledger.park("r", tuple(range(1, 12)), 44)


def no_host_to_stream(ledger: KVLedger) -> None:
    table = tuple(range(POOL, POOL + ZONE))
    ledger.step_layered("a", table, num_computed=20, num_scheduled=20)


@pytest.mark.parametrize("attempt", [no_zone, no_host, no_host_to_park, no_host_to_stream])
def test_what_does_not_fit_changes_nothing(attempt: Callable[[KVLedger], None]) -> None:
    ledger = make_ledger(num_host_blocks=9)
    layered(ledger, "a", 6)
    ledger.add("r")
    ledger.started("r")
    before = books(ledger)
    with pytest.raises(CapacityError):
        attempt(ledger)
    ledger.residency.get("b") and ledger.finish("b")
    assert books(ledger) == before
    assert ledger.take_plan(0) == StepPlan()
    ledger.check()


def test_can_park_says_what_park_would_do() -> None:
    ledger = make_ledger(num_host_blocks=3)
    ledger.add("r")
    ledger.started("r")
    assert ledger.can_park(3)
    assert not ledger.can_park(4)
    ledger.park("r", (1, 2, 3, 4), 12)
    assert not ledger.can_park(1)


# Any life of any requests -----------------------------------------------------------------------------------------

Token = tuple[str, int]


@dataclass
class Life:
    """What the machine knows of one request. A shared prefix has the tokens of whoever computed it."""

    request_id: str
    num_prompt: int
    num_computed: int = 0
    table: list[int] = field(default_factory=list)
    prefix: list[Token] = field(default_factory=list)
    prefix_of: str | None = None

    def token(self, position: int) -> Token:
        return self.prefix[position] if position < len(self.prefix) else (self.request_id, position)


class Lives(RuleBasedStateMachine):
    """Carries every plan out literally, on blocks that are lists of tokens, and looks whether each token is there.

    The zone is poisoned between steps: what a step needs there it must load, and what it leaves there is lost.
    """

    @initialize(num_host_blocks=st.sampled_from((16, 12, 9, 3, 0)))
    def begin(self, num_host_blocks: int) -> None:
        self.ledger = make_ledger(num_host_blocks)
        self.pool = RunAllocator(1, POOL - 1)
        self.users: dict[int, int] = {}
        self.lives: dict[str, Life] = {}
        self.device: dict[int, list[Token | None]] = {b: [None] * TOKENS for b in range(POOL + ZONE)}
        self.host: dict[int, list[Token | None]] = {b: [None] * TOKENS for b in range(num_host_blocks)}
        self.num_arrived = 0
        self.leaving: dict[str, list[int]] = {}
        self.loading: dict[str, list[int]] = {}  # host blocks that are read, by request
        self.ahead: list[BlockRun] = []  # background stores that have not run: they do so as late as they may

    def among(self, *states: Residency) -> list[str]:
        return [request_id for request_id in self.lives if self.ledger.residency[request_id] in states]

    def blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // TOKENS)

    def hold(self, request_id: str, new: list[int]) -> None:
        for block in new:
            if block < POOL:
                self.users[block] = self.users.get(block, 0) + 1
        self.lives[request_id].table += new

    def free(self, table: list[int]) -> None:
        self.ledger.zone.give_back(block for block in table if block >= POOL)
        for block in table:
            if block < POOL:
                self.users[block] -= 1
                if not self.users[block]:
                    del self.users[block]
                    self.pool.give_back([block])
        table.clear()

    @precondition(lambda self: len(self.lives) < 6)
    @rule(num_tokens=st.integers(1, 30), is_layered=st.booleans(), data=st.data())
    def arrive(self, num_tokens: int, is_layered: bool, data: st.DataObject) -> None:
        request_id = f"r{self.num_arrived}"
        self.num_arrived += 1
        self.ledger.add(request_id)
        self.lives[request_id] = Life(request_id, num_tokens)
        if is_layered:
            self.admit(request_id, data)

    @precondition(lambda self: self.unadmitted)
    @rule(data=st.data())
    def admit_later(self, data: st.DataObject) -> None:
        self.admit(data.draw(st.sampled_from(self.unadmitted)), data)

    @property
    def unadmitted(self) -> list[str]:
        return [r for r in self.among(WAITING) if not self.ledger.is_layered(r) and not self.lives[r].table]

    def admit(self, request_id: str, data: st.DataObject) -> None:
        life = self.lives[request_id]
        table_blocks = self.blocks(life.num_prompt)
        donors = [
            (donor, num_shared)
            for donor in self.among(RESIDENT)
            if (num_shared := min(self.lives[donor].num_computed, life.num_prompt - 1) // TOKENS) > 0
        ]
        donor, num_shared = data.draw(st.sampled_from([*donors, (None, 0)]))
        fits = table_blocks <= self.ledger.host.num_free and table_blocks - num_shared <= self.ledger.zone.num_available
        before = books(self.ledger)
        try:
            self.ledger.admit_layered(request_id, table_blocks=table_blocks, zone_blocks=table_blocks - num_shared)
        except CapacityError:
            assert not fits
            assert books(self.ledger) == before
            return
        assert fits
        if data.draw(st.integers(0, 7)) == 7:
            self.ledger.cancel_layered(request_id)
            assert books(self.ledger) == before
            return
        if donor is not None:
            life.prefix_of = donor
            life.prefix = [self.lives[donor].token(position) for position in range(num_shared * TOKENS)]
            self.hold(request_id, self.lives[donor].table[:num_shared])
            life.num_computed = num_shared * TOKENS

    @precondition(lambda self: self.among(WAITING, RESIDENT, LAYERED))
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        runnable = self.among(WAITING, RESIDENT, LAYERED)
        chosen = data.draw(st.lists(st.sampled_from(runnable), unique=True, min_size=1, max_size=3))
        rows: list[tuple[str, int]] = []
        for request_id in chosen:
            life = self.lives[request_id]
            left = life.num_prompt - life.num_computed
            num_tokens = data.draw(st.integers(1, left)) if left > 0 else 1
            if self.allocate(request_id, num_tokens):
                rows.append((request_id, num_tokens))
        plan = self.ledger.take_plan(sum(num_tokens for _, num_tokens in rows))
        self.carry_out(plan, rows)

    def allocate(self, request_id: str, num_tokens: int) -> bool:
        """As vLLM does: blocks for all tokens or none; then the ledger is told."""
        ledger, life = self.ledger, self.lives[request_id]
        missing = max(self.blocks(life.num_computed + num_tokens) - len(life.table), 0)
        if not ledger.is_layered(request_id):
            if missing > self.pool.num_free:
                return False
            self.hold(request_id, self.pool.take(missing))
            ledger.started(request_id)
            return True
        if not ledger.zone.can_take(request_id, missing):
            return False
        within_prompt = life.num_computed + num_tokens <= life.num_prompt
        if not within_prompt and ledger.host.num_free < missing:
            return False
        self.hold(request_id, ledger.zone.take(request_id, missing))
        ledger.started(request_id)
        ledger.step_layered(request_id, tuple(life.table), num_computed=life.num_computed, num_scheduled=num_tokens)
        return True

    def carry_out(self, plan: StepPlan, rows: list[tuple[str, int]]) -> None:
        assert plan.is_layered == any(self.ledger.is_layered(request_id) for request_id, _ in rows)
        if plan.settle:
            self.store(tuple(self.ahead))
            self.ahead = []
        self.ahead += plan.ahead
        self.store(plan.parks)
        for block in range(POOL, POOL + ZONE):
            self.device[block] = [("poison", 0)] * TOKENS
        assert all(block >= POOL for block in pairs(plan.stores + plan.loads))
        for block, host_block in pairs(plan.loads).items():
            self.device[block] = list(self.host[host_block])
        for request_id, num_tokens in rows:
            life = self.lives[request_id]
            for position in range(life.num_computed, life.num_computed + num_tokens):
                self.device[life.table[position // TOKENS]][position % TOKENS] = life.token(position)
            life.num_computed += num_tokens
            self.attend(request_id)
        self.store(plan.stores)
        for fetch in plan.fetches:
            for block, host_block in pairs(fetch.runs).items():
                assert block < POOL
                self.device[block] = list(self.host[host_block])
            self.loading[fetch.request_id] = list(pairs(fetch.runs).values())

    def store(self, runs: tuple[BlockRun, ...]) -> None:
        for run in runs:  # one device block may go to two hosts: two parked requests shared it
            for offset in range(run.num_blocks):
                self.host[run.host_block + offset] = list(self.device[run.device_block + offset])

    def attend(self, request_id: str) -> None:
        life = self.lives[request_id]
        for position in range(life.num_computed):
            found = self.device[life.table[position // TOKENS]][position % TOKENS]
            assert found == life.token(position), f"{request_id} finds {found} at token {position}"

    @precondition(lambda self: self.among(RESIDENT))
    @rule(data=st.data())
    def store_ahead(self, data: st.DataObject) -> None:
        self.carry_out(self.ledger.take_plan(0), [])
        request_id = data.draw(st.sampled_from(self.among(RESIDENT)))
        life, before = self.lives[request_id], books(self.ledger)
        num_held = self.ledger.num_host_blocks_of(request_id)
        num_whole = life.num_computed // TOKENS
        try:
            num_stored = self.ledger.store_ahead(request_id, tuple(life.table), life.num_computed)
        except CapacityError:
            assert num_whole - num_held > self.ledger.host.num_free
            assert books(self.ledger) == before
            return
        assert num_stored == self.ledger.num_host_blocks_of(request_id) == max(num_whole, num_held)

    @property
    def parkable(self) -> list[str]:
        return [r for r in self.among(RESIDENT, LAYERED) if self.lives[r].num_computed]

    @precondition(lambda self: self.parkable)
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self.parkable))
        life, before = self.lives[request_id], books(self.ledger)
        is_layered = self.ledger.is_layered(request_id)
        num_held = self.ledger.num_host_blocks_of(request_id)
        fits = is_layered or self.ledger.can_park(self.blocks(life.num_computed) - num_held)
        try:
            self.ledger.park(request_id, tuple(life.table), life.num_computed)
        except CapacityError:
            assert not fits
            assert books(self.ledger) == before
            return
        assert fits
        assert self.ledger.parked_tokens(request_id) == life.num_computed
        self.free(life.table)

    @property
    def fetchable(self) -> list[str]:
        return [r for r in self.among(PARKED) if self.blocks(self.lives[r].num_computed + 1) <= self.pool.num_free]

    @precondition(lambda self: self.fetchable)
    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self.fetchable))
        life, shared = self.lives[request_id], []
        if life.prefix_of in self.among(RESIDENT):
            donor = self.lives[life.prefix_of]
            common = [donor.token(position) for position in range(len(life.prefix))] == life.prefix
            most = min(len(life.prefix), life.num_computed - 1, donor.num_computed) // TOKENS * common
            shared = donor.table[: data.draw(st.integers(0, most))]
        self.hold(request_id, shared)
        self.hold(request_id, self.pool.take(self.blocks(life.num_computed + 1) - len(shared)))
        self.ledger.fetch(request_id, tuple(life.table), len(shared) * TOKENS)

    @precondition(lambda self: self.loading)
    @rule()
    def report_a_fetch(self) -> None:
        request_id = next(iter(self.loading))
        del self.loading[request_id]
        self.ledger.complete_fetch(request_id)
        self.free(self.leaving.pop(request_id, []))
        if request_id in self.lives:
            self.attend(request_id)

    @precondition(lambda self: self.num_arrived > 2 and self.among(RESIDENT, LAYERED, PARKED))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """Not while FETCHING: vLLM preempts only what runs (see the test on its own above)."""
        self.carry_out(self.ledger.take_plan(0), [])
        request_id = data.draw(st.sampled_from(self.among(RESIDENT, LAYERED, PARKED)))
        self.ledger.drop(request_id)
        life = self.lives[request_id]
        life.num_prompt = max(life.num_prompt, life.num_computed)
        life.num_computed, life.prefix_of, life.prefix = 0, None, []
        self.free(life.table)

    @precondition(lambda self: len(self.lives) > 2)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.carry_out(self.ledger.take_plan(0), [])  # requests leave between steps
        self.leave(data.draw(st.sampled_from(sorted(self.lives))))

    def leave(self, request_id: str) -> None:
        is_fetching = self.ledger.residency[request_id] is FETCHING
        self.ledger.finish(request_id)
        life = self.lives.pop(request_id)
        if is_fetching:
            self.leaving[request_id] = life.table
        else:
            self.free(life.table)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.ledger.check()
        self.pool.check()
        tables = [life.table for life in self.lives.values()] + list(self.leaving.values())
        in_zone = [block for table in tables for block in table if block >= POOL]
        assert len(in_zone) == len(set(in_zone)) == self.ledger.zone.num_taken
        being_read = [block for blocks in self.loading.values() for block in blocks]
        assert not any(self.ledger.host.is_free(block) for block in being_read)

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.carry_out(self.ledger.take_plan(0), [])
        for request_id in list(self.lives):
            self.leave(request_id)
            self.ledger.check()
        while self.loading:
            self.report_a_fetch()
        assert self.ledger.num_host_blocks_used == 0
        assert (self.ledger.zone.num_taken, self.ledger.zone.num_available) == (0, ZONE)
        assert self.pool.num_free == POOL - 1
        assert not any(self.ledger.residency.counts.values())
        assert not self.ledger.take_plan(0).ahead, "a store of nobody's blocks is still planned"
        assert self.ledger.is_idle


Lives.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestLives = Lives.TestCase


def test_who_holds_a_host_block_is_known_wherever_its_request_is() -> None:
    ledger = make_ledger()
    for name in ("layered", "parked", "ahead"):
        ledger.add(name)
    ledger.admit_layered("layered", table_blocks=2, zone_blocks=2)
    ledger.started("layered")
    for name in ("parked", "ahead"):
        ledger.started(name)
    ledger.park("parked", [3, 4], 2 * TOKENS)
    ledger.store_ahead("ahead", [5, 6], 2 * TOKENS)
    plan = ledger.take_plan(1)
    assert ledger.holders({run.host_block for run in plan.parks}) == ["parked"]
    assert ledger.holders({run.host_block for run in plan.ahead}) == ["ahead"]
    ledger.drop_ahead("ahead")
    assert ledger.holders(set(range(12))) == ["layered", "parked"]
    assert ledger.residency["ahead"] is Residency.RESIDENT
    assert ledger.take_plan(1).settle, "its blocks may be given to somebody else while the store is under way"
    ledger.check()
