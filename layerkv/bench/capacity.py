"""`layerkv simulate --capacity`: searches each policy's fluid capacity, prints it, writes JSON."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.status import Status
from rich.table import Table

from layerkv.bench.machine import measured_here
from layerkv.sim.capacity import FLUID_SHARE, Capacity, capacity_report, find_capacity, num_requests_of
from layerkv.sim.config import SimConfig
from layerkv.sim.run import STRIDE


def run_capacity(
    config: SimConfig, config_path: Path, json_path: Path | None, *, exact: bool, console: Console
) -> None:
    """Search, print and write.

    Raises:
        ConfigError: KV memory does not hold the longest request.
    """
    with Status("searching", console=console) as status:
        found = find_capacity(
            config,
            stride=1 if exact else STRIDE,
            on_run=lambda name, rate: status.update(f"searching: {name} at {rate:g} requests per second"),
        )
    console.print(_table(config, found))
    result = {
        **msgspec.to_builtins(measured_here()),
        "config": str(config_path),
        **capacity_report(config, found),
    }
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _table(config: SimConfig, found: Capacity) -> Table:
    table = Table(
        title=config.profile.name,
        caption=f"at least {FLUID_SHARE:.0%} fluid; {num_requests_of(config)} requests a run",
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("policy", no_wrap=True)
    for heading in ("fluid capacity", "of stock's", "fluid there", "next above"):
        table.add_column(heading, justify="right", no_wrap=True)
    stock = found.rates.get("stock")
    for name, rate in found.rates.items():
        by_rate = {each: shares[name] for each, shares in found.shares.items() if name in shares}
        above = [each for each in by_rate if each > rate]
        lowest = min(by_rate)
        table.add_row(
            name,
            f"{rate:.3g}/s" + (" or more" if name in found.is_at_top else "") if rate else f"below {lowest:.2g}/s",
            f"{rate / stock:.2f}" if stock and rate else "-",
            f"{by_rate[rate]:.1%}" if rate else "-",
            f"{by_rate[min(above)]:.1%}" if above else "-",
        )
    return table
