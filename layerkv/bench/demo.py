"""The demo: one load through stock vLLM, layerkv and the oracle, compared side by side.

Runs in the process of `layerkv demo`, with each engine in a process of its own, one after the other. Leaves
in the output folder: result.json, report.html, and for each engine NAME.spec.json, NAME.json (all its
records) and NAME.log. Invariant: these files are of this run alone, and what was measured is kept when
something fails.

The process of an engine is also the one that hands it the requests, at gaps between its steps: there is neither a
server nor a client that a busy engine could starve of CPU, nothing to probe, and priorities are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
from rich.console import Console

from layerkv.bench import metrics, records
from layerkv.bench.board import ProgressBoard
from layerkv.bench.machine import measured_here
from layerkv.bench.plan import ENGINE_NAMES, check_engine_names, demo_load, engine_specs
from layerkv.bench.suite.kept import read_result
from layerkv.bench.suite.outcome import with_figures
from layerkv.bench.suite.report import write_report
from layerkv.bench.suite.result import CaseResult, PointResult
from layerkv.bench.suite.terminal import print_result
from layerkv.bench.supervise import ENGINE_COMMAND, try_engine
from layerkv.bench.tiny_model import SHAPES, make_tiny_model
from layerkv.config import SloPolicy, default_policy

MODEL_SHAPE = "demo"
EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130


@dataclass(slots=True)
class Outcomes:
    """What became of the engines, by name; an engine that was never started is in neither mapping."""

    runs: dict[str, records.EngineRun] = field(default_factory=dict)
    failures: dict[str, records.EngineFailure] = field(default_factory=dict)
    interrupted: bool = False


def run_demo(out_dir: Path, *, seed: int = 0, quick: bool = False, engines: Sequence[str] = ENGINE_NAMES) -> int:
    """Runs the demo and leaves its files in `out_dir`; returns the exit code of the command.

    0: every engine finished and tokens are equal. 1: an engine failed or tokens differ. 130: interrupted by
    Ctrl-C. `quick` takes a small load (under 90 s in all) whose ratios mean little.

    Raises:
        ConfigError: `engines` names an unknown engine, or one twice, or none.
    """
    console = Console()
    shape = SHAPES[MODEL_SHAPE]
    load = demo_load(shape, seed=seed, quick=quick)
    check_engine_names(engines)
    out_dir.mkdir(parents=True, exist_ok=True)
    with console.status("making a tiny random model"):
        model_dir = make_tiny_model(MODEL_SHAPE, out_dir / "models", seed=seed)
    specs = engine_specs(engines, model_dir, shape, load)

    outcomes = run_engines(specs, out_dir, console)
    result = compare(specs, outcomes)
    records.write_json(result, out_dir / "result.json")
    case, loads = as_case(result, outcomes.runs)
    write_report(case, loads, out_dir / "report.html", default_policy())
    print_result(case, console)
    console.print(f"\nresult  {out_dir / 'result.json'}\nreport  {out_dir / 'report.html'}", highlight=False)
    if outcomes.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_OK if result.complete and result.tokens_equal is not False else EXIT_FAILED


def run_engines(
    specs: Sequence[records.EngineSpec],
    out_dir: Path,
    console: Console,
    command: Sequence[str] = ENGINE_COMMAND,
) -> Outcomes:
    """Runs the engines one after the other, each by `command` SPEC OUT; Ctrl-C ends the one that runs."""
    _remove_earlier_results(out_dir)
    outcomes = Outcomes()
    with ProgressBoard([spec.name for spec in specs], console) as board:
        for spec in specs:
            board.starts(spec.name)
            try:
                outcome = try_engine(spec, out_dir, partial(board.advances, spec.name), command)
            except KeyboardInterrupt:
                outcomes.failures[spec.name] = records.EngineFailure(reason="was interrupted", log_tail=[])
                outcomes.interrupted = True
                board.ends(spec.name, "stopped")
                break
            if isinstance(outcome, records.EngineFailure):
                outcomes.failures[spec.name] = outcome
                board.ends(spec.name, "FAILED")
            else:
                outcomes.runs[spec.name] = outcome
                board.ends(spec.name, "done")
    return outcomes


def _remove_earlier_results(out_dir: Path) -> None:
    of_engines = (f"{name}{end}" for name in ENGINE_NAMES for end in (".spec.json", ".json", ".log"))
    for name in ("result.json", "report.html", *of_engines):
        (out_dir / name).unlink(missing_ok=True)


def compare(specs: Sequence[records.EngineSpec], outcomes: Outcomes) -> metrics.DemoResult:
    """The figures of the engines that finished, side by side, with where and when they were measured."""
    engines = {name: metrics.engine_figures(run) for name, run in outcomes.runs.items()}
    layerkv_run, oracle_run = outcomes.runs.get("layerkv"), outcomes.runs.get("oracle")
    load = specs[0].load
    return metrics.DemoResult(
        complete=len(outcomes.runs) == len(specs),
        interrupted=outcomes.interrupted,
        engines=engines,
        ratios=metrics.engine_ratios(outcomes.runs),
        tokens_equal=(not metrics.differing_requests(layerkv_run, oracle_run) if layerkv_run and oracle_run else None),
        failures=outcomes.failures,
        load=load,
        kv_cache_memory_bytes={spec.name: spec.engine_args["kv_cache_memory_bytes"] for spec in specs},
        **measured_here(),
        seed=load.seed,
    )


def recompute(folder: Path, json_path: Path) -> tuple[CaseResult, list[records.LoadRun], SloPolicy]:
    """The demo's result again, from the records that its engines have left in `folder`; writes it to `json_path`.

    Raises:
        ConfigError: `folder` is not one that the demo has filled.
    """
    result = read_result(folder / "result.json", metrics.DemoResult)
    paths = {name: folder / f"{name}.json" for name in ENGINE_NAMES}
    runs = {name: read_result(path, records.EngineRun) for name, path in paths.items() if path.exists()}
    engines = {name: metrics.engine_figures(run) for name, run in runs.items()}
    result = msgspec.structs.replace(result, engines=engines, ratios=metrics.engine_ratios(runs))
    records.write_json(result, json_path)
    return *as_case(result, runs), default_policy()


def as_case(
    result: metrics.DemoResult, runs: Mapping[str, records.EngineRun]
) -> tuple[CaseResult, list[records.LoadRun]]:
    """The demo as the suite shows it: a case of one point and one seed, and its runs."""
    load, policy = result.load, default_policy()
    rate, objectives = load.rate_per_s, policy.classes[policy.default_class]
    name = f"{rate:g} requests per second"
    loads = [metrics.as_load(run, point=name, seed=result.seed) for run in runs.values()]
    case = CaseResult(
        case="demo",
        question="How many readers are served fluidly when KV memory is full, and how soon do they begin?",
        size=f"{load.num_requests} requests",
        complete=result.complete,
        interrupted=result.interrupted,
        axis="requests per second",
        main_point=name,
        tokens_equal=result.tokens_equal,
        failures=result.failures,
        points=[
            PointResult(name=name, x=rate, rate_per_s=rate, tokens_equal=result.tokens_equal, failures=result.failures)
        ],
        kv_cache_memory_bytes=result.kv_cache_memory_bytes,
        notes=[
            f"{load.num_requests} requests, Poisson arrivals, prompts of {_range(load.prompt_tokens)} tokens, "
            f"outputs of {_range(load.output_tokens)} tokens",
            f"objectives are layerkv's defaults: TTFT {objectives.ttft_s:g} s, TPOT {objectives.tpot_s:g} s",
        ],
        command=result.command,
        machine=result.machine,
        versions=result.versions,
        seeds=[result.seed],
        date=result.date,
        priorities=result.priorities,
    )
    return with_figures(case, loads, policy), loads


def _range(of: tuple[int, int]) -> str:
    return f"{of[0]}-{of[1]}"
