"""What the scheduler remembers of each request between steps, kept so that a snapshot is cheap to take.

The queues of waiting and parked requests are sorted when a request enters them; a step reads their heads.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from layerkv.config import SloClass
from layerkv.scheduler.snapshot import ParkedRequest, WaitingRequest

View = TypeVar("View", WaitingRequest, ParkedRequest)

RANK_STEP_S = 1e6
"""More than any two deadlines differ."""


class DeadlineQueue(Generic[View]):
    """Views sorted by deadline; entering and leaving cost O(log n) comparisons and one short memory move."""

    def __init__(self) -> None:
        self._keys: list[tuple[float, str]] = []
        self._views: list[View] = []
        self._key_of: dict[str, tuple[float, str]] = {}

    def __len__(self) -> int:
        return len(self._views)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._key_of

    @property
    def views(self) -> Sequence[View]:
        """All views in order. The list lives on: do not keep it across steps, do not change it."""
        return self._views

    def add(self, view: View) -> None:
        """Insert a request that is not here yet."""
        key = (view.deadline_s, view.request_id)
        insort(self._keys, key)
        self._views.insert(bisect_left(self._keys, key), view)
        self._key_of[view.request_id] = key

    def discard(self, request_id: str) -> None:
        """Remove a request if it is here."""
        key = self._key_of.pop(request_id, None)
        if key is not None:
            at = bisect_left(self._keys, key)
            del self._keys[at], self._views[at]


@dataclass(slots=True)
class TrackedRequest:
    """One request's history, in seconds on the monotonic clock.

    Attributes:
        slo: Its class.
        arrival_s: When it arrived at the server.
        rank: vLLM's request priority under ``--scheduling-policy priority``, else 0. Lower goes first, whatever the
            deadlines: it shifts every deadline by :data:`RANK_STEP_S`.
        can_layer: Whether it may be parked and fetched.
        first_token_s: When its first token came out; None before.
        admitted_s: When it was first given compute; None before.
        resident_since_step: Step of its last admission or fetch.
    """

    slo: SloClass
    arrival_s: float
    rank: int = 0
    can_layer: bool = True
    first_token_s: float | None = None
    admitted_s: float | None = None
    resident_since_step: int = 0

    @property
    def rank_shift_s(self) -> float:
        """What the rank adds to every deadline."""
        return self.rank * RANK_STEP_S

    @property
    def ttft_deadline_s(self) -> float:
        """When the first token is due, shifted by rank."""
        return self.arrival_s + self.slo.ttft_s + self.rank_shift_s

    def next_token_deadline_s(self, num_output_tokens: int, now_s: float) -> float:
        """When token ``num_output_tokens + 1`` is due so that the average keeps the TPOT objective, not shifted.

        Args:
            num_output_tokens: Tokens made so far.
            now_s: Stands for the first token's time while that token is still on its way.
        """
        first = self.first_token_s if self.first_token_s is not None else now_s
        return first + self.slo.tpot_s * max(num_output_tokens, 1)


class StepTimer:
    """Running estimates of what a step costs, from observed steps: decode step time and prefill time per token.

    Exponential averages over the last dozen steps or so; a sample may move an estimate by a factor of two at most,
    so that one stall (a compilation, a page-cache miss) does not throw the policy off.
    """

    def __init__(self, smoothing: float = 0.15) -> None:
        self._smoothing = smoothing
        self.decode_step_s = 0.0
        self.prefill_s_per_token = 0.0

    def observe(self, step_s: float, num_prefill_tokens: int) -> None:
        """One step took ``step_s`` and computed ``num_prefill_tokens`` besides its decodes."""
        if num_prefill_tokens == 0:
            self.decode_step_s = self._blend(self.decode_step_s, step_s)
        elif step_s > self.decode_step_s:
            sample = (step_s - self.decode_step_s) / num_prefill_tokens
            self.prefill_s_per_token = self._blend(self.prefill_s_per_token, sample)

    def _blend(self, old: float, sample: float) -> float:
        if old == 0.0:
            return sample
        bounded = min(max(sample, old / 2), old * 2)
        return old + self._smoothing * (bounded - old)
