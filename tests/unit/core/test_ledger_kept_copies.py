"""The ledger: what a fetched request keeps in host memory, so that its next park stores only what is new."""

from __future__ import annotations

import pytest

from layerkv.core.ledger import KVLedger
from tests.fakes.tiny_ledger import PARKED, RESIDENT, TOKENS, finished, make_ledger, pairs, resident


def keeping(num_host_blocks: int = 12) -> KVLedger:
    ledger = make_ledger(num_host_blocks)
    ledger.keeps_copies = True
    return ledger


def come_back(ledger: KVLedger, request_id: str, table: tuple[int, ...], num_computed: int) -> dict[int, int]:
    """A resident is parked and fetched; what its park stored."""
    ledger.park(request_id, table, num_computed)
    stored = pairs(ledger.take_plan(0).parks)
    ledger.fetch(request_id, table, 0)
    ledger.take_plan(0)
    ledger.complete_fetch(request_id)
    ledger.check()
    return stored


def test_the_second_park_stores_only_the_blocks_that_have_changed_since_the_first() -> None:
    ledger = keeping()
    resident(ledger, "r")
    first = come_back(ledger, "r", (1, 2, 3), 2 * TOKENS + 1)
    assert set(first) == {1, 2, 3}
    assert ledger.num_host_blocks_of("r") == 2, "its third block is written on"
    ledger.park("r", (4, 5, 6, 7), 3 * TOKENS + 2)
    plan = ledger.take_plan(0)
    assert set(pairs(plan.parks)) == {6, 7}
    ledger.fetch("r", (8, 9, 10, 11), 0)
    (fetch,) = ledger.take_plan(0).fetches
    found = pairs(fetch.runs)
    assert (found[8], found[9]) == (first[1], first[2]), "what was stored the first time"
    assert {found[10], found[11]} == set(pairs(plan.parks).values())


def test_without_the_wish_to_keep_copies_a_fetch_gives_its_host_blocks_back() -> None:
    ledger = make_ledger()
    resident(ledger, "r")
    come_back(ledger, "r", (1, 2, 3), 2 * TOKENS + 1)
    assert ledger.num_host_blocks_of("r") == 0
    assert set(come_back(ledger, "r", (1, 2, 3), 2 * TOKENS + 1)) == {1, 2, 3}


def test_a_request_without_a_whole_block_keeps_nothing() -> None:
    ledger = keeping()
    resident(ledger, "r")
    come_back(ledger, "r", (1,), TOKENS - 1)
    assert ledger.num_host_blocks_used == 0


def test_a_copy_that_gives_way_is_stored_again_by_the_next_park() -> None:
    ledger = keeping(num_host_blocks=3)
    resident(ledger, "r")
    come_back(ledger, "r", (1, 2, 3), 2 * TOKENS + 1)
    ledger.drop_ahead("r")
    assert (ledger.host.num_free, ledger.residency["r"]) == (3, RESIDENT)
    ledger.park("r", (1, 2, 3), 2 * TOKENS + 1)
    plan = ledger.take_plan(0)
    assert set(pairs(plan.parks)) == {1, 2, 3}
    assert plan.settle, "a background store may still write what was given back"
    ledger.check()


def test_what_is_stored_ahead_of_a_request_that_was_fetched_goes_on_where_its_copy_ends() -> None:
    ledger = keeping()
    resident(ledger, "r")
    come_back(ledger, "r", (1, 2, 3), 2 * TOKENS + 1)
    assert ledger.store_ahead("r", (1, 2, 3, 4, 5), 5 * TOKENS, 2) == 4, "of three blocks it may copy two"
    assert set(pairs(ledger.take_plan(0).ahead)) == {3, 4}
    ledger.park("r", (1, 2, 3, 4, 5), 5 * TOKENS)
    assert set(pairs(ledger.take_plan(0).parks)) == {5}
    ledger.check()


def test_what_was_being_loaded_when_a_load_failed_is_not_kept() -> None:
    ledger = keeping()
    resident(ledger, "r")
    ledger.park("r", (1, 2), 2 * TOKENS)
    ledger.fetch("r", (3, 4), 0)
    ledger.take_plan(0)
    ledger.forget_prefixes()
    ledger.complete_fetch("r")
    assert ledger.num_host_blocks_used == 0
    ledger.park("r", (3, 4), 2 * TOKENS)
    assert set(pairs(ledger.take_plan(0).parks)) == {3, 4}


@pytest.mark.parametrize("how", ["finish", "drop", "leave while it is fetched"])
def test_a_kept_copy_goes_with_its_request(how: str) -> None:
    ledger = keeping()
    resident(ledger, "r")
    come_back(ledger, "r", (1, 2, 3), 2 * TOKENS + 1)
    if how == "finish":
        ledger.finish("r")
    elif how == "drop":
        ledger.drop("r")
    else:
        ledger.park("r", (1, 2, 3), 2 * TOKENS + 1)
        ledger.fetch("r", (1, 2, 3), 0)
        ledger.take_plan(0)
        ledger.finish("r")
        ledger.complete_fetch("r")
    assert ledger.num_host_blocks_used == 0
    ledger.check()


def test_a_kept_copy_becomes_a_cached_prefix_when_its_request_ends() -> None:
    ledger = keeping()
    resident(ledger, "r")
    stored = come_back(ledger, "r", (1, 2), 2 * TOKENS)
    ledger.finish("r", hashes=["h0", "h1"], block_ids=(1, 2), num_computed=2 * TOKENS)
    assert not pairs(ledger.take_plan(0).parks)
    assert ledger.host.find(["h0", "h1"]) == [stored[1], stored[2]]


def test_host_blocks_that_are_shared_with_the_prefix_cache_are_not_kept_as_ones_that_could_give_way() -> None:
    """Regression: a copy that gave way counted as so many free blocks, and the parks that were to have them ended the
    engine."""
    ledger = keeping()
    finished(ledger, "a", (4, 5), ["h0", "h1"], 2 * TOKENS)
    ledger.take_plan(0)
    ledger.add("b")
    ledger.admit_layered("b", table_blocks=3, zone_blocks=3, hashes=["h0", "h1"])
    assert ledger.settle_prefix("b", ["h0", "h1"], 0) == 2
    table = ledger.zone.take("b", 3)
    ledger.load_prefix("b", table, ["h0", "h1"], range(2))
    ledger.step_layered("b", table, num_computed=2 * TOKENS, num_scheduled=TOKENS)
    ledger.take_plan(TOKENS)
    ledger.park("b", table, 3 * TOKENS)
    assert ledger.residency["b"] is PARKED
    ledger.zone.give_back(table)
    ledger.take_plan(0)
    ledger.fetch("b", (1, 2, 3), 0)
    ledger.take_plan(0)
    ledger.complete_fetch("b")
    ledger.take_plan(0)
    free, num_kept = ledger.host.num_free, ledger.num_host_blocks_of("b")
    if num_kept:
        ledger.drop_ahead("b")
    assert ledger.host.num_free == free + num_kept
    ledger.check()
