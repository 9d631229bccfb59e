"""eLLM's SLO-aware logical buffer: how much host memory early prefills may take (arXiv 2506.15155)."""

from __future__ import annotations

from collections import deque

WINDOW = 5
MANY = 3


class HostShare:
    """A limit in host blocks, halved when decodes suffer and doubled when first tokens do.

    In at least 3 of the last 5 steps that say something about it: most requests that decoded were behind their TPOT
    objective, or a first token came late. Never above all of host memory, never below ``floor``
    (one lane zone: with less, no prompt at all could run layered). After a change the count begins anew.
    """

    def __init__(self, num_blocks: int, *, floor: int) -> None:
        self._most = num_blocks
        self._floor = min(floor, num_blocks)
        self._late_decodes: deque[bool] = deque(maxlen=WINDOW)
        self._late_firsts: deque[bool] = deque(maxlen=WINDOW)
        self.limit = num_blocks

    def observe(self, *, decodes_are_late: bool | None, first_was_late: bool | None) -> None:
        """One step; None where it says nothing (nobody decoded, no first token came)."""
        if decodes_are_late is not None:
            self._late_decodes.append(decodes_are_late)
            if sum(self._late_decodes) >= MANY:
                self.limit = max(self.limit // 2, self._floor)
                self._late_decodes.clear()
        if first_was_late is not None:
            self._late_firsts.append(first_was_late)
            if sum(self._late_firsts) >= MANY:
                self.limit = min(max(self.limit, 1) * 2, self._most)
                self._late_firsts.clear()
