"""What engines gain that share their KV memory: `layerkv bench sharing`.

Runs in the command's process; engines are real servers (`vllm serve`), all at once, with a load generator each, and
start their loads at the same moment. Three ways of having the memory, one after the other, seed by seed:

- `static_stock`: stock vLLM, each engine with its part of the memory;
- `static`: layerkv, each with its part;
- `shared`: layerkv, a broker before them, each with a floor of its own and the rest where it is needed.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import TypeAlias

import msgspec
from rich.console import Console
from rich.table import Table

from layerkv.bench.machine import Machine, measured_here, source_commit
from layerkv.bench.priorities import Priorities, allowed_here
from layerkv.bench.records import EngineFailure, LoadRun, read_json, ttft_s, write_json
from layerkv.bench.sharing_load import CAPACITY_BYTES, Bursts, engine_case, planned
from layerkv.bench.suite.engines import SERVED_NAME, serve_command
from layerkv.bench.suite.figures import engine_figures
from layerkv.bench.suite.generator import GeneratorRun
from layerkv.bench.suite.load_run import load_run
from layerkv.bench.suite.plan import LoadPlan, warm_up_requests
from layerkv.bench.suite.result import Figures, Spread
from layerkv.bench.suite.run import GENERATOR, QUIET_ENV, SAMPLE_INTERVAL_S, TINY_MODEL_ENV
from layerkv.bench.suite.server import Server, free_port
from layerkv.bench.supervise import child_env, run_child
from layerkv.bench.tiny_model import make_tiny_model
from layerkv.errors import LayerKVError
from layerkv.units import format_bytes

ARMS = ("static_stock", "static", "shared")
FLOOR_BYTES = 12 << 20
WARM_UP_S = 8.0
"""From the start of load generators to that of their loads: they warm their servers up before."""

Runs: TypeAlias = Mapping[int, Mapping[int, LoadRun]]
"""By seed, then by engine."""


class SharingRatios(msgspec.Struct, frozen=True, kw_only=True):
    """The shared arm beside the others, all engines together; each ratio is taken within a seed."""

    ttft_mean_speedup_over_stock: Spread
    ttft_mean_over_static: Spread
    second_token_speedup_over_static: Spread
    fluid_goodput_over_static: Spread
    throughput_ratio: Spread


class SharingResult(msgspec.Struct, frozen=True, kw_only=True):
    """The command's JSON: for each arm the figures of each engine, as those of `layerkv bench run`."""

    schema: int = 1
    engines: int
    burst_requests: int
    capacity_bytes: int
    static_stock: dict[str, Figures]
    static: dict[str, Figures]
    shared: dict[str, Figures]
    ratios: SharingRatios
    tokens_equal: bool
    priorities: Priorities
    seeds: list[int]
    command: str
    date: str
    machine: Machine
    versions: dict[str, str]
    commit: str | None


def run_sharing(json_path: Path | None, *, num_engines: int, burst_requests: int, num_seeds: int) -> int:
    """Measure, print a table, and write JSON if asked to. Returns the command's exit status: 1 if tokens differ.

    Raises:
        LayerKVError: an engine or a request failed.
    """
    console, bursts = Console(), Bursts(num_engines, burst_requests)
    runs: dict[str, dict[int, dict[int, LoadRun]]] = {arm: {} for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="layerkv-sharing-") as name:
        for seed in range(num_seeds):
            for arm in ARMS if seed % 2 == 0 else ARMS[::-1]:
                console.print(f"seed {seed}: {arm}", highlight=False)
                runs[arm][seed] = run_arm(arm, bursts, seed, Path(name))
    result = _result(bursts, runs)
    _print(result, console)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(result, json_path)
    return 0 if result.tokens_equal else 1


def run_arm(arm: str, bursts: Bursts, seed: int, folder: Path) -> dict[int, LoadRun]:
    """One load through all engines at once; by engine.

    Raises:
        LayerKVError: an engine failed, the message has the last lines of its log; or a request did.
    """
    priorities = allowed_here()
    with ExitStack() as stack:
        socket = stack.enter_context(_broker(folder)) if arm == "shared" else None
        servers = [
            stack.enter_context(_server(arm, bursts, engine, socket, folder)) for engine in range(bursts.num_engines)
        ]
        for engine, server in enumerate(servers):
            _check(server.wait_until_ready(), arm, engine)
            server.prioritise(priorities)
        not_before_s = time.monotonic() + WARM_UP_S
        with ThreadPoolExecutor(len(servers)) as pool:
            loads = [
                pool.submit(_load, arm, bursts, engine, seed, server, priorities, not_before_s, folder)
                for engine, server in enumerate(servers)
            ]
            runs = {engine: load.result() for engine, load in enumerate(loads)}
        for engine, server in enumerate(servers):
            _check(server.failure(), arm, engine)
        return runs


def _check(failure: EngineFailure | None, arm: str, engine: int) -> None:
    if failure is not None:
        raise LayerKVError(f"{arm}: engine {engine} {failure.reason}: " + "\n".join(failure.log_tail))


@contextlib.contextmanager
def _broker(folder: Path) -> Iterator[Path]:
    socket = folder / "broker.sock"
    program = "import sys; from layerkv.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "broker", "--socket", str(socket), "--capacity"]
    command.append(f"{CAPACITY_BYTES >> 20}MiB")
    with (folder / "broker.log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        while not socket.exists():
            if process.poll() is not None:
                raise LayerKVError(f"the broker ended at once: {(folder / 'broker.log').read_text()[-400:]}")
            time.sleep(0.05)
        yield socket
    finally:
        process.terminate()
        process.wait()


def _server(arm: str, bursts: Bursts, engine: int, socket: Path | None, folder: Path) -> Server:
    own_bytes = CAPACITY_BYTES // bursts.num_engines
    own_folder = folder / f"{arm}-{engine}"
    own_folder.mkdir(exist_ok=True)
    options: dict[str, object] = {}
    if socket is not None:
        ceiling_bytes = CAPACITY_BYTES - (bursts.num_engines - 1) * FLOOR_BYTES
        options = {"broker": str(socket), "kv_floor": FLOOR_BYTES, "kv_ceiling": ceiling_bytes}
        own_bytes = FLOOR_BYTES
    port = free_port()
    command = serve_command(
        engine_case(own_bytes),
        _kind(arm),
        model=str(make_tiny_model(engine_case(own_bytes).settings.model, folder / "models")),
        port=port,
        kv_memory=own_bytes,
        folder=own_folder,
        connector_options=options,
    )
    return Server(command, env=child_env(QUIET_ENV | TINY_MODEL_ENV), port=port, log_path=own_folder / "server.log")


def _load(
    arm: str,
    bursts: Bursts,
    engine: int,
    seed: int,
    server: Server,
    priorities: Priorities,
    not_before_s: float,
    folder: Path,
) -> LoadRun:
    own_bytes = CAPACITY_BYTES // bursts.num_engines
    case = engine_case(own_bytes)
    assert case.settings.shape is not None
    block_bytes = case.settings.shape.kv_bytes_per_token * case.settings.block_tokens
    plan = LoadPlan(
        url=server.url,
        model=SERVED_NAME,
        requests=planned(bursts, engine, seed),
        warm_up=warm_up_requests(case),
        names_classes=False,
        sample_interval_s=SAMPLE_INTERVAL_S,
        kv_memory_bytes=own_bytes,
        block_bytes=block_bytes,
        priorities=priorities,
        not_before_s=not_before_s,
    )
    own_folder = folder / f"{arm}-{engine}"
    plan_path, run_path = own_folder / "plan.json", own_folder / "run.json"
    write_json(plan, plan_path)
    cpu_before, _ = server.observe()
    failure = run_child(
        [*GENERATOR, str(plan_path), str(run_path)],
        env=child_env(QUIET_ENV),
        log_path=own_folder / "generator.log",
        on_progress=lambda _: None,
    )
    _check(server.failure(within_s=0.0) or failure, arm, engine)
    run = read_json(run_path, GeneratorRun)
    if run.start_s > not_before_s + 0.1:
        raise LayerKVError(f"{arm}: the load of engine {engine} began {run.start_s - not_before_s:.1f} s late")
    cpu_after, peak_rss_bytes = server.observe()
    if lost := [request for request in run.requests if request.error is not None]:
        raise LayerKVError(f"{arm}: engine {engine}: {lost[0].request_id} failed: {lost[0].error}")
    return load_run(
        run,
        engine=_kind(arm),
        name=arm,
        point=f"{engine}",
        seed=seed,
        cpu=(cpu_before, cpu_after),
        times=(None, None),
        peak_rss_bytes=peak_rss_bytes,
        block_bytes=block_bytes,
    )


def _kind(arm: str) -> str:
    return "stock" if arm == "static_stock" else "layerkv"


def _result(bursts: Bursts, runs: Mapping[str, Runs]) -> SharingResult:
    policy = engine_case(CAPACITY_BYTES).policy
    seeds = sorted(runs["shared"])

    def figures(arm: str) -> dict[str, Figures]:
        return {
            f"{engine}": engine_figures([runs[arm][seed][engine] for seed in seeds], policy)
            for engine in range(bursts.num_engines)
        }

    by_arm = {arm: figures(arm) for arm in ARMS}
    digests = [
        [[request.token_digest for request in runs[arm][seed][engine].requests] for arm in ARMS]
        for seed in seeds
        for engine in range(bursts.num_engines)
    ]
    return SharingResult(
        engines=bursts.num_engines,
        burst_requests=bursts.burst_requests,
        capacity_bytes=CAPACITY_BYTES,
        static_stock=by_arm["static_stock"],
        static=by_arm["static"],
        shared=by_arm["shared"],
        ratios=_ratios(runs, by_arm, seeds),
        tokens_equal=all(of_arm == of_arms[0] for of_arms in digests for of_arm in of_arms),
        priorities=allowed_here(),
        seeds=seeds,
        commit=source_commit(),
        **measured_here(),
    )


def _ratios(
    runs: Mapping[str, Runs], by_arm: Mapping[str, Mapping[str, Figures]], seeds: Sequence[int]
) -> SharingRatios:
    def ttft(arm: str, seed: int) -> float:
        return mean(first for run in runs[arm][seed].values() for r in run.requests if (first := ttft_s(r)) is not None)

    def second(arm: str, seed: int) -> float:
        return mean(gaps[0] for run in runs[arm][seed].values() for r in run.requests if (gaps := r.gaps_s))

    def fluid(arm: str, seed: int) -> float:
        return sum(of.fluid_goodput_rps.values[seed] for of in by_arm[arm].values() if of.fluid_goodput_rps)

    def tokens(arm: str, seed: int) -> float:
        requests = [request for run in runs[arm][seed].values() for request in run.requests]
        last_s = max(request.token_times_s[-1] for request in requests if request.token_times_s)
        return sum(len(request.token_times_s) for request in requests) / last_s

    return SharingRatios(
        ttft_mean_speedup_over_stock=Spread.of([ttft("static_stock", seed) / ttft("shared", seed) for seed in seeds]),
        ttft_mean_over_static=Spread.of([ttft("shared", seed) / ttft("static", seed) for seed in seeds]),
        second_token_speedup_over_static=Spread.of([second("static", seed) / second("shared", seed) for seed in seeds]),
        fluid_goodput_over_static=Spread.of([fluid("shared", seed) / fluid("static", seed) for seed in seeds]),
        throughput_ratio=Spread.of([tokens("shared", seed) / tokens("static_stock", seed) for seed in seeds]),
    )


def _print(result: SharingResult, console: Console) -> None:
    size = format_bytes(result.capacity_bytes)
    title = f"{result.engines} engines, {size} of KV memory, bursts of {result.burst_requests}"
    table = Table("", "engine", "fluid", "TTFT mean", "second token p99", "longest pause p99", "tok/s", title=title)
    for arm in ARMS:
        of_arm: dict[str, Figures] = getattr(result, arm)
        for engine, figures in of_arm.items():
            pause = figures.longest_pause_s.p99.median if figures.longest_pause_s else 0.0
            table.add_row(
                arm,
                engine,
                f"{figures.fluid.median * 100:.0f} %" if figures.fluid else "",
                f"{figures.ttft_s.mean.median:.3f} s",
                f"{figures.second_token_s.p99.median:.3f} s",
                f"{pause:.3f} s",
                f"{figures.output_tokens_per_s.median:.0f}",
            )
    console.print(table)
    for name, ratio in msgspec.structs.asdict(result.ratios).items():
        console.print(f"{name}: {ratio.median:.2f}", highlight=False)
    console.print(f"tokens equal: {result.tokens_equal}", highlight=False)
