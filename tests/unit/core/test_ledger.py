"""The ledger: what each operation plans for one request, and that a refused one changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from layerkv.core.ledger import KVLedger
from layerkv.core.transfer import StepPlan
from layerkv.errors import CapacityError
from tests.fakes.tiny_ledger import (
    FETCHING,
    LAYERED,
    PARKED,
    POOL,
    RESIDENT,
    TOKENS,
    ZONE,
    books,
    finished,
    layered,
    make_ledger,
    pairs,
)


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


def test_a_park_takes_host_blocks_for_what_was_computed() -> None:
    ledger = make_ledger(num_host_blocks=3)
    ledger.add("r")
    ledger.started("r")
    assert ledger.host.num_free == 3
    ledger.park("r", (1, 2, 3, 4), 12)
    assert ledger.host.num_free == 0
