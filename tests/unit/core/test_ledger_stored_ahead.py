"""The ledger: what is stored before a request parks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from layerkv.core.ledger import KVLedger
from layerkv.core.residency import Residency
from layerkv.errors import CapacityError
from tests.fakes.tiny_ledger import (
    TOKENS,
    books,
    make_ledger,
    pairs,
    resident,
)


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
