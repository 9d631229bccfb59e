"""Predicts how many tokens a request will make: per class, from those that finished."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from typing import Protocol

LOW_QUANTILE = 0.25
"""For slack: a request that is thought to go on longer than it does is thought to have slack that it has not
(LayerKV, section on N_future: over-prediction is the dangerous side)."""
MIDDLE_QUANTILE = 0.5
"""For memory: half of the requests outgrow it; parking is there for those."""
UNKNOWN_TOKENS = 1024
"""What memory is planned for while nothing is known: clients often allow far more tokens than they want, and a pool
kept free for those would stand empty."""
MIN_SAMPLES = 16
WINDOW = 512


class LengthPredictor(Protocol):
    """How long outputs become. Implementations are asked once per admission and every few dozen tokens."""

    def observe(self, slo_class: str, num_tokens: int) -> None:
        """A request of the class has finished by itself after ``num_tokens`` output tokens."""

    def total_tokens(self, slo_class: str, num_made: int, max_tokens: int, quantile: float) -> int | None:
        """Output tokens in all that a request which has made ``num_made`` will have made, at that quantile.

        Never below ``num_made + 1``, never above ``max_tokens`` unless that has been passed already. None if nothing
        is known.
        """


class MaxTokens:
    """No prediction: every request makes as many tokens as it may."""

    def observe(self, slo_class: str, num_tokens: int) -> None:
        """Nothing is learned."""

    def total_tokens(self, slo_class: str, num_made: int, max_tokens: int, quantile: float) -> int | None:
        """Nothing is known."""
        return None


class QuantileLengths:
    """Quantiles over a class's last :data:`WINDOW` finished requests, of those that got as far as this one."""

    def __init__(self) -> None:
        self._recent: dict[str, deque[int]] = {}
        self._sorted: dict[str, list[int]] = {}

    def observe(self, slo_class: str, num_tokens: int) -> None:
        """Learn one length. O(window) for the move inside a list: microseconds."""
        recent = self._recent.setdefault(slo_class, deque())
        lengths = self._sorted.setdefault(slo_class, [])
        if len(recent) == WINDOW:
            lengths.remove(recent.popleft())
        recent.append(num_tokens)
        insort(lengths, num_tokens)

    def total_tokens(self, slo_class: str, num_made: int, max_tokens: int, quantile: float) -> int | None:
        """The quantile; None while fewer than :data:`MIN_SAMPLES` such requests have finished."""
        lengths = self._sorted.get(slo_class, ())
        first_longer = bisect_right(lengths, num_made)
        num_longer = len(lengths) - first_longer
        if num_longer < MIN_SAMPLES:
            return None
        total = lengths[first_longer + int(quantile * num_longer)]
        return max(min(total, max_tokens), num_made + 1)
