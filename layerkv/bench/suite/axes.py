"""Axes of the suite's plots: where a value lies, in percent from the axis's low end, and which values are marked.

Pure functions. Invariant: every position is between 0 and 100.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Above this spread of times a linear axis would press the fast engines against its edge.
LOG_AXIS_SPREAD = 20.0
MAX_TICKS = 8
MAX_MARKS = 6
# What a mark's label takes of the narrowest plot, a phone's with about 270 pixels: per character and as a gap.
LABEL_CHARACTER_PERCENT = 2.7
LABEL_GAP_PERCENT = 3.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A labelled value, in percent from the axis's low end."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high`, the values themselves or their logarithms, with its marks in rising order."""

    low: float
    high: float
    is_log: bool
    marks: tuple[Mark, ...] = ()

    def position(self, value: float) -> float:
        """Percent from the low end; values beyond an end lie on it."""
        at = self._scaled(value)
        return round(min(max(100.0 * (at - self.low) / (self.high - self.low), 0.0), 100.0), 3)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.is_log else value

    def marked(self, values: Sequence[float], label: Callable[[float], str]) -> Axis:
        """This axis with `values` marked, but none whose label would run into the one before."""
        marks: list[Mark] = []
        for value in values:
            mark = Mark(self.position(value), label(value))
            room = LABEL_CHARACTER_PERCENT * max(len(mark.label), 2) + LABEL_GAP_PERCENT
            if not marks or mark.at - marks[-1].at >= room:
                marks.append(mark)
        return Axis(self.low, self.high, self.is_log, tuple(marks))


def from_zero(most: float, label: Callable[[float], str], unit: float = 1.0) -> Axis:
    """A linear axis from 0 to just above `most`; its marks are round in `unit`."""
    high = most * 1.04 if most > 0 else unit
    values = round_values(high / unit)
    if len(values) > MAX_MARKS:
        values = values[::2]
    axis = Axis(0.0, high, is_log=False)
    marks = tuple(Mark(axis.position(value * unit), label(value * unit)) for value in values)
    return Axis(0.0, high, is_log=False, marks=marks)


def of_times(values_s: Sequence[float]) -> Axis:
    """An axis for durations: linear from 0, or logarithmic where they differ much."""
    positive = [value for value in values_s if value > 0]
    most = max(positive, default=1.0)
    least = max(min(positive, default=most), 1e-4)
    if most / least <= LOG_AXIS_SPREAD:
        return from_zero(most, format_tick)
    axis = Axis(math.log10(least / 1.15), math.log10(most * 1.15), is_log=True)
    decades = range(math.floor(axis.low), math.ceil(axis.high) + 1)
    rounds = [factor * 10.0**decade for decade in decades for factor in (1, 3)]
    shown = [value for value in rounds if axis.low <= math.log10(value) <= axis.high]
    if len(shown) > MAX_MARKS + 2:
        shown = [value for value in shown if f"{value:e}".startswith("1.0")]
    return Axis(axis.low, axis.high, True, tuple(Mark(axis.position(value), format_tick(value)) for value in shown))


def of_points(xs: Sequence[float]) -> Axis:
    """A case's own axis: just its points are marked; logarithmic where they differ much, with some room at both ends.

    Raises:
        ValueError: fewer than two different values.
    """
    least, most = min(xs), max(xs)
    if least == most:
        raise ValueError(f"found the one value {least:g} on the axis, expected at least two")
    is_log = least > 0 and most / least > LOG_AXIS_SPREAD
    low, high = (math.log10(least), math.log10(most)) if is_log else (least, most)
    margin = 0.06 * (high - low)
    return Axis(low - margin, high + margin, is_log).marked(sorted(set(xs)), lambda value: f"{value:g}")


def round_values(end: float) -> list[float]:
    """0 and the multiples of a round step (1, 2 or 5 times a power of ten) up to `end`, at most 8."""
    if end <= 0:
        return [0.0]
    rough = end / (MAX_TICKS - 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= rough)
    return [round(index * step, 10) for index in range(int(end / step + 1e-9) + 1)]


def format_tick(value_s: float) -> str:
    """A round time without trailing zeros: `0`, `30 ms`, `0.3 s`, `10 s`."""
    if value_s == 0:
        return "0"
    return f"{value_s * 1e3:g} ms" if value_s < 0.0995 else f"{value_s:g} s"
