"""Copies that residents keep in host memory give way, and what is counted on then is there."""

from __future__ import annotations

from layerkv.scheduler.policy import decide
from tests.fakes.snapshots import HOST, POOL, ZONE, changed, cost, prompt, resident, snapshot

FULL = {"policy": "fluid", "free_blocks": 20, "cost": cost(), "num_resident": 8, "free_host_blocks": 10}


def test_blocks_that_a_copy_shares_are_not_counted_on_when_it_gives_way() -> None:
    """They are not free before the next plan. Where they were, a park took them, and the engine ended."""
    shares = resident("shares", num_stored=9, num_shared=6)
    s = snapshot(resident=[shares], **{**FULL, "free_host_blocks": 2, "free_blocks": 0, "growth_blocks": 1})
    decision = decide(s)
    assert decision.drop_copy == ("shares",)
    assert decision.park == (), "its ten blocks find five"
    owns = shares._replace(num_shared=0)
    assert decide(changed(s, resident=[owns])).park == ("shares",)


def test_a_copy_of_nothing_but_shared_blocks_stays() -> None:
    shares = resident("shares", num_stored=6, num_shared=6)
    assert decide(snapshot(resident=[shares], **FULL)).drop_copy == ()


def test_no_copy_gives_way_to_a_prompt_that_can_never_run_layered() -> None:
    """It waits for the pool: all copies went in every step, and were written anew in the next."""
    kept = resident("kept", num_stored=9)
    for waits in (prompt("longer than the zone", ZONE + 1), prompt("stays", 30, can_layer=False)):
        s = snapshot(resident=[kept], waiting=[waits], **{**FULL, "free_host_blocks": 20})
        assert decide(s).drop_copy == ()


def test_what_gave_way_to_a_prompt_is_not_written_again_while_that_waits() -> None:
    waits = prompt("waits", ZONE)
    residents = [resident(f"r{i}", num_stored=5) for i in range(8)]
    s = snapshot(resident=residents, waiting=[waits], **{**FULL, "free_zone_blocks": 0, "free_host_blocks": ZONE - 5})
    first = decide(s)
    assert len(first.drop_copy) == 1
    [gone] = first.drop_copy
    residents = [r._replace(num_stored=0) if r.request_id == gone else r for r in residents]
    second = decide(changed(s, resident=residents, free_host_blocks=ZONE))
    assert second.drop_copy == second.store_ahead == ()
    assert decide(changed(s, resident=residents, free_host_blocks=ZONE, waiting=())).store_ahead
    assert ZONE > HOST // 4 < POOL
