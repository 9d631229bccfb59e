"""Steps in which the same requests made one token each: what their readers got is noted for all such steps at once.

With hundreds of streams, noting each token as it comes would cost more than all else that a step without a decision
does.
"""

from __future__ import annotations

import math
from collections.abc import Collection

MOST_STEPS = 32
"""So many steps are noted together at most: readers' figures are that much behind. Not measured: chosen by judgement.
"""
MOST_DIFFERENCE_S = 0.05
"""Steps that differ by more are not noted together, nor is a token that would be taken to come so much sooner or later
than it did, all being equally far apart: a reader's wait would be lost. Not measured: chosen by judgement, half of the
shortest wait that is told."""
LONGEST_RUN_S = 1.6
"""Nor are steps that take longer together: readers' figures would be that much behind. Not measured: chosen by
judgement."""


class SteadySteps:
    """Steps not noted yet. All of them made a token for each request in ``request_ids``."""

    def __init__(self) -> None:
        self.request_ids: set[str] = set()
        self._first_s = self._last_s = 0.0
        self._shortest_s = self._longest_s = 0.0  # from step to step, the one before the first included
        self._least_every_s, self._most_every_s = (
            0.0,
            math.inf,
        )  # between which no token so far is taken to be elsewhere
        self._num_steps = 0
        self._num_left = 0

    def add(self, request_ids: Collection[str], at_s: float) -> bool:
        """One more step, whose tokens came at ``at_s``; False if it is not like the ones before, which are to be noted
        first.

        Nobody may have come in since the last one; those who :meth:`leave` may still be among ``request_ids``.
        """
        step_s = at_s - self._last_s
        if not self._num_steps:
            self.request_ids, self._first_s = set(request_ids), at_s
            self._least_every_s, self._most_every_s = 0.0, math.inf
            self._shortest_s = self._longest_s = step_s
        else:
            run_s = at_s - self._first_s
            every_s, most_s = run_s / self._num_steps, MOST_DIFFERENCE_S / self._num_steps
            shortest_s, longest_s = min(self._shortest_s, step_s), max(self._longest_s, step_s)
            if (
                self._num_steps >= MOST_STEPS
                or longest_s - shortest_s > MOST_DIFFERENCE_S
                or not self._least_every_s <= every_s <= self._most_every_s
                or run_s > LONGEST_RUN_S
                or len(request_ids) != len(self.request_ids) + self._num_left
            ):
                return False
            self._shortest_s, self._longest_s = shortest_s, longest_s
            self._least_every_s = max(self._least_every_s, every_s - most_s)
            self._most_every_s = min(self._most_every_s, every_s + most_s)
        self._last_s, self._num_left = at_s, 0
        self._num_steps += 1
        return True

    def leave(self, request_id: str) -> tuple[float, int, float] | None:
        """One of them ends: its tokens not noted yet, as for :meth:`take`; None if there are none."""
        if not self._num_steps or request_id not in self.request_ids:
            return None
        self.request_ids.discard(request_id)
        self._num_left += 1
        return self._tokens()

    def take(self) -> tuple[float, int, float] | None:
        """When the first token of each came, how many, and seconds from one to the next; None if there are none.

        Afterwards there are none.
        """
        if not self._num_steps:
            return None
        tokens, self._num_steps, self._num_left = self._tokens(), 0, 0
        return tokens

    def _tokens(self) -> tuple[float, int, float]:
        every_s = (self._last_s - self._first_s) / max(self._num_steps - 1, 1)
        return self._first_s, self._num_steps, every_s
