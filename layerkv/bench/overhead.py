"""What layerkv costs beside stock vLLM with the same KV memory, at full speed: `layerkv bench overhead`.

Runs in the command's process; each engine runs in a process of its own that it shares with nobody
(:mod:`layerkv.bench.overhead_engine`). The engines are never asked for less than they can do, so that throughput shows
what a step costs. Three parts, on two models:

- closed loop: n requests at once and KV memory for all of them: layerkv has nothing to decide;
- saturated: requests come faster than they can be served, and the pool is short;
- slots: more requests than `max_num_seqs`, and KV memory for all of them.

A round starts stock vLLM and layerkv afresh, side by side, and gives both the same bursts of requests, one engine idle
while the other works; every second round has the order turned around. Ratios are taken within a round.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from types import MappingProxyType
from typing import Any, TypeAlias

import msgspec
from rich.console import Console
from rich.table import Table

from layerkv.bench import records
from layerkv.bench.engine_args import BLOCK_TOKENS, layerkv_connector, tiny_engine_args
from layerkv.bench.load import FIRST_ORDINARY_TOKEN_ID, PlannedRequest
from layerkv.bench.machine import Machine, measured_here
from layerkv.bench.overhead_engine import STAGES, Stretch, Turn
from layerkv.bench.supervise import child_env, end_child, ended_badly
from layerkv.bench.tiny_model import SHAPES, make_tiny_model
from layerkv.errors import LayerKVError
from layerkv.figures import percentile

ENGINES = ("stock", "layerkv")
CONNECTORS: Mapping[str, Mapping[str, Any] | None] = MappingProxyType(
    {"stock": None, "layerkv": {"host_memory": "1GiB"}}
)
"""By engine, the options of its connector; None where it has none. What is compared with comes first."""
MODELS = ("demo", "test")

CLOSED_OUTPUT_TOKENS = {1: 500, 8: 500, 32: 500, 128: 200, 256: 200}
CLOSED_PROMPT_TOKENS = 32
# Short turns, because machines drift within seconds.
TURN_STEPS = 20
SATURATED_REQUESTS, SATURATED_SPAN_S, SATURATED_BLOCKS = 120, 3.6, 72
SLOTS_REQUESTS, NUM_SLOTS = 48, 4
SHORT_PROMPT_TOKENS, LONG_PROMPT_TOKENS = 300, 700

Round: TypeAlias = Mapping[str, list[Stretch]]
"""By engine, its turns with one burst."""


@dataclass(frozen=True, slots=True)
class Part:
    """Engines of one size and what they get in one round: by how many they are, `bursts` of requests.

    With `turn_steps` the engines take turns of so many steps, else one has the whole burst before the other.
    """

    max_num_seqs: int
    kv_blocks: int
    bursts: Mapping[int, list[PlannedRequest]]
    turn_steps: int | None = None

    def kv_bytes(self, shape_name: str) -> int:
        """KV memory of each engine, with that model."""
        return self.kv_blocks * BLOCK_TOKENS * SHAPES[shape_name].kv_bytes_per_token


def parts(vocab_size: int) -> dict[str, Part]:
    """The three parts, for a model of that vocabulary."""
    rng = Random(0)

    def request(index: int, prompt_tokens: int, output_tokens: int, arrival_s: float = 0.0) -> PlannedRequest:
        prompt = rng.choices(range(FIRST_ORDINARY_TOKEN_ID, vocab_size), k=prompt_tokens)
        return PlannedRequest(request_id=f"r{index}", arrival_s=arrival_s, prompt=prompt, output_tokens=output_tokens)

    closed = {n: [request(i, CLOSED_PROMPT_TOKENS, k) for i in range(n)] for n, k in CLOSED_OUTPUT_TOKENS.items()}
    saturated = [
        request(
            i,
            LONG_PROMPT_TOKENS if i % 8 == 7 else SHORT_PROMPT_TOKENS,
            rng.randint(40, 100),
            i * SATURATED_SPAN_S / SATURATED_REQUESTS,
        )
        for i in range(SATURATED_REQUESTS)
    ]
    queued = [request(i, SHORT_PROMPT_TOKENS, rng.randint(40, 100)) for i in range(SLOTS_REQUESTS)]
    return {
        "closed_loop": Part(max(closed), blocks_for_all(closed[max(closed)]), closed, TURN_STEPS),
        "saturated": Part(SATURATED_REQUESTS, SATURATED_BLOCKS, {SATURATED_REQUESTS: saturated}),
        "slots": Part(NUM_SLOTS, blocks_for_all(queued), {SLOTS_REQUESTS: queued}),
    }


def blocks_for_all(requests: Sequence[PlannedRequest]) -> int:
    """KV blocks for each request to its end, and a tenth and one prompt more: layerkv's zone comes out of it."""
    needed = sum(-(-(len(request.prompt) + request.output_tokens) // BLOCK_TOKENS) for request in requests)
    return needed + needed // 10 + LONG_PROMPT_TOKENS // BLOCK_TOKENS


class Comparison(msgspec.Struct, kw_only=True):
    """Medians over rounds; `throughput_ratio` is layerkv / stock, `host_us` per step by engine and stage.

    `cpu_ms` is the engine's thread's CPU time per step. Where stock's is well below its time per step, others had the
    CPU, and only it can be compared.
    """

    model: str
    throughput_ratio: float
    throughput_ratio_by_round: list[float]
    cpu_ms: dict[str, float]
    host_us: dict[str, dict[str, float]]


class ClosedLoop(Comparison, kw_only=True):
    """With `running` requests at once. Figures are medians over turns: most of a burst's steps are decodes of all."""

    running: int
    step_ms: dict[str, float]


class Overload(Comparison, kw_only=True):
    """Where requests wait. `long_ttft_p99_s` is of the long prompts alone, where there are some."""

    wall_s: dict[str, float]
    steps: dict[str, float]
    tokens_per_step: dict[str, float]
    ttft_p99_s: dict[str, float]
    long_ttft_p99_s: dict[str, float] = {}


class OverheadResult(msgspec.Struct, kw_only=True):
    """What `--json` writes. A part that was not run has no entries."""

    schema: int = 2
    closed_loop: list[ClosedLoop] = []
    saturated: list[Overload] = []
    slots: list[Overload] = []
    rounds: int
    command: str
    date: str
    machine: Machine
    versions: dict[str, str]


def run_overhead(json_path: Path | None, *, rounds: int, only: str | None = None, model: str | None = None) -> int:
    """Measure, print tables, and write JSON if asked to; `only` one part, `model` one of `MODELS`.

    Returns:
        The command's exit status.

    Raises:
        LayerKVError: an engine failed.
    """
    console = Console()
    result = OverheadResult(rounds=rounds, **measured_here())
    with tempfile.TemporaryDirectory(prefix="layerkv-overhead-") as folder:
        for shape_name in MODELS if model is None else (model,):
            for name, part in parts(SHAPES[shape_name].vocab_size).items():
                if only not in (None, name):
                    continue
                console.print(f"{shape_name}, {name}: {rounds} rounds")
                for size, found in measure(part, shape_name, rounds, Path(folder)).items():
                    if name == "closed_loop":
                        result.closed_loop.append(closed_loop(shape_name, size, found))
                    else:
                        waiting = result.saturated if name == "saturated" else result.slots
                        waiting.append(overload(shape_name, part.bursts[size], found))
    _print(result, console)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        records.write_json(result, json_path)
    return 0


def measure(
    part: Part,
    shape_name: str,
    rounds: int,
    folder: Path,
    connectors: Mapping[str, Mapping[str, Any] | None] = CONNECTORS,
) -> dict[int, list[Round]]:
    """The rounds of each burst; models and logs are in `folder`. `connectors` has the engines, as `CONNECTORS` does.

    Raises:
        LayerKVError: an engine failed; the message has the last lines of its log.
    """
    rounds_of: dict[int, list[Round]] = {size: [] for size in part.bursts}
    for number in range(rounds):
        names = list(connectors)
        order = names if number % 2 == 0 else names[::-1]
        with ExitStack() as stack:
            engines = {
                name: stack.enter_context(_engine(part, shape_name, name, connectors[name], folder)) for name in order
            }
            first = next(iter(part.bursts.values()))[0]
            in_turns(engines, [msgspec.structs.replace(first, prompt=first.prompt[::-1], output_tokens=8)], None)
            for size, requests in part.bursts.items():
                rounds_of[size].append(in_turns(engines, requests, part.turn_steps))
    return rounds_of


def in_turns(
    engines: Mapping[str, Callable[[Turn], Stretch]], requests: list[PlannedRequest], steps: int | None
) -> Round:
    """The same burst through each engine, in turns of so many steps, or one after the other."""
    stretches: dict[str, list[Stretch]] = {name: [] for name in engines}
    busy, turn = list(engines), Turn(requests=requests, steps=steps)
    while busy:
        for name in busy:
            stretches[name].append(engines[name](turn))
        busy = [name for name in busy if not stretches[name][-1].is_last]
        turn = Turn(steps=steps)
    return stretches


@contextmanager
def _engine(
    part: Part, shape_name: str, name: str, connector: Mapping[str, Any] | None, folder: Path
) -> Iterator[Callable[[Turn], Stretch]]:
    """Starts an engine, which is ready when its first turn is answered, and ends it."""
    longest = max(len(r.prompt) + r.output_tokens for requests in part.bursts.values() for r in requests)
    args = tiny_engine_args(
        make_tiny_model(shape_name, folder / "models"),
        max_model_len=longest,
        max_num_seqs=part.max_num_seqs,
        kv_bytes=part.kv_bytes(shape_name),
    )
    if connector is not None:
        args["kv_transfer_config"] = layerkv_connector(**connector)
    args_path, log_path = folder / f"{name}.args.json", folder / f"{name}.log"
    args_path.write_bytes(msgspec.json.encode(args))
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "layerkv.bench.overhead_engine", str(args_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=child_env(),
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def run(turn: Turn) -> Stretch:
        try:
            stdin.write(msgspec.json.encode(turn) + b"\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            failure = ended_badly(process.wait(), log_path)
            raise LayerKVError(f"{name} {failure.reason}: " + "\n".join(failure.log_tail))
        return msgspec.json.decode(answer, type=Stretch)

    try:
        yield run
    finally:
        end_child(process)


def closed_loop(model: str, running: int, rounds: Sequence[Round], engines: Sequence[str] = ENGINES) -> ClosedLoop:
    """The figures of a burst whose requests all run at once; ratios are the second engine's over the first one's."""
    step_ms = _medians(rounds, lambda stretch: stretch.wall_s / stretch.steps * 1e3, engines)
    return ClosedLoop(**_comparison(model, rounds, engines), running=running, step_ms=step_ms)


def overload(model: str, requests: Sequence[PlannedRequest], rounds: Sequence[Round]) -> Overload:
    """The figures of a burst whose requests wait for each other."""
    everybody = {request.request_id for request in requests}
    long = {request.request_id for request in requests if len(request.prompt) == LONG_PROMPT_TOKENS}

    def ttft_p99_s(request_ids: set[str]) -> dict[str, float]:
        return _medians(rounds, lambda stretch: percentile(sorted(stretch.ttft_s[i] for i in request_ids), 0.99))

    return Overload(
        **_comparison(model, rounds, ENGINES),
        wall_s=_medians(rounds, lambda stretch: stretch.wall_s),
        steps=_medians(rounds, lambda stretch: stretch.steps),
        tokens_per_step=_medians(rounds, lambda stretch: stretch.scheduled_tokens / stretch.steps),
        ttft_p99_s=ttft_p99_s(everybody),
        long_ttft_p99_s=ttft_p99_s(long) if long else {},
    )


def _comparison(model: str, rounds: Sequence[Round], engines: Sequence[str]) -> dict[str, Any]:
    def per_step_us(stage: str) -> dict[str, float]:
        return _medians(rounds, lambda stretch: stretch.host_s[stage] / stretch.steps * 1e6, engines)

    by_stage = {stage: per_step_us(stage) for stage in STAGES}
    # Turns of the same number computed the same tokens.
    ratios = [
        median(
            (ours.output_tokens / ours.wall_s) / (stock.output_tokens / stock.wall_s)
            for stock, ours in zip(*(round_[name] for name in engines), strict=False)
        )
        for round_ in rounds
    ]
    return {
        "model": model,
        "throughput_ratio": median(ratios),
        "throughput_ratio_by_round": ratios,
        "cpu_ms": _medians(rounds, lambda stretch: stretch.cpu_s / stretch.steps * 1e3, engines),
        "host_us": {name: {stage: by_engine[name] for stage, by_engine in by_stage.items()} for name in engines},
    }


def _medians(
    rounds: Sequence[Round], of: Callable[[Stretch], float], engines: Sequence[str] = ENGINES
) -> dict[str, float]:
    """By engine, over the turns of all rounds."""
    return {name: median(of(stretch) for round_ in rounds for stretch in round_[name]) for name in engines}


def _print(result: OverheadResult, console: Console) -> None:
    """A line for each engine: ms per step, us of host time; under the ratio, its least and most over rounds."""
    tables: dict[str, Sequence[ClosedLoop | Overload]] = {
        "closed loop": result.closed_loop,
        "saturated": result.saturated,
        "slots full": result.slots,
    }
    for title, rows in tables.items():
        if not rows:
            continue
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        for heading in ("", "", "ms", "cpu", "steps", "p99 s", "sched", "meta", "work", "upd", "front", "ratio"):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        for row in rows:
            ratios = row.throughput_ratio_by_round
            for name in ENGINES:
                if isinstance(row, ClosedLoop):
                    label, figures = f"{row.model} {row.running}", [f"{row.step_ms[name]:.2f}", "", ""]
                else:
                    label, step_ms = row.model, row.wall_s[name] / row.steps[name] * 1e3
                    figures = [f"{step_ms:.2f}", f"{row.steps[name]:.0f}", f"{row.ttft_p99_s[name]:.2f}"]
                is_ours = name == "layerkv"
                ratio = f"{min(ratios):.2f}-{max(ratios):.2f}" if is_ours else f"{row.throughput_ratio:.3f}"
                host = (f"{row.host_us[name][stage]:.0f}" for stage in STAGES)
                figures.insert(1, f"{row.cpu_ms[name]:.2f}")
                table.add_row("" if is_ours else label, name, *figures, *host, ratio)
        console.print(table)
