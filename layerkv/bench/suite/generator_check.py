"""`layerkv bench generator`: how punctual the suite's load generator is, seen from the server's side.

The generator's own process drives a server that only stamps arrivals, with as many streams open as a busy engine has.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from random import Random

import msgspec
from rich.console import Console

from layerkv.bench.load import PlannedRequest
from layerkv.bench.machine import Machine, measured_here
from layerkv.bench.metrics import Distribution
from layerkv.bench.records import read_json, write_json
from layerkv.bench.suite.generator import GeneratorRun
from layerkv.bench.suite.plan import LoadPlan
from layerkv.bench.suite.server import Server, free_port
from layerkv.bench.supervise import run_child
from layerkv.errors import LayerKVError

RATE_PER_S = 50.0
NUM_REQUESTS = 1500
OUTPUT_TOKENS = 50
PROMPT_TOKENS = 500
SEED = 0
START_LIMIT_S = 30.0


class PunctualityResult(msgspec.Struct, kw_only=True):
    """What `--json` writes: seconds from a request's due time to its first byte at the server, and to its sending."""

    schema: int = 1
    rate_per_s: float
    num_requests: int
    output_tokens: int
    seed: int
    arrival_error_s: Distribution
    arrival_error_max_s: float
    sent_error_s: Distribution
    command: str
    date: str
    machine: Machine
    versions: dict[str, str]


def run_generator_check(json_path: Path | None) -> int:
    """Measures for half a minute, prints the figures, and writes them if asked to.

    Raises:
        LayerKVError: the generator or the server failed.
    """
    with tempfile.TemporaryDirectory(prefix="layerkv-generator-") as folder:
        run, arrivals_s = _measure(Path(folder))
    result = _result(run, arrivals_s)
    errors = result.arrival_error_s
    Console().print(
        f"{result.num_requests} requests at {RATE_PER_S:g} per second, {OUTPUT_TOKENS} tokens each: arrived late by "
        f"{errors.p50 * 1e3:.2f} ms (p50), {errors.p90 * 1e3:.2f} ms (p90), {errors.p99 * 1e3:.2f} ms (p99), "
        f"{result.arrival_error_max_s * 1e3:.2f} ms at most",
        highlight=False,
    )
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(result, json_path)
    return 0


def _measure(folder: Path) -> tuple[GeneratorRun, list[float]]:
    port, rng = free_port(), Random(SEED)
    requests, due_s = [], 0.0
    for index in range(NUM_REQUESTS):
        due_s += rng.expovariate(RATE_PER_S)
        prompt = rng.choices(range(3, 500), k=PROMPT_TOKENS)
        requests.append(
            PlannedRequest(request_id=f"r{index}", arrival_s=due_s, prompt=prompt, output_tokens=OUTPUT_TOKENS)
        )
    plan = LoadPlan(
        url=f"http://127.0.0.1:{port}",
        model="echo",
        requests=requests,
        warm_up=[],
        names_classes=False,
        sample_interval_s=0.5,
        kv_memory_bytes=0,
        block_bytes=0,
    )
    write_json(plan, folder / "plan.json")
    arrivals_path = folder / "arrivals.json"
    command = [sys.executable, "-m", "layerkv.bench.suite.echo_server", str(port), str(arrivals_path)]
    env = dict(os.environ)
    with Server(command, env=env, port=port, log_path=folder / "server.log") as server:
        failure = server.wait_until_ready(START_LIMIT_S) or run_child(
            [
                sys.executable,
                "-m",
                "layerkv.bench.suite.generator",
                str(folder / "plan.json"),
                str(folder / "run.json"),
            ],
            env=env,
            log_path=folder / "generator.log",
            on_progress=lambda _: None,
        )
    if failure is not None:
        raise LayerKVError(f"the measurement {failure.reason}: " + "\n".join(failure.log_tail))
    return read_json(folder / "run.json", GeneratorRun), json.loads(arrivals_path.read_text())


def _result(run: GeneratorRun, arrivals_s: list[float]) -> PunctualityResult:
    due_s = sorted(request.arrival_s + run.start_s for request in run.requests)
    if len(arrivals_s) != len(due_s):
        raise LayerKVError(f"the measurement lost requests: found {len(arrivals_s)} arrivals; expected {len(due_s)}")
    errors_s = [arrival - due for arrival, due in zip(sorted(arrivals_s), due_s, strict=True)]
    return PunctualityResult(
        rate_per_s=RATE_PER_S,
        num_requests=NUM_REQUESTS,
        output_tokens=OUTPUT_TOKENS,
        seed=SEED,
        arrival_error_s=Distribution.of(errors_s),
        arrival_error_max_s=max(errors_s),
        sent_error_s=Distribution.of(r.sent_s - r.arrival_s for r in run.requests if r.sent_s is not None),
        **measured_here(),
    )
