"""The residency of every request, and which moves between residencies are legal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum


class Residency(StrEnum):
    """Where a request's KV lives (DESIGN.md 2)."""

    WAITING = "waiting"
    """No KV anywhere."""
    RESIDENT = "resident"
    """In the pool, all layers on the device."""
    LAYERED = "layered"
    """In host memory; one layer per lane at a time passes through the lane zone."""
    PARKED = "parked"
    """In host memory only; the request does not run."""
    FETCHING = "fetching"
    """On the way from host memory into pool blocks."""


_W, _R, _L, _P, _F = Residency
LEGAL_MOVES: dict[Residency, frozenset[Residency]] = {
    _W: frozenset({_R, _L}),
    _L: frozenset({_P, _W}),  # to WAITING: vLLM preempted it, or its host copy was lost; it is computed again
    _R: frozenset({_P, _W}),
    # straight to RESIDENT: all its blocks are still prefix-cache hits; to LAYERED: it decodes in the zone
    _P: frozenset({_F, _R, _L, _W}),
    _F: frozenset({_R}),  # when the load has ended, also if it failed: then vLLM says what must be computed again
}

MoveListener = Callable[[str, str, str], None]
"""Called as ``listener(request_id, old, new)``; ``new`` is "gone" when a request leaves."""


class ResidencyTable:
    """The residency of every known request. Counts are kept, so asking for them costs nothing.

    ``version`` changes with every arrival, move and departure.
    """

    def __init__(self) -> None:
        self._of: dict[str, Residency] = {}
        self.counts: dict[Residency, int] = dict.fromkeys(Residency, 0)
        self.version = 0
        self.listener: MoveListener | None = None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._of

    def __getitem__(self, request_id: str) -> Residency:
        return self._of[request_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def get(self, request_id: str) -> Residency | None:
        """Its residency, or None if it is not known."""
        return self._of.get(request_id)

    def add(self, request_id: str) -> None:
        """A request arrives, WAITING."""
        assert request_id not in self._of, f"{request_id} is known already"
        self._of[request_id] = Residency.WAITING
        self.counts[Residency.WAITING] += 1
        self.version += 1

    def move(self, request_id: str, new: Residency) -> None:
        """Move a request; an illegal move is a bug of ours and asserts."""
        old = self._of[request_id]
        assert new in LEGAL_MOVES[old], f"{request_id}: {old} -> {new} is no legal move"
        self._of[request_id] = new
        self.counts[old] -= 1
        self.counts[new] += 1
        self.version += 1
        if self.listener is not None:
            self.listener(request_id, old.value, new.value)

    def remove(self, request_id: str) -> None:
        """A request leaves, from any residency."""
        old = self._of.pop(request_id)
        self.counts[old] -= 1
        self.version += 1
        if self.listener is not None:
            self.listener(request_id, old.value, "gone")
