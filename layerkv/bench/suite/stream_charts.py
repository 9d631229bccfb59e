"""Plots of single answers: tokens delivered over time, beside the line on which they were due.

Pure functions of raw runs. Invariant: one request is drawn for all engines on the same axes, so that its panels can be
laid side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layerkv.bench import plots
from layerkv.bench.plots import colour, format_tick, marked
from layerkv.bench.records import LoadRun, RequestRecord
from layerkv.bench.suite.charts import X_TITLE, Plot
from layerkv.bench.suite.readers import slo_of
from layerkv.bench.suite.titles import ENGINE_TITLES
from layerkv.bench.words import format_duration
from layerkv.config import SloClass, SloPolicy
from layerkv.figures import ReaderClock, due_s

# More corners than pixels only make the file larger.
MAX_STEPS = 160
HEIGHT = 150.0
# Three of them fit beside each other.
WIDTH = 250.0
# The engines whose requests are chosen from.
CHOOSERS = ("layerkv", "stock")


@dataclass(frozen=True, slots=True)
class Stream:
    """One request, with a panel for each engine; `title` says why it was chosen."""

    title: str
    plots: list[Plot]


def streams(runs: Mapping[str, LoadRun], policy: SloPolicy) -> list[Stream]:
    """The worst and the median request of layerkv and of stock, by how late its latest token was.

    Of several reasons to choose a request the first counts. Requests that nobody reads as they come, that failed, or
    that had no token in some engine are not among them.
    """
    whole = [{r.request_id: r for r in run.requests if r.token_times_s and r.error is None} for run in runs.values()]
    common = set.intersection(*(set(of) for of in whole)) if whole else set()
    chosen: dict[str, str] = {}
    for engine in (name for name in CHOOSERS if name in runs):
        found = [
            request
            for request in runs[engine].requests
            if request.request_id in common and slo_of(request, policy).has_reader
        ]
        found.sort(key=lambda request: _latest_s(request, slo_of(request, policy)))
        if found:
            chosen.setdefault(found[-1].request_id, f"the latest with {ENGINE_TITLES[engine]}")
            chosen.setdefault(found[(len(found) - 1) // 2].request_id, f"the median with {ENGINE_TITLES[engine]}")
    order = [request.request_id for run in list(runs.values())[:1] for request in run.requests]
    return [
        Stream(
            f"Request {order.index(request_id) + 1}: {why}",
            _panels({name: of[request_id] for name, of in zip(runs, whole, strict=True)}, policy, index),
        )
        for index, (request_id, why) in enumerate(chosen.items())
    ]


def _latest_s(request: RequestRecord, slo: SloClass) -> float:
    """How long after it was due its latest token came; negative if all were early."""
    return max(at_s - due_s(slo, request.arrival_s, k) for k, at_s in enumerate(request.token_times_s))


def _panels(by_engine: Mapping[str, RequestRecord], policy: SloPolicy, index: int) -> list[Plot]:
    slo = slo_of(next(iter(by_engine.values())), policy)
    most = max(len(request.token_times_s) for request in by_engine.values())
    last_due_s = due_s(slo, 0.0, most - 1)
    end_s = max(last_due_s, *(request.token_times_s[-1] - request.arrival_s for request in by_engine.values()))
    return [_panel(name, request, slo, index, most, end_s) for name, request in by_engine.items()]


def _panel(name: str, request: RequestRecord, slo: SloClass, index: int, most: int, end_s: float) -> Plot:
    axes = plots.new_plot(HEIGHT, width=WIDTH, left=34.0, bottom=X_TITLE)
    plots.scale_from_zero(axes, "x", end_s, format_tick, bins=4)
    plots.scale_from_zero(axes, "y", float(most), lambda value: f"{value:g}")
    axes.set_xlabel("after the request was due", color=colour("soft"))
    times_s = [at_s - request.arrival_s for at_s in request.token_times_s]
    reader = ReaderClock(slo.pace_s)
    for at_s in times_s:
        wanted_s = at_s if reader.num_tokens == 0 else reader.wants_next_s
        waited_s = reader.add(at_s)
        if waited_s > 0.004 * end_s:  # thinner than a line
            said = f"its reader waited {format_duration(waited_s)} for token {reader.num_tokens}"
            marked(axes.axvspan(wanted_s, at_s, color=colour("paused"), alpha=0.4, linewidth=0), title=said)
    due = [due_s(slo, 0.0, k) for k in (0, len(times_s) - 1)]
    axes.plot([due[0], *due], [0, 1, len(times_s)], color=colour("ink"), linewidth=0.9, dashes=(4, 3), gid="due")
    shown = [0, *_corners(times_s, end_s / MAX_STEPS)]
    line = axes.plot([times_s[k] for k in shown], [0, *(k + 1 for k in shown[1:])], color=colour(name), linewidth=1.8)[
        0
    ]
    marked(line, name)
    late = sum(at_s > due_s(slo, 0.0, k) for k, at_s in enumerate(times_s))
    waits = "never waited"
    if reader.lag_s:
        lag, pause = format_duration(reader.lag_s), format_duration(reader.longest_pause_s)
        waits = f"waited {lag} in all, {pause} at most at once"
    first = format_duration(times_s[0])
    note = f"first token after {first}; its reader {waits}; {late} of {len(times_s)} tokens late"
    return Plot(f"stream-{index}-{name}", ENGINE_TITLES[name], note, axes, name)


def _corners(times_s: list[float], apart_s: float) -> list[int]:
    """The tokens to draw a line through: some evenly, and both ends of each gap that would show."""
    last = len(times_s) - 1
    found = {round(at * last / MAX_STEPS) for at in range(MAX_STEPS + 1)}
    for k in range(1, last + 1):
        if times_s[k] - times_s[k - 1] > apart_s:
            found |= {k - 1, k}
    return sorted(found)
