"""Parked streams that flow, summed up."""

from __future__ import annotations

from layerkv.scheduler.flows import STALE_ENDS, Flows


def test_what_is_kept_does_not_grow_with_parks() -> None:
    """A request without a reader flows until its mean is lost, which may be hours from now: each of its parks left an
    entry until then."""
    flows = Flows()
    for _ in range(10_000):
        flows.add("batch", 1.0, 3, until_s=1e6)
        flows.discard("batch")
    assert len(flows._ends) <= STALE_ENDS


def test_streams_end_in_their_turn_though_others_come_and_go_often() -> None:
    flows = Flows()
    for index in range(10):
        flows.add(f"stays {index}", 0.1, 2, until_s=float(index))
    for _ in range(1_000):
        flows.add("turns", 0.2, 5, until_s=100.0)
    assert flows.blocks(-1.0) == {0.1: 20, 0.2: 5}
    assert flows.blocks(4.5) == {0.1: 10, 0.2: 5}
    assert flows.blocks(100.5) == {}
