"""A case's plots: figures against its axis, or as bars at its only point, and what is drawn from raw runs.

Pure functions: each plot is matplotlib axes until a report asks for it as SVG. Invariant: what was not measured is not
drawn, and a line breaks where it lacks a point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from layerkv.bench import plots
from layerkv.bench.plots import colour, format_tick, marked
from layerkv.bench.records import LoadRun, RequestRecord, Sample, ttft_s
from layerkv.bench.suite.result import CaseResult, Figures, PointResult, Spread
from layerkv.bench.suite.tables import SLOS_MET
from layerkv.bench.suite.titles import (
    ENGINE_TITLES,
    engine_note,
    engine_order,
    has_first_tokens,
    main_point,
    point_label,
)
from layerkv.bench.timeline import Phase, PhaseKind, phases
from layerkv.bench.words import format_duration
from layerkv.units import format_bytes

HEIGHT, X_TITLE = 172.0, 32.0
# More corners than pixels only make the file larger.
MAX_CDF_STEPS = 300
MAX_ROWS = 60
MAX_SAMPLES = 240
# A capacity so far above the engine's own use, as the oracle's is, would press the areas flat: it is in words only.
CAPACITY_SHOWN_UP_TO = 1.5
THICK = (PhaseKind.PREFILL, PhaseKind.DECODE)


@dataclass(frozen=True, slots=True)
class Plot:
    """One drawing with its words; of one engine alone if it names one."""

    name: str
    title: str
    note: str
    axes: Axes
    engine: str = ""

    def svg(self) -> str:
        """The drawing as an element of a page."""
        return plots.inline_svg(self.axes, self.name, f"{self.title}: {self.note}")


@dataclass(frozen=True, slots=True)
class _Quantity:
    """A figure that is drawn against the axis: how to get it, write it, mark it."""

    name: str
    title: str
    note: str
    pick: Callable[[Figures], Spread | None]
    write: Callable[[float], str]
    mark: Callable[[float], str]

    def with_range(self, value: Spread) -> str:
        text = self.write(value.median)
        if len(value.values) < 2:
            return text
        return f"{text} ({self.write(min(value.values))} to {self.write(max(value.values))})"


def _percent_text(share: float) -> str:
    return f"{share * 100:.3g} %"


_FLUID = _Quantity(
    "fluid",
    "Fluid requests",
    "Share of all requests with the first token in time and a reader who hardly had to wait. Higher is better",
    lambda figures: figures.fluid,
    _percent_text,
    _percent_text,
)
_TTFT = _Quantity(
    "ttft",
    "Time to first token",
    "Mean, from when a request was due. Lower is better",
    # Of an engine that served nothing the mean is 0 s, which is no time.
    lambda figures: figures.ttft_s.mean if has_first_tokens(figures) else None,
    format_duration,
    format_tick,
)
_GOODPUT = _Quantity(
    "goodput",
    "Goodput",
    "Requests per second that met TTFT and, on the mean, TPOT. Higher is better",
    lambda figures: figures.goodput_rps,
    lambda rate: f"{rate:.2f}/s",
    lambda rate: f"{rate:g}/s",
)
_ATTAINMENT = _Quantity(
    "attainment",
    SLOS_MET,
    "Share of all requests that met TTFT and, on the mean, TPOT. Higher is better",
    lambda figures: figures.slo_attainment,
    _percent_text,
    _percent_text,
)


_QUANTITIES = (_FLUID, _TTFT, _GOODPUT, _ATTAINMENT)


def against_axis(result: CaseResult) -> list[Plot]:
    """The quantities against the case's axis; none with fewer than two points that have figures."""
    points = sorted((point for point in result.points if point.engines), key=lambda point: point.x)
    if len({point.x for point in points}) < 2:
        return []
    known = [q for q in _QUANTITIES if any(q.pick(figures) is not None for figures in _all_figures(points))]
    return [_against_axis(result, points, quantity) for quantity in known]


def _against_axis(result: CaseResult, points: Sequence[PointResult], quantity: _Quantity) -> Plot:
    axes = plots.new_plot(HEIGHT, bottom=X_TITLE)
    plots.scale_points(axes, [point.x for point in points])
    axes.set_xlabel(result.axis, color=colour("soft"))
    is_rate = all(point.x == point.rate_per_s and not point.has_sessions for point in points)
    rates = [point.rate_per_s for point in points] if is_rate and quantity is _GOODPUT else []
    values = [value for figures in _all_figures(points) for value in _values(quantity.pick(figures))]
    is_log = False
    if quantity is _TTFT:
        is_log = plots.scale_times(axes, "y", values, quantity.mark)
    else:
        most = 1.0 if quantity in (_FLUID, _ATTAINMENT) else max([*values, *rates], default=0.0)
        plots.scale_from_zero(axes, "y", most, quantity.mark)
    if rates:
        axes.plot(rates, rates, color=colour("soft"), linewidth=0.8, dashes=(3, 4), gid="offered")
    for name in sorted(engine_order(result), key=_is_ours):
        known = [(point, _of(point, name, quantity)) for point in points]
        for part in _unbroken(known):
            _line(axes, name, [point.x for point, _ in part], [value.median for _, value in part])
        for point, value in known:
            if value is not None:
                title = f"{ENGINE_TITLES[name]}, {point_label(result, point)}: {quantity.with_range(value)}"
                _dot(axes, name, point.x, value, title)
    note = f"{quantity.note}{' (logarithmic axis)' if is_log else ''}."
    return Plot(quantity.name, quantity.title, f"{note} Thin dashes: offered rate." if rates else note, axes)


def bars(result: CaseResult) -> list[Plot]:
    """The same figures as bars, for a case with one point; empty without any figures."""
    point = main_point(result)
    if point is None or not point.engines:
        return []
    drawn = (_bars(result, point, quantity) for quantity in _QUANTITIES)
    return [plot for plot in drawn if plot is not None]


def _bars(result: CaseResult, point: PointResult, quantity: _Quantity) -> Plot | None:
    known = [(name, value) for name in engine_order(result) if (value := _of(point, name, quantity)) is not None]
    if not known:
        return None
    axes = plots.new_plot(17.0 * len(known) + 12.0, width=250.0, left=98.0, bottom=5.0)
    axes.grid(visible=False)
    most = max((value for _, spread in known for value in spread.values), default=0.0)
    axes.set(xlim=(0, most * 1.3 if most > 0 else 1.0), ylim=(len(known) - 0.5, -0.5), xticks=[])
    axes.set_yticks(range(len(known)), [ENGINE_TITLES[name] for name, _ in known])
    for row, (name, value) in enumerate(known):
        drawn = axes.barh(row, value.median, 0.7, color=colour(name))[0]
        marked(drawn, name, f"{ENGINE_TITLES[name]}: {quantity.with_range(value)}")
        if len(value.values) > 1:
            marked(axes.hlines(row, min(value.values), max(value.values), colour("ink"), linewidth=1), name)
        at = max(value.values) + most * 0.02
        marked(axes.text(at, row, quantity.write(value.median), va="center", color=colour("ink")), name)
    return Plot(f"bars-{quantity.name}", quantity.title, f"{quantity.note}.", axes)


def first_runs(result: CaseResult, runs: Sequence[LoadRun]) -> dict[str, LoadRun]:
    """The main point's run of each engine, of the first seed that any engine ran, by engine in the usual order."""
    at_point = [run for run in runs if run.point == result.main_point]
    order = [*result.seeds, *sorted({run.seed for run in at_point} - set(result.seeds))]
    seed = next((seed for seed in order if any(run.seed == seed for run in at_point)), None)
    by_engine = {run.engine: run for run in at_point if run.seed == seed}
    return {name: by_engine[name] for name in engine_order(result) if name in by_engine}


def cdf(result: CaseResult, runs: Sequence[LoadRun]) -> Plot | None:
    """The distribution of TTFT at the main point, all seeds pooled, over all requests, the failed ones among them."""
    waits: dict[str, list[float | None]] = {name: [] for name in engine_order(result)}
    for run in runs:
        if run.point == result.main_point and run.engine in waits:
            waits[run.engine] += [ttft_s(request) for request in run.requests]
    served = {name: sorted(wait for wait in of if wait is not None) for name, of in waits.items()}
    served = {name: times for name, times in served.items() if times}
    if not served:
        return None
    axes = plots.new_plot(HEIGHT, bottom=X_TITLE)
    is_log = plots.scale_times(axes, "x", [times[at] for times in served.values() for at in (0, -1)], format_tick)
    plots.scale_from_zero(axes, "y", 1.0, _percent_text)
    axes.set_xlabel("time to first token", color=colour("soft"))
    start, end = axes.get_xlim()
    for name in sorted(served, key=_is_ours):
        times, of = served[name], len(waits[name])
        ranks = _ranks(len(times), MAX_CDF_STEPS)
        xs, ys = [times[rank - 1] for rank in ranks], [rank / of for rank in ranks]
        _line(axes, name, [start, *xs, end], [0.0, *ys, ys[-1]], drawstyle="steps-post")
    scale = ", logarithmic axis" if is_log else ""
    note = f"Share of all requests that had their first token within a time{scale}. Further left is better."
    return Plot("cdf", "Distribution of time to first token", note, axes)


def timeline(result: CaseResult, runs: Mapping[str, LoadRun]) -> tuple[list[Plot], list[PhaseKind]]:
    """The life of the first requests of every run, by engine in the order to draw, and the phases that occur."""
    shown = {name: sorted(run.requests, key=lambda r: r.arrival_s)[:MAX_ROWS] for name, run in runs.items()}
    ends_s = {name: _end_s(requests, runs[name]) for name, requests in shown.items()}
    seen: set[PhaseKind] = set()
    drawn = []
    for name, requests in shown.items():
        pitch = 7.0 if len(requests) <= 30 else 4.5
        axes = plots.new_plot(plots.TOP + pitch * len(requests) + 18.0, left=plots.RIGHT)
        plots.scale_from_zero(axes, "x", max(ends_s.values()), _seconds)
        axes.set(ylim=(len(requests) - 0.5, -0.5), yticks=[])
        for row, request in enumerate(requests):
            for phase in phases(request, ends_s[name]):
                seen.add(phase.kind)
                height = 0.8 if phase.kind in THICK else 0.26
                corner, size = (phase.start_s, row - height / 2), (phase.end_s - phase.start_s, height)
                bar = Rectangle(corner, *size, facecolor=colour(phase.kind.value), linewidth=0)
                marked(axes.add_artist(bar), title=f"request {row + 1}: {_words(phase, request)}")
            if request.token_times_s:
                first_s = request.token_times_s[0]
                tick = Line2D([first_s] * 2, [row - 0.45, row + 0.45], color=colour("ink"), linewidth=1.3)
                waited = format_duration(first_s - request.arrival_s)
                marked(axes.add_artist(tick), title=f"request {row + 1}: first token after {waited}")
        total = len(runs[name].requests)
        note = engine_note(result, name)
        if total > len(requests):
            note += f"; the first {len(requests)} of {total} requests"
        drawn.append(Plot(f"requests-{name}", ENGINE_TITLES[name], note, axes, name))
    return drawn, [kind for kind in PhaseKind if kind in seen]


def memory(result: CaseResult, runs: Mapping[str, LoadRun]) -> list[Plot]:
    """KV in use in each tier over time, by engine in the order to draw; engines without samples are left out."""
    sampled = {name: _thinned(run.samples) for name, run in runs.items() if len(run.samples) > 1}
    used = {name: max(map(_used_bytes, samples)) for name, samples in sampled.items()}
    capacities = {name: result.kv_cache_memory_bytes.get(name, 0) for name in sampled}
    near = [size for name, size in capacities.items() if size <= CAPACITY_SHOWN_UP_TO * used[name]]
    top = max([*used.values(), *near], default=0)
    end_s = max((samples[-1].time_s for samples in sampled.values()), default=0.0)
    unit = next((float(unit) for unit in (1024**3, 1024**2, 1024) if top >= unit), 1.0)
    drawn = []
    for name, samples in sampled.items():
        axes = plots.new_plot(112.0)
        plots.scale_from_zero(axes, "x", end_s, _seconds)
        plots.scale_from_zero(axes, "y", top, format_bytes, unit=unit)
        times_s = [sample.time_s for sample in samples]
        device = [sample.device_kv_bytes for sample in samples]
        axes.fill_between(times_s, device, color=colour("device"), linewidth=0, gid="device")
        if any(sample.host_kv_bytes for sample in samples):
            both = list(map(_used_bytes, samples))
            axes.fill_between(times_s, device, both, color=colour("host"), linewidth=0, gid="host")
        if 0 < capacities[name] <= axes.get_ylim()[1]:
            axes.axhline(capacities[name], color=colour("ink"), linewidth=0.8, dashes=(4, 3), gid="capacity")
        note = _peaks(samples, capacities[name])
        drawn.append(Plot(f"memory-{name}", ENGINE_TITLES[name], note, axes, name))
    return drawn


def _peaks(samples: Sequence[Sample], capacity_bytes: int) -> str:
    peak_device = max(sample.device_kv_bytes for sample in samples)
    peak_host = max(sample.host_kv_bytes or 0 for sample in samples)
    of = f" of {format_bytes(capacity_bytes)}" if capacity_bytes else ""
    peaks = f"at most {format_bytes(peak_device)}{of} on the device"
    if peak_host:
        return f"{peaks}, {format_bytes(peak_host)} on the host"
    return f"{peaks}; it does not tell of the host" if all(s.host_kv_bytes is None for s in samples) else peaks


def _line(axes: Axes, name: str, xs: Sequence[float], ys: Sequence[float], drawstyle: str = "default") -> None:
    width = 2.0 if _is_ours(name) else 1.5
    style = plots.DASHES.get(name, "solid")
    line = axes.plot(xs, ys, color=colour(name), linewidth=width, linestyle=style, drawstyle=drawstyle)[0]
    marked(line, name)


def _dot(axes: Axes, name: str, x: float, value: Spread, title: str) -> None:
    if len(value.values) > 1:
        marked(axes.vlines(x, min(value.values), max(value.values), colour(name), linewidth=0.9), name)
    size = 4.5 if _is_ours(name) else 3.5
    dot = axes.plot([x], [value.median], marker="o", markersize=size, color=colour(name), clip_on=False)[0]
    marked(dot, name, title)


def _is_ours(name: str) -> bool:
    """Whether this is layerkv's; as the key of a sort it puts layerkv on top."""
    return name == "layerkv"


def _all_figures(points: Sequence[PointResult]) -> Iterator[Figures]:
    return (figures for point in points for figures in point.engines.values())


def _of(point: PointResult, name: str, quantity: _Quantity) -> Spread | None:
    figures = point.engines.get(name)
    return None if figures is None else quantity.pick(figures)


def _values(spread: Spread | None) -> list[float]:
    return [] if spread is None else spread.values


def _unbroken(known: Sequence[tuple[PointResult, Spread | None]]) -> list[list[tuple[PointResult, Spread]]]:
    """Stretches of two or more points with a value: nothing is known between the neighbours of a missing one."""
    parts: list[list[tuple[PointResult, Spread]]] = [[]]
    for point, value in known:
        if value is None:
            parts.append([])
        else:
            parts[-1].append((point, value))
    return [part for part in parts if len(part) > 1]


def _seconds(value: float) -> str:
    return f"{value:g} s"


def _end_s(requests: Sequence[RequestRecord], run: LoadRun) -> float:
    last_s = max((request.token_times_s[-1] for request in requests if request.token_times_s), default=run.wall_s)
    return max([last_s, *(request.arrival_s for request in requests)])


def _words(phase: Phase, request: RequestRecord) -> str:
    if phase.kind is PhaseKind.FAILED:
        return f"failed after {len(request.token_times_s)} tokens: {request.error}"
    lasts = format_duration(phase.end_s - phase.start_s)
    return f"{phase.kind.value} for {lasts} (from {phase.start_s:.2f} s to {phase.end_s:.2f} s)"


def _used_bytes(sample: Sample) -> int:
    return sample.device_kv_bytes + (sample.host_kv_bytes or 0)


def _thinned(samples: Sequence[Sample]) -> list[Sample]:
    """At most `MAX_SAMPLES` in order of time: of neighbours the one with most KV, so that no peak is lost."""
    ordered = sorted(samples, key=lambda sample: sample.time_s)
    size = -(-len(ordered) // MAX_SAMPLES)
    return [max(ordered[at : at + size], key=_used_bytes) for at in range(0, len(ordered), size)]


def _ranks(count: int, at_most: int) -> list[int]:
    """1 to `count`, or `at_most` of these evenly, the last among them."""
    if count <= at_most:
        return list(range(1, count + 1))
    return [round((index + 1) * count / at_most) for index in range(at_most)]
