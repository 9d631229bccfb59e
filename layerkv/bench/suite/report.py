"""The suite's report of one case: one HTML file that needs nothing else, neither network nor scripts.

Runs in the suite's process. Invariant: everything in the report is in the case's JSON or in the raw runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import jinja2

from layerkv.bench.records import LoadRun
from layerkv.bench.suite import charts, summary
from layerkv.bench.suite.result import CaseResult
from layerkv.bench.suite.stream_charts import streams
from layerkv.bench.suite.tables import PLUS_MINUS, RESOURCES, wait_rows
from layerkv.bench.suite.titles import engine_note, main_point, point_label
from layerkv.config import SloPolicy
from layerkv.units import format_bytes

TEMPLATE = "suite.html.j2"
PRIORITIES = {
    "realtime": "API server and load generator at real-time priority",
    "niceness": "engine processes at niceness 19",
    "none": "as the system has them",
    None: "",
}


def render_report(result: CaseResult, runs: Sequence[LoadRun], policy: SloPolicy | None = None) -> str:
    """The report as HTML. An engine without figures has its failure in their place; what has no runs has no plots.

    Without the policy that the runs are judged by nobody knows when a token was due: no single answers are shown.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("layerkv.bench"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    curves = charts.against_axis(result)
    cdf = charts.cdf(result, runs)
    first_runs = charts.first_runs(result, runs)
    requests, kinds = charts.timeline(result, first_runs)
    point = main_point(result)
    return environment.get_template(TEMPLATE).render(
        result=result,
        headline=summary.headline(result),
        sentences=summary.sentences(result),
        main_point=result.main_point if point is None else point_label(result, point),
        engines=summary.engine_order(result),
        all_engines=tuple(summary.ENGINE_TITLES),
        engine_titles=summary.ENGINE_TITLES,
        engine_notes={name: engine_note(result, name) for name in summary.ENGINE_TITLES},
        rows=summary.figure_rows(result),
        point_columns=summary.POINT_COLUMNS,
        point_groups=[(label, list(group)) for label, group in groupby(summary.point_rows(result), lambda r: r.point)],
        resources=RESOURCES,
        wait_groups=[(label, list(group)) for label, group in groupby(wait_rows(result), lambda row: row.point)],
        plus_minus=PLUS_MINUS,
        plots=[*curves, *([] if cdf is None else [cdf])],
        bars=[] if curves else charts.bars(result),
        streams=[] if policy is None else streams(first_runs, policy),
        requests=requests,
        kinds=[(kind.value, kind in charts.THICK) for kind in kinds],
        memory=charts.memory(result, first_runs),
        seed=next((run.seed for run in first_runs.values()), None),
        facts=_facts(result),
    )


def write_report(result: CaseResult, runs: Sequence[LoadRun], path: Path, policy: SloPolicy | None = None) -> None:
    """Writes `render_report` to `path`."""
    path.write_text(render_report(result, runs, policy), encoding="utf-8")


def _unbroken(text: str) -> str:
    """The text with its numbers and units held together at line ends."""
    return re.sub(r"(?<=\d) (?=(%|s|ms)(\W|$))", "\N{NO-BREAK SPACE}", text)


def _facts(result: CaseResult) -> list[tuple[str, str]]:
    """Where, when and with what it was measured: name and text of each fact."""
    machine = result.machine
    sizes = result.kv_cache_memory_bytes
    known = [name for name in summary.ENGINE_TITLES if name in sizes]
    facts = [
        ("Command", result.command),
        ("Date", result.date),
        ("Case", f"{result.case}, size {result.size}, points: {', '.join(point.name for point in result.points)}"),
        ("Seeds", ", ".join(map(str, result.seeds))),
        ("KV memory", ", ".join(f"{summary.ENGINE_TITLES[name]} {format_bytes(sizes[name])}" for name in known)),
        ("Machine", f"{machine.cpu}, {machine.num_cpus} cores, {format_bytes(machine.memory_bytes)} memory"),
        ("System", machine.system),
        ("Priorities", PRIORITIES.get(result.priorities, "")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
        *(("Note", note) for note in result.notes),
    ]
    return [(name, text) for name, text in facts if text]
