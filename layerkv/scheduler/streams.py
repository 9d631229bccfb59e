"""What readers got: tokens on time, fluid requests, lags and pauses, counted by class until somebody reports them.

Told of every token and of every end; costs O(1) for tokens that come together. The figures are those of
:mod:`layerkv.figures`, of tokens as they leave the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from layerkv.figures import is_fluid, met_slo, num_late, tpot_s
from layerkv.metrics import MetricSamples
from layerkv.scheduler.reasons import End, Event, Reason

if TYPE_CHECKING:
    from layerkv.scheduler.tracker import TrackedRequest

LEAST_TOLD_S = 0.1
"""Shorter waits of a reader are in the figures and not in the decision log. Not measured: chosen by judgement."""


REPORT_TOKENS = 256
"""So many tokens of a class are reported together, unless a request of it has ended: with few requests running, a
payload for each step would cost more than what it tells. Not measured: chosen by what a dashboard shows."""


class Pause(NamedTuple):
    """A reader's wait that is worth telling.

    Attributes:
        wait_s: How long.
        token: The number of the token that it was for (the first is 0).
        left: What took the request out of the batch since the token before; None if nothing did,
        reason: and why.
    """

    wait_s: float
    token: int
    left: Event | None
    reason: Reason | None


@dataclass(slots=True)
class Stream:
    """What one client has got so far, beside its reader's clock.

    Attributes:
        ttft_s: Arrival to first token; None before.
        last_token_s: When its last token came,
        longest_gap_s: and the longest time between two; both for those without a reader only.
        left: What took it out of the batch since its last token; None if nothing did,
        reason: and why.
        is_away: Whether it is out of the batch.
        told_s: The longest wait without a reason that was told: the next one told is twice as long.
    """

    ttft_s: float | None = None
    last_token_s: float = 0.0
    longest_gap_s: float = 0.0
    told_s: float = LEAST_TOLD_S / 2
    left: Event | None = None
    reason: Reason | None = None
    is_away: bool = False

    def leaves(self, how: Event, reason: Reason) -> None:
        """The request leaves the batch. What made it leave first since its last token is what its reader waits for."""
        if self.left is None:
            self.left, self.reason = how, reason
        self.is_away = True

    def comes_back(self) -> None:
        """The request is in the batch again."""
        self.is_away = False

    def pause(self, wait_s: float, token: int) -> Pause | None:
        """A wait that has ended now, if it is worth telling."""
        if wait_s < LEAST_TOLD_S:
            return None
        if self.left is not None and not self.is_away:
            return Pause(wait_s, token, self.left, self.reason)
        if (
            wait_s < 2 * self.told_s
        ):  # slow steps make a reader wait at every token: an entry for each would say nothing
            return None
        self.told_s = wait_s
        return Pause(wait_s, token, None, None)

    def pause_at_end(self, wait_s: float, token: int) -> Pause | None:
        """A wait that goes on while the request ends, if it is worth telling."""
        if wait_s < LEAST_TOLD_S:
            return None
        return Pause(wait_s, token, self.left, self.reason if self.left is not None else None)


@dataclass(slots=True)
class _Counts:
    """Of one class, since the last report."""

    on_time: int = 0
    late: int = 0
    fluid: int = 0
    not_fluid: int = 0
    lags_s: list[float] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)


class Streams:
    """See the module. One per engine."""

    def __init__(self) -> None:
        self._of: dict[str, _Counts] = {}
        self._has_news = False  # since the last report

    def made(self, tracked: TrackedRequest, at_s: float, num_tokens: int, every_s: float) -> Pause | None:
        """A request's tokens have come out: see :meth:`layerkv.figures.ReaderClock.add`.

        Returns the wait of its reader that ends with the first of them, if it is worth telling.
        """
        stream, reader, slo = tracked.stream, tracked.reader, tracked.slo
        token = reader.num_tokens
        counts = self._of.get(slo.name) or self._begin(slo.name)
        # Called for every token: no more calls than it needs.
        late = num_late(slo, tracked.arrival_s, token, at_s, num_tokens, every_s)
        self._has_news = True
        counts.late += late
        counts.on_time += num_tokens - late
        if not token:
            stream.ttft_s, stream.last_token_s = at_s - tracked.arrival_s, at_s
        wait_s = at_s - reader.wants_next_s
        pause = stream.pause(wait_s, token) if wait_s >= LEAST_TOLD_S else None
        reader.add(at_s, num_tokens, every_s)
        if stream.left is not None and not stream.is_away:  # else it was on its way when the request left
            stream.left = None
        if not tracked.has_reader:
            stream.longest_gap_s = max(stream.longest_gap_s, at_s - stream.last_token_s)
            stream.last_token_s = at_s + (num_tokens - 1) * every_s
        return pause

    def ended(self, tracked: TrackedRequest, end: End, now_s: float) -> Pause | None:
        """A request is over. What it was by then is counted, whoever ended it.

        One that left before its first token was due has had no stream, and one refused before its first token was not
        served: neither is counted. One that the engine ended in mid-stream was not fluid. Without a reader it is
        judged by its class's objectives, and has no lag and no pause.

        Returns the wait in which its reader was at that moment, if it is worth telling. It counts: who hangs up in a
        long pause has not seen a fluid stream.
        """
        stream, reader, slo = tracked.stream, tracked.reader, tracked.slo
        name = slo.name
        self._has_news = True
        if stream.ttft_s is None:
            if end in (End.LEFT, End.CUT_OFF) and now_s > tracked.ttft_deadline_s:
                (self._of.get(name) or self._begin(name)).not_fluid += 1
            return None
        counts = self._of.get(name) or self._begin(name)
        wait_s = 0.0 if end is End.FINISHED else max(now_s - reader.wants_next_s, 0.0)
        reader.lag_s += wait_s
        if wait_s > reader.longest_pause_s:
            reader.longest_pause_s, reader.paused_at = wait_s, reader.num_tokens
        if tracked.has_reader:
            flowed = is_fluid(slo, stream.ttft_s, reader.lag_s)
            counts.lags_s.append(reader.lag_s)
            counts.pauses_s.append(reader.longest_pause_s)
        else:
            flowed = _met_slo(tracked, end, now_s)
        if flowed and end is not End.REFUSED:
            counts.fluid += 1
        else:
            counts.not_fluid += 1
        return stream.pause_at_end(wait_s, reader.num_tokens)

    def report(self, samples: MetricSamples) -> None:
        """Add to the samples what was counted since the last report; a few tokens wait for more, or for an end."""
        if not self._has_news:
            return
        self._has_news = False
        for name, counts in list(self._of.items()):
            num_ends, num_tokens = counts.fluid + counts.not_fluid, counts.on_time + counts.late
            if not num_ends and num_tokens < REPORT_TOKENS:
                continue
            del self._of[name]
            # both halves, so that each is there to be divided by
            samples.add("layerkv_tokens_on_time", counts.on_time, name)
            samples.add("layerkv_tokens_late", counts.late, name)
            samples.add("layerkv_fluid_requests", counts.fluid, name)
            samples.add("layerkv_not_fluid_requests", counts.not_fluid, name)
            for lag_s in counts.lags_s:
                samples.observe("layerkv_lag_seconds", lag_s, name)
            for pause_s in counts.pauses_s:
                samples.observe("layerkv_longest_pause_seconds", pause_s, name)

    def _begin(self, name: str) -> _Counts:
        counts = self._of[name] = _Counts()
        return counts


def _met_slo(tracked: TrackedRequest, end: End, now_s: float) -> bool:
    """Whether nobody's request met its objectives; of one that was ended, the token that it waited for counts as made
    at that moment."""
    stream, num_tokens = tracked.stream, tracked.reader.num_tokens
    assert stream.ttft_s is not None
    first_s, last_s, gap_s = tracked.arrival_s + stream.ttft_s, stream.last_token_s, stream.longest_gap_s
    if end is not End.FINISHED:
        gap_s, last_s, num_tokens = max(gap_s, now_s - last_s), now_s, num_tokens + 1
    return met_slo(tracked.slo, stream.ttft_s, tpot_s(first_s, last_s, num_tokens), gap_s)
