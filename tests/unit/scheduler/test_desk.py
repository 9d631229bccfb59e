"""The desk enters what happens to a request in both books, or in neither."""

from __future__ import annotations

from unittest import mock

import pytest

from layerkv.core.ledger import KVLedger
from layerkv.core.residency import Residency
from layerkv.errors import CapacityError
from layerkv.scheduler.controller import Controller
from layerkv.scheduler.desk import Desk
from layerkv.scheduler.engine import EngineShape
from layerkv.scheduler.prefill import prefill_share
from layerkv.scheduler.reasons import End, Event, Reason
from layerkv.scheduler.snapshot import Admission, StoreAhead
from tests.fakes.tiny_scheduler import BLOCK_BYTES, BLOCK_TOKENS, job, policy, profile, setup


class Books:
    """A desk and its two books, and requests of two blocks each that have been started."""

    def __init__(self, *running: str, host_blocks: int = 60) -> None:
        geometry = setup().geometry
        shape = EngineShape("auto", BLOCK_TOKENS, BLOCK_BYTES, geometry.pool_blocks, geometry.zone_blocks, host_blocks)
        self.ledger = KVLedger(geometry, host_blocks)
        self.controller = Controller(policy(), shape, profile(), is_measured=True, keep_log=True)
        self.desk = Desk(self.controller, self.ledger)
        self.desk.begin_step(7, 1.0)
        for name in running:
            self.arrive(name)
            self.ledger.started(name)
            self.desk.admitted(name, Reason.FITS)

    def arrive(self, name: str) -> None:
        self.ledger.add(name)
        self.controller.arrive(name, job("", 1, 1).slo, now_s=0.0, arrival_s=0.0, num_tokens=20, max_tokens=9)

    def park(self, name: str, *block_ids: int) -> None:
        self.desk.park(name, (block_ids,), num_computed=20, num_tokens=21, num_output=1, reason=Reason.MAKES_ROOM)

    def check(self, name: str, state: Residency | None) -> None:
        """Both books say the same of a request."""
        self.ledger.check()
        assert self.ledger.residency.get(name) is state
        assert (name in self.controller.waiting) == (state is Residency.WAITING)
        assert (name in self.controller.parked) == (state is Residency.PARKED)
        assert (name in self.controller.tracked) == (state is not None)


def test_both_books_follow_a_request_from_its_start_to_its_end() -> None:
    books = Books("a")
    books.check("a", Residency.RESIDENT)
    books.desk.store_ahead(StoreAhead("a", 9), ([1, 2],), 20)
    assert books.ledger.num_host_blocks_of("a") == 1, "of its whole blocks"
    books.park("a", 1, 2)
    books.check("a", Residency.PARKED)
    books.desk.begin_step(9, 2.0)
    books.desk.fetch("a", ([3, 4],))
    books.check("a", Residency.FETCHING)
    assert books.controller.tracked["a"].resident_since_step == 9
    books.ledger.complete_fetch("a")
    books.desk.recomputes("a", num_tokens=21, num_output=1, reason=Reason.PREEMPTED, now_s=3.0)
    books.check("a", Residency.WAITING)
    books.desk.leave("a", num_output=1, end=End.LEFT, now_s=4.0)
    books.check("a", None)
    said = [(entry.event, entry.time_s) for entry in books.controller.take_log()]
    events = (Event.ADMITTED_RESIDENT, Event.STORED_AHEAD, Event.PARKED, Event.FETCHED, Event.RECOMPUTES)
    assert said[1:-1] == list(zip(events, (1.0, 1.0, 1.0, 2.0, 3.0), strict=True))


@pytest.mark.parametrize("state", ["resident", "parked", "fetching", "paused"])
def test_only_a_request_that_makes_tokens_says_how_long_it_became(state: str) -> None:
    books = Books("a")
    if state == "paused":
        books.desk.pause("a", 20, Reason.SLOT_LENT)
    elif state != "resident":
        books.park("a", 1, 2)
    if state == "fetching":
        books.desk.begin_step(9, 2.0)
        books.desk.fetch("a", ([3, 4],))
    with mock.patch.object(books.controller.lengths, "observe") as observed:
        books.desk.leave("a", num_output=3, end=End.LEFT, now_s=4.0)
    assert observed.call_args.kwargs["is_bound"] is (state != "resident")


def test_what_the_ledger_refuses_the_controller_never_hears_of() -> None:
    books = Books("a", "b", host_blocks=3)
    books.park("a", 1, 2)
    with pytest.raises(CapacityError):
        books.park("b", 3, 4)
    books.check("b", Residency.RESIDENT)
    with pytest.raises(CapacityError):
        books.desk.store_ahead(StoreAhead("b", 2), ([3, 4],), 32)
    assert Event.STORED_AHEAD not in [entry.event for entry in books.controller.take_log()]


def test_a_copy_that_is_dropped_ahead_of_a_park_is_forgotten() -> None:
    books = Books("a")
    books.desk.store_ahead(StoreAhead("a", 1), ([1, 2],), 20)
    books.desk.drop_ahead("a")
    assert books.ledger.num_host_blocks_used == 0


@pytest.mark.parametrize("is_started", [True, False])
def test_a_reservation_in_the_zone_is_used_or_given_back(is_started: bool) -> None:
    books = Books()
    books.arrive("a")
    books.desk.reserve(Admission("a", layered=True, zone_blocks=2, host_blocks=2))
    if is_started:
        books.ledger.started("a")
        books.desk.admitted("a", Reason.FITS)
        books.check("a", Residency.LAYERED)
        assert Event.ADMITTED_LAYERED in [entry.event for entry in books.controller.take_log()]
        return
    books.desk.declined("a")
    books.check("a", Residency.WAITING)
    assert books.ledger.num_host_blocks_used == 0
    assert books.ledger.zone.num_available == books.ledger.zone.num_blocks


def test_prompts_under_way_share_what_decodes_leave() -> None:
    assert prefill_share(2048, decode_tokens=8, prefill_tokens=512, num_prompts=2) == (520, 256)
    assert prefill_share(100, decode_tokens=8, prefill_tokens=512, num_prompts=2) == (100, 46)
    assert prefill_share(100, decode_tokens=8, prefill_tokens=512, num_prompts=2, spare_tokens=2) == (100, 45)


def test_a_step_is_never_without_tokens_and_without_prompts_the_first_may_take_all() -> None:
    assert prefill_share(2048, decode_tokens=0, prefill_tokens=0, num_prompts=3) == (1, 1)
    assert prefill_share(2048, decode_tokens=8, prefill_tokens=512, num_prompts=0) == (520, 520)
