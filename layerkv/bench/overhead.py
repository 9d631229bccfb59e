"""What layerkv costs where it has nothing to do: `layerkv bench overhead`.

Runs in the command's process; engines run in processes of their own, one after the other. Two questions:
with KV memory for everybody, how do throughput and TTFT compare with stock vLLM, with short steps (under 10 ms)
and with long ones; and what does a step's scheduling cost with 500 requests queued. Rounds alternate the order of
the engines, and a ratio is taken within a round, so that a machine that drifts hits both alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

import layerkv
from layerkv.bench import records
from layerkv.bench.board import ProgressBoard
from layerkv.bench.load import LoadSpec
from layerkv.bench.machine import Machine, measured_here
from layerkv.bench.supervise import run_engine
from layerkv.bench.tiny_model import SHAPES, make_tiny_model

NUM_ROUNDS = 3
DEEP_QUEUE = 500


@dataclass(frozen=True, slots=True)
class OverheadCase:
    """One engine shape and load, run on stock vLLM and on layerkv with the same KV memory."""

    name: str
    shape: str
    load: LoadSpec
    kv_requests: float
    max_batched_tokens: int = 2048
    max_num_seqs: int = 64
    deep_queue: int | None = None


def overhead_cases() -> tuple[OverheadCase, ...]:
    """Short steps, long steps, and a deep queue."""
    vocab = SHAPES["demo"].vocab_size
    return (
        OverheadCase(
            "short steps",
            "demo",
            LoadSpec(
                num_requests=20, rate_per_s=2.0, prompt_tokens=(100, 300), output_tokens=(100, 150), vocab_size=vocab
            ),
            kv_requests=24,
        ),
        OverheadCase(
            "long steps",
            "demo",
            LoadSpec(
                num_requests=24, rate_per_s=6.0, prompt_tokens=(600, 1000), output_tokens=(150, 250), vocab_size=vocab
            ),
            kv_requests=30,
        ),
        OverheadCase(
            "deep queue",
            "test",
            LoadSpec(
                num_requests=700, rate_per_s=1e6, prompt_tokens=(150, 250), output_tokens=(400, 500), vocab_size=vocab
            ),
            kv_requests=4,
            max_batched_tokens=512,
            max_num_seqs=256,
            deep_queue=DEEP_QUEUE,
        ),
    )


class CaseResult(msgspec.Struct, kw_only=True):
    """Medians over rounds. Ratios are layerkv / stock, within a round; `*_by_round` keep the single ones."""

    name: str
    step_s: dict[str, float]
    host_s_per_step: dict[str, float]
    output_tokens_per_s: dict[str, float]
    ttft_mean_s: dict[str, float]
    throughput_ratio: float
    ttft_mean_ratio: float
    throughput_ratio_by_round: list[float]
    ttft_mean_ratio_by_round: list[float]
    schedule_s_median: dict[str, float] = {}
    schedule_s_added: float | None = None


class OverheadResult(msgspec.Struct, kw_only=True):
    """What `--json` writes."""

    schema: int = 1
    cases: list[CaseResult]
    rounds: int
    command: str
    date: str
    machine: Machine
    versions: dict[str, str]


def run_overhead(json_path: Path | None, *, rounds: int = NUM_ROUNDS) -> int:
    """Measure, print a table, and write JSON if asked to. Takes about two minutes per round.

    Returns:
        The command's exit status.
    """
    console = Console()
    with tempfile.TemporaryDirectory(prefix="layerkv-overhead-") as folder:
        results = [_run_case(case, Path(folder), rounds, console) for case in overhead_cases()]
    result = OverheadResult(
        cases=results,
        rounds=rounds,
        **measured_here(),
    )
    _print(result, console)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        records.write_json(result, json_path)
    return 0


def _run_case(case: OverheadCase, folder: Path, rounds: int, console: Console) -> CaseResult:
    runs: dict[str, list[records.EngineRun]] = {"stock": [], "layerkv": []}
    rounds = 1 if case.deep_queue is not None else rounds
    for number in range(rounds):
        order = ("stock", "layerkv") if number % 2 == 0 else ("layerkv", "stock")
        console.print(f"{case.name}: round {number + 1} of {rounds}")
        with ProgressBoard(list(order), console) as board:
            for name in order:
                board.starts(name)
                runs[name].append(_run_engine(case, name, folder, board))
                board.ends(name, "done")
    return _summarise(case, runs)


def _run_engine(case: OverheadCase, name: str, folder: Path, board: ProgressBoard) -> records.EngineRun:
    return run_engine(_spec(case, name, folder), folder, lambda line: board.advances(name, line))


def _spec(case: OverheadCase, name: str, folder: Path) -> records.EngineSpec:
    shape, load = SHAPES[case.shape], case.load
    block_tokens = 32
    kv_bytes = int(case.kv_requests * load.max_context_tokens) // block_tokens * block_tokens * shape.kv_bytes_per_token
    args: dict[str, Any] = {
        "model": str(make_tiny_model(case.shape, folder / "models")),
        "dtype": "float32",
        "block_size": block_tokens,
        "max_model_len": load.max_context_tokens,
        "max_num_batched_tokens": case.max_batched_tokens,
        "max_num_seqs": case.max_num_seqs,
        "enforce_eager": True,
        "kv_cache_memory_bytes": kv_bytes,
        "seed": 0,
    }
    if name == "layerkv":
        args["kv_transfer_config"] = {
            "kv_connector": "LayerKVConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"host_memory": "2GiB"},
        }
    return records.EngineSpec(name=name, engine_args=args, load=load, deep_queue=case.deep_queue)


def _summarise(case: OverheadCase, runs: dict[str, list[records.EngineRun]]) -> CaseResult:
    throughput = {name: [_tokens_per_s(run) for run in of_engine] for name, of_engine in runs.items()}
    ttft = {name: [_ttft_mean_s(run) for run in of_engine] for name, of_engine in runs.items()}
    throughput_ratios = _ratios(throughput["layerkv"], throughput["stock"])
    ttft_ratios = _ratios(ttft["layerkv"], ttft["stock"])
    schedule_s = {n: [s for run in of_engine for s in run.schedule_s] for n, of_engine in runs.items()}
    medians = {name: median(values) for name, values in schedule_s.items() if values}
    return CaseResult(
        name=case.name,
        step_s={name: median(run.step_s for run in of_engine) for name, of_engine in runs.items()},
        host_s_per_step={name: median(run.host_s_per_step for run in of_engine) for name, of_engine in runs.items()},
        output_tokens_per_s={name: median(values) for name, values in throughput.items()},
        ttft_mean_s={name: median(values) for name, values in ttft.items()},
        throughput_ratio=median(throughput_ratios),
        ttft_mean_ratio=median(ttft_ratios),
        throughput_ratio_by_round=throughput_ratios,
        ttft_mean_ratio_by_round=ttft_ratios,
        schedule_s_median=medians,
        schedule_s_added=medians["layerkv"] - medians["stock"] if len(medians) == 2 else None,
    )


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def _tokens_per_s(run: records.EngineRun) -> float:
    first = min(request.arrival_s for request in run.requests)
    times = [time_s for request in run.requests for time_s in request.token_times_s]
    return len(times) / (max(times) - first)


def _ttft_mean_s(run: records.EngineRun) -> float:
    return mean(waited_s for request in run.requests if (waited_s := records.ttft_s(request)) is not None)


def _print(result: OverheadResult, console: Console) -> None:
    table = Table(title=f"layerkv {layerkv.__version__} with nothing to do, against stock vLLM (median of rounds)")
    for heading in ("case", "step stock / layerkv", "host time per step", "throughput", "TTFT mean"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case in result.cases:
        if case.schedule_s_added is not None:
            console.print(
                f"{DEEP_QUEUE} requests queued: scheduling takes {case.schedule_s_median['stock'] * 1e3:.2f} ms per "
                f"step in stock vLLM, {case.schedule_s_median['layerkv'] * 1e3:.2f} ms with layerkv "
                f"({case.schedule_s_added * 1e3:+.2f} ms)"
            )
            continue
        table.add_row(
            case.name,
            " / ".join(f"{case.step_s[name] * 1e3:.1f}" for name in ("stock", "layerkv")) + " ms",
            " / ".join(f"{case.host_s_per_step[name] * 1e3:.2f}" for name in ("stock", "layerkv")) + " ms",
            f"{case.throughput_ratio:.3f}",
            f"{case.ttft_mean_ratio:.3f}",
        )
    console.print(table)
