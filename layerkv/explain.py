"""`layerkv explain`: why one request or its reader waited, was parked or refused, told from a decision log."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from layerkv.errors import LayerKVError
from layerkv.scheduler.decision_log import read_log
from layerkv.scheduler.reasons import WAITS_FOR, End, Event, LogEntry, Reason, Resource

SENTENCES = {
    Reason.FITS: "the pool had room for all of it",
    Reason.POOL_CONTENDED: "the pool had no room, or others stood in line for it, so it went through the lane zone",
    Reason.HOST_FULL_RESIDENT: "host memory was too full to run it layered, so it went into the pool",
    Reason.ITS_TURN: "pool blocks for it were free",
    Reason.ZONE_TURN: "the lane zone had room for it, and no prompt needed that just then",
    Reason.SLOT_FREE: "there was a slot for it again",
    Reason.NO_TOKENS_LEFT: "the step's prefill budget was spent on prompts before it, or decodes had no time to spare",
    Reason.NO_SLOT: "max_num_seqs requests were running",
    Reason.LINK_BUSY: "fetches enough were under way, and its own would have waited for the link",
    Reason.HELD: "the streams that flowed needed all of the pool's time, and some would have stopped flowing with it",
    Reason.POOL_FULL: "it can only go on in the pool, and the pool had no room for it",
    Reason.ZONE_FULL: "the lane zone had no room for it",
    Reason.HOST_FULL: "host memory had no room for it",
    Reason.SMALL_REST: "only a small rest of the step's tokens was left, not worth beginning a layered prompt with",
    Reason.BEHIND: "another prompt stood before it in line for the lane zone",
    Reason.BEHIND_OVERDUE: "another was next, overtaken too often or due by arrival, and nobody was to pass it",
    Reason.BEHIND_RANK: "a request of better priority was waiting",
    Reason.LATE: "it could not have its first token in time any more, so those that could went first",
    Reason.WAIT_IS_SHORTER: "pool blocks were about to come free, sooner than the lane zone would pay off",
    Reason.VICTIMS_LEAVE: "running requests were being parked for want of blocks, so nobody came in",
    Reason.FIRST_TOKEN_DONE: "its layered prefill was over; it waits in host memory for pool blocks to decode in",
    Reason.POOL_SHORT: "running requests needed more blocks than were free, and it could best afford to wait",
    Reason.SEGMENT_LEAVES: "the pool gave memory back, and some of its blocks were there",
    Reason.MAKES_ROOM: "another request was about to be late for want of blocks, and it could afford to wait",
    Reason.TURN_OVER: "its reader had enough to read, and another's was about to run dry",
    Reason.ZONE_TURN_OVER: "a prompt, or a reader about to run dry, needed its blocks in the lane zone",
    Reason.SLOT_LENT: "another needed its slot, and its reader had enough to read",
    Reason.STREAM_BUDGET: "streaming its KV in every step took more time than the objectives left",
    Reason.RECOMPUTE_CHEAPER: "computing its KV again costs less than copying it to host memory and back",
    Reason.NO_ROOM_TO_PARK: "the pool was short, and host memory had no room for its KV either",
    Reason.LONGER_THAN_POOL: "it grew longer than the pool, and comes back through the zone",
    Reason.PREEMPTED: "a running request found no block, and vLLM preempted this one",
    Reason.CACHE_RESET: "the prefix cache was reset, and running requests were to start over",
    Reason.LOAD_FAILED: "a load from host memory that it depended on had failed",
    Reason.NEVER_FITS: "it cannot run here at all",
    Reason.COPIES_FAIL: "copying its KV failed again and again, and it got no further in between",
    Reason.OVERLOAD: "its first token would have come late, and its class asks to be refused then",
}

ACTIONS = {
    Event.ARRIVED: "arrived",
    Event.WAITS: "waits",
    Event.ADMITTED_RESIDENT: "started in the pool",
    Event.ADMITTED_LAYERED: "started through the lane zone",
    Event.FIRST_TOKEN: "first token",
    Event.PARKED: "parked",
    Event.FETCHED: "fetched back into the pool",
    Event.BACK_IN_ZONE: "went on in the lane zone",
    Event.PAUSED: "paused, with its KV in the pool",
    Event.RESUMED: "went on",
    Event.RECOMPUTES: "gave its KV up, to be computed again",
    Event.STORED_AHEAD: "its KV began to be copied to host memory in the background, in case it must be parked",
    Event.READER_WAITED: "its reader waited",
    Event.REFUSED: "refused",
    Event.FINISHED: "finished",
}

ENDS = {
    End.FINISHED: "finished",
    End.LEFT: "ended by a stop string, or by its client hanging up,",
    End.CUT_OFF: "aborted with all others",
    End.REFUSED: "refused",
}

RESOURCES = {
    Resource.POOL: "the pool",
    Resource.ZONE: "the lane zone",
    Resource.SLOT: "a slot of max_num_seqs",
    Resource.LINK: "the link",
    Resource.COMPUTE: "compute",
    Resource.HOST_MEMORY: "host memory",
}

IN_THE_BATCH = "it was in the batch all the while, and steps came more slowly than it is read"
"""Of a wait of a reader that no event explains."""

MOST_SHOWN = 20


@dataclass(slots=True)
class History:
    """One request's entries, in order, and what they come to. Times are seconds after its arrival.

    Attributes:
        request_id: The request.
        entries: What the log has of it.
        waited_s: Seconds waited for each reason, before the first token and while parked,
        waited_for_s: and for each resource.
        ttft_s: Time to first token, None without one; of a session, the longest of its turns.
        late_by_s: By how much that passed the objective; below 0 if it did not; None if either is unknown.
        lag_s: All waits of its reader together; None before its end, and if nobody read.
        longest_pause_s: The longest of them.
        reader_waited_s: Seconds of the reader's waits that were told, by what they were for; None: no event.
    """

    request_id: str
    entries: list[LogEntry] = field(default_factory=list)
    waited_s: Counter[Reason] = field(default_factory=Counter)
    waited_for_s: Counter[Resource] = field(default_factory=Counter)
    ttft_s: float | None = None
    late_by_s: float | None = None
    lag_s: float | None = None
    longest_pause_s: float | None = None
    reader_waited_s: Counter[Reason | None] = field(default_factory=Counter)


def run_explain(log_path: Path, request: str | None, *, as_json: bool, console: Console | None = None) -> int:
    """Print the history of one request, or who had to wait most and why.

    Args:
        log_path: The decision log.
        request: The request's id, or a part of it that no other id has (vLLM adds a suffix to ids).
        as_json: Print JSON instead of text.
        console: Where to; standard output by default.

    Raises:
        LayerKVError: no request, or more than one, goes by that id.
    """
    console = console or Console()
    histories = read_histories(log_path)
    if request is None:
        chosen = sorted(histories.values(), key=_badness, reverse=True)[:MOST_SHOWN]
        if as_json:
            console.print_json(json.dumps([_summary(history) for history in chosen]))
        else:
            console.print(_table(chosen, num_all=len(histories)))
            for totals in _totals(histories.values()):
                console.print(totals)
        return 0
    history = histories[_find(request, list(histories), log_path)]
    if as_json:
        console.print_json(json.dumps({**_summary(history), "history": _lines(history)}))
    else:
        for line in _lines(history):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def read_histories(log_path: Path) -> dict[str, History]:
    """All requests of a log, by id, in order of arrival."""
    histories: dict[str, History] = {}
    for entry in read_log(log_path):
        histories.setdefault(entry.request_id, History(entry.request_id)).entries.append(entry)
    for history in histories.values():
        _reckon(history)
    return histories


def _reckon(history: History) -> None:
    entries = history.entries
    arrived_s = entries[0].time_s
    objective_s = None
    # A reader's wait is told in between, of a token that was on its way; it ends no wait of the request.
    for entry, following in pairwise([entry for entry in entries if entry.event is not Event.READER_WAITED]):
        if entry.event is Event.WAITS and entry.reason is not None:
            seconds = following.time_s - entry.time_s
            history.waited_s[entry.reason] += seconds  # type: ignore[assignment]
            history.waited_for_s[_lacks(entry.reason, entry.facts)] += seconds  # type: ignore[assignment]
    for entry in entries:
        if entry.event is Event.ARRIVED:  # of a session, each turn
            objective_s = entry.facts.get("ttft_s")
        if entry.event is Event.FIRST_TOKEN:
            ttft_s = entry.facts.get("ttft_s", entry.time_s - arrived_s)
            if history.ttft_s is None or ttft_s > history.ttft_s:
                history.ttft_s = ttft_s
                history.late_by_s = None if objective_s is None else ttft_s - objective_s
        if entry.event is Event.READER_WAITED:
            history.reader_waited_s[entry.reason] += entry.facts.get("wait_s", 0.0)
        if entry.event is Event.FINISHED and (lag_s := entry.facts.get("lag_s")) is not None:
            history.lag_s = (history.lag_s or 0.0) + lag_s
            history.longest_pause_s = max(history.longest_pause_s or 0.0, entry.facts.get("longest_pause_s", 0.0))


def _lines(history: History) -> list[str]:
    """The history in plain words, a line for each entry."""
    arrived_s = history.entries[0].time_s
    lines = []
    for index, entry in enumerate(history.entries):
        later = (e.time_s for e in history.entries[index + 1 :] if e.event is not Event.READER_WAITED)
        until = next(later, None)
        lines.append(f"{entry.time_s - arrived_s:9.3f} s  {_sentence(entry, until)}")
    return lines


def _sentence(entry: LogEntry, until_s: float | None) -> str:
    facts, why = entry.facts, SENTENCES[entry.reason] if entry.reason is not None else ""
    if entry.event is Event.ARRIVED:
        return (
            f"arrived: class {facts.get('slo_class')}, {facts.get('prompt_tokens')} prompt tokens, first token due "
            f"within {_seconds(facts.get('ttft_s'))}"
            + (f", then {_seconds(facts['tpot_s'])} per token" if facts.get("tpot_s") is not None else "")
        )
    if entry.event is Event.WAITS and entry.reason is not None:
        how_long = "" if until_s is None else f" {_seconds(until_s - entry.time_s)}"
        room = (
            f" (free: {facts['free_blocks']} pool, {facts['free_zone_blocks']} zone, {facts['free_host_blocks']} host "
            f"blocks; prefill budget {facts['prefill_tokens']} tokens)"
            if "free_blocks" in facts
            else ""
        )
        return f"waited{how_long} for {RESOURCES[_lacks(entry.reason, facts)]}: {why}{room}"
    if entry.event is Event.FIRST_TOKEN:
        on_time = {True: ", on time", False: ", late"}.get(facts.get("on_time", ""), "")
        return f"first token after {_seconds(facts.get('ttft_s'))}{on_time}"
    if entry.event is Event.FINISHED:
        return (
            f"{ENDS[End(facts.get('end', End.FINISHED))]} with {facts.get('output_tokens')} output tokens"
            + _waits_in_all(facts)
        )
    if entry.event is Event.READER_WAITED:
        left = facts.get("left")
        because = f"{ACTIONS[Event(left)]}: {why}" if left is not None else why or IN_THE_BATCH
        return f"its reader waited {_seconds(facts.get('wait_s'))} at token {facts.get('token')}: {because}"
    if entry.event is Event.REFUSED:
        return f"refused: {facts.get('text') or why}"
    return f"{ACTIONS[entry.event]}{': ' + why if why else ''}"


def _waits_in_all(facts: dict[str, Any]) -> str:
    lag_s = facts.get("lag_s")
    if lag_s is None:
        return ""
    if not lag_s:
        return "; its reader never waited"
    longest_s = facts.get("longest_pause_s")
    return f"; its reader waited {_seconds(lag_s)} in all, {_seconds(longest_s)} at the longest"


def _find(request: str, request_ids: Sequence[str], log_path: Path) -> str:
    if request in request_ids:
        return request
    for matches in (
        [r for r in request_ids if r.startswith(request)],
        [r for r in request_ids if request in r],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            shown = ", ".join(matches[:5]) + (", ..." if len(matches) > 5 else "")
            raise LayerKVError(f"{len(matches)} requests go by {request!r}: {shown}; name one")
    raise LayerKVError(
        f"{log_path} has no request {request!r}, but {len(request_ids)} others; leave it out to see the worst"
    )


def _badness(history: History) -> tuple[float, float]:
    late_s = max(history.late_by_s or 0.0, 0.0)
    lag_s = sum(history.reader_waited_s.values()) if history.lag_s is None else history.lag_s
    return (late_s + lag_s, sum(history.waited_s.values()))


def _summary(history: History) -> dict[str, Any]:
    return {
        "request_id": history.request_id,
        "ttft_s": history.ttft_s,
        "late_by_s": history.late_by_s,
        "lag_s": history.lag_s,
        "longest_pause_s": history.longest_pause_s,
        "waited_s": {reason.value: round(seconds, 6) for reason, seconds in history.waited_s.most_common()},
        "waited_for_s": {resource.value: round(s, 6) for resource, s in history.waited_for_s.most_common()},
        "parks": sum(entry.event is Event.PARKED for entry in history.entries),
    }


def _table(chosen: Sequence[History], *, num_all: int) -> Table:
    table = Table(title=f"Who waited longest among {num_all} requests", box=SIMPLE, pad_edge=False)
    table.add_column("request", no_wrap=True)
    table.add_column("TTFT", justify="right")
    table.add_column("late by", justify="right")
    table.add_column("reader waited", justify="right")
    table.add_column("parked", justify="right")
    table.add_column("waited longest because")
    for history in chosen:
        longest = history.waited_s.most_common(1)
        table.add_row(
            history.request_id,
            _seconds(history.ttft_s),
            _seconds(history.late_by_s) if (history.late_by_s or 0) > 0 else "-",
            _seconds(history.lag_s),
            str(_summary(history)["parks"]),
            f"{_seconds(longest[0][1])}: {SENTENCES[longest[0][0]]}" if longest else "-",
        )
    return table


def _totals(histories: Iterable[History]) -> Iterator[Table]:
    waited: Counter[Reason | None] = Counter()
    readers: Counter[Reason | None] = Counter()
    for history in histories:
        waited.update(history.waited_s)
        readers.update(history.reader_waited_s)
    for title, totals in (
        ("Seconds waited, over all requests", waited),
        ("Seconds that readers waited, over all requests", readers),
    ):
        if totals:
            table = Table(title=title, box=SIMPLE, pad_edge=False)
            table.add_column("seconds", justify="right")
            table.add_column("for")
            table.add_column("because")
            for reason, seconds in totals.most_common():
                table.add_row(
                    f"{seconds:.1f}", _for_what(reason), IN_THE_BATCH if reason is None else SENTENCES[reason]
                )
            yield table


def _for_what(reason: Reason | None) -> str:
    return "" if reason is None or reason not in WAITS_FOR else RESOURCES[WAITS_FOR[reason]]


def _lacks(reason: Reason, facts: dict[str, Any]) -> Resource:
    """What one waits for; behind another, what that one lacked when the wait began."""
    return Resource(facts["lacks"]) if "lacks" in facts else WAITS_FOR[reason]


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.0f} ms" if abs(value) < 1 else f"{value:.2f} s"
