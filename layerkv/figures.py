"""What every figure means, once: for the simulator, the benchmarks and `/metrics`.

Times are seconds. A percentile is the linear interpolation between the two nearest of the ordered samples (numpy's
default, Hyndman and Fan's type 7).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from layerkv.config import SloClass

PERCENTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of the samples lie.

    Args:
        ordered: At least one sample, in ascending order.
        share: Which percentile, as a share.
    """
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    if low + 1 >= len(ordered):
        return ordered[-1]
    return ordered[low] + (ordered[low + 1] - ordered[low]) * (at - low)


def distribution(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean and percentiles of the values that are there; None if none is."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    found = {"mean": math.fsum(ordered) / len(ordered)}
    found.update((name, percentile(ordered, share)) for name, share in PERCENTILES)
    return found


def tpot_s(first_token_s: float, last_token_s: float, num_tokens: int) -> float | None:
    """Mean time per output token after the first; None with fewer than two tokens."""
    return (last_token_s - first_token_s) / (num_tokens - 1) if num_tokens > 1 else None


def met_ttft(slo: SloClass, ttft_s: float | None) -> bool:
    """Whether the first token came in time."""
    return ttft_s is not None and ttft_s <= slo.ttft_s


def met_slo(slo: SloClass, ttft_s: float | None, tpot_s: float | None, longest_gap_s: float) -> bool:
    """Whether a finished request met all objectives of its class.

    Args:
        slo: The class.
        ttft_s: Arrival to first token; None if none came.
        tpot_s: Mean time per token after the first; None with fewer than two.
        longest_gap_s: Longest time between two of its tokens: it counts where the class has a ``max_stall``.
    """
    return (
        met_ttft(slo, ttft_s)
        and (tpot_s is None or tpot_s <= slo.tpot_s)
        and (slo.max_stall_s is None or longest_gap_s <= slo.max_stall_s)
    )


@dataclass(slots=True)
class ReaderClock:
    """Somebody who reads a stream as it comes, one token each ``pace_s`` from the first one on, and waits where there
    is none.

    Each wait moves the times of all later tokens. Feed it a stream's tokens in order; what it holds does not grow.
    (Andes, arXiv 2404.16283, and TokenFlow, arXiv 2510.02758, rate streams by such a reader's buffer.)

    Attributes:
        pace_s: Seconds that a token takes to read: the class's TPOT. 0 reads each token as it comes: waits for all.
        lag_s: All waits together: ``max over k of (t_k - t_first - k * pace_s)``.
        longest_pause_s: The longest single wait,
        paused_at: and the number of the token that it was for (the first is 0).
        num_tokens: Tokens so far.
        wants_next_s: When the reader has read them all; infinite before the first.
    """

    pace_s: float
    lag_s: float = 0.0
    longest_pause_s: float = 0.0
    paused_at: int = 0
    num_tokens: int = 0
    wants_next_s: float = math.inf

    def add(self, at_s: float, num_tokens: int = 1, every_s: float = 0.0) -> float:
        """So many tokens come out, the first at ``at_s`` and one more each ``every_s`` (0: all at once).

        Returns how long the reader waited for them.
        """
        if self.num_tokens == 0:
            self.wants_next_s = at_s
        wait_s = max(at_s - self.wants_next_s, 0.0)
        if wait_s > self.longest_pause_s:
            self.longest_pause_s, self.paused_at = wait_s, self.num_tokens
        wants_s = self.wants_next_s + wait_s
        if every_s > self.pace_s and num_tokens > 1:  # they come more slowly than they are read
            each_s = every_s - self.pace_s
            later_s = max(each_s * (num_tokens - 1) - (wants_s - at_s), 0.0)
            longest_s = min(each_s, later_s)
            if longest_s > self.longest_pause_s:
                self.longest_pause_s, self.paused_at = longest_s, self.num_tokens + num_tokens - 1
            wait_s += later_s
            wants_s += later_s
        self.lag_s += wait_s
        self.num_tokens += num_tokens
        self.wants_next_s = wants_s + num_tokens * self.pace_s
        return wait_s


def reader_of(slo: SloClass, token_times_s: Iterable[float]) -> ReaderClock:
    """The reader of a whole stream whose tokens came out at these times."""
    reader = ReaderClock(slo.pace_s)
    for at_s in token_times_s:
        reader.add(at_s)
    return reader


def is_fluid(slo: SloClass, ttft_s: float | None, lag_s: float) -> bool:
    """Whether a finished stream flowed: its first token met TTFT, and its reader's waits together the class's
    ``max_lag``.

    Args:
        slo: A class with a reader; what nobody reads as it comes (``slo.has_reader`` is False) is fluid if
            :func:`met_slo` says so, which the caller asks.
        ttft_s: Arrival to first token; None if none came.
        lag_s: :attr:`ReaderClock.lag_s` of its tokens.
    """
    return met_ttft(slo, ttft_s) and lag_s <= slo.max_lag_s


def due_s(slo: SloClass, arrival_s: float, k: int) -> float:
    """When token ``k`` (the first is 0) is due if the stream is to be on time: ``arrival + TTFT + k * TPOT``."""
    return arrival_s + slo.ttft_s + k * slo.tpot_s if k else arrival_s + slo.ttft_s


def num_on_time(slo: SloClass, arrival_s: float, token_times_s: Iterable[float]) -> int:
    """Tokens that came no later than :func:`due_s`."""
    return sum(at_s <= due_s(slo, arrival_s, k) for k, at_s in enumerate(token_times_s))


def num_late(slo: SloClass, arrival_s: float, k: int, at_s: float, num_tokens: int = 1, every_s: float = 0.0) -> int:
    """Of tokens told together, those that came later than :func:`due_s`.

    Args:
        slo: The request's class.
        arrival_s: When the request arrived.
        k: Number of the first of them.
        at_s: When that came; the others one each ``every_s`` after it.
        num_tokens: How many.
        every_s: See ``at_s``.
    """
    behind_s = at_s - due_s(slo, arrival_s, k)
    if num_tokens == 1:  # nearly always
        return 1 if behind_s > 0 else 0
    gains_s = slo.tpot_s - every_s  # what each is less behind than the one before
    if behind_s > 0:
        return num_tokens if gains_s <= 0 else min(max(math.ceil(behind_s / gains_s), 1), num_tokens)
    return 0 if gains_s >= 0 else max(num_tokens - 1 - math.floor(behind_s / gains_s), 0)


def fluidity_index(slo: SloClass, arrival_s: float, token_times_s: Iterable[float]) -> float | None:
    """Etalon's fluidity index (arXiv 2407.07000): ``1 - deadlines missed / deadlines``; None without tokens.

    Token ``k`` has its deadline one TPOT after the last one's; tokens that come early bank the difference. A token
    that is late misses its own deadline and one more for each TPOT that passes, and the next deadline counts from it.
    """
    deadlines = missed = 0
    deadline_s = arrival_s + slo.ttft_s
    for at_s in token_times_s:
        deadlines += 1
        if at_s > deadline_s:
            late = 1 + int((at_s - deadline_s) / slo.tpot_s)
            missed += late
            deadlines += late - 1
            deadline_s = at_s
        deadline_s += slo.tpot_s
    return 1 - missed / deadlines if deadlines else None


@dataclass(slots=True)
class StreamTally:
    """What :class:`ReaderClock`, :func:`num_on_time` and :func:`fluidity_index` say of one stream, counted as it comes.

    Feed it a stream's tokens in order. What it holds does not grow, and so many tokens that come evenly are one call.
    As long as tokens come before they are wanted, and no more slowly than they are read, they are only counted.

    Attributes:
        slo: The stream's class.
        arrival_s: When its request arrived.
        num_tokens: Tokens so far.
        num_on_time: Those that came by :func:`due_s`.
        first_s: When the first token came; None before.
        second_token_s: How long after it the second one came; None before.
    """

    slo: SloClass
    arrival_s: float
    num_tokens: int = field(default=0, init=False)
    num_on_time: int = field(default=0, init=False)
    first_s: float | None = field(default=None, init=False)
    second_token_s: float | None = field(default=None, init=False)
    _tpot_s: float = field(init=False)
    _first_due_s: float = field(init=False)
    _reader: ReaderClock = field(init=False)  # does not know of the latest tokens that came before they were wanted
    _deadline_s: float = field(init=False)  # Etalon's, of the token that the reader is told of next
    _num_deadlines: int = field(default=0, init=False)
    _num_missed: int = field(default=0, init=False)
    _safe_s: float = field(default=-math.inf, init=False)  # token k by this and k TPOTs keeps nobody waiting

    def __post_init__(self) -> None:
        self._tpot_s = self.slo.tpot_s
        self._first_due_s = self._deadline_s = due_s(self.slo, self.arrival_s, 0)
        self._reader = ReaderClock(self.slo.pace_s)

    def add(self, at_s: float, num_tokens: int = 1, every_s: float = 0.0) -> None:
        """So many tokens come out, the first at ``at_s`` and one more each ``every_s`` (0: all at once)."""
        tpot_s = self._tpot_s
        k = self.num_tokens
        self.num_tokens = k + num_tokens
        if k > 1 and (num_tokens == 1 or every_s <= tpot_s):  # millions of times in a simulation
            ahead_s = k * tpot_s
            if at_s <= self._first_due_s + ahead_s:
                self.num_on_time += num_tokens
            elif num_tokens > 1 and at_s + (num_tokens - 1) * (every_s - tpot_s) <= self._first_due_s + ahead_s:
                self.num_on_time += self._on_time_of(k, at_s, num_tokens, every_s)
            if at_s <= self._safe_s + ahead_s:
                return
        else:
            self.num_on_time += self._on_time_of(k, at_s, num_tokens, every_s)
        if k == 0:
            self.first_s = at_s
        if k < 2 <= self.num_tokens and self.first_s is not None:
            self.second_token_s = at_s - self.first_s if k else every_s
        self._tell_of(k)
        self._reader.add(at_s, num_tokens, every_s)
        self._pass_deadlines(at_s, num_tokens, every_s)
        if tpot_s < math.inf:
            self._safe_s = min(self._reader.wants_next_s, self._deadline_s) - self.num_tokens * tpot_s
        else:
            self._safe_s = 0.0  # with all the time in the world

    @property
    def reader(self) -> ReaderClock:
        """The clock of its reader, who waits for nothing if its class has none."""
        self._tell_of(self.num_tokens)
        return self._reader

    @property
    def fluidity_index(self) -> float | None:
        """See :func:`fluidity_index`."""
        self._tell_of(self.num_tokens)
        return 1 - self._num_missed / self._num_deadlines if self._num_deadlines else None

    def _tell_of(self, num_tokens: int) -> None:
        """Tell reader and deadlines of so many tokens; those that they do not know of yet were early."""
        num = num_tokens - self._reader.num_tokens
        if num > 0:
            self._reader.num_tokens += num
            self._reader.wants_next_s += num * self._reader.pace_s
            self._num_deadlines += num
            self._deadline_s += num * self._tpot_s

    def _on_time_of(self, k: int, at_s: float, num_tokens: int, every_s: float) -> int:
        """Tokens on time of so many from token ``k`` on: a run at their beginning, or at their end if they catch up."""
        slo, arrival_s = self.slo, self.arrival_s

        def is_on_time(i: int) -> bool:
            return at_s + i * every_s <= due_s(slo, arrival_s, k + i)

        if is_on_time(0) == is_on_time(num_tokens - 1):
            return num_tokens if is_on_time(0) else 0
        if slo.tpot_s == math.inf:  # only the first token of all has a due time
            return num_tokens - 1
        low, high = 0, num_tokens - 1  # the two differ: find where it changes
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if is_on_time(middle) == is_on_time(low) else (low, middle)
        return high if is_on_time(0) else num_tokens - high

    def _pass_deadlines(self, at_s: float, num_tokens: int, every_s: float) -> None:
        tpot_s = self.slo.tpot_s
        num_left = num_tokens
        self._num_deadlines += num_tokens
        if at_s <= self._deadline_s and every_s > tpot_s:  # what was banked lasts for some
            slack_s = self._deadline_s - at_s
            num = min(math.floor(slack_s / (every_s - tpot_s)) + 1, num_left)
            at_s += num * every_s
            self._deadline_s += num * tpot_s
            num_left -= num
        if num_left and at_s > self._deadline_s:
            self._miss(at_s - self._deadline_s)
            self._deadline_s = at_s + tpot_s
            num_left -= 1
            if every_s > tpot_s:  # and each of the others as much as it is slower
                self._miss(every_s - tpot_s, num_left)
                self._deadline_s += num_left * every_s
                return
        if num_left:
            self._deadline_s += num_left * tpot_s

    def _miss(self, late_s: float, num_tokens: int = 1) -> None:
        """So many tokens come so late: each misses its own deadline and one for each TPOT that passed."""
        missed = 1 + int(late_s / self.slo.tpot_s)
        self._num_missed += missed * num_tokens
        self._num_deadlines += (missed - 1) * num_tokens


def tally_of(slo: SloClass, arrival_s: float, token_times_s: Iterable[float]) -> StreamTally:
    """The tally of a whole stream whose tokens came out at these times."""
    tally = StreamTally(slo, arrival_s)
    for at_s in token_times_s:
        tally.add(at_s)
    return tally
