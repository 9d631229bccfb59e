"""How much host memory readers need: the share of fluid requests by host memory, as a multiple of KV memory.

    python benchmarks/host_memory.py --json benchmarks/results/DATE-host-memory.json

Simulated, with the loads of configs/sim/cpu_bursts.yaml (at 4 requests per second) and quickstart.yaml: what layerkv
keeps of requests that are parked or may be, and prompts on their way through the zone, are all that host memory holds
there (the simulator has no prefix cache).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from layerkv.bench.machine import measured_here
from layerkv.sim.config import load_sim_config
from layerkv.sim.run import make_engine, requests_of

CONFIGS = Path(__file__).parents[1] / "configs" / "sim"
LOADS = (("cpu_bursts", 4.0), ("quickstart", 2.5))
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Host memory over KV memory; 4 is the default."""
SEEDS = (0, 1, 2)


def measure() -> list[dict[str, Any]]:
    """Medians over the seeds, for each load and factor."""
    rows: list[dict[str, Any]] = []
    for name, rate in LOADS:
        config = load_sim_config(CONFIGS / f"{name}.yaml")
        for factor in FACTORS:
            sized = replace(config, host_memory_bytes=int(config.kv_memory_bytes * factor))
            outcomes = [make_engine(sized, "layerkv", requests_of(sized, rate, seed)).run().figures() for seed in SEEDS]
            rows.append(
                {
                    "load": name,
                    "rate_per_s": rate,
                    "host_over_kv_memory": factor,
                    "fluid": median(figures["fluid"] for figures in outcomes),
                    "ttft_mean_s": median(figures["ttft_s"]["mean"] for figures in outcomes),
                    "output_tokens_per_s": median(figures["output_tokens_per_s"] for figures in outcomes),
                    "preemptions": median(figures["preemptions"] for figures in outcomes),
                }
            )
    return rows


def main() -> None:
    """Measure, print, and write the JSON file if one is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows = measure()
    table = Table(box=SIMPLE)
    for title in ("load", "host / KV memory", "fluid", "TTFT mean", "tok/s", "computed again"):
        table.add_column(title, justify="left" if title == "load" else "right")
    for row in rows:
        table.add_row(
            row["load"],
            f"{row['host_over_kv_memory']:g}",
            f"{row['fluid']:.1%}",
            f"{row['ttft_mean_s']:.2f} s",
            f"{row['output_tokens_per_s']:.0f}",
            f"{row['preemptions']:g}",
        )
    Console().print(table)
    if arguments.json is not None:
        result = {"schema": 1, **msgspec.to_builtins(measured_here()), "seeds": list(SEEDS), "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
