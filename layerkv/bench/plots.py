"""Plots by matplotlib as SVG inside a page: colours are the page's, engines can be hidden, marks tell of themselves.

Artists are drawn in colours that stand for names (`colour`) and become the page's CSS variables, so that one drawing
serves light and dark. Invariant: a plot refers to nothing outside of itself.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from layerkv.bench.suite.titles import ENGINE_TITLES
from layerkv.bench.timeline import PhaseKind

# Above this spread of values a linear axis would press the small ones against its edge.
LOG_AXIS_SPREAD = 20.0
# A plot's width in the SVG's units: about a phone's pixels, so that text keeps its size there and grows on a desktop.
WIDTH = 340.0
LEFT, RIGHT, TOP = 44.0, 12.0, 7.0
FONT = 9.0
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "layerkv", "font.size": FONT, "path.simplify": False}
_NAMES = ("ink", "soft", "grid", "line", "device", "host", *ENGINE_TITLES, *(kind.value for kind in PhaseKind))
DASHES = {
    "stock": (0, (5, 2.5)),
    "stock-watermark": (0, (5, 2, 1, 2)),
    "vllm-cpu-offload": (0, (9, 2.5)),
    "lmcache": (0, (6, 2, 1, 2, 1, 2)),
    "layerkv-no-slo": (0, (3, 2)),
    "oracle": (0, (1, 2)),
}


def colour(name: str) -> str:
    """What stands for a colour of the page, until the drawing is in it."""
    return f"#0000{16 + _NAMES.index(name):02x}"


def marked(artist: Artist, engine: str = "", title: str = "") -> None:
    """Makes an artist one that is hidden with its engine, and that says `title` when the pointer is over it."""
    artist.set_gid(f"{engine}|{title}")


def new_plot(height: float, *, width: float = WIDTH, left: float = LEFT, bottom: float = 18.0) -> Axes:
    """Axes of a figure of their own with a grid; `left` and `bottom` are what labels take, in the SVG's units."""
    figure = Figure(figsize=(width / 72, height / 72))
    size = (1 - (left + RIGHT) / width, 1 - (TOP + bottom) / height)
    axes = figure.add_axes((left / width, bottom / height, *size))
    axes.grid(color=colour("grid"), linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colour("soft"), length=0, pad=4)
    axes.spines[:].set_visible(False)
    return axes


def scale_times(axes: Axes, which: str, values_s: Sequence[float], write: Callable[[float], str]) -> bool:
    """A scale for durations: linear from 0, or logarithmic where they differ much; says whether it is."""
    positive = [value for value in values_s if value > 0] or [1.0]
    least, most = max(min(positive), 1e-4), max(positive)
    if most / least <= LOG_AXIS_SPREAD:
        scale_from_zero(axes, which, most, write)
        return False
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log", f"{which}lim": (least / 1.15, most * 1.15)})
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if most / least < 2e3 else (1.0,), numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    return True


def scale_from_zero(
    axes: Axes, which: str, most: float, write: Callable[[float], str], *, unit: float = 1.0, bins: int = 6
) -> None:
    """A linear scale from 0 to just above `most`; its marks are round in `unit`."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    high = most * 1.04 if most > 0 else unit
    values = MaxNLocator(nbins=bins, steps=[1, 2, 2.5, 5, 10]).tick_values(0, high / unit)
    axes.set(**{f"{which}lim": (0, high)})
    axis.set_major_locator(FixedLocator([value * unit for value in values if 0 <= value * unit <= high]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def scale_points(axes: Axes, xs: Sequence[float]) -> None:
    """A horizontal scale with marks at `xs` alone, but for those whose label would run into the one before.

    Raises:
        ValueError: fewer than two different values.
    """
    values = sorted(set(xs))
    if len(values) < 2:
        raise ValueError(f"found the one value {values[0]:g} on the axis, expected at least two")
    if values[0] > 0 and values[-1] / values[0] > LOG_AXIS_SPREAD:
        axes.set_xscale("log")
        margin = (values[-1] / values[0]) ** 0.06
        axes.set_xlim(values[0] / margin, values[-1] * margin)
    else:
        margin = 0.06 * (values[-1] - values[0])
        axes.set_xlim(values[0] - margin, values[-1] + margin)
    shown: list[float] = []
    end = -1e9
    for value in values:
        at = axes.transData.transform((value, 1.0))[0] * 72 / axes.figure.dpi
        half = 0.32 * FONT * len(f"{value:g}")
        if at - half > end + FONT / 2:
            shown.append(value)
            end = at + half
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def format_tick(value_s: float) -> str:
    """A round time without trailing zeros: `0`, `30 ms`, `0.3 s`, `10 s`."""
    if value_s == 0:
        return "0"
    return f"{value_s * 1e3:g} ms" if value_s < 0.0995 else f"{value_s:g} s"


def inline_svg(axes: Axes, name: str, label: str) -> str:
    """The drawing as an element of a page; `name` is unique there, `label` is for those who do not see it."""
    written = io.StringIO()
    assert isinstance(axes.figure, Figure)
    with mpl.rc_context(STYLE):
        axes.figure.savefig(written, format="svg", transparent=True)
    drawing = written.getvalue()
    opening = drawing.index("<svg")
    body = drawing[drawing.index(">", opening) + 1 :]
    box = re.search(r'viewBox="([^"]*)"', drawing)
    assert box is not None
    for pattern, by in (
        (r"<metadata>.*?</metadata>\s*", ""),
        (r"<style.*?</style>", ""),
        (r'<g id="([\w-]*)\|">', r'<g class="engine \1">'),
        (r'<g id="([\w-]*)\|([^"]*)">', r'<g class="engine \1"><title>\2</title>'),
        (r'<g id="matplotlib\.axis_1">', '<g class="x-axis">'),
        (r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-"),
        (r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px"),
        (r"#0000([0-9a-f]{2})", lambda found: f"var(--{_NAMES[int(found[1], 16) - 16]})"),
    ):
        body = re.sub(pattern, by, body, flags=re.DOTALL)
    label = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg role="img" aria-label="{label}" viewBox="{box[1]}">{body}'
