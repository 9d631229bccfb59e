from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from layerkv.core.sharing import Wish, divide
from layerkv.core.sharing_ledger import LOWER_EVERY_S, MISSING_FOR_S, NEED_MEMORY_S, GivenLimit, SharingLedger


def wish(need: int, *, held: int = 0, floor: int = 0, **others: Any) -> Wish:
    return Wish(1, floor, ceiling=100, held=held, need=need, can_leave=100, **others)


def two_engines(capacity: int = 20) -> SharingLedger:
    """`a` holds all of it, and `b` has come."""
    ledger = SharingLedger(capacity)
    ledger.join("a", wish(capacity))
    [limit] = ledger.settle(0).values()
    assert limit.num_bytes == capacity
    ledger.report("a", wish(capacity, held=capacity), limit.revision, 1)
    ledger.join("b", wish(5, floor=5))
    return ledger


def test_who_comes_late_starts_with_nothing_and_gets_what_others_have_given_back() -> None:
    ledger = two_engines()
    limits = ledger.settle(2)
    assert limits == {"a": GivenLimit(3, 15)}, "lowered at once; nothing is there for b yet"
    assert ledger.settle(2.1) == {}
    ledger.report("a", wish(20, held=18), limits["a"].revision, 3)
    assert ledger.settle(3) == {"b": GivenLimit(2, 2)}
    ledger.report("a", wish(20, held=15), limits["a"].revision, 4)
    assert ledger.settle(4) == {"b": GivenLimit(3, 5)}
    ledger.check()


def test_a_limit_that_was_lowered_counts_until_the_engine_has_seen_it() -> None:
    """What it holds may have been less all the time; but it may be growing while the lower limit is on its way."""
    ledger = SharingLedger(20)
    ledger.join("a", wish(20))
    first = ledger.settle(0)["a"]
    ledger.report("a", wish(1, held=1), first.revision, 1)
    lowered = ledger.settle(9)["a"]
    assert lowered.num_bytes == 1
    assert ledger.committed == 20
    ledger.report("a", wish(1, held=1), first.revision, 10)
    assert ledger.committed == 20
    ledger.report("a", wish(1, held=1), lowered.revision, 11)
    assert ledger.committed == 1


def test_a_need_lasts_for_a_while_and_limits_do_not_fall_all_the_time() -> None:
    ledger = SharingLedger(20)
    ledger.join("a", wish(12))
    limit = ledger.settle(0)["a"]
    ledger.report("a", wish(12, held=12), limit.revision, 0)
    ledger.report("a", wish(4, held=12), limit.revision, 1)
    ledger.report("a", wish(2, held=12), limit.revision, 1.1)
    assert ledger.settle(1 + NEED_MEMORY_S - 0.01) == {}
    assert ledger.settle(1 + NEED_MEMORY_S)["a"].num_bytes == 4
    assert ledger.settle(1.1 + NEED_MEMORY_S) == {}
    assert ledger.settle(1 + NEED_MEMORY_S + 1.1 * LOWER_EVERY_S)["a"].num_bytes == 2


def test_what_an_engine_may_have_and_does_not_hold_goes_to_who_needs_it_at_once() -> None:
    ledger = SharingLedger(20)
    ledger.join("a", wish(10, like=15))
    ledger.join("b", wish(0))
    ledger.join("c", wish(5))
    limits = ledger.settle(0)
    assert {engine: limit.num_bytes for engine, limit in limits.items()} == {"a": 15, "c": 5}
    ledger.report("a", wish(10, held=11, like=15), limits["a"].revision, 0)
    ledger.report("b", wish(0), 1, 0)
    ledger.report("c", wish(2, held=3), limits["c"].revision, 0)
    assert {engine: limit.num_bytes for engine, limit in ledger.settle(9).items()} == {"c": 2}, "held memory has to go"
    for need, limit in ((4, 14), (7, 11)):
        ledger.report("b", wish(need), 1, 9 + need / 100)
        assert {e: limit.num_bytes for e, limit in ledger.settle(9 + need / 100).items()} == {"a": limit}
    ledger.report("b", wish(8), 1, 9.1)
    assert ledger.settle(9.1) == {}
    assert ledger.settle(9 + 1.1 * LOWER_EVERY_S)["a"].num_bytes == 10, "in its time what is held has to go as well"
    ledger.check()


def test_who_has_no_requests_gives_at_once_what_others_need_and_not_for_likes() -> None:
    ledger = two_engines()
    revision = ledger.settle(2)["a"].revision
    ledger.report("a", wish(1, held=20, like=20, has_requests=False), revision, 3)
    for need, limit in ((5, 15), (8, 12), (10, 10)):
        ledger.report("b", wish(need, like=15), 1, 3 + need / 100)
        ledger.settle(3 + need / 100)
        assert ledger.limits["a"] == limit, "it was busy a moment ago, and gave a moment ago"
    ledger.check()


def test_likes_alone_take_what_is_not_held_in_their_time_and_keep_no_need_waiting() -> None:
    ledger = SharingLedger(20)
    ledger.join("a", wish(10, like=20))
    ledger.join("b", wish(2))
    revision = ledger.settle(0)["a"].revision
    ledger.report("a", wish(10, held=12, like=20), revision, 0)
    ledger.report("b", wish(2, held=2, like=4), 2, 0)
    assert ledger.settle(0.1)["a"].num_bytes == 16
    ledger.report("b", wish(2, held=2, like=8), 2, 0.1)
    assert ledger.settle(0.2) == {}, "nobody needs it"
    assert ledger.settle(0.1 + LOWER_EVERY_S)["a"].num_bytes == 12
    ledger.report("b", wish(10, held=2), 2, 0.5)
    assert ledger.settle(0.5)["a"].num_bytes == 10, "what likes took a moment ago is no reason to wait"


def test_an_engine_that_is_gone_leaves_its_bytes_to_others() -> None:
    ledger = two_engines()
    ledger.leave("a")
    assert ledger.settle(2)["b"].num_bytes == 5
    ledger.leave("nobody")


def test_a_ledger_that_begins_anew_raises_nothing_until_all_are_back_or_gone() -> None:
    ledger = SharingLedger(20)
    for engine in "abc":
        ledger.expect(engine)
    assert ledger.join("a", wish(9, held=4), limit=6) == GivenLimit(1, 6)
    assert ledger.settle(0) == {}
    ledger.join("b", wish(3))
    assert ledger.settle(1) == {}
    ledger.leave("c")
    assert {engine: limit.num_bytes for engine, limit in ledger.settle(2).items()} == {"a": 9, "b": 3}


def test_who_comes_back_keeps_its_limit_until_it_has_said_what_it_asks_for() -> None:
    """Else a broker that starts again takes memory from all, and gives it back a moment later."""
    ledger = SharingLedger(20)
    ledger.join("a", wish(2, held=2), limit=15)
    ledger.join("b", wish(5, held=1), limit=1)
    assert {engine: limit.num_bytes for engine, limit in ledger.settle(9).items()} == {"b": 5}
    ledger.report("a", wish(9, held=2), 1, 9.1)
    assert ledger.settle(9.1)["a"].num_bytes == 9


def test_memory_that_somebody_else_has_taken_is_missing_at_once() -> None:
    ledger = two_engines()
    ledger.settle(2)
    ledger.lower_capacity(8, 2.0)
    assert ledger.settle(2.01)["a"].num_bytes == 7
    ledger.lower_capacity(99, 3.0)
    assert ledger.capacity == 0
    ledger.settle(2 + MISSING_FOR_S)
    assert ledger.capacity == 8
    ledger.settle(3 + MISSING_FOR_S)
    assert ledger.capacity == 20, "whoever took it may be gone"


def test_what_can_never_be_kept_is_refused() -> None:
    ledger = SharingLedger(20)
    ledger.join("a", Wish(8, floor=9, ceiling=16))
    with pytest.raises(ValueError, match="a floor of 5 bytes, beside 16 of others, where 20 are shared"):
        ledger.join("b", wish(0, floor=5))
    with pytest.raises(ValueError, match="a ceiling of 10 bytes, which in whole segments is below the floor of 9"):
        ledger.join("b", Wish(8, floor=9, ceiling=10))
    assert ledger.limits == {"a": 0}


def test_who_comes_back_is_not_refused_for_floors_that_no_longer_fit() -> None:
    ledger = SharingLedger(20)
    ledger.join("a", wish(5, floor=15))
    ledger.settle(0)
    ledger.lower_capacity(10, 0.0)
    assert ledger.join("a", wish(0, floor=15), limit=5).num_bytes == 5
    again = SharingLedger(10)
    again.expect("a")
    again.join("a", wish(0, floor=15), limit=5)
    with pytest.raises(ValueError, match="beside 15 of others"):
        again.join("new", wish(0, floor=1))


def test_an_engine_that_hears_nothing_costs_no_more_with_time() -> None:
    ledger = SharingLedger(20)
    first = ledger.join("deaf", wish(20))
    for at_s in range(0, 4000, 4):
        ledger.settle(at_s)
        ledger.report("deaf", wish(20 if at_s % 8 else 7, held=5), first.revision, at_s + 1)
        ledger.check()
    assert ledger.limit("deaf").revision > 900  # type: ignore[union-attr]
    assert ledger.committed == 20
    assert len(ledger._accounts["deaf"].unseen) <= 2


@dataclass
class Engine:
    """A real engine, as far as memory goes: messages to and from it are on their way for any time."""

    wish: Wish
    limit: int = 0
    revision: int = 0
    told: deque[GivenLimit] = field(default_factory=deque)
    said: deque[tuple[Wish, int]] = field(default_factory=deque)


NAMES = st.sampled_from("abcd")
BYTES = st.integers(0, 60)


class Sharing(RuleBasedStateMachine):
    """Engines that keep to what they have heard, however late; processes that die, a broker that starts again."""

    @initialize(capacity=st.integers(0, 80))
    def begin(self, capacity: int) -> None:
        self.capacity = capacity
        self.ledger = SharingLedger(capacity)
        self.engines: dict[str, Engine] = {}
        self.now_s = 0.0

    @rule(name=NAMES, segment=st.integers(1, 7), floor=st.integers(0, 20), ceiling=BYTES, need=BYTES)
    def come(self, name: str, segment: int, floor: int, ceiling: int, need: int) -> None:
        if name in self.engines:
            return
        engine = Engine(Wish(segment, floor, ceiling, need=need))
        try:
            engine.told.append(self.ledger.join(name, engine.wish))
        except ValueError:
            return
        self.engines[name] = engine

    @rule(name=NAMES, need=BYTES, like=BYTES, can_leave=BYTES, weight=st.floats(0.01, 100))
    def report(self, name: str, need: int, like: int, can_leave: int, weight: float) -> None:
        if engine := self.engines.get(name):
            engine.wish = replace(engine.wish, need=need, like=like, can_leave=can_leave, weight=weight)
            engine.said.append((engine.wish, engine.revision))

    @rule(name=NAMES, up_to=BYTES)
    def grow_or_shrink(self, name: str, up_to: int) -> None:
        if engine := self.engines.get(name):
            goal = up_to // engine.wish.segment_bytes * engine.wish.segment_bytes
            held = min(goal, max(engine.limit, engine.wish.held))
            engine.wish = replace(engine.wish, held=held)

    @rule(name=NAMES)
    def hear(self, name: str) -> None:
        if (engine := self.engines.get(name)) and engine.told:
            limit = engine.told.popleft()
            engine.limit, engine.revision = limit.num_bytes, limit.revision

    @rule(name=NAMES)
    def be_heard(self, name: str) -> None:
        if (engine := self.engines.get(name)) and engine.said:
            self.ledger.report(name, *engine.said.popleft(), self.now_s)

    @rule(wait_s=st.floats(0, 2))
    def settle(self, wait_s: float) -> None:
        self.now_s += wait_s
        for name, limit in self.ledger.settle(self.now_s).items():
            self.engines[name].told.append(limit)

    @rule(name=NAMES)
    def die(self, name: str) -> None:
        self.engines.pop(name, None)
        self.ledger.leave(name)

    @rule(name=NAMES)
    def connect_again(self, name: str) -> None:
        if engine := self.engines.get(name):
            engine.told.clear()
            engine.said.clear()
            engine.told.append(self.ledger.join(name, engine.wish, engine.limit))

    @rule()
    def broker_starts_again(self) -> None:
        self.ledger = SharingLedger(self.capacity)
        for name in self.engines:
            self.ledger.expect(name)
        for name in list(self.engines):
            before = self.ledger.limits
            self.settle(0)
            assert all(self.ledger.limits[other] <= before[other] for other in before), "not all are back"
            self.connect_again(name)

    @invariant()
    def nobody_holds_what_is_not_there(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.ledger.check()
        assert sum(max(engine.wish.held, engine.limit) for engine in self.engines.values()) <= self.capacity

    @precondition(lambda self: self.engines)
    @rule()
    def in_the_end_everybody_has_a_fair_share(self) -> None:
        """When wishes stay as they are, messages arrive, and whoever is above its limit gives back."""
        for _ in range(8):
            self.settle(2.0)
            for name, engine in self.engines.items():
                while engine.told:
                    self.hear(name)
                engine.wish = replace(engine.wish, held=min(engine.wish.held, engine.limit))
                engine.said.append((engine.wish, engine.revision))
                while engine.said:
                    self.be_heard(name)
        wishes = {name: engine.wish for name, engine in self.engines.items()}
        assert self.ledger.limits == divide(wishes, self.capacity)


Sharing.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
TestSharing = Sharing.TestCase
