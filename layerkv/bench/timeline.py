"""A request's life as phases, for the timeline plot.

Pure functions of request records: what the engine did with it where that was recorded, else what its client saw.
Invariant: the phases of a request are in order, do not overlap, and cover everything from its arrival to its last
token.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from statistics import median

from layerkv.bench.records import RequestRecord, StateChange


class PhaseKind(StrEnum):
    """What a user of the request would say it is doing."""

    QUEUED = "queued"
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decoding"
    PARKED = "parked"
    PREEMPTED = "preempted"
    PAUSED = "paused"
    FAILED = "failed"


# A gap between two tokens is a pause when it is longer than both: this many of the request's median gaps, this time.
PAUSE_GAPS = 10.0
PAUSE_S = 0.25
# States in which the request does not run, and the phase that each begins. Fetching belongs to being parked.
_STOPPED = {"parked": PhaseKind.PARKED, "fetching": PhaseKind.PARKED, "preempted": PhaseKind.PREEMPTED}
_RUNNING = frozenset({"resident", "layered"})


@dataclass(frozen=True, slots=True)
class Phase:
    """The request is in `kind` from `start_s` to `end_s`, in seconds after the start of the load."""

    kind: PhaseKind
    start_s: float
    end_s: float


def phases(request: RequestRecord, run_end_s: float) -> list[Phase]:
    """The phases of `request`; without a next sign of life the last one goes to `run_end_s`."""
    if request.states or request.first_scheduled_s is not None:
        return _of_engine(request, run_end_s)
    return _of_client(request, run_end_s)


def _of_client(request: RequestRecord, run_end_s: float) -> list[Phase]:
    """waiting: to the first token. decoding: to the last one, but for pauses between them."""
    tokens_s = request.token_times_s
    found = []
    if tokens_s or request.error is None:
        found.append(Phase(PhaseKind.WAITING, request.arrival_s, tokens_s[0] if tokens_s else run_end_s))
    gaps_s = [after_s - before_s for before_s, after_s in pairwise(tokens_s)]
    pause_s = max(PAUSE_GAPS * median(gaps_s), PAUSE_S) if gaps_s else 0.0
    start_s = tokens_s[0] if tokens_s else 0.0
    for before_s, after_s in pairwise(tokens_s):
        if after_s - before_s > pause_s:
            found.append(Phase(PhaseKind.DECODE, start_s, before_s))
            found.append(Phase(PhaseKind.PAUSED, before_s, after_s))
            start_s = after_s
    if tokens_s:
        found.append(Phase(PhaseKind.DECODE, start_s, tokens_s[-1]))
    found = _cleaned(found)
    if request.error is not None:
        last_s = tokens_s[-1] if tokens_s else request.arrival_s
        found.append(Phase(PhaseKind.FAILED, last_s, max(run_end_s, last_s)))
    return found


def _of_engine(request: RequestRecord, run_end_s: float) -> list[Phase]:
    """queued: arrival to first scheduling. prefill: to the first token. decoding: to the last token.

    parked or preempted is cut out of these: from the stop to the first token after the request runs again.
    """
    tokens_s = request.token_times_s
    scheduled_s = request.first_scheduled_s
    if scheduled_s is None:
        return [Phase(PhaseKind.QUEUED, request.arrival_s, tokens_s[-1] if tokens_s else run_end_s)]
    first_token_s, last_token_s = (tokens_s[0], tokens_s[-1]) if tokens_s else (run_end_s, run_end_s)
    whole = [
        Phase(PhaseKind.QUEUED, request.arrival_s, scheduled_s),
        Phase(PhaseKind.PREFILL, scheduled_s, first_token_s),
        Phase(PhaseKind.DECODE, first_token_s, last_token_s),
    ]
    for stop in _stops(request, last_token_s):
        whole = [piece for phase in whole for piece in _cut(phase, stop)]
        whole.append(stop)
    return _cleaned(sorted(whole, key=lambda phase: phase.start_s))


def _stops(request: RequestRecord, end_s: float) -> list[Phase]:
    """The stretches in which the request was parked or preempted, ascending and disjoint."""
    found: list[Phase] = []
    stopped: tuple[PhaseKind, float] | None = None
    for move in [*request.states, StateChange(end_s, "resident")]:
        if move.state in _STOPPED and stopped is None:
            stopped = _STOPPED[move.state], move.time_s
        elif move.state in _RUNNING and stopped is not None:
            kind, stopped_s = stopped
            stopped = None
            earliest_s = max(stopped_s, found[-1].end_s if found else stopped_s)
            found.append(_stop(request.token_times_s, kind, earliest_s, min(move.time_s, end_s)))
    return _cleaned(found)


def _stop(tokens_s: list[float], kind: PhaseKind, stopped_s: float, resumed_s: float) -> Phase:
    """From the stop, or the token that was under way then, to the first token after running again."""
    next_token = bisect_left(tokens_s, resumed_s)
    start_s = max(stopped_s, tokens_s[next_token - 1]) if next_token > 0 else stopped_s
    has_both = 0 < next_token < len(tokens_s)  # before the first token, running again is prefill
    return Phase(kind, start_s, tokens_s[next_token] if has_both else resumed_s)


def _cut(phase: Phase, stop: Phase) -> list[Phase]:
    """What is left of `phase` outside `stop`."""
    return [
        Phase(phase.kind, phase.start_s, min(phase.end_s, stop.start_s)),
        Phase(phase.kind, max(phase.start_s, stop.end_s), phase.end_s),
    ]


def _cleaned(found: list[Phase]) -> list[Phase]:
    return [phase for phase in found if phase.end_s > phase.start_s]
