"""The geometry of what is drawn from raw runs at the main point: all TTFTs, each request's life, memory over time.

Pure functions; positions in percent of the plot area, as in :mod:`layerkv.bench.suite.charts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerkv.bench.records import LoadRun, RequestRecord, Sample, ttft_s
from layerkv.bench.suite.axes import Axis, Mark, from_zero, of_times
from layerkv.bench.suite.charts import Curve, CurvePoint, Plot, is_ours
from layerkv.bench.suite.result import CaseResult
from layerkv.bench.suite.titles import ENGINE_TITLES, engine_order
from layerkv.bench.timeline import Phase, PhaseKind, phases
from layerkv.bench.words import format_duration
from layerkv.units import format_bytes

# More corners than pixels only make the file larger.
MAX_CDF_STEPS = 300
MAX_CDF_TITLES = 40
MAX_ROWS = 60
MAX_SAMPLES = 240
# A capacity so far above the engine's own use, as the oracle's is, would press the areas flat: it is in words only.
CAPACITY_SHOWN_UP_TO = 1.5


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
    """Requests of each engine over one common time axis; `num_requests` by engine, of which the first are drawn."""

    panels: list[TimelinePanel]
    marks: tuple[Mark, ...]
    kinds: list[str]
    num_requests: dict[str, int]


@dataclass(frozen=True, slots=True)
class MemoryPanel:
    """One engine's KV over time: host on top of device, each the `points` of an SVG polygon; `capacity` from the top.

    `capacity` is None when the line is beyond the plot, `peaks` is the sizes in words.
    """

    engine: str
    title: str
    device: str
    host: str
    capacity: float | None
    peaks: str


@dataclass(frozen=True, slots=True)
class Memory:
    """All panels share both axes; `y_marks` count from the bottom."""

    panels: list[MemoryPanel]
    x_marks: tuple[Mark, ...]
    y_marks: tuple[Mark, ...]


def first_runs(result: CaseResult, runs: Sequence[LoadRun]) -> dict[str, LoadRun]:
    """The main point's run of each engine, of the first seed that any engine ran, by engine in the usual order."""
    at_point = [run for run in runs if run.point == result.main_point]
    order = [*result.seeds, *sorted({run.seed for run in at_point} - set(result.seeds))]
    seed = next((seed for seed in order if any(run.seed == seed for run in at_point)), None)
    by_engine = {run.engine: run for run in at_point if run.seed == seed}
    return {name: by_engine[name] for name in engine_order(result) if name in by_engine}


def cdf(result: CaseResult, runs: Sequence[LoadRun]) -> Plot:
    """The distribution of TTFT at the main point, all seeds pooled, over all requests, the failed ones among them."""
    at_point = [run for run in runs if run.point == result.main_point]
    waits: Mapping[str, list[float | None]] = {
        name: [ttft_s(request) for run in at_point if run.engine == name for request in run.requests]
        for name in engine_order(result)
    }
    served = {name: sorted(wait for wait in of if wait is not None) for name, of in waits.items()}
    served = {name: times for name, times in served.items() if times}
    axis = of_times([times[index] for times in served.values() for index in (0, -1)])
    curves = [_staircase(name, times, len(waits[name]), axis) for name, times in served.items()]
    scale = ", logarithmic axis" if axis.is_log else ""
    return Plot(
        name="cdf",
        title="Distribution of time to first token",
        note=f"Share of all requests that had their first token within a time{scale}. Further left is better.",
        x_title="time to first token",
        x_marks=axis.marks,
        y_marks=tuple(Mark(share, f"{share} %") for share in (0, 25, 50, 75, 100)),
        curves=sorted(curves, key=is_ours),
    )


def timeline(runs: Mapping[str, LoadRun]) -> Timeline:
    """The life of the first requests of every run, by engine name in the order to draw."""
    shown = {name: sorted(run.requests, key=lambda r: r.arrival_s)[:MAX_ROWS] for name, run in runs.items()}
    ends_s = {name: _end_s(requests, runs[name]) for name, requests in shown.items()}
    axis = from_zero(max(ends_s.values(), default=0.0), _seconds)
    panels = [
        TimelinePanel(
            name, ENGINE_TITLES[name], [_row(n, request, ends_s[name], axis) for n, request in enumerate(requests, 1)]
        )
        for name, requests in shown.items()
        if requests
    ]
    seen = {bar.kind for panel in panels for row in panel.rows for bar in row.bars}
    counts = {name: len(run.requests) for name, run in runs.items()}
    return Timeline(panels, axis.marks, [kind.value for kind in PhaseKind if kind.value in seen], counts)


def memory(result: CaseResult, runs: Mapping[str, LoadRun]) -> Memory:
    """KV in use in each tier over time, by engine name in the order to draw; engines without samples are left out."""
    sampled = {name: _thinned(run.samples) for name, run in runs.items() if len(run.samples) > 1}
    used = {name: max(map(_used_bytes, samples)) for name, samples in sampled.items()}
    capacities = {name: result.kv_cache_memory_bytes.get(name, 0) for name in sampled}
    near = [size for name, size in capacities.items() if size <= CAPACITY_SHOWN_UP_TO * used[name]]
    top = max([*used.values(), *near], default=0)
    x = from_zero(max((samples[-1].time_s for samples in sampled.values()), default=0.0), _seconds)
    y = from_zero(top, format_bytes, unit=_unit_bytes(top))
    panels = [_memory_panel(name, samples, capacities[name], x, y) for name, samples in sampled.items()]
    return Memory(panels, x.marks, y.marks)


def _seconds(value: float) -> str:
    return f"{value:g} s"


def _end_s(requests: Sequence[RequestRecord], run: LoadRun) -> float:
    last_s = max((request.token_times_s[-1] for request in requests if request.token_times_s), default=run.wall_s)
    return max([last_s, *(request.arrival_s for request in requests)])


def _row(number: int, request: RequestRecord, end_s: float, axis: Axis) -> TimelineRow:
    bars = [_bar(phase, number, request, axis) for phase in phases(request, end_s)]
    if not request.token_times_s:
        return TimelineRow(bars, None, "")
    first_s = request.token_times_s[0]
    title = f"request {number}: first token after {format_duration(first_s - request.arrival_s)}"
    return TimelineRow(bars, axis.position(first_s), title)


def _bar(phase: Phase, number: int, request: RequestRecord, axis: Axis) -> Bar:
    left, right = axis.position(phase.start_s), axis.position(phase.end_s)
    if phase.kind is PhaseKind.FAILED:
        text = f"failed after {len(request.token_times_s)} tokens: {request.error}"
    else:
        lasts = format_duration(phase.end_s - phase.start_s)
        text = f"{phase.kind.value} for {lasts} (from {phase.start_s:.2f} s to {phase.end_s:.2f} s)"
    return Bar(phase.kind.value, left, right - left, f"request {number}: {text}")


def _used_bytes(sample: Sample) -> int:
    return sample.device_kv_bytes + (sample.host_kv_bytes or 0)


def _thinned(samples: Sequence[Sample]) -> list[Sample]:
    """At most `MAX_SAMPLES` in order of time: of neighbours the one with most KV, so that no peak is lost."""
    ordered = sorted(samples, key=lambda sample: sample.time_s)
    size = -(-len(ordered) // MAX_SAMPLES)
    return [max(ordered[at : at + size], key=_used_bytes) for at in range(0, len(ordered), size)]


def _unit_bytes(top: float) -> float:
    return next((float(unit) for unit in (1024**3, 1024**2, 1024) if top >= unit), 1.0)


def _memory_panel(name: str, samples: Sequence[Sample], capacity_bytes: int, x: Axis, y: Axis) -> MemoryPanel:
    lefts = [x.position(sample.time_s) for sample in samples]
    device = [100 - y.position(sample.device_kv_bytes) for sample in samples]
    total = [100 - y.position(_used_bytes(sample)) for sample in samples]
    peak_device = max(sample.device_kv_bytes for sample in samples)
    peak_host = max(sample.host_kv_bytes or 0 for sample in samples)
    of = f" of {format_bytes(capacity_bytes)}" if capacity_bytes else ""
    peaks = f"at most {format_bytes(peak_device)}{of} on the device"
    if peak_host:
        peaks += f", {format_bytes(peak_host)} on the host"
    elif all(sample.host_kv_bytes is None for sample in samples):
        peaks += "; it does not tell of the host"
    return MemoryPanel(
        engine=name,
        title=ENGINE_TITLES[name],
        device=_area(lefts, device, [100.0] * len(lefts)),
        host=_area(lefts, total, device) if peak_host else "",
        capacity=100 - y.position(capacity_bytes) if 0 < capacity_bytes <= y.high else None,
        peaks=peaks,
    )


def _area(lefts: Sequence[float], tops: Sequence[float], bottoms: Sequence[float]) -> str:
    there = [f"{left:.2f},{top:.2f}" for left, top in zip(lefts, tops, strict=True)]
    back = [f"{left:.2f},{bottom:.2f}" for left, bottom in zip(lefts, bottoms, strict=True)]
    return " ".join(there + back[::-1])


def _staircase(name: str, times_s: Sequence[float], num_requests: int, axis: Axis) -> Curve:
    """A staircase from the lower left corner: up at each first token, flat between, flat to the right edge."""
    title = ENGINE_TITLES[name]
    corners = [(0.0, 100.0)]
    for rank in _ranks(len(times_s), MAX_CDF_STEPS):
        left = axis.position(times_s[rank - 1])
        corners.append((left, corners[-1][1]))
        corners.append((left, 100.0 * (1 - rank / num_requests)))
    corners.append((100.0, corners[-1][1]))
    points = [
        CurvePoint(
            axis.position(times_s[rank - 1]),
            round(100.0 * (1 - rank / num_requests), 2),
            None,
            None,
            f"{title}: {rank / num_requests:.0%} of requests within {format_duration(times_s[rank - 1])}",
        )
        for rank in _ranks(len(times_s), MAX_CDF_TITLES)
    ]
    return Curve(name, title, [" ".join(f"{left:.2f},{top:.2f}" for left, top in corners)], points)


def _ranks(count: int, at_most: int) -> list[int]:
    """1 to `count`, or `at_most` of these evenly, the last among them."""
    if count <= at_most:
        return list(range(1, count + 1))
    return [round((index + 1) * count / at_most) for index in range(at_most)]
