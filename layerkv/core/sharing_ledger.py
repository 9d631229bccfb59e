"""Who may have how much of one memory, and who has it (broker process; the simulator uses the same).

Time is handed in, and messages are the caller's: this is bookkeeping only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from layerkv.core.sharing import Wish, divide

NEED_MEMORY_S = 1.5
"""An engine's need is the largest that it has reported for this long, while it has requests: bursts that alternate
would take memory from each other without end. Not measured: chosen by trials of a prototype (2026-11-22, no result
file)."""

LOWER_EVERY_S = 0.3
"""Seconds between times at which limits of engines with requests fall below what they hold; and between those at which
limits fall to it though nobody needs that. Not measured: chosen by trials, together with that."""

MISSING_FOR_S = 60.0
"""Seconds for which memory that somebody else has taken counts as missing. Not measured: chosen by judgement: long
beside the time that engines take to give back. Whoever took it may be gone then, or the next engine that fails says so.
"""

MOST_SEGMENTS_EACH = 4096
"""Segments of one engine. Derived: eight times those of the largest pool (core/segments.py). Limits are settled a
segment at a time: an engine with tiny ones would keep all others waiting."""


@dataclass(slots=True)
class _Account:
    """One engine's side of the ledger.

    ``unseen`` are limits that were told before the present one, by revision, which the engine may still act on; without
    those after which a higher one was told, so that an engine that hears nothing costs no more with time.
    """

    wish: Wish
    limit: int
    revision: int = 0
    has_reported: bool = False
    """Since it joined. Until then it is not known what it asks for, and its limit does not fall."""
    unseen: dict[int, int] = field(default_factory=dict)
    needs: deque[tuple[float, int]] = field(default_factory=deque)  # (when, need), needs falling

    @property
    def committed(self) -> int:
        """What the engine has or may take before it hears of anything else."""
        return max(self.limit, self.wish.held, *self.unseen.values())


@dataclass(frozen=True, slots=True)
class GivenLimit:
    """An engine may hold ``num_bytes``. Absolute; of two the one with the higher revision holds."""

    revision: int
    num_bytes: int


class SharingLedger:
    """The limits of all engines that share ``capacity`` bytes. Not thread-safe.

    Invariant: no limit is raised beyond what is committed to nobody. While all engines keep to theirs and the capacity
    is not lowered, what is committed fits: limits, what is held above them, and earlier limits that may still be acted
    on. A lowered limit frees bytes only when the engine has seen it and says that it holds less.
    """

    def __init__(self, capacity: int) -> None:
        self._whole = capacity
        self._missing: deque[tuple[float, int]] = deque()  # (until when, bytes)
        self._accounts: dict[str, _Account] = {}
        self._expected: set[str] = set()
        self._took_held_s = self._took_unheld_s = float("-inf")

    @property
    def capacity(self) -> int:
        """Bytes to share now."""
        return max(self._whole - sum(num_bytes for _, num_bytes in self._missing), 0)

    @property
    def committed(self) -> int:
        """Bytes that engines have or may take."""
        return sum(account.committed for account in self._accounts.values())

    def limit(self, engine: str) -> GivenLimit | None:
        """What the engine may hold; None for one that takes no part."""
        account = self._accounts.get(engine)
        return None if account is None else GivenLimit(account.revision, account.limit)

    @property
    def limits(self) -> dict[str, int]:
        """The limit of each engine."""
        return {engine: account.limit for engine, account in self._accounts.items()}

    def wish(self, engine: str) -> Wish | None:
        """What the engine was last heard to have and to ask for; None for one that takes no part."""
        account = self._accounts.get(engine)
        return None if account is None else account.wish

    def expect(self, engine: str) -> None:
        """It was there before this ledger began. No limit is raised until it has joined or left."""
        self._expected.add(engine)

    def join(self, engine: str, wish: Wish, limit: int = 0) -> GivenLimit:
        """An engine begins to take part, at nothing; or it comes back and goes on with what it has.

        Args:
            engine: The same name as before where it comes back.
            wish: What it has and asks for.
            limit: What it was last told that it may hold, by this ledger or one before it.

        Raises:
            ValueError: its ceiling is below its floor, it has more than :data:`MOST_SEGMENTS_EACH`, or it is new
                and the floors of all do not fit together. It takes no part.
        """
        self.check_join(engine, wish, limit)
        self._expected.discard(engine)
        before = self._accounts.get(engine)
        revision = before.revision + 1 if before else 1
        self._accounts[engine] = account = _Account(wish, limit=max(wish.held, limit), revision=revision)
        return GivenLimit(account.revision, account.limit)

    def check_join(self, engine: str, wish: Wish, limit: int = 0) -> None:
        """Whether it can join: nothing changes.

        Raises:
            ValueError: see :meth:`join`.
        """
        others = [account.wish for name, account in self._accounts.items() if name != engine]
        floors = sum(other.whole(other.floor) for other in others)
        floor = wish.whole(wish.floor)
        if floor < wish.floor:
            raise ValueError(
                f"a ceiling of {wish.ceiling} bytes, which in whole segments is below the floor of {wish.floor}"
            )
        is_back = engine in self._accounts or engine in self._expected or wish.held or limit
        if floor + floors > self.capacity and not is_back:
            raise ValueError(f"a floor of {floor} bytes, beside {floors} of others, where {self.capacity} are shared")
        num_segments, most = min(wish.ceiling, self.capacity) // wish.segment_bytes, MOST_SEGMENTS_EACH
        if num_segments > most:
            raise ValueError(f"{num_segments} segments of {wish.segment_bytes} bytes, where {most} are the most")

    def report(self, engine: str, wish: Wish, revision: int, now_s: float) -> None:
        """What an engine has and asks for, said after it had seen the limit of that revision."""
        account = self._accounts[engine]
        account.wish, account.has_reported = wish, True
        while account.needs and (account.needs[-1][1] <= wish.need or not wish.has_requests):
            account.needs.pop()
        account.needs.append((now_s, wish.need))
        account.unseen = {told: limit for told, limit in account.unseen.items() if told >= revision}

    def leave(self, engine: str) -> None:
        """All processes of the engine have ended: what it had is free."""
        self._accounts.pop(engine, None)
        self._expected.discard(engine)

    def lower_capacity(self, num_bytes: int, now_s: float) -> None:
        """Somebody else has taken so much of the memory; it is missing for :data:`MISSING_FOR_S`."""
        self._missing.append((now_s + MISSING_FOR_S, min(num_bytes, self.capacity)))

    def settle(self, now_s: float) -> dict[str, GivenLimit]:
        """Bring limits closer to what each engine should have; those that changed."""
        while self._missing and self._missing[0][0] <= now_s:
            self._missing.popleft()
        wishes = {engine: replace(a.wish, need=_lasting_need(a, now_s)) for engine, a in self._accounts.items()}
        goals = divide(wishes, self.capacity)
        before = self.limits
        self._lower(goals, now_s, is_short=self._lack(goals, wishes) > self.capacity - self.committed)
        if not self._expected:
            for is_for_need in (True, False):
                self._raise(goals, wishes, is_for_need=is_for_need)
        return {
            engine: GivenLimit(account.revision, account.limit)
            for engine, account in self._accounts.items()
            if account.limit != before[engine]
        }

    def check(self) -> None:
        """Assert that what is committed fits (not while engines break their limits, or after the capacity fell)."""
        assert self.committed <= self.capacity, (self.committed, self.capacity)
        for account in self._accounts.values():
            assert account.limit <= max(account.wish.ceiling, account.wish.held)
            assert all(told < account.revision for told in account.unseen)

    def _lack(self, goals: Mapping[str, int], wishes: Mapping[str, Wish]) -> int:
        """Bytes that engines need, should have, and may not hold yet."""
        return sum(
            max(min(goals[engine], wishes[engine].whole(wishes[engine].need)) - account.limit, 0)
            for engine, account in self._accounts.items()
        )

    def _lower(self, goals: Mapping[str, int], now_s: float, *, is_short: bool) -> None:
        is_over = self.committed > self.capacity
        takes_held = is_over or now_s - self._took_held_s >= LOWER_EVERY_S
        takes_unheld = is_over or is_short or now_s - self._took_unheld_s >= LOWER_EVERY_S
        for engine, account in self._accounts.items():
            held, goal = account.wish.held, goals[engine]
            if goal >= account.limit or not (account.has_reported or is_over):
                continue
            if goal < held and (takes_held or not account.wish.has_requests):
                if account.wish.has_requests:
                    self._took_held_s = now_s
            elif takes_unheld and held < account.limit:  # no memory moves for that
                goal = max(goal, held)
                self._took_unheld_s = now_s
            else:
                continue
            self._tell(account, goal)

    def _raise(self, goals: Mapping[str, int], wishes: Mapping[str, Wish], *, is_for_need: bool) -> None:
        left = max(self.capacity - self.committed, 0)
        got = {engine: account.limit / wishes[engine].weight for engine, account in self._accounts.items()}
        for engine in sorted(got, key=lambda engine: (got[engine], engine)):
            account, wish = self._accounts[engine], wishes[engine]
            goal = min(goals[engine], wish.whole(wish.need)) if is_for_need else goals[engine]
            committed = account.committed
            goal = min(goal, (committed + left) // wish.segment_bytes * wish.segment_bytes)
            if goal > account.limit:
                self._tell(account, goal)
                left -= account.committed - committed

    def _tell(self, account: _Account, limit: int) -> None:
        for told in reversed([*account.unseen]):
            if account.unseen[told] > account.limit:
                break
            del account.unseen[told]
        account.unseen[account.revision] = account.limit
        account.revision += 1
        account.limit = limit


def _lasting_need(account: _Account, now_s: float) -> int:
    needs = account.needs
    while len(needs) > 1 and needs[1][0] <= now_s - NEED_MEMORY_S:
        needs.popleft()
    return needs[0][1] if needs else account.wish.need
