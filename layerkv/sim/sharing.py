"""Several virtual engines on one device: they compute in turns, and share its KV memory.

The ledger and the division are the broker's own (:mod:`layerkv.core.sharing_ledger`, :mod:`layerkv.core.sharing`); an
engine reports and hears of its limit before each of its steps, as a real one does. A pool shrinks by free blocks
first; what more is to leave looks to the scheduler like a shortage, so that it parks residents in its own order. Not
modelled: which blocks lie in which segment (any free blocks make one), the time to map and unmap, the way of messages
and what engines like to be allowed ahead of it, a host link that engines share, host memory that moves between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from layerkv.core.sharing import TokenRate, Wish, token_pressure
from layerkv.core.sharing_ledger import SharingLedger
from layerkv.sim.engine import VirtualEngine
from layerkv.sim.outcome import SimOutcome

SETTLE_EVERY_S = 0.1
"""Seconds between divisions while nobody asks for more, and at most between two looks of an engine at its limit.
Derived: the broker's own (``broker/server.py``)."""


@dataclass(slots=True)
class Member:
    """A model's engine on a device. ``floor_bytes`` and ``ceiling_bytes`` are whole segments.

    Attributes:
        name: The model.
        engine: Its engine.
        segment_blocks: What its pool comes and goes in.
        floor_bytes: What it gets whenever it needs that much.
        ceiling_bytes: More it cannot use.
        tpot_s: The time that its readers allow for a token.
        weight: Beside other models.
    """

    name: str
    engine: VirtualEngine
    segment_blocks: int
    floor_bytes: int
    ceiling_bytes: int
    tpot_s: float
    weight: float = 1.0
    peak_bytes: int = 0
    _num_with_kv: int = 0
    _rate: TokenRate = field(default_factory=TokenRate)

    @property
    def segment_bytes(self) -> int:
        """Bytes of a segment over all layers and ranks."""
        return self.segment_blocks * self.engine.geometry.block_bytes

    @property
    def held_bytes(self) -> int:
        """What nobody else can have, in whole segments."""
        return self._segments(self.engine.num_in_service) * self.segment_bytes

    @property
    def is_idle(self) -> bool:
        """Whether it has no requests."""
        return not self.engine.num_under_way

    def wish(self, now_s: float, *, is_weighted: bool = True) -> Wish:
        """What it reports to a broker. Idle, it keeps one segment."""
        engine, block_bytes = self.engine, self.engine.geometry.block_bytes
        need = max(engine.num_needed(), 1)
        stuck = max(self._segments(engine.num_used - engine.num_that_could_leave()), 1)
        can_leave = min(self._segments(engine.num_in_service), self._segments(need)) - stuck
        self._rate.note(engine.num_with_kv - self._num_with_kv, now_s, is_busy=not self.is_idle)
        self._num_with_kv = engine.num_with_kv
        token_bytes = block_bytes // engine.geometry.block_tokens
        pressure = token_pressure(self._rate.per_s, token_bytes, self.tpot_s, self.weight)
        return Wish(
            segment_bytes=self.segment_bytes,
            floor=self.floor_bytes,
            ceiling=self.ceiling_bytes,
            held=self.held_bytes,
            need=need * block_bytes,
            can_leave=max(can_leave, 0) * self.segment_bytes,
            weight=pressure if is_weighted else self.weight,
            has_requests=not self.is_idle,
        )

    def hold(self, num_bytes: int) -> None:
        """The engine may hold so much from now on."""
        self.engine.resize(num_bytes // self.segment_bytes * self.segment_blocks)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def _segments(self, num_blocks: int) -> int:
        return -(-num_blocks // self.segment_blocks)


class Memory(Protocol):
    """How a device's KV memory is divided."""

    def look(self, member: Member, now_s: float) -> None:
        """An engine is about to step, or has become idle: it hears what it may hold."""


class StaticPartition:
    """Each has what it was given at its start."""

    def look(self, member: Member, now_s: float) -> None:
        """Nothing changes."""


class FirstCome:
    """Whoever needs memory takes what is free, and gives back only what is not in use (kvcached's way).

    Floors are kept free for those that do not use them: else two could wait for each other for ever.
    """

    def __init__(self, members: Sequence[Member], capacity: int) -> None:
        self._members, self._capacity = members, capacity
        for member in members:
            member.hold(0)

    def look(self, member: Member, now_s: float) -> None:
        """It takes what it needs as far as there is any, and keeps what it uses."""
        most = self._capacity - sum(
            max(other.held_bytes, other.floor_bytes) for other in self._members if other is not member
        )
        used = -(-member.engine.num_used // member.segment_blocks) * member.segment_bytes
        wanted = member.wish(now_s).whole(max(member.engine.num_needed(), 1) * member.engine.geometry.block_bytes)
        member.hold(max(min(wanted, most), used))
        assert sum(other.held_bytes for other in self._members) <= self._capacity


class Brokered:
    """The broker's ledger. Who is asked to give memory parks what is in use.

    Invariant: what engines hold, and what they may take, fits the capacity.
    """

    def __init__(self, members: Sequence[Member], capacity: int, *, is_weighted: bool = True) -> None:
        self.ledger = SharingLedger(capacity)
        self._members = {member.name: member for member in members}
        self._is_weighted = is_weighted
        self._settled_s = 0.0
        self._told = dict.fromkeys(self._members, 0)  # revision of the limit that each kept to in its last report
        for member in members:
            member.hold(0)
            self.ledger.join(member.name, member.wish(0.0, is_weighted=is_weighted))
        self._settle(0.0)
        for member in members:
            self._obey(member, 0.0)

    def look(self, member: Member, now_s: float) -> None:
        """It reports, and keeps to its limit; memory is divided anew where somebody asks, gives, or some time has
        passed."""
        ledger = self.ledger
        before, committed = ledger.wish(member.name), ledger.committed
        assert before is not None
        self._report(member, now_s)
        now = ledger.wish(member.name)
        assert now is not None
        asks = now.need > before.need and now.whole(now.need) > ledger.limits[member.name]
        if asks or ledger.committed < committed or now_s - self._settled_s >= SETTLE_EVERY_S:
            self._settle(now_s)
        self._obey(member, now_s)

    def _settle(self, now_s: float) -> None:
        self._settled_s = now_s
        for name in self.ledger.settle(now_s):
            if self._members[name].is_idle:  # nobody steps there: its thread answers
                self._obey(self._members[name], now_s)

    def _obey(self, member: Member, now_s: float) -> None:
        limit, held = self.ledger.limit(member.name), member.held_bytes
        assert limit is not None
        member.hold(limit.num_bytes)
        if held != member.held_bytes or self._told[member.name] != limit.revision:
            self._report(member, now_s)
        self.ledger.check()
        assert sum(other.held_bytes for other in self._members.values()) <= self.ledger.capacity

    def _report(self, member: Member, now_s: float) -> None:
        limit = self.ledger.limit(member.name)
        assert limit is not None
        wish = member.wish(now_s, is_weighted=self._is_weighted)
        self._told[member.name] = limit.revision
        self.ledger.report(member.name, wish, limit.revision, now_s)


class SharedDevice:
    """Engines on one device and one clock.

    While several have requests, each step of one takes so many times its cost as there are such engines: the device
    does one thing after the other, and its time is divided evenly.
    """

    def __init__(self, members: Sequence[Member], memory: Memory) -> None:
        self._members, self._memory = members, memory

    def run(self) -> dict[str, SimOutcome]:
        """Serve everything; outcomes by model."""
        at_work = [member for member in self._members if member.engine.to_come]
        while at_work:
            member = min(at_work, key=lambda member: member.engine.now_s)
            engine = member.engine
            engine.take_arrivals()
            self._memory.look(member, engine.now_s)
            if member.is_idle and not engine.to_come:
                at_work.remove(member)
                continue
            engine.slowdown = max(sum(not other.is_idle for other in at_work), 1)
            alone = member.is_idle or len(self._members) == 1
            engine.horizon_s = math.inf if alone else engine.now_s + SETTLE_EVERY_S
            engine.advance()
        return {member.name: member.engine.whole_outcome() for member in self._members}
