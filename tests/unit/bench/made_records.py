"""Hand-made engine runs and results with round figures, for the tests of this folder."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from layerkv.bench.demo import Outcomes, compare
from layerkv.bench.load import LoadSpec
from layerkv.bench.metrics import DemoResult
from layerkv.bench.plan import ENGINE_NAMES, engine_specs
from layerkv.bench.records import EngineRun, EngineSpec, RequestRecord, StateChange
from layerkv.bench.tiny_model import SHAPES

LOAD = LoadSpec(num_requests=2, rate_per_s=1.0, prompt_tokens=(8, 8), output_tokens=(3, 3), vocab_size=512)


def request(
    index: int,
    arrival_s: float,
    first_scheduled_s: float | None,
    token_times_s: Sequence[float],
    states: Sequence[tuple[float, str]] = (),
) -> RequestRecord:
    return RequestRecord(
        request_id=f"request-{index:03d}",
        arrival_s=arrival_s,
        prompt_tokens=8,
        output_tokens=3,
        first_scheduled_s=first_scheduled_s,
        token_times_s=list(token_times_s),
        token_ids=[10 + index + i for i in range(len(token_times_s))],
        states=[StateChange(time_s, state) for time_s, state in states],
    )


def engine_run(name: str, requests: Sequence[RequestRecord]) -> EngineRun:
    return EngineRun(
        name=name,
        requests=list(requests),
        preemptions=0,
        parks=0,
        fetches=0,
        bytes_stored=0,
        bytes_loaded=0,
        wall_s=20.0,
        num_steps=6,
        step_s=0.01,
        host_s_per_step=0.001,
    )


def stock_run() -> EngineRun:
    waiting = request(1, 1.0, 10.0, [11.0, 12.0, 13.0])
    return engine_run("stock", [request(0, 0.0, 0.0, [1.0, 2.0, 3.0]), waiting])


def layerkv_run() -> EngineRun:
    parked = request(1, 1.0, 1.0, [2.0, 12.0, 13.0], [(1.0, "layered"), (2.0, "parked"), (11.0, "resident")])
    run = engine_run("layerkv", [request(0, 0.0, 0.0, [1.0, 2.0, 3.0]), parked])
    return msgspec.structs.replace(run, parks=1, fetches=1, bytes_stored=4096, bytes_loaded=4096)


def oracle_run() -> EngineRun:
    return engine_run("oracle", [request(0, 0.0, 0.0, [1.0, 2.0, 3.0]), request(1, 1.0, 1.0, [2.0, 3.0, 4.0])])


def all_runs() -> dict[str, EngineRun]:
    return {"stock": stock_run(), "layerkv": layerkv_run(), "oracle": oracle_run()}


def specs(names: Sequence[str] = ENGINE_NAMES) -> list[EngineSpec]:
    return engine_specs(names, Path("model"), SHAPES["test"], LOAD)


def result(outcomes: Outcomes | None = None) -> DemoResult:
    return compare(specs(), outcomes or Outcomes(runs=all_runs()))
