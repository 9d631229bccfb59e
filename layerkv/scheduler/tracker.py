"""What the scheduler remembers of each request between steps, kept so that a snapshot is cheap to take.

The queues of waiting and parked requests are sorted when a request enters them; a step reads their heads.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from layerkv.config import SloClass
from layerkv.figures import ReaderClock
from layerkv.scheduler.reasons import Event, Reason
from layerkv.scheduler.snapshot import ParkedRequest, WaitingRequest
from layerkv.scheduler.streams import Stream

View = TypeVar("View", WaitingRequest, ParkedRequest)

MOST_FAILURES = 3
"""So many times a request's KV may be lost to failed copies before it makes a token; then it is ended with an error.
Not measured: chosen by judgement."""

NO_TPOT_S = 1.0
"""Seconds per token by which a request is scheduled whose class promises none: it waits longer than those that are
read, and not for ever. Not measured: chosen by judgement."""

LATE_SHARE = 8
"""One in so many of a queue's head is kept for requests that are late already, so that they are seen at all. Not
measured: chosen by judgement."""


UNREADY_LOOKS = 128
"""Of those that cannot go on yet, so many are found out in one step at most, and so many asked about again. Not
measured: chosen by judgement."""


class _Sorted(Generic[View]):
    """Views in the order of their keys."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, float, str]] = []
        self.views: list[View] = []

    def add(self, key: tuple[int, float, str], view: View) -> None:
        at = bisect_left(self.keys, key)
        self.keys.insert(at, key)
        self.views.insert(at, view)

    def remove(self, key: tuple[int, float, str]) -> None:
        at = bisect_left(self.keys, key)
        del self.keys[at], self.views[at]


class DeadlineQueue(Generic[View]):
    """Views sorted by rank and deadline; entering and leaving cost O(log n) comparisons and short memory moves."""

    def __init__(self) -> None:
        self._all: _Sorted[View] = _Sorted()
        self._open: _Sorted[View] = _Sorted()  # but for those set aside
        self._aside: dict[str, View] = {}  # not ready when last asked about; next to be asked first
        self._key_of: dict[str, tuple[int, float, str]] = {}
        self._unasked: set[str] = set()  # not known to be ready for good

    def __len__(self) -> int:
        return len(self._key_of)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._key_of

    def view(self, request_id: str) -> View | None:
        """A request's view, if it is here."""
        key = self._key_of.get(request_id)
        return None if key is None else self._all.views[bisect_left(self._all.keys, key)]

    @property
    def has_unready(self) -> bool:
        """Whether any were not ready when last asked about."""
        return bool(self._aside)

    @property
    def views(self) -> Sequence[View]:
        """All views in order. The list lives on: do not keep it across steps, do not change it."""
        return self._all.views

    def add(self, view: View) -> None:
        """Insert a request that is not here yet."""
        key = (view.rank, view.deadline_s, view.request_id)
        self._all.add(key, view)
        self._open.add(key, view)
        self._key_of[view.request_id] = key
        self._unasked.add(view.request_id)

    def discard(self, request_id: str) -> None:
        """Remove a request if it is here."""
        key = self._key_of.pop(request_id, None)
        if key is not None:
            self._all.remove(key)
            self._unasked.discard(request_id)
            if self._aside.pop(request_id, None) is None:
                self._open.remove(key)

    def due_before(self, now_s: float, due_s: float) -> list[View]:
        """Whom a newcomer of rank 0 stands behind that is due at ``due_s`` and can be on time.

        Those of better rank, and of its own those that are due no later and not late yet.
        """
        start = self._start_of_rank_0()
        on_time = bisect_left(self._all.keys, (0, now_s, ""), start)
        end = bisect_left(self._all.keys, (0, math.nextafter(due_s, math.inf), ""), on_time)
        return self._all.views[:start] + self._all.views[on_time:end]

    def late(self, now_s: float, most: int) -> list[View]:
        """The first ``most`` of rank 0 whose deadline has passed."""
        start = self._start_of_rank_0()
        return self._all.views[start : min(bisect_left(self._all.keys, (0, now_s, ""), start), start + most)]

    def _start_of_rank_0(self) -> int:
        return bisect_left(self._all.keys, (0, float("-inf"), ""))

    def head(
        self,
        most: int,
        now_s: float,
        is_ready: Callable[[View], bool] | None = None,
        *,
        stays_ready: bool = False,
    ) -> list[View]:
        """The first ``most`` views: rank by rank, those whose deadline is to come before those whose has passed.

        Costs a few binary searches for each rank that it shows, however many there are, and few questions however
        many are not ready: those are set aside, and asked about again in turn, all in each step while there are no
        more than :data:`UNREADY_LOOKS`. Behind more of them than that, one that is ready is shown some steps later.

        Args:
            most: How many; of each rank one in :data:`LATE_SHARE`, and one at least, is a late one if there are any.
            now_s: Current time.
            is_ready: Leaves out those it says False of.
            stays_ready: Whether one that is ready stays so while it is here: then it is not asked about again.
        """
        if stays_ready and not self._unasked:
            is_ready = None
        if is_ready is not None:
            self._ask_again(is_ready)
        line = self._all if is_ready is None else self._open
        to_ask = self._unasked if stays_ready else self._key_of.keys()
        keys, found, unready = line.keys, list[View](), list[View]()
        start = 0
        # one round per rank: nearly always one
        while start < len(keys) and len(found) < most and len(unready) < UNREADY_LOOKS:
            room = most - len(found)
            rank = keys[start][0]
            split = bisect_left(keys, (rank, now_s, ""), start)
            end = bisect_left(keys, (rank + 1, float("-inf"), ""), split)
            late = _ready(line.views, range(start, split), room, is_ready, to_ask, unready)
            on_time = _ready(line.views, range(split, end), room, is_ready, to_ask, unready)
            num_late = min(len(late), max(room - len(on_time), room // LATE_SHARE, 1))
            found += on_time[: room - num_late]
            found += late[:num_late]
            start = end
        for view in unready:
            self._open.remove(self._key_of[view.request_id])
            self._aside[view.request_id] = view
        if stays_ready and is_ready is not None:
            self._unasked.difference_update([view.request_id for view in found])
        return found

    def _ask_again(self, is_ready: Callable[[View], bool]) -> None:
        """Take back those set aside that have become ready, of those not asked about for longest."""
        for request_id, view in list(islice(self._aside.items(), UNREADY_LOOKS)):
            del self._aside[request_id]
            if is_ready(view):
                self._open.add(self._key_of[request_id], view)
            else:
                self._aside[request_id] = view


def _ready(
    views: Sequence[View],
    where: range,
    most: int,
    is_ready: Callable[[View], bool] | None,
    to_ask: Set[str],
    unready: list[View],
) -> list[View]:
    """The first ``most`` that are ready; others met on the way are added to ``unready``, while that has room.

    Whoever is not ``to_ask`` is ready.
    """
    if is_ready is None:
        return list(views[where.start : min(where.stop, where.start + most)])
    found: list[View] = []
    for at in where:
        if len(found) >= most or len(unready) >= UNREADY_LOOKS:
            break
        view = views[at]
        (found if view.request_id not in to_ask or is_ready(view) else unready).append(view)
    return found


@dataclass(slots=True)
class TrackedRequest:
    """One request's history, in seconds on the monotonic clock.

    Attributes:
        slo: Its class.
        arrival_s: When it arrived at the server.
        max_tokens: Output tokens that it may make.
        rank: vLLM's request priority under ``--scheduling-policy priority``, else 0. Lower goes first.
        can_layer: Whether it may be parked and fetched.
        can_pause: Whether steps may leave it out.
        in_one_step: Whether its prompt must not be computed in chunks.
        most_blocks: Blocks of all tokens that it may ever have; 0 unless it is expected to become longer than the pool.
        has_reader: Whether somebody gets its tokens as they come, at the pace of its class if that has one.
        prompt_blocks: Blocks of its prompt,
        ticket_blocks: and of all prompts that came up to it, its own included.
        first_token_s: When its first token came out; None before.
        admitted_s: When it was first given compute; None before.
        resident_since_step: Step of its last admission or fetch,
        resident_since_s: and when that was.
        turn_since_step: Step in which it last got its slot, or was paused.
        parked_tokens: Tokens that had KV when it was last parked or paused.
        low_tokens: Output tokens it is predicted to make in all, low quantile (for slack),
        middle_tokens: and middle quantile (for memory).
        prefill_cost_s: Seconds of its prefill by the profile, not corrected online, as of when it last had no KV.
        prefill_rest_s: Of those, what its prefill still cost when running requests were last looked at; 0 unless one is
            under way.
        predict_again_at: Output tokens at which the prediction is made anew.
        num_failures: How often its KV was lost to a failed copy since it last made a token,
        failed_at: and how many output tokens it had then.
        said: The last thing said of it in the decision log: the same is not said twice.
        tpot_s: Its class's TPOT objective (:data:`NO_TPOT_S` if it has none),
        weight: weight,
        max_stall_s: longest stall (infinite if it has none),
        max_lag_s: and most lag, at hand for the pass over running requests.
        ttft_deadline_s: When its first token is due.
        reader: Who reads its tokens, by its class's pace.
        stream: What its client has got so far.
        awaits_input: A session that has answered: its client has not said anything since.
    """

    slo: SloClass
    arrival_s: float
    max_tokens: int = 1
    rank: int = 0
    can_layer: bool = True
    can_pause: bool = True
    in_one_step: bool = False
    most_blocks: int = 0
    has_reader: bool = True
    prompt_blocks: int = 0
    ticket_blocks: int = 0
    first_token_s: float | None = None
    admitted_s: float | None = None
    resident_since_step: int = 0
    resident_since_s: float = 0.0
    turn_since_step: int = 0
    parked_tokens: int = 0
    low_tokens: int = 1
    middle_tokens: int = 1
    prefill_cost_s: float = 0.0
    prefill_rest_s: float = 0.0
    predict_again_at: int = 0
    num_failures: int = 0
    failed_at: int = 0
    said: Event | Reason | None = None
    tpot_s: float = field(init=False)
    weight: float = field(init=False)
    max_stall_s: float = field(init=False)
    max_lag_s: float = field(init=False)
    ttft_deadline_s: float = field(init=False)
    reader: ReaderClock = field(init=False)
    stream: Stream = field(default_factory=Stream)
    awaits_input: bool = False

    def __post_init__(self) -> None:
        self.tpot_s = self.slo.tpot_s if self.slo.tpot_s < math.inf else NO_TPOT_S
        self.weight = self.slo.weight
        self.max_stall_s = math.inf if self.slo.max_stall_s is None else self.slo.max_stall_s
        self.max_lag_s = self.slo.max_lag_s
        self.ttft_deadline_s = self.arrival_s + self.slo.ttft_s
        self.has_reader &= self.slo.has_reader
        self.reader = ReaderClock(self.slo.pace_s if self.has_reader else math.inf)

    @property
    def outgrows_pool(self) -> bool:
        """Whether it is expected to become longer than the pool: it decodes in the zone."""
        return self.most_blocks > 0

    def begin_turn(self, arrival_s: float, max_tokens: int) -> None:
        """A session's client has sent its next input: all that is promised of a stream counts from there."""
        self.arrival_s, self.max_tokens = arrival_s, max_tokens
        self.ttft_deadline_s = arrival_s + self.slo.ttft_s
        self.first_token_s, self.awaits_input = None, False
        self.reader, self.stream = ReaderClock(self.reader.pace_s), Stream()
        self.predict_again_at = self.failed_at = 0

    def copy_failed(self, num_output_tokens: int) -> bool:
        """Its KV is lost to a failed copy; whether it has been often enough for one that gets no further."""
        self.num_failures = self.num_failures + 1 if num_output_tokens <= self.failed_at else 1
        self.failed_at = num_output_tokens
        return self.num_failures >= MOST_FAILURES

    def start_by_s(self, num_output_tokens: int, now_s: float, step_s: float) -> float:
        """The latest time to go on decoding at ``step_s`` a token and still keep the objectives.

        LayerKV's slack (Eq. 1): now plus ``TPOT_SLO (N_past + N_future) - (T_past + N_future step_s)``, with N_future
        the low quantile of the tokens to come. Where decoding is slower than the objective, the tokens to come earn
        nothing. A class's ``max_stall`` bounds it: its last token came now, at the latest.

        Args:
            num_output_tokens: Tokens made so far.
            now_s: Current time; stands for the first token's while that is still on its way.
            step_s: Seconds of a step.
        """
        # Asked for hundreds of times per decision: no calls, and no more than it needs.
        tpot_s, first_s = self.tpot_s, self.first_token_s
        due_s = (now_s if first_s is None else first_s) + tpot_s * (num_output_tokens or 1)
        if self.low_tokens > num_output_tokens and tpot_s > step_s:
            due_s += (self.low_tokens - num_output_tokens) * (tpot_s - step_s)
        latest_s = now_s + self.max_stall_s
        return due_s if due_s < latest_s else latest_s

    def dry_s(self, num_output_tokens: int, now_s: float, step_s: float) -> float:
        """When its reader has read all that it made: its next token is due then. Without a reader, as
        :meth:`start_by_s`. A first token that is still on its way comes now."""
        if not self.has_reader:
            return self.start_by_s(num_output_tokens, now_s, step_s)
        reader = self.reader
        dry_s = reader.wants_next_s if reader.num_tokens else now_s + self.tpot_s
        latest_s = now_s + self.max_stall_s
        return dry_s if dry_s < latest_s else latest_s

    def flows_until_s(self, dry_s: float) -> float:
        """Until when its next token may come and its stream still be fluid; in the past if it is not any more."""
        if self.first_token_s is not None and self.first_token_s > self.ttft_deadline_s:
            return self.ttft_deadline_s
        if not self.has_reader:
            return dry_s
        may_wait_s = self.max_lag_s - self.reader.lag_s
        return dry_s + may_wait_s if may_wait_s >= 0 else self.arrival_s
