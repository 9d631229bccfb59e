"""`layerkv profile`: what this machine's steps and copies cost, measured on a real engine.

Runs in the command's process, with the engine in a child. Leaves one file, a `CostProfile` as JSON, which says how it
was made and how well it predicts a random load that it was not fitted to.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import layerkv
from layerkv.bench import records
from layerkv.bench.engine_args import layerkv_connector, parse_engine_args, tiny_engine_args
from layerkv.bench.engine_run import ENGINE_ENV
from layerkv.bench.fit import FitError, fit_copies, fit_profile, prediction_error
from layerkv.bench.machine import Machine, installed_versions, this_command, utc_now
from layerkv.bench.profile_run import ProfileRun, ProfileSpec, StepSample
from layerkv.bench.supervise import child_env, run_child
from layerkv.bench.tiny_model import SHAPES, make_tiny_model
from layerkv.core.cost import CostProfile, Curve
from layerkv.device.base import Direction
from layerkv.errors import LayerKVError
from layerkv.units import format_bytes, format_seconds

RUN_COMMAND = (sys.executable, "-m", "layerkv.bench.profile_run")
TINY_MODEL = "demo"
TINY_POOL_TOKENS = 1 << 16
# Objectives so far off that no decision shortens a chunk: the steps measured are those that were designed.
POLICY = """\
version: 1
default_class: default
classes: {default: {ttft: 10h, tpot: 10h}}
compare: {policy: arrival}
"""


def run_profile(model: str | None, out: Path, *, engine_args: str | None = None, quick: bool = False) -> int:
    """Measure, fit, check and write the profile to `out`; returns the exit status of the command.

    `engine_args` is JSON: keyword arguments of vLLM's `EngineArgs` for the engine to measure. Without a model, the
    demo's tiny one is made and measured. `quick` takes under a minute there and fits less well.

    Raises:
        ConfigError: `engine_args` is not a JSON object.
        LayerKVError: the engine could not be measured; the message ends with its log.
    """
    console = Console()
    theirs = parse_engine_args(engine_args)
    with tempfile.TemporaryDirectory(prefix="layerkv-profile-") as name:
        folder = Path(name)
        args = _engine_args(model, theirs, folder)
        run = _measure(_spec(args, quick=quick), folder, console)
    profile, errors = profile_of(run, name=f"{_model_name(model)}, {run.engine['dtype']}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(profile.to_json() + "\n", encoding="utf-8")
    _print(profile, errors, out, console)
    return 0


def _model_name(model: str | None) -> str:
    """A name without the folders of this machine."""
    if model is None:
        return f"layerkv's tiny model {TINY_MODEL!r}"
    return Path(model).resolve().name if Path(model).is_dir() else model


def profile_of(run: ProfileRun, *, name: str) -> tuple[CostProfile, dict[str, FitError]]:
    """The profile that a run's grid gives, and its errors by kind of sample: "fit", "held_out" and so on."""
    grid = [(sample.work, sample.seconds) for sample in run.steps if not sample.is_check]
    profile = fit_profile(
        grid,
        name=name,
        store=_copy_curve(run, Direction.STORE),
        load=_copy_curve(run, Direction.LOAD),
        kv_bytes_per_token=run.kv_bytes_per_token,
    )
    errors = {
        "fit": prediction_error(profile, grid),
        "held_out": _check_error(profile, run.steps),
        "held_out_decode": _check_error(profile, [s for s in run.steps if not s.work.prefill_tokens]),
        "held_out_layered": _check_error(profile, [s for s in run.steps if s.work.is_layered]),
    }
    return replace(profile, made=_made(run, errors)), errors


def _copy_curve(run: ProfileRun, direction: Direction) -> Curve:
    return fit_copies([(copy.num_bytes, copy.seconds) for copy in run.copies if copy.direction is direction])


def _check_error(profile: CostProfile, steps: list[StepSample]) -> FitError:
    return prediction_error(profile, [(sample.work, sample.seconds) for sample in steps if sample.is_check])


def _made(run: ProfileRun, errors: Mapping[str, FitError]) -> dict[str, str]:
    machine, versions = Machine.here(), installed_versions()
    made = {
        "command": this_command(),
        "date": utc_now(),
        "layerkv": layerkv.__version__,
        "vllm": versions["vllm"],
        "torch": versions["torch"],
        "cpu": machine.cpu,
        "num_cpus": str(machine.num_cpus),
        "memory": format_bytes(machine.memory_bytes),
        **run.engine,
        "num_samples": str(sum(not sample.is_check for sample in run.steps)),
    }
    for kind, error in errors.items():
        made |= {
            f"{kind}_shapes": str(error.num_shapes),
            f"{kind}_median_error": f"{error.median:.4f}",
            f"{kind}_p90_error": f"{error.p90:.4f}",
        }
    return made


def _engine_args(model: str | None, theirs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The engine asked for, with every prompt layered and steps that end before the next one is scheduled."""
    policy = folder / "policy.yaml"
    policy.write_text(POLICY, encoding="utf-8")
    base: dict[str, Any] = {"model": model} if model is not None else _tiny_engine(folder)
    transfer = theirs.get("kv_transfer_config") or {}
    extra = transfer.get("kv_connector_extra_config") or {}
    ours = {
        "async_scheduling": False,
        "kv_transfer_config": layerkv_connector(
            **{**extra, "mode": "auto", "compare": {"mode": "layered"}, "policy": str(policy)}
        ),
    }
    return {**base, **theirs, **ours}


def _tiny_engine(folder: Path) -> dict[str, Any]:
    kv_bytes = TINY_POOL_TOKENS * SHAPES[TINY_MODEL].kv_bytes_per_token
    return tiny_engine_args(make_tiny_model(TINY_MODEL, folder), max_model_len=4096, max_num_seqs=64, kv_bytes=kv_bytes)


def _spec(engine_args: dict[str, Any], *, quick: bool) -> ProfileSpec:
    if not quick:
        return ProfileSpec(engine_args=engine_args, rounds=5)
    return ProfileSpec(
        engine_args=engine_args,
        rounds=3,
        contexts=(0.015, 0.15),
        longest_prompt=0.5,
        batches=(8, 4, 1),
        check_steps=60,
        copy_repeats=5,
    )


def _measure(spec: ProfileSpec, folder: Path, console: Console) -> ProfileRun:
    spec_path, run_path, log_path = folder / "spec.json", folder / "run.json", folder / "engine.log"
    records.write_json(spec, spec_path)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting the engine", total=None)
        failure = run_child(
            [*RUN_COMMAND, str(spec_path), str(run_path)],
            env=_child_env(),
            log_path=log_path,
            on_progress=lambda line: bar.update(
                task, description="measuring", completed=line.progress, total=line.total
            ),
        )
    if failure is not None:
        raise LayerKVError("\n  ".join([f"the engine {failure.reason}; its log ends with", *failure.log_tail]))
    return records.read_json(run_path, ProfileRun)


def _child_env() -> dict[str, str]:
    """Threads are those that the caller set, so that a profile can be made for the engine that will use it."""
    in_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": ENGINE_ENV["VLLM_ENABLE_V1_MULTIPROCESSING"]}
    return child_env(ENGINE_ENV) | in_process


def _print(profile: CostProfile, errors: Mapping[str, FitError], out: Path, console: Console) -> None:
    table = Table(title=f"what steps cost: {profile.name}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, seconds in {
        "a step": profile.step_s,
        "each request in it": profile.request_s,
        "1000 prompt tokens": profile.tokens(1000),
        "1000 KV tokens read by decodes": profile.decode_context(1000),
        "1 million query-key pairs of prefill": 1e6 * profile.pair_s,
        "storing 64 MiB": profile.store(64 << 20),
        "loading 64 MiB": profile.load(64 << 20),
        "layer hooks in a step": profile.layered_step_s,
    }.items():
        table.add_row(label, format_seconds(seconds))
    table.add_row("hidden copies that still cost time", f"{profile.exposed_share:.0%}")
    console.print(table)
    for kind, text in {
        "fit": "steps measured and fitted",
        "held_out": "a random load that was not fitted",
        "held_out_decode": "  its steps without prefill",
        "held_out_layered": "  its layered steps",
    }.items():
        error = errors[kind]
        console.print(
            f"{text}: off by {error.median:.1%} (median), {error.p90:.1%} (p90) over {error.num_shapes} steps",
            highlight=False,
        )
    console.print(f"profile  {out}", highlight=False)
