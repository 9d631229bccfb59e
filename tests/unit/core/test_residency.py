from __future__ import annotations

from itertools import product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from layerkv.core.residency import Residency, ResidencyTable

WAITING, RESIDENT, LAYERED, PARKED, FETCHING = Residency

LEGAL = {
    (WAITING, RESIDENT),
    (WAITING, LAYERED),
    (LAYERED, PARKED),
    (RESIDENT, PARKED),
    (PARKED, FETCHING),
    (PARKED, LAYERED),  # longer than the pool: its next turn in the zone
    (PARKED, RESIDENT),  # all its blocks are prefix-cache hits
    (FETCHING, RESIDENT),
    *((old, WAITING) for old in (RESIDENT, LAYERED, PARKED)),  # given up, computed again; never while loads read it
}
"""DESIGN.md 2, written down a second time."""

PATH_TO = {
    WAITING: (),
    RESIDENT: (RESIDENT,),
    LAYERED: (LAYERED,),
    PARKED: (LAYERED, PARKED),
    FETCHING: (LAYERED, PARKED, FETCHING),
}


def table_with(request_id: str, residency: Residency) -> ResidencyTable:
    table = ResidencyTable()
    table.add(request_id)
    for step in PATH_TO[residency]:
        table.move(request_id, step)
    return table


@pytest.mark.parametrize(("old", "new"), list(product(Residency, Residency)))
def test_only_the_legal_moves_can_be_made(old: Residency, new: Residency) -> None:
    table = table_with("a", old)
    if (old, new) in LEGAL:
        table.move("a", new)
        assert table["a"] is new
    else:
        with pytest.raises(AssertionError, match="no legal move"):
            table.move("a", new)
        assert table["a"] is old
        assert table.counts[old] == 1


@pytest.mark.parametrize("residency", Residency)
def test_a_request_may_leave_from_anywhere(residency: Residency) -> None:
    table = table_with("a", residency)
    table.remove("a")
    assert "a" not in table
    assert table.get("a") is None
    assert not any(table.counts.values())


def test_the_listener_hears_every_move_and_the_leaving() -> None:
    table, heard = ResidencyTable(), []
    table.listener = lambda *move: heard.append(move)
    table.add("a")
    for step in (LAYERED, PARKED, FETCHING, RESIDENT):
        table.move("a", step)
    table.remove("a")
    assert heard == [
        ("a", "waiting", "layered"),
        ("a", "layered", "parked"),
        ("a", "parked", "fetching"),
        ("a", "fetching", "resident"),
        ("a", "resident", "gone"),
    ]


def test_a_request_that_is_here_cannot_arrive_again() -> None:
    table = table_with("a", PARKED)
    with pytest.raises(AssertionError, match="known already"):
        table.add("a")


def test_nobody_moves_who_is_not_here() -> None:
    table = ResidencyTable()
    with pytest.raises(KeyError):
        table.move("a", RESIDENT)
    with pytest.raises(KeyError):
        table.remove("a")


class Table(RuleBasedStateMachine):
    """The table beside a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.of = ResidencyTable(), {}

    @rule(request_id=st.sampled_from("abcd"))
    def arrive_or_leave(self, request_id: str) -> None:
        if request_id in self.of:
            self.table.remove(request_id)
            del self.of[request_id]
        else:
            self.table.add(request_id)
            self.of[request_id] = WAITING

    @rule(data=st.data(), new=st.sampled_from(Residency))
    def move(self, data: st.DataObject, new: Residency) -> None:
        if not self.of:
            return
        request_id = data.draw(st.sampled_from(sorted(self.of)))
        if (self.of[request_id], new) in LEGAL:
            self.table.move(request_id, new)
            self.of[request_id] = new
        else:
            with pytest.raises(AssertionError):
                self.table.move(request_id, new)

    @invariant()
    def agrees_with_the_dictionary(self) -> None:
        assert {request_id: self.table[request_id] for request_id in self.table} == self.of
        residencies = list(self.of.values())
        assert self.table.counts == {residency: residencies.count(residency) for residency in Residency}


Table.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestTable = Table.TestCase
