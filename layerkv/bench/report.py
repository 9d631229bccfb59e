"""The demo's report: one HTML file that needs nothing else, neither network nor scripts.

Runs in the demo's process. Invariant: everything in the report is in `result.json` or in the engines'
records.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jinja2

from layerkv.bench import charts, summary
from layerkv.bench.metrics import DemoResult
from layerkv.bench.records import EngineRun
from layerkv.units import format_bytes

TEMPLATE = "report.html.j2"


def render_report(result: DemoResult, runs: Mapping[str, EngineRun]) -> str:
    """The report as HTML. An engine without a run has its failure in place of figures, and no plots."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("layerkv.bench"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    order = summary.engine_order(result)
    runs_in_order = {name: runs[name] for name in order if name in runs}
    return environment.get_template(TEMPLATE).render(
        result=result,
        headline=summary.headline(result),
        sentences=summary.sentences(result),
        engines=order,
        engine_titles=summary.ENGINE_TITLES,
        engine_notes=summary.ENGINE_NOTES,
        rows=summary.figure_rows(result),
        timeline=charts.timeline(runs_in_order),
        cdf=charts.cdf(runs_in_order),
        facts=_facts(result),
    )


def write_report(result: DemoResult, runs: Mapping[str, EngineRun], path: Path) -> None:
    """Writes `render_report` to `path`."""
    path.write_text(render_report(result, runs), encoding="utf-8")


def _facts(result: DemoResult) -> list[tuple[str, str]]:
    """Where, when and with what it was measured: name and text of each fact."""
    load, machine = result.load, result.machine
    kv_memory = ", ".join(
        f"{summary.ENGINE_TITLES[name]} {format_bytes(size_bytes)}"
        for name, size_bytes in result.kv_cache_memory_bytes.items()
    )
    return [
        ("Command", result.command),
        ("Date", result.date),
        (
            "Load",
            f"{load.num_requests} requests, Poisson arrivals at {load.rate_per_s:g} per second, prompts of "
            f"{load.prompt_tokens[0]}-{load.prompt_tokens[1]} tokens, outputs of "
            f"{load.output_tokens[0]}-{load.output_tokens[1]} tokens, seed {load.seed}",
        ),
        ("KV memory", kv_memory),
        ("Machine", f"{machine.cpu}, {machine.num_cpus} cores, {format_bytes(machine.memory_bytes)} memory"),
        ("System", machine.system),
        ("Versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
    ]
