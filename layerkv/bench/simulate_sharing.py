"""`layerkv simulate` of several models on one device: runs the file, prints a table, writes JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from layerkv.bench.machine import measured_here
from layerkv.bench.words import seconds, share
from layerkv.errors import ConfigError
from layerkv.sim.run import STRIDE
from layerkv.sim.sharing_config import load_sharing_config
from layerkv.sim.sharing_run import sharing_report, simulate_sharing
from layerkv.units import format_bytes

HEADINGS = ("TTFT", "fluid", "on\ntime", "lag\np99", "tok/s", "parks", "recom-\nputed", "most KV,\nGiB")


def run_sharing(
    config_path: Path, *, json_path: Path | None, exact: bool, refused: Mapping[str, object], console: Console
) -> None:
    """Simulate such a file. `refused` are the flags that it has no use for, with what was given for them.

    Raises:
        ConfigError: the file is wrong, or one of those flags was given.
    """
    for flag, value in refused.items():
        if value:
            raise ConfigError(f"{flag}: found it with a file of several models, which knows only --json and --exact")
    config = load_sharing_config(config_path)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("simulating", total=len(config.arms) * len(config.seeds))
        runs = simulate_sharing(config, stride=1 if exact else STRIDE, on_run=lambda run: progress.advance(task))
    report = sharing_report(config, runs)
    seeds = ", ".join(str(seed) for seed in config.seeds)
    title = f"{len(config.models)} models in {format_bytes(config.kv_memory_bytes)} of KV memory, seed {seeds}"
    console.print(_table(title, report["arms"]))
    if json_path is not None:
        result = {**msgspec.to_builtins(measured_here()), "config": str(config_path), **report}
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _table(title: str, arms: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=title, caption="lag: all waits of a reader", box=SIMPLE, pad_edge=False, padding=0)
    for heading in ("memory", "model"):
        table.add_column(heading, no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for arm, by_model in arms.items():
        for i, (name, f) in enumerate(by_model.items()):
            peak = f.get("kv_peak_bytes")
            table.add_row(
                "" if i else arm,
                name,
                seconds(f["ttft_s"]["mean"]),
                share(f["fluid"]),
                share(f["tokens_on_time"]),
                seconds(f["lag_s"]["p99"]),
                f"{f['output_tokens_per_s']:.0f}",
                f"{f['parks']:.0f}",
                f"{f['preemptions']:.0f}",
                "" if peak is None else f"{peak / (1 << 30):.1f}",
            )
        table.add_section()
    return table
