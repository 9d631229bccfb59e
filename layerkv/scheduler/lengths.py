"""Predicts how many tokens a request will make: per class, from those that ended.

An end is an end, whoever caused it: vLLM reports a stop string that its front end found, and a client that hung up, as
aborts, and the blocks come free all the same. Only a request that left while it made no tokens (it was parked, or
everybody was aborted at once) says less: its length is a *lower bound*.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple, Protocol

LOW_QUANTILE = 0.25
"""For slack: a request that is thought to go on longer than it does is thought to have slack that it has not (LayerKV,
section on N_future: over-prediction is the dangerous side). Not measured: chosen by LayerKV's warning; that it is a
quarter is judgement."""
MIDDLE_QUANTILE = 0.5
"""For memory: half of the requests outgrow it; parking is there for those. Derived: the median."""
UNKNOWN_TOKENS = 32
"""Tokens ahead that memory is planned for while nothing is known, whatever ``max_tokens`` allows: clients often allow
far more than they want, and a pool kept free for those would stand emptier than stock vLLM's, which plans for none. Not
measured: chosen by judgement; planned at `max_tokens`, the pool stood at a fifth (docs/decisions.md, no result
file)."""
MIN_SAMPLES = 16
"""So many ends beyond the length reached are needed before they say anything: fewer have no quartile to speak of. Not
measured: chosen by judgement."""
WINDOW = 512
"""The last ends of a class that are learned from. Not measured: chosen by judgement."""
NEW_SHARE = 32
"""One in so many of a class's window may be newer than what predictions are made from. Not measured: chosen by
judgement."""
_ROUNDING = 1e-9


class LengthPredictor(Protocol):
    """How long outputs become. Implementations are asked once per admission and every few dozen tokens."""

    def observe(self, slo_class: str, num_tokens: int, *, is_bound: bool = False) -> None:
        """A request of the class has ended after ``num_tokens`` output tokens; a bound if it would have made more."""

    def total_tokens(self, slo_class: str, num_made: int, max_tokens: int, quantile: float) -> int | None:
        """Output tokens in all that a request which has made ``num_made`` will have made, at that quantile.

        Never below ``num_made + 1``, never above ``max_tokens`` unless that has been passed already. None if nothing
        is known.
        """


class MaxTokens:
    """No prediction: nothing is learned, and every length stays unknown."""

    def observe(self, slo_class: str, num_tokens: int, *, is_bound: bool = False) -> None:
        """Nothing is learned."""

    def total_tokens(self, slo_class: str, num_made: int, max_tokens: int, quantile: float) -> int | None:
        """Nothing is known."""
        return None


class _Survival(NamedTuple):
    """Of one class's window: each length at which some ended, in order, and how many got that far and further.

    Attributes:
        ends: The lengths, each once.
        beyond: Requests that made more than each, as a share of all. A lower bound counts among those that got as far
            as it did; its weight then goes to those that got further (Kaplan and Meier 1958, product limit).
        samples: All ends, each as often as it was seen.
    """

    ends: list[int]
    beyond: list[float]
    samples: list[int]


class QuantileLengths:
    """Quantiles over a class's last :data:`WINDOW` requests that ended, of those that got as far as this one."""

    def __init__(self) -> None:
        self._recent: dict[str, deque[tuple[int, bool]]] = {}
        self._survival: dict[str, _Survival] = {}
        self._num_new: dict[str, int] = {}  # since the class's survival was worked out

    def observe(self, slo_class: str, num_tokens: int, *, is_bound: bool = False) -> None:
        """Learn one length."""
        self._recent.setdefault(slo_class, deque(maxlen=WINDOW)).append((num_tokens, is_bound))
        self._num_new[slo_class] = self._num_new.get(slo_class, 0) + 1

    def total_tokens(self, slo_class: str, num_made: int, max_tokens: int, quantile: float) -> int | None:
        """The quantile; None while fewer than :data:`MIN_SAMPLES` such requests have ended, or none that far."""
        known = self._known(slo_class)
        if known is None:
            return None
        if len(known.samples) - bisect_right(known.samples, num_made) < MIN_SAMPLES:
            return None
        first = bisect_right(known.ends, num_made)
        got_here = known.beyond[first - 1] if first else 1.0
        left = (1.0 - quantile) * got_here
        # The first end that fewer than the rest of the quantile got beyond.
        at = bisect_left(known.beyond, True, lo=first, key=lambda beyond: beyond < left - _ROUNDING)
        if at == len(known.ends):
            return None  # more of them are bounds than the quantile leaves
        return max(min(known.ends[at], max_tokens), num_made + 1)

    def _known(self, slo_class: str) -> _Survival | None:
        """Worked out anew when a few per cent of the window are new: that takes some tenths of a millisecond."""
        recent = self._recent.get(slo_class)
        if recent is None:
            return None
        if self._num_new[slo_class] * NEW_SHARE >= len(recent) or slo_class not in self._survival:
            self._survival[slo_class] = _survival(recent)
            self._num_new[slo_class] = 0
        return self._survival[slo_class]


def _survival(lengths: deque[tuple[int, bool]]) -> _Survival:
    ends: list[int] = []
    beyond: list[float] = []
    share, at_risk = 1.0, len(lengths)
    for length, same in groupby(sorted(lengths), key=itemgetter(0)):
        are_bounds = [is_bound for _, is_bound in same]
        num_ends = are_bounds.count(False)
        if num_ends:
            share *= 1.0 - num_ends / at_risk
            ends.append(length)
            beyond.append(share)
        at_risk -= len(are_bounds)
    return _Survival(ends, beyond, sorted(length for length, is_bound in lengths if not is_bound))
