"""`layerkv bench fidelity`: the same load on the real CPU engine and in the simulator, side by side.

It takes a simulation file whose engine has a measured profile, builds that engine with the demo's tiny model, and
drives the file's load through it, open loop, one policy after the other, seed by seed. So it answers two questions
with the same run: how far the simulator is off, and what layerkv changes on a real engine under that load.

An engine runs in one process with whoever hands it the requests, so there is no server that it could starve of CPU, and
priorities are left as they are (`priorities` in the result: see :mod:`layerkv.bench.priorities`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from layerkv.bench import records
from layerkv.bench.board import ProgressBoard
from layerkv.bench.engine_args import layerkv_connector, tiny_engine_args
from layerkv.bench.load import FIRST_ORDINARY_TOKEN_ID, LoadSpec, PlannedRequest
from layerkv.bench.machine import measured_here
from layerkv.bench.policy_file import write_policy
from layerkv.bench.suite.room_for_one import bytes_for_one, rounded_up
from layerkv.bench.suite.tables import SLOS_MET
from layerkv.bench.supervise import run_engine
from layerkv.bench.tiny_model import SHAPES, make_tiny_model
from layerkv.bench.words import MISSING
from layerkv.core.cost import load_profile, seconds_per_byte
from layerkv.errors import ConfigError
from layerkv.figures import tally_of
from layerkv.sim.config import SimConfig, load_sim_config
from layerkv.sim.engine import SimRequest
from layerkv.sim.outcome import GapHistogram, RequestOutcome, SimOutcome
from layerkv.sim.run import WATERMARK, make_engine, medians, policy_of, requests_of, with_memory_of
from layerkv.units import format_bytes

SHAPE = "demo"
COMPARED = (
    ("fluid", None),
    ("tokens_on_time", None),
    ("lag_s", "mean"),
    ("lag_s", "p99"),
    ("ttft_s", "mean"),
    ("ttft_s", "p99"),
    ("output_tokens_per_s", None),
)


def run_fidelity(
    config_path: Path, json_path: Path | None, *, profile_path: Path | None = None, console: Console | None = None
) -> int:
    """Run a simulation file on both; `profile_path` takes the place of the file's profile.

    Raises:
        ConfigError: the file is wrong, its engine is not the demo model's, or has KV memory for less than a request.
        LayerKVError: an engine failed.
    """
    console = console or Console()
    config = load_sim_config(config_path)
    if profile_path is not None:
        config = replace(config, profile=load_profile(profile_path))
    if config.num_layers != SHAPES[SHAPE].num_layers:
        raise ConfigError(
            f"{config_path}: $.engine.num_layers: found {config.num_layers}; expected the demo model's "
            f"{SHAPES[SHAPE].num_layers}, which is what this command runs"
        )
    _check_room_for_one(config, config_path)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for rate in config.rates:
            for seed in config.seeds:
                rows += _measure(config, rate, seed, Path(folder), console)
            console.print(_table(rows, rate))
    result = {
        "schema": 1,
        "priorities": "none",
        **msgspec.to_builtins(measured_here()),
        "profile": {"name": config.profile.name, **config.profile.made},
        "rows": rows,
        "medians": _over_seeds(rows),
    }
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _check_room_for_one(config: SimConfig, path: Path) -> None:
    needed = bytes_for_one(SHAPES[SHAPE], max_model_len=config.max_model_len, block_tokens=config.block_tokens)
    if config.kv_memory_bytes < needed:
        raise ConfigError(
            f"{path}: $.engine.kv_memory: found {format_bytes(config.kv_memory_bytes)}; expected room for one request "
            f"of max_model_len {config.max_model_len}, without which vLLM does not start; set it to "
            f"{rounded_up(needed)} or more, or max_model_len lower"
        )


def _measure(config: SimConfig, rate: float, seed: int, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Both worlds' figures of each policy under one load; every other seed runs the policies in reverse order."""
    load = requests_of(config, rate, seed)
    order = list(config.policies) if seed % 2 == 0 else list(config.policies)[::-1]
    rows = []
    console.print(f"{rate:g} requests per second, seed {seed}")
    with ProgressBoard(order, console) as board:
        for name in order:
            board.starts(name)
            real = _run_real(config, name, load, seed, folder, board)
            simulated = make_engine(config, name, load, stride=1).run().figures()
            rows.append({"policy": name, "rate_per_s": rate, "seed": seed, "real": real, "simulated": simulated})
            board.ends(name, "done")
    return rows


def _run_real(
    config: SimConfig, name: str, load: Sequence[SimRequest], seed: int, folder: Path, board: ProgressBoard
) -> dict[str, Any]:
    spec = _spec(config, name, load, seed, folder)
    run = run_engine(spec, folder, lambda line: board.advances(name, line))
    return {**_outcome(config, run, load).figures(), "step_s": run.step_s, "host_s_per_step": run.host_s_per_step}


def _spec(config: SimConfig, name: str, load: Sequence[SimRequest], seed: int, folder: Path) -> records.EngineSpec:
    config = with_memory_of(config, name, load)
    longest = max(request.prompt_tokens for request in load)
    args = tiny_engine_args(
        make_tiny_model(SHAPE, folder / "models"),
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_bytes=config.kv_memory_bytes,
        block_size=config.block_tokens,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_prefix_caching=False,  # prompts are random, and the simulator has no prefix cache
    )
    is_ours = name.startswith("layerkv")
    if is_ours:
        extra: dict[str, Any] = {"host_memory": config.host_memory_bytes, "lanes": config.lanes}
        extra["policy"] = str(write_policy(policy_of(config.policy, name), folder / "slo.yaml"))
        if config.zone_tokens is not None:
            extra["zone_tokens"] = config.zone_tokens
        args["kv_transfer_config"] = layerkv_connector(**extra)
    elif name == "stock-watermark":
        args["watermark"] = WATERMARK
    shape = SHAPES[SHAPE]
    rng, ordinary = Random(seed), range(FIRST_ORDINARY_TOKEN_ID, shape.vocab_size)
    return records.EngineSpec(
        name=name,
        engine_args=args,
        load=LoadSpec(
            num_requests=len(load),
            rate_per_s=1.0,
            prompt_tokens=(1, longest),
            output_tokens=(1, max(request.output_tokens for request in load)),
            vocab_size=shape.vocab_size,
            seed=seed,
        ),
        planned=[
            PlannedRequest(
                request_id=request.request_id,
                arrival_s=request.arrival_s,
                prompt=rng.choices(ordinary, k=request.prompt_tokens),
                output_tokens=request.output_tokens,
                slo_class=request.slo.name if is_ours else None,
            )
            for request in load
        ],
    )


def _outcome(config: SimConfig, run: records.EngineRun, load: Sequence[SimRequest]) -> SimOutcome:
    """A real run in the simulator's terms, so that both are judged by the same code."""
    planned = {request.request_id: request for request in load}
    gaps = GapHistogram()
    outcomes = []
    for record in run.requests:
        request, times = planned[record.request_id], record.token_times_s
        between = [later - earlier for earlier, later in pairwise(times)]
        for gap_s in between:
            gaps.add(gap_s)
        outcomes.append(
            RequestOutcome(
                record.request_id,
                request.slo,
                record.arrival_s,
                record.prompt_tokens,
                len(times),
                times[0] if times else None,
                times[-1] if times else None,
                tally_of(request.slo, record.arrival_s, times),
                max(between, default=0.0),
            )
        )
    end_s = max((r.token_times_s[-1] for r in run.requests if r.token_times_s), default=run.wall_s)
    return SimOutcome(
        outcomes,
        gaps,
        end_s,
        run.num_steps,
        preemptions=run.preemptions,
        parks=run.parks,
        fetches=run.fetches,
        stored_bytes=run.bytes_stored,
        loaded_bytes=run.bytes_loaded,
        link_s_per_byte=(seconds_per_byte(config.profile.store), seconds_per_byte(config.profile.load)),
    )


def _over_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over seeds by rate and policy, and simulated over real of the figures that are compared."""
    merged = []
    for rate, name in dict.fromkeys((row["rate_per_s"], row["policy"]) for row in rows):
        chosen = [row for row in rows if row["rate_per_s"] == rate and row["policy"] == name]
        real, simulated = medians([row["real"] for row in chosen]), medians([row["simulated"] for row in chosen])
        ratios = {}
        for figure, part in COMPARED:
            measured, predicted = _part(real, figure, part), _part(simulated, figure, part)
            ratio = predicted / measured if measured and predicted is not None else None
            ratios[f"{figure}.{part}" if part else figure] = ratio
        merged.append({"rate_per_s": rate, "policy": name, "simulated_over_real": ratios, "real": real})
        merged[-1]["simulated"] = simulated
    return merged


def _part(figures: Mapping[str, Any], figure: str, part: str | None) -> float | None:
    """None where it is not known."""
    found = figures.get(figure)
    return found[part] if part and found is not None else found


def _table(rows: Sequence[dict[str, Any]], rate: float) -> Table:
    table = Table(title=f"{rate:g} requests per second: real / simulated", box=SIMPLE, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for heading in ("fluid", "TTFT", "p99", "TPOT", SLOS_MET, "goodput", "tok/s"):
        table.add_column(heading, justify="right", no_wrap=heading != SLOS_MET)
    for row in _over_seeds([row for row in rows if row["rate_per_s"] == rate]):
        r, s = row["real"], row["simulated"]
        table.add_row(
            row["policy"],
            "/".join(MISSING if part.get("fluid") is None else f"{part['fluid']:.0%}" for part in (r, s)),
            f"{r['ttft_s']['mean']:.2f}/{s['ttft_s']['mean']:.2f}",
            f"{r['ttft_s']['p99']:.2f}/{s['ttft_s']['p99']:.2f}",
            f"{r['tpot_s']['mean'] * 1e3:.0f}/{s['tpot_s']['mean'] * 1e3:.0f}ms",
            f"{r['slo_attainment']:.0%}/{s['slo_attainment']:.0%}",
            f"{r['goodput_rps']:.2f}/{s['goodput_rps']:.2f}",
            f"{r['output_tokens_per_s']:.0f}/{s['output_tokens_per_s']:.0f}",
        )
    return table
