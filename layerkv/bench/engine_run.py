"""Drives one load through one vLLM engine: `python -m layerkv.bench.engine_run SPEC.json OUT.json`.

A fresh process per engine, with the engine inside it. Reads an `EngineSpec`, writes an `EngineRun`; standard
output carries one `Progress` line per second and nothing else (what vLLM prints goes to standard error).

The load is open loop: a request is handed over at its scheduled time whatever the engine does, at the first
gap between two steps; its waiting for that gap counts, since all times are taken from the *scheduled*
arrival.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from layerkv.bench.child import ReportProgress, run_spec
from layerkv.bench.load import FIRST_ORDINARY_TOKEN_ID, LoadSpec, PlannedRequest, make_load
from layerkv.bench.probes import EngineCounters, StateLog, StepTimer
from layerkv.bench.records import (
    EngineRun,
    EngineSpec,
    RequestRecord,
    StateChange,
)

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

# One thread, unbound: with vLLM's defaults, step times jump 20-fold as soon as anything else runs on the
# machine.
ENGINE_ENV = MappingProxyType(
    {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }
)
PROGRESS_INTERVAL_S = 1.0
NUM_WARM_UP_REQUESTS = 3
WARM_UP_OUTPUT_TOKENS = 8


@dataclass(slots=True)
class _Flight:
    """A request under way; times are `time.monotonic()` seconds."""

    request: PlannedRequest
    scheduled_s: float | None = None
    token_times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


def run_engine(spec: EngineSpec, report_progress: ReportProgress) -> EngineRun:
    """Builds the engine in this process, warms it up and drives the whole load through it.

    The environment must hold `ENGINE_ENV` before vLLM is imported for the first time. `report_progress` gets
    (output tokens so far, output tokens in all) once per second.
    """
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(**spec.engine_args, disable_log_stats=False))
    _warm_up(engine, spec.load)
    return _drive(engine, spec, report_progress)


def _warm_up(engine: LLMEngine, load: LoadSpec) -> None:
    prompt = [FIRST_ORDINARY_TOKEN_ID] * load.prompt_tokens[1]
    for index in range(NUM_WARM_UP_REQUESTS):
        warm_up = PlannedRequest(
            request_id=f"warm-up-{index}", arrival_s=0.0, prompt=prompt, output_tokens=WARM_UP_OUTPUT_TOKENS
        )
        add_request(engine, warm_up)
    while engine.has_unfinished_requests():
        engine.step()
    engine.reset_prefix_cache(reset_connector=True)


def add_request(engine: LLMEngine, request: PlannedRequest) -> str:
    """Hands over a request and returns vLLM's internal id for it (the given one with a random suffix)."""
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0,
        max_tokens=request.output_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=None if request.slo_class is None else {"slo_class": request.slo_class},
    )
    prompt = tokens_input(prompt_token_ids=list(request.prompt))
    return engine.add_request(request.request_id, prompt, params)


def _drive(engine: LLMEngine, spec: EngineSpec, report_progress: ReportProgress) -> EngineRun:
    pending = deque(spec.planned or make_load(spec.load))
    flights = {request.request_id: _Flight(request) for request in pending}
    internal_ids: dict[str, str] = {}
    num_total = sum(request.output_tokens for request in pending)
    num_done = 0

    timer = StepTimer()
    engine.apply_model(timer.watch)
    state_log = StateLog.attach(engine)
    counters_before = EngineCounters.read()
    start_s = time.monotonic()
    next_report_s = start_s
    while pending or engine.has_unfinished_requests():
        now_s = time.monotonic()
        while pending and start_s + pending[0].arrival_s <= now_s:
            request = pending.popleft()
            internal_ids[request.request_id] = add_request(engine, request)
        if engine.has_unfinished_requests():
            num_done += _step(engine, flights, timer, state_log)
        else:
            time.sleep(max(0.0, start_s + pending[0].arrival_s - time.monotonic()))
        if time.monotonic() >= next_report_s:
            report_progress(num_done, num_total)
            next_report_s = time.monotonic() + PROGRESS_INTERVAL_S
    wall_s = time.monotonic() - start_s
    report_progress(num_done, num_total)

    counted = EngineCounters.read() - counters_before
    return EngineRun(
        name=spec.name,
        requests=[
            _record(flight, start_s, state_log.moves.get(internal_ids[request_id], []))
            for request_id, flight in flights.items()
        ],
        preemptions=counted.recomputing_preemptions,
        parks=counted.parks,
        fetches=counted.fetches,
        bytes_stored=counted.bytes_stored,
        bytes_loaded=counted.bytes_loaded,
        wall_s=wall_s,
        num_steps=timer.num_steps,
        step_s=timer.mean_step_s,
        host_s_per_step=timer.mean_host_s,
    )


def _step(engine: LLMEngine, flights: dict[str, _Flight], timer: StepTimer, state_log: StateLog) -> int:
    """Runs one engine step, stamps its tokens with the moment they came out, returns how many there were."""
    began_s = time.monotonic()
    outputs = engine.step()
    ended_s = time.monotonic()
    timer.end_step(ended_s - began_s)
    state_log.look(ended_s)
    num_tokens = 0
    for output in outputs:
        completion: Any = output.outputs[0]
        flight = flights[output.request_id]
        flight.token_ids.extend(completion.token_ids)
        flight.token_times_s.extend([ended_s] * len(completion.token_ids))
        if flight.scheduled_s is None and output.metrics is not None:
            flight.scheduled_s = output.metrics.scheduled_ts  # vLLM's first SCHEDULED event, monotonic
        num_tokens += len(completion.token_ids)
    return num_tokens


def _record(flight: _Flight, start_s: float, moves: list[StateChange]) -> RequestRecord:
    return RequestRecord(
        request_id=flight.request.request_id,
        slo_class=flight.request.slo_class,
        arrival_s=flight.request.arrival_s,
        prompt_tokens=len(flight.request.prompt),
        output_tokens=flight.request.output_tokens,
        first_scheduled_s=None if flight.scheduled_s is None else flight.scheduled_s - start_s,
        token_times_s=[time_s - start_s for time_s in flight.token_times_s],
        token_ids=flight.token_ids,
        states=[StateChange(move.time_s - start_s, move.state) for move in moves],
    )


def main(argv: list[str]) -> int:
    """Runs the spec file `argv[0]` and writes the outcome to `argv[1]`; returns the exit status."""
    os.environ.update(ENGINE_ENV)
    return run_spec(argv, "layerkv.bench.engine_run", EngineSpec, run_engine)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
