from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from layerkv.core.zone import ZoneLedger
from layerkv.errors import CapacityError


def test_a_promise_keeps_others_out_and_its_owner_in() -> None:
    zone = ZoneLedger(100, 8)
    zone.reserve("a", 6)
    assert zone.num_available == 2
    assert zone.can_take("a", 8)
    assert not zone.can_take("b", 3)
    with pytest.raises(CapacityError):
        zone.take("b", 3)
    assert zone.take("a", 4) == [100, 101, 102, 103]
    assert zone.num_available == 2
    assert zone.take("a", 2) == [104, 105]
    assert zone.num_taken == 6


def test_more_than_was_promised_comes_out_of_what_is_left() -> None:
    zone = ZoneLedger(0, 8)
    zone.reserve("a", 2)
    zone.reserve("b", 3)
    assert len(zone.take("a", 5)) == 5
    assert zone.num_available == 0
    with pytest.raises(CapacityError):
        zone.take("a", 1)
    assert len(zone.take("b", 3)) == 3


def test_an_ended_reservation_gives_back_only_what_was_not_taken() -> None:
    zone = ZoneLedger(0, 8)
    zone.reserve("a", 6)
    taken = zone.take("a", 2)
    zone.end_reservation("a")
    zone.end_reservation("a")
    assert zone.num_available == 6
    assert zone.num_taken == 2
    zone.give_back(taken)
    assert zone.num_available == 8


def test_a_promise_is_raised_where_there_is_room_and_never_lowered() -> None:
    zone = ZoneLedger(0, 8)
    zone.reserve("a", 2)
    zone.reserve("b", 3)
    zone.raise_reservation("a", 5)
    assert zone.num_available == 0
    zone.raise_reservation("a", 1)
    zone.raise_reservation("b", 4)  # no room: nothing changes
    assert zone.num_available == 0
    assert len(zone.take("a", 5)) == 5
    assert len(zone.take("b", 3)) == 3


def test_a_promise_of_nothing_is_none() -> None:
    """A prompt whose blocks are all prefix-cache hits wants no zone block."""
    zone = ZoneLedger(0, 8)
    zone.reserve("a", 0)
    zone.check()
    assert zone.num_available == 8


REQUESTS = ("a", "b", "c")


class Zone(RuleBasedStateMachine):
    """The zone beside two dictionaries: what each request holds and what it was promised."""

    @initialize(first=st.integers(0, 50), num_blocks=st.integers(0, 30))
    def begin(self, first: int, num_blocks: int) -> None:
        self.zone = ZoneLedger(first, num_blocks)
        self.ids = range(first, first + num_blocks)
        self.held: dict[str, list[int]] = {request_id: [] for request_id in REQUESTS}
        self.promised = dict.fromkeys(REQUESTS, 0)

    @property
    def available(self) -> int:
        return len(self.ids) - sum(map(len, self.held.values())) - sum(self.promised.values())

    @rule(request_id=st.sampled_from(REQUESTS), num_blocks=st.integers(1, 12))
    def reserve(self, request_id: str, num_blocks: int) -> None:
        if num_blocks > self.available:
            with pytest.raises(CapacityError):
                self.zone.reserve(request_id, num_blocks)
        else:
            self.zone.reserve(request_id, num_blocks)
            self.promised[request_id] += num_blocks

    @rule(request_id=st.sampled_from(REQUESTS), num_blocks=st.integers(0, 12))
    def take(self, request_id: str, num_blocks: int) -> None:
        fits = num_blocks <= self.promised[request_id] + self.available
        assert self.zone.can_take(request_id, num_blocks) == fits
        if not fits:
            with pytest.raises(CapacityError):
                self.zone.take(request_id, num_blocks)
            return
        ids = self.zone.take(request_id, num_blocks)
        assert len(ids) == len(set(ids)) == num_blocks
        assert set(ids) <= set(self.ids)
        assert not any(set(ids) & set(held) for held in self.held.values())
        self.held[request_id] += ids
        self.promised[request_id] = max(self.promised[request_id] - num_blocks, 0)

    @rule(request_id=st.sampled_from(REQUESTS))
    def end_reservation(self, request_id: str) -> None:
        self.zone.end_reservation(request_id)
        self.promised[request_id] = 0

    @rule(request_id=st.sampled_from(REQUESTS), keep=st.integers(0, 3))
    def give_back(self, request_id: str, keep: int) -> None:
        kept, given = self.held[request_id][:keep], self.held[request_id][keep:]
        self.zone.give_back(given)
        self.held[request_id] = kept

    @invariant()
    def agrees_with_the_dictionaries(self) -> None:
        if hasattr(self, "zone"):
            self.zone.check()
            assert self.zone.num_available == self.available >= 0
            assert self.zone.num_taken == sum(map(len, self.held.values()))


Zone.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestZone = Zone.TestCase
