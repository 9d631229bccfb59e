"""`layerkv simulate`: runs a simulation file, prints a table, writes JSON, plots and a decision log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table

from layerkv.bench.capacity import run_capacity
from layerkv.bench.machine import measured_here
from layerkv.bench.simulate_sharing import run_sharing
from layerkv.bench.words import seconds, share
from layerkv.errors import ConfigError
from layerkv.sim.config import SimConfig, load_sim_config
from layerkv.sim.offline import offline
from layerkv.sim.run import STRIDE, SimRun, medians, report, requests_of, simulate
from layerkv.sim.sharing_config import is_sharing
from layerkv.sim.workload import TraceArrivals
from layerkv.sim.workload_config import load_document

HEADINGS = ("TTFT", "fluid", "2nd tok\np99", "pause\np99", "end to\nend", "tok/s", "SLOs\nmet")
CAPTION = "pause: the longest of a reader; SLOs met: by mean TPOT"


def run_simulate(
    config_path: Path,
    *,
    json_path: Path | None = None,
    plots_dir: Path | None = None,
    log_path: Path | None = None,
    exact: bool = False,
    capacity: bool = False,
    with_offline: bool = False,
    console: Console | None = None,
) -> int:
    """Simulate a file; `exact` decides before every step, as production does, instead of every few.

    `capacity` searches each policy's fluid capacity instead of simulating the file's rates. `with_offline` also says
    what somebody could keep fluid who knew the load beforehand.

    Raises:
        ConfigError: the file, or one that it names, is wrong; or an output cannot be written.
    """
    console = console or Console()
    if is_sharing(load_document(config_path, what="a simulation", example="configs/sim/quickstart.yaml")):
        _check_outputs([path for path in (json_path,) if path is not None], None)
        refused = {"--plots": plots_dir, "--log": log_path, "--capacity": capacity, "--offline": with_offline}
        run_sharing(config_path, json_path=json_path, exact=exact, refused=refused, console=console)
        return 0
    config = load_sim_config(config_path)
    _tell_about_trace(config, console)
    _check_outputs([path for path in (json_path, log_path) if path is not None], plots_dir)
    if log_path is not None and "layerkv" not in config.policies:
        raise ConfigError(f"{config_path}: $.policies: found no layerkv, whose decisions --log writes; add it")
    if capacity:
        for flag, value in (("--plots", plots_dir), ("--log", log_path), ("--offline", with_offline or None)):
            if value is not None:
                raise ConfigError(
                    f"{flag}: found it beside --capacity, which searches rates and simulates none for it; leave one out"
                )
        run_capacity(config, config_path, json_path, exact=exact, console=console)
        return 0
    runs = _simulate(config, log_path, stride=1 if exact else STRIDE, console=console)
    known = _offline(config, stride=1 if exact else STRIDE, console=console) if with_offline else []
    for rate in config.rates:
        console.print(_table(config, [run for run in runs if run.rate_per_s == rate], rate))
        for found in [row for row in known if row["rate_per_s"] == rate]:
            low, high = share(found["schedule"]), share(found["bound"])
            console.print(f"known beforehand, seed {found['seed']}: {low} to {high} could be fluid")
    result = {
        **msgspec.to_builtins(measured_here()),
        "config": str(config_path),
        **report(config, runs),
    }
    if with_offline:
        result["offline"] = known
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if plots_dir is not None:
        from layerkv.bench.sim_plots import draw

        for path in draw(result, runs, plots_dir):
            console.print(f"plot: {path}")
    return 0


def _check_outputs(files: Sequence[Path], plots_dir: Path | None) -> None:
    """Before an hour of simulation, and not after it.

    Raises:
        ConfigError: an output cannot be written.
    """
    for path in files:
        if path.is_dir():
            raise ConfigError(f"{path}: found a folder; expected a file to write to; name one in it")
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: found no folder {path.parent}; expected one to write to; make it first")
    if plots_dir is not None and plots_dir.exists() and not plots_dir.is_dir():
        raise ConfigError(f"{plots_dir}: found a file; expected a folder for plots; name another one")


def _simulate(config: SimConfig, log_path: Path | None, *, stride: int, console: Console) -> list[SimRun]:
    num_runs = len(config.rates) * len(config.seeds) * len(config.policies)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("simulating", total=num_runs)
        if log_path is None:
            return simulate(config, stride=stride, on_run=lambda run: progress.advance(task))
        from layerkv.scheduler.decision_log import DecisionLog

        log = DecisionLog(log_path)
        try:
            return simulate(config, stride=stride, on_run=lambda run: progress.advance(task), on_log=log.write)
        finally:
            log.close()


def _offline(config: SimConfig, *, stride: int, console: Console) -> list[dict[str, Any]]:
    """Shares of requests that could be fluid, by rate and seed."""
    rows = []
    with Status("what could be fluid", console=console):
        for rate in config.rates:
            for seed in config.seeds:
                found = offline(config, requests_of(config, rate, seed), stride=stride)
                num = max(found.requests, 1)
                shares = {"schedule": found.schedule / num, "bound": found.bound / num}
                rows.append({"rate_per_s": rate, "seed": seed, **shares})
    return rows


def _tell_about_trace(config: SimConfig, console: Console) -> None:
    arrivals = config.workload.arrivals
    if not isinstance(arrivals, TraceArrivals):
        return
    trace = arrivals.trace
    if trace.broken:
        first = trace.broken[0]
        console.print(
            f"trace: {len(trace.broken)} broken rows left out, the first is line {first.line}: {first.reason}"
        )
    if trace.num_failed or trace.num_too_long:
        console.print(f"trace: {trace.num_failed} failed and {trace.num_too_long} too long requests left out")


def _table(config: SimConfig, runs: Sequence[SimRun], rate: float) -> Table:
    seeds = ", ".join(str(seed) for seed in config.seeds)
    title = f"{config.profile.name}, {rate:g} requests per second, seed {seeds}"
    table = Table(title=title, caption=CAPTION, box=SIMPLE, pad_edge=False, padding=0)
    table.add_column("policy", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for name in config.policies:
        f = medians([run.outcome.figures() for run in runs if run.policy == name])
        table.add_row(
            name,
            seconds(f["ttft_s"]["mean"]),
            share(f["fluid"]),
            seconds(f["second_token_s"]["p99"]),
            seconds(f["longest_pause_s"]["p99"]),
            seconds(f["end_to_end_s"]["mean"]),
            f"{f['output_tokens_per_s']:.0f}",
            share(f["slo_attainment"]),
        )
    return table
