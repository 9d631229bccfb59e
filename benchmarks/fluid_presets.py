"""How many readers an engine serves without a pause: fluid capacity on GPU presets, prompts of 1K to 32K tokens.

    python benchmarks/fluid_presets.py --json benchmarks/results/DATE-fluid-presets.json

For each of configs/sim/fluid_*.yaml, with the file's mix of prompts and with prompts of one length, the highest rate
at which 90 % of requests are fluid (`layerkv simulate --capacity`): stock vLLM's scheduling, layerkv, and the oracle,
which has KV memory for everybody. Beside it how much of the link layerkv uses at its capacity, and what its capacity
would be with a link eight times as fast: where that is more, the link is the limit and not the pool. First tokens of
prompts of one length are due within 2 s and twice what such a prompt takes by itself. Derived costs: nothing here has
run on a GPU. docs/simulator.md discusses the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from layerkv.bench.machine import measured_here
from layerkv.config import SloPolicy
from layerkv.core.cost import CostProfile, Curve, StepWork, chunk_pairs
from layerkv.sim.capacity import CAPACITY_POLICIES, FLUID_SHARE, find_capacity
from layerkv.sim.config import SimConfig, load_sim_config
from layerkv.sim.offline import needs_of
from layerkv.sim.run import make_engine, requests_of
from layerkv.sim.workload import FixedLength

CONFIGS = Path(__file__).parents[1] / "configs" / "sim"
PRESETS = (
    "fluid_7b_l20",
    "fluid_8b_a100",
    "fluid_8b_h100",
    "fluid_70b_4h100",
    "fluid_v2_lite_l20",
    "fluid_oss_20b_l20",
)
PROMPTS: dict[str, int | None] = {"1K": 1024, "4K": 4096, "16K": 16384, "32K": 32768, "1K-32K": None}
FASTER_LINK = 8
LINK_COUNTS = 1.1
"""With a faster link so many times the capacity: then the link was the limit. Rates of a search are 5 % apart."""


def cases(presets: tuple[str, ...]) -> Iterator[tuple[str, str, SimConfig]]:
    """Preset, prompts and configuration of each case; the search begins at what the engine could compute, by need."""
    for name in presets:
        for prompts, tokens in PROMPTS.items():
            config = load_sim_config(CONFIGS / f"{name}.yaml")
            if tokens is not None:
                config = _with_prompts(config, tokens)
            needs = needs_of(config, requests_of(config, 1.0, config.seeds[0]))
            rate = len(needs) / sum(max(need.whole_s) for need in needs)
            yield name, prompts, replace(config, rates=(float(f"{rate:.3g}"),))


def _with_prompts(config: SimConfig, tokens: int) -> SimConfig:
    (mix,) = config.workload.classes
    (slo,) = config.policy.classes.values()
    slo = msgspec.structs.replace(slo, ttft_s=2.0 + 2 * prefill_s(config, tokens))
    return replace(
        config,
        policy=SloPolicy(classes={slo.name: slo}, default_class=slo.name),
        workload=replace(config.workload, classes=(replace(mix, prompt_tokens=FixedLength(tokens)),)),
    )


def prefill_s(config: SimConfig, tokens: int) -> float:
    """How long a prompt takes by itself, step by step."""
    step, profile, seconds = config.max_num_batched_tokens, config.profile, 0.0
    for begun in range(0, tokens, step):
        num = min(step, tokens - begun)
        work = StepWork(prefill_tokens=num, prefill_pairs=chunk_pairs(num, begun), num_prefills=1)
        seconds += profile.step_s + profile.prefill_part_s(work)
    return seconds


def with_faster_link(config: SimConfig) -> SimConfig:
    """The same engine with copies so many times as fast."""
    profile: CostProfile = config.profile
    store, load = (Curve([(x, y / FASTER_LINK) for x, y in curve.points]) for curve in (profile.store, profile.load))
    return replace(config, profile=replace(profile, store=store, load=load))


def run_case(config: SimConfig) -> dict[str, Any]:
    """Capacities, and the link at layerkv's."""
    found = find_capacity(config)
    faster = find_capacity(with_faster_link(config), ("layerkv",)).rates["layerkv"]
    rate = found.rates["layerkv"]
    figures: dict[str, Any] = {}
    if rate:
        outcome = make_engine(config, "layerkv", requests_of(config, rate, config.seeds[0])).run()
        figures = outcome.figures()
    (slo,) = config.policy.classes.values()
    return {
        "profile": config.profile.name,
        "ttft_s": slo.ttft_s,
        "kv_tokens": config.kv_memory_bytes // config.profile.kv_bytes_per_token,
        "pool_over_link_s": config.profile.load(config.kv_memory_bytes),
        "fluid_capacity_rps": found.rates,
        "at_highest_rate_tried": sorted(found.is_at_top),
        "with_faster_link_rps": faster,
        "is_limited_by_link": faster >= LINK_COUNTS * rate if rate else faster > 0,
        "at_capacity": {
            name: figures.get(name) for name in ("fluid", "link_utilisation", "parks", "output_tokens_per_s", "lag_s")
        },
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The table of docs/simulator.md."""
    table = Table(title=f"requests per second with {FLUID_SHARE:.0%} fluid", box=SIMPLE, pad_edge=False, padding=0)
    for heading in ("preset", "prompts", "TTFT", *CAPACITY_POLICIES, "link\nout", "link\nin", "link\nx 8", "limit"):
        table.add_column(heading, justify="left" if heading in ("preset", "prompts") else "right", no_wrap=True)
    for row in rows:
        used = row["at_capacity"]["link_utilisation"] or {"store": None, "load": None}
        table.add_row(
            row["preset"],
            row["prompts"],
            f"{row['ttft_s']:.3g} s",
            *(f"{row['fluid_capacity_rps'][name]:.3g}" for name in CAPACITY_POLICIES),
            *("-" if used[way] is None else f"{used[way]:.0%}" for way in ("store", "load")),
            f"{row['with_faster_link_rps']:.3g}",
            "link" if row["is_limited_by_link"] else "",
        )
    return table


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--preset", choices=PRESETS, action="append", help="only this one; repeatable")
    arguments = parser.parse_args()
    console = Console(width=max(Console().width, 100))  # in a file too, nothing of the table is cut off
    presets = tuple(arguments.preset or PRESETS)
    rows = []
    with Progress(console=console, transient=True) as progress:
        for name, prompts, config in progress.track(list(cases(presets))):
            rows.append({"preset": name.removeprefix("fluid_"), "prompts": prompts, **run_case(config)})
    console.print(table_of(rows))
    if arguments.json is not None:
        result = {"schema": 1, **msgspec.to_builtins(measured_here()), "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
