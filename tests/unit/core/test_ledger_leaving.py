"""The ledger: a request that leaves, in whatever state, gives everything back, once."""

from __future__ import annotations

import pytest

from layerkv.core.ledger import KVLedger
from layerkv.core.residency import Residency
from tests.fakes.tiny_ledger import (
    FETCHING,
    LAYERED,
    PARKED,
    RESIDENT,
    WAITING,
    ZONE,
    books,
    layered,
    make_ledger,
)


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
