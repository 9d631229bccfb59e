"""The geometry of the suite's curves and bars: figures against the case's axis, or at its only point.

Pure functions. Positions are percentages of the plot area, from the left and from the top, so that the same drawing
fits a phone and a desktop and text keeps its size. The template decides colours and line widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layerkv.bench.suite.axes import Axis, Mark, format_tick, from_zero, of_points, of_times
from layerkv.bench.suite.result import CaseResult, Figures, PointResult, Spread
from layerkv.bench.suite.titles import ENGINE_TITLES, engine_order, has_first_tokens, main_point, point_label
from layerkv.bench.words import format_duration


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One figure; its whisker goes from `low` (the least seed) to `high`, None with one seed. `title` is for hover."""

    left: float
    top: float
    low: float | None
    high: float | None
    title: str


@dataclass(frozen=True, slots=True)
class Curve:
    """One engine's line: the value of SVG's `points` for each unbroken part, and its points."""

    engine: str
    title: str
    parts: list[str]
    points: list[CurvePoint]


@dataclass(frozen=True, slots=True)
class Plot:
    """Curves over two axes, layerkv's last and so on top. `reference` is a thin line's `points`, or empty."""

    name: str
    title: str
    note: str
    x_title: str
    x_marks: tuple[Mark, ...]
    y_marks: tuple[Mark, ...]
    curves: list[Curve]
    reference: str = ""
    reference_title: str = ""


@dataclass(frozen=True, slots=True)
class BarRow:
    """One engine's bar, in percent of the plot's width; the whisker spans the seeds."""

    engine: str
    title: str
    width: float
    low: float | None
    high: float | None
    label: str


@dataclass(frozen=True, slots=True)
class Bars:
    """One figure of all engines at one point."""

    name: str
    title: str
    note: str
    rows: list[BarRow]


@dataclass(frozen=True, slots=True)
class _Quantity:
    """A figure that is drawn against the axis: how to get it, write it, mark it."""

    name: str
    title: str
    note: str
    pick: Callable[[Figures], Spread | None]
    write: Callable[[float], str]
    mark: Callable[[float], str]


def _percent_text(share: float) -> str:
    return f"{share * 100:.3g} %"


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
    "Requests per second that met both TTFT and TPOT. Higher is better",
    lambda figures: figures.goodput_rps,
    lambda rate: f"{rate:.2f}/s",
    lambda rate: f"{rate:g}/s",
)
_ATTAINMENT = _Quantity(
    "attainment",
    "Objectives met",
    "Share of all requests that met both TTFT and TPOT. Higher is better",
    lambda figures: figures.slo_attainment,
    _percent_text,
    _percent_text,
)


def against_axis(result: CaseResult) -> list[Plot]:
    """TTFT, goodput and SLO attainment against the case's axis; none with fewer than two points that have figures."""
    points = [point for point in result.points if point.engines]
    if len({point.x for point in points}) < 2:
        return []
    points.sort(key=lambda point: point.x)
    x_axis = of_points([point.x for point in points])
    ttft = _plot(result, points, _TTFT, x_axis, of_times(_values(points, _TTFT)))
    rates = [point.rate_per_s for point in points] if _is_rate(points) else []
    goodput_axis = from_zero(max([*_values(points, _GOODPUT), *rates], default=0.0), _GOODPUT.mark)
    offered = " ".join(f"{x_axis.position(rate):.2f},{100 - goodput_axis.position(rate):.2f}" for rate in rates)
    return [
        ttft,
        _plot(result, points, _GOODPUT, x_axis, goodput_axis, offered),
        _plot(result, points, _ATTAINMENT, x_axis, from_zero(1.0, _ATTAINMENT.mark)),
    ]


def bars(result: CaseResult) -> list[Bars]:
    """The same three figures as bars, for a case with one point; empty without any figures."""
    point = main_point(result)
    if point is None or not point.engines:
        return []
    return [_bars(result, point, quantity) for quantity in (_TTFT, _GOODPUT, _ATTAINMENT)]


def is_ours(curve: Curve) -> bool:
    """Whether this is layerkv's curve; as the key of a sort it puts layerkv on top."""
    return curve.engine == "layerkv"


def _is_rate(points: Sequence[PointResult]) -> bool:
    return all(point.x == point.rate_per_s and not point.has_sessions for point in points)


def _values(points: Sequence[PointResult], quantity: _Quantity) -> list[float]:
    found = [quantity.pick(figures) for point in points for figures in point.engines.values()]
    return [value for spread in found if spread is not None for value in spread.values]


def _plot(
    result: CaseResult, points: Sequence[PointResult], quantity: _Quantity, x: Axis, y: Axis, reference: str = ""
) -> Plot:
    curves = [_curve(result, name, points, quantity, x, y) for name in engine_order(result)]
    note = f"{quantity.note} (logarithmic axis)." if y.is_log else f"{quantity.note}."
    return Plot(
        name=quantity.name,
        title=quantity.title,
        note=note,
        x_title=result.axis,
        x_marks=x.marks,
        y_marks=y.marks,
        curves=sorted((curve for curve in curves if curve.points), key=is_ours),
        reference=reference,
        reference_title="offered rate" if reference else "",
    )


def _curve(
    result: CaseResult, name: str, points: Sequence[PointResult], quantity: _Quantity, x: Axis, y: Axis
) -> Curve:
    parts: list[list[str]] = [[]]
    drawn = []
    for point in points:
        figures = point.engines.get(name)
        value = None if figures is None else quantity.pick(figures)
        if value is None:
            # The line breaks here: nothing is known between the neighbours.
            parts.append([])
            continue
        left, top = x.position(point.x), 100 - y.position(value.median)
        low, high = (None if at is None else 100 - at for at in _whisker(value, y))
        title = f"{ENGINE_TITLES[name]}, {point_label(result, point)}: {_with_range(value, quantity)}"
        drawn.append(CurvePoint(left, top, low, high, title))
        parts[-1].append(f"{left:.2f},{top:.2f}")
    return Curve(name, ENGINE_TITLES[name], [" ".join(part) for part in parts if len(part) > 1], drawn)


def _whisker(value: Spread, axis: Axis) -> tuple[float | None, float | None]:
    if len(value.values) < 2:
        return None, None
    return axis.position(min(value.values)), axis.position(max(value.values))


def _with_range(value: Spread, quantity: _Quantity) -> str:
    text = quantity.write(value.median)
    if len(value.values) < 2:
        return text
    return f"{text} ({quantity.write(min(value.values))} to {quantity.write(max(value.values))})"


def _bars(result: CaseResult, point: PointResult, quantity: _Quantity) -> Bars:
    axis = from_zero(max(_values([point], quantity), default=0.0), quantity.mark)
    rows = []
    for name in engine_order(result):
        figures = point.engines.get(name)
        value = None if figures is None else quantity.pick(figures)
        if value is not None:
            low, high = _whisker(value, axis)
            text = quantity.write(value.median)
            rows.append(BarRow(name, ENGINE_TITLES[name], axis.position(value.median), low, high, text))
    return Bars(quantity.name, quantity.title, f"{quantity.note}.", rows)
