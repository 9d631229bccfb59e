"""LayerKV's own setting (arXiv 2410.00428) in the simulator: L20, prompts of 1K to 16K tokens, TTFT 3 s, TPOT 200 ms.

    python benchmarks/layerkv_setting.py --json benchmarks/results/DATE-layerkv-setting.json

For each model, prompt length and output length the request rate goes up around the rate at which KV memory for whole
prompts runs out (`kv_limited_rate`), and stock vLLM's scheduling is compared with layerkv's. Then one case is taken
apart: what does the ratio depend on? Devices and models are presets: costs are derived from data sheets, and nothing
here has run on a GPU. docs/simulator.md discusses the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from layerkv.bench.machine import Machine, installed_versions, this_command, utc_now
from layerkv.config import SloClass, SloPolicy
from layerkv.core.cost import CostProfile, Curve, StepWork
from layerkv.errors import ConfigError
from layerkv.sim.config import SimConfig
from layerkv.sim.presets import kv_memory_bytes, preset
from layerkv.sim.run import medians, simulate
from layerkv.sim.workload import ClassMix, FixedLength, GammaArrivals, UniformLength, WorkloadSpec

MODELS = (("llama-2-7b", 1), ("yi-34b", 2), ("llama-3.1-70b", 4))
PROMPTS: dict[str, FixedLength | UniformLength] = {
    "1K": FixedLength(1024),
    "2K": FixedLength(2048),
    "4K": FixedLength(4096),
    "8K": FixedLength(8192),
    "16K": FixedLength(16384),
    "1K-16K": UniformLength(1024, 16384),
}
OUTPUTS = {"200-500": UniformLength(200, 500), "500-1000": UniformLength(500, 1000)}
FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)
QUICK_FACTORS = (0.8, 1.0, 1.2)
POLICIES = ("stock", "stock-watermark", "layerkv", "layerkv-no-slo")
NUM_REQUESTS = 300
SEEDS = (0, 1)
ZONE_TOKENS = 18_432
"""The longest prompt and one step's tokens more: every prompt can run layered."""
HOST_MEMORY_BYTES = 256 << 30
PAPER = {
    "ttft_mean_ratio": "up to 69",
    "violations": "17.7 to 28.7 % lower",
    "throughput": "loss below 3 %",
    "without_slo_scheduler": "more violations than vLLM",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One model under one kind of load."""

    model: str
    tensor_parallel: int
    prompt: str
    output: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.model}, prompts {self.prompt}, outputs {self.output}"


def config_of(case: Case, *, num_requests: int = NUM_REQUESTS, seeds: Sequence[int] = SEEDS) -> SimConfig:
    """The simulation of a case, its rates still to be chosen."""
    chosen = preset("L20", case.model, case.tensor_parallel)
    paper = SloClass(name="paper", ttft_s=3.0, tpot_s=0.2)
    mix = ClassMix(prompt_tokens=PROMPTS[case.prompt], output_tokens=OUTPUTS[case.output])
    return SimConfig(
        profile=chosen.profile,
        num_layers=chosen.model.num_layers,
        kv_memory_bytes=kv_memory_bytes(chosen.device, chosen.model, chosen.tensor_parallel),
        host_memory_bytes=HOST_MEMORY_BYTES,
        block_tokens=16,
        max_num_batched_tokens=2048,
        max_num_seqs=256,
        max_model_len=32_768,
        lanes=2,
        zone_tokens=ZONE_TOKENS,
        async_scheduling=False,
        policy=SloPolicy(classes={"paper": paper}, default_class="paper"),
        policies=POLICIES,
        seeds=tuple(seeds),
        workload=WorkloadSpec(num_requests, classes=(mix,), max_model_len=32_768),
        rates=(),
    )


def limited_rate(config: SimConfig, kv_tokens: float) -> float:
    """Requests per second that an engine keeps up with whose KV memory holds so many tokens, in closed form.

    ``n`` requests fit, each with its prompt and half of its output. Each needs its prefill, and as many decode steps
    as its output is long, which it shares with the others: ``rate * output * step = n * (1 - rate * prefill)``.
    """
    (mix,) = config.workload.classes
    prompts, outputs = _sample(mix.prompt_tokens), _sample(mix.output_tokens)
    prompt, output = mean(prompts), mean(outputs)
    held = prompt + output / 2
    most = config.max_num_seqs
    together = min(max(kv_tokens / held, 1.0), most)
    profile = config.profile
    step_s = profile.decode_part_s(StepWork(num_decodes=round(together), decode_context=round(together * held)))
    prefill_s = mean(_prefill_s(profile, tokens) for tokens in prompts)
    return together / (output * step_s + together * prefill_s)


def _sample(lengths: Any) -> list[int]:
    if isinstance(lengths, FixedLength):
        return [lengths.tokens]
    return [round(lengths.least + (lengths.most - lengths.least) * (i + 0.5) / 16) for i in range(16)]


def _prefill_s(profile: CostProfile, tokens: int) -> float:
    pairs = tokens * (tokens + 1) / 2
    return profile.prefill_part_s(StepWork(num_decodes=1, prefill_tokens=tokens, prefill_pairs=pairs, num_prefills=1))


def kv_limited_rate(config: SimConfig) -> float:
    """What stock vLLM keeps up with."""
    return limited_rate(config, config.kv_memory_bytes / config.profile.kv_bytes_per_token)


def compute_limited_rate(config: SimConfig) -> float:
    """What the device could compute if KV memory were without bounds."""
    return limited_rate(config, float("inf"))


def run_case(config: SimConfig, factors: Iterable[float]) -> dict[str, Any]:
    """All rates of one case, and the extremes over them."""
    kv_rate = kv_limited_rate(config)
    found = []
    for factor in factors:
        rate = kv_rate * factor
        runs = simulate(replace(config, rates=(rate,)))
        figures = {
            name: _kept(medians([run.outcome.figures() for run in runs if run.policy == name]))
            for name in config.policies
        }
        found.append({"factor": factor, "rate_per_s": rate, "policies": figures, **compared(figures)})
    profile = config.profile
    most = max(_sample(config.workload.classes[0].prompt_tokens))
    return {
        "kv_tokens": config.kv_memory_bytes // profile.kv_bytes_per_token,
        "kv_limited_rate_per_s": kv_rate,
        "compute_limited_rate_per_s": compute_limited_rate(config),
        "longest_prefill_s": _prefill_s(profile, most) + profile.step_s,
        "rates": found,
        "extremes": extremes(found),
    }


def _kept(figures: dict[str, Any]) -> dict[str, Any]:
    names = ("ttft_s", "tpot_s", "slo_attainment", "goodput_rps", "output_tokens_per_s", "preemptions", "parks")
    return {name: figures[name] for name in names}


def compared(figures: dict[str, Any]) -> dict[str, Any]:
    """Ratios stock / layerkv of TTFT, violations in points (below zero: fewer than stock), throughput change."""
    stock, ours = figures["stock"], figures["layerkv"]
    found = {
        "ttft_mean_ratio": stock["ttft_s"]["mean"] / ours["ttft_s"]["mean"],
        "ttft_p99_ratio": stock["ttft_s"]["p99"] / ours["ttft_s"]["p99"],
        "violations_points": 100 * (stock["slo_attainment"] - ours["slo_attainment"]),
        "throughput_change": ours["output_tokens_per_s"] / stock["output_tokens_per_s"] - 1,
    }
    without = figures.get("layerkv-no-slo")
    if without is not None:
        found["violations_points_without_slo"] = 100 * (stock["slo_attainment"] - without["slo_attainment"])
        found["ttft_mean_ratio_without_slo"] = stock["ttft_s"]["mean"] / without["ttft_s"]["mean"]
    return found


def extremes(rates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The largest and smallest of each comparison over rates, and at which factor of the KV-limited rate."""
    found: dict[str, Any] = {}
    for name in compared(rates[0]["policies"]):
        ordered = sorted(rates, key=lambda entry: entry[name])
        low, high = ordered[0], ordered[-1]
        found[name] = {
            "least": low[name], "at_factor_least": low["factor"], "most": high[name], "at_factor_most": high["factor"]
        }  # fmt: skip
    return found


# Why the ratio is what it is ------------------------------------------------------------------------------------------

TAKEN_APART = Case("llama-2-7b", 1, "8K", "200-500")
FACTOR = 1.1


def faster_compute(config: SimConfig, times: float) -> SimConfig:
    """The same engine with prompts computed so many times faster; what decode steps cost stays."""
    profile = config.profile
    first = max(x for x, y in profile.tokens.points if y == profile.tokens(1.0))
    points = [(x if x <= first else first + (x - first) * times, y) for x, y in profile.tokens.points]
    return replace(config, profile=replace(profile, tokens=Curve(points), pair_s=profile.pair_s / times))


def with_workload(config: SimConfig, **changes: Any) -> SimConfig:
    """The same engine under another load."""
    return replace(config, workload=replace(config.workload, **changes))


def with_ttft(config: SimConfig, ttft_s: float) -> SimConfig:
    """The same load with another TTFT objective."""
    paper = SloClass(name="paper", ttft_s=ttft_s, tpot_s=0.2)
    return replace(config, policy=SloPolicy(classes={"paper": paper}, default_class="paper"))


def variations() -> dict[str, tuple[Callable[[SimConfig], SimConfig], bool]]:
    """Changes to one case, and whether the rate is chosen anew: else it is the unchanged case's."""
    variants: dict[str, tuple[Callable[[SimConfig], SimConfig], bool]] = {"as in the table": (lambda c: c, False)}
    for gib in (8, 16, 32, 64):
        variants[f"host memory {gib} GiB"] = (lambda c, gib=gib: replace(c, host_memory_bytes=gib << 30), False)
    for num in (100, 1000):
        variants[f"{num} requests"] = (lambda c, num=num: with_workload(c, num_requests=num), False)
    for tokens in (512, 8192, 16384):
        changed = f"steps of up to {tokens} tokens"
        variants[changed] = (lambda c, tokens=tokens: replace(c, max_num_batched_tokens=tokens), False)
    for times in (2.0, 4.0, 16.0):
        variants[f"prefill {times:g} times as fast"] = (lambda c, times=times: faster_compute(c, times), True)
    for gib in (6, 12):
        variants[f"KV memory {gib} GiB"] = (lambda c, gib=gib: replace(c, kv_memory_bytes=gib << 30), True)
    for ttft_s in (10.0, 30.0):
        variants[f"TTFT objective {ttft_s:g} s"] = (lambda c, ttft_s=ttft_s: with_ttft(c, ttft_s), False)
    for tokens in (8192, 65536):
        variants[f"zone of {tokens} tokens"] = (lambda c, tokens=tokens: replace(c, zone_tokens=tokens), False)
    variants["bursts (gamma, cv 3)"] = (lambda c: with_workload(c, arrivals=GammaArrivals(3.0)), False)
    for least, most in ((20, 50), (1000, 2000)):
        mix = ClassMix(prompt_tokens=PROMPTS[TAKEN_APART.prompt], output_tokens=UniformLength(least, most))
        variants[f"outputs {least}-{most}"] = (lambda c, mix=mix: with_workload(c, classes=(mix,)), True)
    return variants


def take_apart(seeds: Sequence[int], advance: Callable[[], None]) -> dict[str, Any]:
    """Each variation at one factor of the KV-limited rate."""
    base = replace(config_of(TAKEN_APART, seeds=seeds), policies=("stock", "layerkv", "layerkv-no-slo"))
    found = {}
    for name, (change, has_own_rate) in variations().items():
        config = change(base)
        factor = FACTOR if has_own_rate else FACTOR * kv_limited_rate(base) / kv_limited_rate(config)
        found[name] = run_case(config, (factor,))
        advance()
    return found


# Reporting ------------------------------------------------------------------------------------------------------------


def summary(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What stands beside the paper's figures."""

    def over(name: str, pick: str) -> list[float]:
        return [case["extremes"][name][pick] for case in cases]

    points = [rate for case in cases for rate in case["rates"]]
    return {
        "ttft_mean_ratio_most": max(over("ttft_mean_ratio", "most")),
        "ttft_p99_ratio_most": max(over("ttft_p99_ratio", "most")),
        "violations_points_least": min(over("violations_points", "least")),
        "violations_points_most": max(over("violations_points", "most")),
        "violations_points_median_of_least": median(over("violations_points", "least")),
        "throughput_change_least": min(over("throughput_change", "least")),
        "throughput_change_median": median(rate["throughput_change"] for rate in points),
        "throughput_change_most": max(over("throughput_change", "most")),
        "violations_points_without_slo_least": min(over("violations_points_without_slo", "least")),
        "violations_points_without_slo_most": max(over("violations_points_without_slo", "most")),
        "rates_with_more_violations_than_stock": sum(rate["violations_points"] > 0 for rate in points),
        "rates_with_more_violations_than_stock_without_slo": sum(
            rate["violations_points_without_slo"] > 0 for rate in points
        ),
        "num_rates": len(points),
    }


def case_table(cases: Sequence[dict[str, Any]]) -> Table:
    """One row per case."""
    table = Table(title="stock / layerkv over rates", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("model", "prompts", "outputs"):
        table.add_column(heading, no_wrap=True)
    headings = ("KV rate", "compute", "TTFT x", "at", "p99 x", "violations", "no SLO", "tok/s")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for case in cases:
        e = case["extremes"]
        table.add_row(
            case["model"],
            case["prompt"],
            case["output"],
            f"{case['kv_limited_rate_per_s']:.3f}",
            f"{case['compute_limited_rate_per_s']:.3f}",
            f"{e['ttft_mean_ratio']['most']:.1f}",
            f"{e['ttft_mean_ratio']['at_factor_most']:g}",
            f"{e['ttft_p99_ratio']['most']:.1f}",
            f"{e['violations_points']['least']:+.0f}..{e['violations_points']['most']:+.0f}",
            f"{e['violations_points_without_slo']['least']:+.0f}..{e['violations_points_without_slo']['most']:+.0f}",
            f"{e['throughput_change']['least']:+.1%}..{e['throughput_change']['most']:+.1%}",
        )
    return table


def summary_table(found: dict[str, Any]) -> Table:
    """The paper's figures and these."""
    table = Table(title="beside the paper", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("", "paper", "here"):
        table.add_column(heading)
    s = found
    table.add_row(
        "TTFT mean, times lower", PAPER["ttft_mean_ratio"], f"up to {s['ttft_mean_ratio_most']:.1f} "
        f"(p99 up to {s['ttft_p99_ratio_most']:.1f})",
    )  # fmt: skip
    table.add_row(
        "SLO violations",
        PAPER["violations"],
        f"{s['violations_points_least']:+.1f} to {s['violations_points_most']:+.1f} points; median of each case's best "
        f"{s['violations_points_median_of_least']:+.1f}; more than stock at "
        f"{s['rates_with_more_violations_than_stock']} of {s['num_rates']} rates",
    )
    table.add_row(
        "throughput",
        PAPER["throughput"],
        f"{s['throughput_change_least']:+.1%} to {s['throughput_change_most']:+.1%}, "
        f"median {s['throughput_change_median']:+.1%}",
    )
    table.add_row(
        "without SLO scheduling",
        PAPER["without_slo_scheduler"],
        f"{s['violations_points_without_slo_least']:+.1f} to {s['violations_points_without_slo_most']:+.1f} points; "
        f"more than stock at {s['rates_with_more_violations_than_stock_without_slo']} of {s['num_rates']} rates",
    )
    return table


def variation_table(found: dict[str, Any]) -> Table:
    """One row per variation."""
    title = f"{TAKEN_APART.name}, {FACTOR:g} times the KV-limited rate"
    table = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in ("stock TTFT", "layerkv", "TTFT x", "p99 x", "violations", "tok/s", "TPOT", "layerkv"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, case in found.items():
        (rate,) = case["rates"]
        stock, ours = rate["policies"]["stock"], rate["policies"]["layerkv"]
        table.add_row(
            name,
            f"{stock['ttft_s']['mean']:.2f} s",
            f"{ours['ttft_s']['mean']:.2f} s",
            f"{rate['ttft_mean_ratio']:.1f}",
            f"{rate['ttft_p99_ratio']:.1f}",
            f"{rate['violations_points']:+.1f}",
            f"{rate['throughput_change']:+.1%}",
            f"{stock['tpot_s']['mean'] * 1e3:.0f} ms",
            f"{ours['tpot_s']['mean'] * 1e3:.0f} ms",
        )
    return table


def rounded(data: Any) -> Any:
    """Five digits say all that a simulation on derived costs knows."""
    if isinstance(data, dict):
        return {key: rounded(value) for key, value in data.items()}
    if isinstance(data, list):
        return [rounded(value) for value in data]
    return float(f"{data:.5g}") if isinstance(data, float) else data


def main() -> int:
    """Run everything, print tables, write JSON."""
    parser = argparse.ArgumentParser(description="LayerKV's own setting in the simulator.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--quick", action="store_true", help="one model, three rates, one seed: for a first look")
    arguments = parser.parse_args()
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ConfigError(f"{arguments.json}: found no folder {arguments.json.parent}; expected one; make it first")
    models = MODELS[:1] if arguments.quick else MODELS
    factors = QUICK_FACTORS if arguments.quick else FACTORS
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    chosen = [Case(*model, prompt, output) for model in models for prompt in PROMPTS for output in OUTPUTS]
    console = Console()
    cases: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("simulating", total=len(chosen) + len(variations()))
        for case in chosen:
            found = run_case(config_of(case, seeds=seeds), factors)
            cases.append({**msgspec.to_builtins(case), **found})
            progress.advance(task)
        parts = take_apart(seeds, lambda: progress.advance(task))
    result = {
        "schema": 1,
        "command": this_command(),
        "date": utc_now(),
        "machine": msgspec.to_builtins(Machine.here()),
        "versions": installed_versions(),
        "seeds": list(seeds),
        "requests": NUM_REQUESTS,
        "zone_tokens": ZONE_TOKENS,
        "host_memory_bytes": HOST_MEMORY_BYTES,
        "paper": PAPER,
        "summary": summary(cases),
        "cases": cases,
        "taken_apart": {"case": TAKEN_APART.name, "factor": FACTOR, "variations": parts},
    }
    console.print(case_table(cases))
    console.print(summary_table(result["summary"]))
    console.print(variation_table(parts))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rounded(result), indent=0) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
