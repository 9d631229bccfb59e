"""How many GPUs a long tail of models needs: dedicated, statically partitioned, first come, shared behind brokers.

    python benchmarks/long_tail.py --json benchmarks/results/DATE-long-tail.json

Fifty models of configs/sim/long_tail_8b_h100.yaml whose rates follow Zipf's law, every arrival drawn
with a seed. For each way, the fewest H100s with which 99 % of requests meet TTFT and mean TPOT. Prism (arXiv
2505.04021) reports 16 GPUs in the place of 32, for 58 models of other sizes on a trace of its own: a figure to stand
beside these, and not to be compared with them one to one. Derived costs: nothing here has run on a GPU.
docs/sharing.md says what is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from layerkv.bench.machine import measured_here
from layerkv.sim.config import load_sim_config
from layerkv.sim.fleet import ATTAINMENT, attainment, dedicated, fewest_devices, long_tail, on_devices
from layerkv.sim.outcome import SimOutcome
from layerkv.sim.presets import ACTIVATION_BYTES, DEVICES, MODELS

CONFIG = Path(__file__).parents[1] / "configs" / "sim" / "long_tail_8b_h100.yaml"
KEPT = ("fluid", "slo_attainment", "ttft_s", "lag_s", "tokens_on_time", "output_tokens_per_s", "parks", "preemptions")
UTILIZATION = 0.9


def row(way: str, gpus: int | None, outcome: SimOutcome | None) -> dict[str, Any]:
    """One line of the result."""
    figures = outcome.figures() if outcome is not None else {}
    return {"way": way, "gpus": gpus, **{name: figures.get(name) for name in KEPT}}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law (%(default)s)")
    parser.add_argument("--duration", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("--rate", type=float, help="requests per second of all; without it, the file's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    console, begun_s = Console(), time.perf_counter()
    config = load_sim_config(CONFIG)
    if arguments.rate:
        config = replace(config, rates=(arguments.rate,))
    fleet = long_tail(
        config,
        num_models=arguments.models,
        exponent=arguments.exponent,
        duration_s=arguments.duration,
        seed=arguments.seed,
        device_bytes=int(DEVICES["H100"].memory_bytes * UTILIZATION),
        own_bytes=MODELS["llama-3.1-8b"].weight_bytes + ACTIVATION_BYTES,
    )
    tried: list[dict[str, Any]] = []

    def on_run(way: str, gpus: int, outcome: SimOutcome | None) -> None:
        tried.append({"way": way, "gpus": gpus, "slo_attainment": None if outcome is None else attainment(outcome)})
        console.print(tried[-1], f"{time.perf_counter() - begun_s:.0f} s")

    rows = []
    for arm in ("static-stock", "static"):
        gpus, outcome = dedicated(fleet, arm)
        rows.append(row(f"dedicated, {'stock' if arm.endswith('stock') else 'layerkv'}", gpus, outcome))
        console.print(rows[-1])
    low = -(-arguments.models * fleet.own_bytes // fleet.device_bytes)
    for arm in ("shared", "static"):
        fewest, found = fewest_devices(fleet, arm, low, arguments.models, on_run=on_run)
        rows.append(row(arm, fewest, found))
        low = fewest or low
    shared = next(r["gpus"] for r in rows if r["way"] == "shared")
    if shared is not None:
        rows += [row(f"{arm}, as many", shared, on_devices(fleet, shared, arm)) for arm in ("static", "on-demand")]
    for each in rows:
        console.print(each)
    result = {
        "schema": 1,
        **msgspec.to_builtins(measured_here()),
        "profile": config.profile.name,
        "models": arguments.models,
        "zipf_exponent": arguments.exponent,
        "rate_per_s": config.rates[0],
        "duration_s": arguments.duration,
        "seed": arguments.seed,
        "requests": fleet.num_requests,
        "attainment": ATTAINMENT,
        "rows": rows,
        "tried": tried,
        "wall_s": round(time.perf_counter() - begun_s, 1),
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
