"""Parked streams that flow: they have run in the pool, and their readers have hardly waited yet.

Those in the pool and these need its time together: a stream of ``n`` blocks whose reader takes a token per TPOT needs
them for ``step / TPOT`` of the time. Sums are kept, so that many parked requests cost a decision nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heappop, heappush

STALE_ENDS = 64
"""Ends of streams that are parked no longer are thrown out when there are so many, and as many as others.
Not measured: chosen by judgement."""


class Flows:
    """Blocks of parked streams by TPOT, each until its reader has waited too long."""

    def __init__(self) -> None:
        self._flowing: dict[str, tuple[float, int, float]] = {}
        self._blocks: dict[float, int] = {}
        self._ends: list[tuple[float, str]] = []

    def add(self, request_id: str, tpot_s: float, num_blocks: int, until_s: float) -> None:
        """A stream is parked; it flows until ``until_s``."""
        self.discard(request_id)
        self._flowing[request_id] = tpot_s, num_blocks, until_s
        self._blocks[tpot_s] = self._blocks.get(tpot_s, 0) + num_blocks
        heappush(self._ends, (until_s, request_id))
        if len(self._ends) > 2 * len(self._flowing) + STALE_ENDS:  # of earlier parks, some of them due in hours
            self._ends = sorted((until_s, r) for r, (_, _, until_s) in self._flowing.items())

    def discard(self, request_id: str) -> None:
        """It is parked no longer."""
        flowing = self._flowing.pop(request_id, None)
        if flowing is not None:
            tpot_s, num_blocks, _ = flowing
            self._blocks[tpot_s] -= num_blocks
            if not self._blocks[tpot_s]:
                del self._blocks[tpot_s]

    def blocks(self, now_s: float) -> Mapping[float, int]:
        """Blocks of those that flow now, by TPOT. Lives on: not to be kept across steps."""
        while self._ends and self._ends[0][0] < now_s:
            until_s, request_id = heappop(self._ends)
            flowing = self._flowing.get(request_id)
            if flowing is not None and flowing[2] == until_s:
                self.discard(request_id)
        return self._blocks
