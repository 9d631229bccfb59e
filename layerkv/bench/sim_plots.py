"""Plots of a simulation: figures against the request rate, and the distribution of times to first token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display is needed, nor asked for

import matplotlib.pyplot as plt

from layerkv.sim.run import SimRun

# Okabe and Ito's palette: told apart by everybody; stock grey, layerkv the strongest colour.
COLOURS = {
    "stock": "#666666",
    "stock-watermark": "#E69F00",
    "oracle": "#000000",
    "layerkv": "#0072B2",
    "layerkv-slo": "#56B4E9",
    "layerkv-no-slo": "#D55E00",
    "layerkv-no-length-prediction": "#009E73",
    "layerkv-streamed": "#CC79A7",
}
CURVES: Sequence[tuple[str, str, Callable[[dict[str, Any]], float | None], bool]] = (
    ("TTFT mean", "seconds", lambda f: f["ttft_s"]["mean"], True),
    ("TTFT p99", "seconds", lambda f: f["ttft_s"]["p99"], True),
    ("Fluid", "share of requests", lambda f: f["fluid"], False),
    ("Fluid goodput", "requests per second", lambda f: f["fluid_goodput_rps"], False),
    ("SLOs met, by mean TPOT", "share of requests", lambda f: f["slo_attainment"], False),
    ("Goodput, by mean TPOT", "requests per second", lambda f: f["goodput_rps"], False),
)


def draw(result: dict[str, Any], runs: Sequence[SimRun], folder: Path) -> list[Path]:
    """Draw into `folder` (made if need be): curves against the rate if there are several, and the TTFT distribution."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [_distribution(result, runs, folder / "ttft.svg")]
    if len({run["rate_per_s"] for run in result["runs"]}) > 1:
        paths.append(_against_rate(result, folder / "rates.svg"))
    return paths


def _against_rate(result: dict[str, Any], path: Path) -> Path:
    figure, axes = plt.subplots(3, 2, figsize=(10, 10), sharex=True, layout="constrained")
    for axis, (title, unit, figure_of, is_log) in zip(axes.flat, CURVES, strict=True):
        for name in result["policies"]:
            points: dict[float, list[float]] = {}
            for run in result["runs"]:
                value = figure_of(run)
                if run["policy"] == name and value is not None:
                    points.setdefault(run["rate_per_s"], []).append(value)
            rates = sorted(points)
            middles = [median(points[rate]) for rate in rates]
            axis.plot(rates, middles, marker="o", markersize=4, label=name, color=COLOURS.get(name))
        axis.set_title(title)
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        if is_log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    for axis in axes[-1]:
        axis.set_xlabel("requests per second")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(result["profile"])
    figure.savefig(path)
    plt.close(figure)
    return path


def _distribution(result: dict[str, Any], runs: Sequence[SimRun], path: Path) -> Path:
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in result["policies"]:
        values = sorted(
            request.ttft_s
            for run in runs
            if run.policy == name and run.rate_per_s == result["rate_per_s"]
            for request in run.outcome.requests
            if request.ttft_s is not None
        )
        shares = [(index + 1) / len(values) for index in range(len(values))]
        axis.step(values, shares, where="post", label=name, color=COLOURS.get(name))
    axis.set_xscale("log")
    axis.set_xlabel("time to first token, seconds")
    axis.set_ylabel("share of requests")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    axis.set_title(f"{result['profile']}, {result['rate_per_s']:g} requests per second")
    figure.savefig(path)
    plt.close(figure)
    return path
