"""The geometry of the report's two plots: what is drawn where, as data for the template.

Pure functions. Positions are percentages of the plot area, from the left and from the top, so that the same
drawing fits a phone and a desktop and text keeps its size. The template decides colours and line widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerkv.bench.metrics import ttft_s
from layerkv.bench.records import EngineRun
from layerkv.bench.summary import ENGINE_TITLES, format_duration
from layerkv.bench.timeline import Phase, PhaseKind, phases

# Above this spread of times to first token a linear axis would press the fast engines against its edge.
LOG_AXIS_SPREAD = 20.0
MAX_TICKS = 8


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on a horizontal axis."""

    left: float
    label: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One phase of one request; `title` is shown on hover."""

    kind: str
    left: float
    width: float
    title: str


@dataclass(frozen=True, slots=True)
class TimelineRow:
    """One request: its phases, and where its first token came (None: never)."""

    bars: list[Bar]
    first_token: float | None
    first_token_title: str


@dataclass(frozen=True, slots=True)
class TimelinePanel:
    """The requests of one engine in order of arrival."""

    engine: str
    title: str
    rows: list[TimelineRow]


@dataclass(frozen=True, slots=True)
class Timeline:
    """One panel per engine over one common time axis, and the phases that occur."""

    panels: list[TimelinePanel]
    ticks: list[Tick]
    kinds: list[str]


@dataclass(frozen=True, slots=True)
class CdfPoint:
    """One request's time to first token."""

    left: float
    top: float
    title: str


@dataclass(frozen=True, slots=True)
class CdfSeries:
    """One engine's curve: `polyline` is the value of SVG's `points`, in percent of the plot area."""

    engine: str
    title: str
    polyline: str
    points: list[CdfPoint]


@dataclass(frozen=True, slots=True)
class Cdf:
    """The share of requests that had their first token within a time, per engine."""

    series: list[CdfSeries]
    ticks: list[Tick]
    is_log: bool


def timeline(runs: Mapping[str, EngineRun]) -> Timeline:
    """The life of every request of every run, by engine name in the order to draw."""
    end_s = max((_last_s(run) for run in runs.values()), default=1.0)
    seen: set[PhaseKind] = set()
    panels = []
    for name, run in runs.items():
        rows = []
        for number, request in enumerate(run.requests, 1):
            found = phases(request, _last_s(run))
            seen.update(phase.kind for phase in found)
            bars = [_bar(phase, number, end_s) for phase in found]
            waited_s = ttft_s(request)
            first_token = None if waited_s is None else _percent(request.token_times_s[0], end_s)
            title = "" if waited_s is None else f"request {number}: first token after {format_duration(waited_s)}"
            rows.append(TimelineRow(bars, first_token, title))
        panels.append(TimelinePanel(name, ENGINE_TITLES[name], rows))
    ticks = [Tick(_percent(value, end_s), f"{value:g} s") for value in round_values(end_s)]
    return Timeline(panels, ticks, [kind.value for kind in PhaseKind if kind in seen])


def _bar(phase: Phase, number: int, end_s: float) -> Bar:
    lasts_s = phase.end_s - phase.start_s
    return Bar(
        kind=phase.kind.value,
        left=_percent(phase.start_s, end_s),
        width=_percent(lasts_s, end_s),
        title=f"request {number}: {phase.kind.value} for {format_duration(lasts_s)} "
        f"(from {phase.start_s:.2f} s to {phase.end_s:.2f} s)",
    )


def cdf(runs: Mapping[str, EngineRun]) -> Cdf:
    """The distributions of time to first token, by engine name in the order to draw."""
    samples = {name: sorted(_ttfts_s(run)) for name, run in runs.items()}
    samples = {name: values for name, values in samples.items() if values}
    if not samples:
        return Cdf([], [], is_log=False)
    least = max(min(values[0] for values in samples.values()), 1e-4)
    most = max(values[-1] for values in samples.values())
    axis = _LogAxis(least, most) if most / least > LOG_AXIS_SPREAD else _LinearAxis(most)
    series = [
        CdfSeries(name, ENGINE_TITLES[name], _steps(values, axis), _points(values, axis, ENGINE_TITLES[name]))
        for name, values in samples.items()
    ]
    return Cdf(series, axis.ticks(), is_log=isinstance(axis, _LogAxis))


def round_values(end: float) -> list[float]:
    """0 and the multiples of a round step (1, 2 or 5 times a power of ten) up to `end`, at most 8."""
    if end <= 0:
        return [0.0]
    rough = end / (MAX_TICKS - 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= rough)
    return [round(index * step, 10) for index in range(int(end / step + 1e-9) + 1)]


class _LinearAxis:
    def __init__(self, most: float) -> None:
        self._end = most * 1.02

    def position(self, value: float) -> float:
        return _percent(value, self._end)

    def ticks(self) -> list[Tick]:
        return [Tick(self.position(value), format_tick(value)) for value in round_values(self._end)]


class _LogAxis:
    def __init__(self, least: float, most: float) -> None:
        self._low = math.log10(least / 1.15)
        self._high = math.log10(most * 1.15)

    def position(self, value: float) -> float:
        return _percent(max(math.log10(max(value, 1e-9)) - self._low, 0.0), self._high - self._low)

    def ticks(self) -> list[Tick]:
        decades = range(math.floor(self._low), math.ceil(self._high) + 1)
        marks = [(decade, factor) for decade in decades for factor in (1, 3)]
        values = [factor * 10.0**decade for decade, factor in marks]
        shown = [value for value in values if self._low <= math.log10(value) <= self._high]
        if len(shown) > MAX_TICKS:
            shown = [value for value in shown if f"{value:e}".startswith("1.0")]
        return [Tick(self.position(value), format_tick(value)) for value in shown]


def format_tick(value_s: float) -> str:
    """A round time without trailing zeros: `0`, `30 ms`, `0.3 s`, `10 s`."""
    if value_s == 0:
        return "0"
    return f"{value_s * 1e3:g} ms" if value_s < 0.0995 else f"{value_s:g} s"


def _steps(values: Sequence[float], axis: _LinearAxis | _LogAxis) -> str:
    """A staircase from the lower left corner to the right edge: up at each sample, flat between."""
    corners = [(0.0, 100.0)]
    for index, value in enumerate(values):
        left = axis.position(value)
        corners.append((left, corners[-1][1]))
        corners.append((left, 100.0 * (1 - (index + 1) / len(values))))
    corners.append((100.0, 0.0))
    return " ".join(f"{left:.2f},{top:.2f}" for left, top in corners)


def _points(values: Sequence[float], axis: _LinearAxis | _LogAxis, title: str) -> list[CdfPoint]:
    return [
        CdfPoint(
            left=axis.position(value),
            top=round(100.0 * (1 - rank / len(values)), 2),
            title=f"{title}: {rank / len(values):.0%} of first tokens within {format_duration(value)}",
        )
        for rank, value in enumerate(values, 1)
    ]


def _ttfts_s(run: EngineRun) -> list[float]:
    return [value for request in run.requests if (value := ttft_s(request)) is not None]


def _last_s(run: EngineRun) -> float:
    return max((request.token_times_s[-1] for request in run.requests if request.token_times_s), default=run.wall_s)


def _percent(value: float, of: float) -> float:
    return round(100.0 * value / of, 3) if of else 0.0
