"""At what time each event of a token stream goes out, so that its reader gets tokens at a steady pace.

Used by a front end, one :class:`Pacer` per response. The engine makes tokens in slices; the reader of a choice takes
one per ``tpot_s`` from the first one on, and waits where there is none. An event is *due* when its reader gets to its
first token: that is known when it comes, and it goes out then, never later. So nobody who reads at that pace waits
longer than without pacing. An end is told within :data:`END_S`: what is left of a choice when its last event comes is
spread over that time, or goes out when due where that is sooner.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

END_S: Final = 1.0
"""The longest time by which pacing delays the end of a choice, and of the response. Not measured: chosen by design, as
what a reader hardly notices."""
HELD_BYTES: Final = 1 << 20
"""Events that are held back beyond this go out ahead of their time, oldest first: some 4,000 tokens' worth. Not
measured: chosen by judgement."""


@dataclass(slots=True)
class _Reader:
    """Where the reader of one choice is: when he wants the next token, and the last event that waits for him."""

    next_s: float
    last_s: float


@dataclass(slots=True)
class _Held:
    """An event that has not gone out. `choice` is None for one that belongs to all."""

    due_s: float
    number: int
    choice: int | None
    event: bytes

    def __lt__(self, other: _Held) -> bool:
        return (self.due_s, self.number) < (other.due_s, other.number)


class Pacer:
    """The events of one response that have come and not gone out. Times are seconds of any one clock.

    Events of one choice go out in the order in which they came, and so does everything in a response with one choice.
    Several choices have a reader each, so one that has much in hand keeps none of the others waiting.
    """

    def __init__(self, tpot_s: float) -> None:
        self._tpot_s = tpot_s
        self._readers: dict[int, _Reader] = {}
        self._held: list[_Held] = []
        self._num_come = 0
        self._held_bytes = 0

    @property
    def is_empty(self) -> bool:
        """Whether everything has gone out."""
        return not self._held

    @property
    def is_full(self) -> bool:
        """Whether more is held than should be: :meth:`take` gives out the surplus."""
        return self._held_bytes > HELD_BYTES

    @property
    def next_s(self) -> float | None:
        """When the next event goes out, by what has come so far."""
        return self._held[0].due_s if self._held else None

    def put(self, event: bytes, now_s: float, choice: int, num_tokens: int) -> None:
        """An event of a choice has come, with so many tokens to read; one without any only keeps its place."""
        reader = self._readers.setdefault(choice, _Reader(now_s, now_s))
        due_s = max(now_s, reader.next_s if num_tokens else reader.last_s)
        if num_tokens:
            reader.next_s = due_s + num_tokens * self._tpot_s
        reader.last_s = due_s
        self._hold(event, due_s, choice)

    def put_for_all(self, event: bytes, now_s: float) -> None:
        """An event of no choice has come, such as the usage: it goes out behind all that came before it."""
        self._hold(event, max([now_s, *(held.due_s for held in self._held)]), None)

    def put_first(self, event: bytes, now_s: float) -> None:
        """An event that says nothing has come, to keep the connection alive: it waits for nobody."""
        self._hold(event, now_s, None)

    def end_choice(self, choice: int, now_s: float) -> None:
        """The last event of a choice has come."""
        choices = (choice, None) if len(self._readers) == 1 else (choice,)
        self._hasten((held for held in self._held if held.choice in choices), now_s)

    def end(self, now_s: float) -> None:
        """The last event of all has come, or comes now."""
        for choice in self._readers:
            self.end_choice(choice, now_s)
        for held in self._held:
            if held.choice is None:  # not before what it was to be behind, which is as late as this at most
                held.due_s = min(held.due_s, now_s + END_S)
        heapq.heapify(self._held)

    def release(self, now_s: float) -> None:
        """Nobody is to wait any more: all that is held goes out now, in its order."""
        for number, held in enumerate(sorted(self._held)):
            held.due_s, held.number = min(held.due_s, now_s), number
        heapq.heapify(self._held)

    def drop(self) -> None:
        """Nobody reads any more: what is held goes nowhere."""
        self._held.clear()
        self._held_bytes = 0

    def take(self, now_s: float) -> list[bytes]:
        """What goes out now, in order."""
        taken = []
        while self._held and (self._held[0].due_s <= now_s or self.is_full):
            event = heapq.heappop(self._held).event
            self._held_bytes -= len(event)
            taken.append(event)
        return taken

    def _hold(self, event: bytes, due_s: float, choice: int | None) -> None:
        self._num_come += 1
        self._held_bytes += len(event)
        heapq.heappush(self._held, _Held(due_s, self._num_come, choice, event))

    def _hasten(self, some: Iterable[_Held], now_s: float) -> None:
        """Spread what is left of a choice over the time that its end may be delayed."""
        left = sorted(some)
        for place, held in enumerate(left, start=1):
            held.due_s = min(held.due_s, now_s + END_S * place / len(left))
        heapq.heapify(self._held)
