"""One engine under `layerkv bench overhead`: `python -m layerkv.bench.overhead_engine ARGS.json`.

Runs with the engine inside, scheduler and worker in this process, as executor `uni` has it. ARGS.json are the keyword
arguments of vLLM's `EngineArgs`. Standard input carries a `Turn` a line; each is answered by one line, a `Stretch`. The
process ends with its input. Timers hang on the objects of the engine, by their public methods; they cost layerkv some
3 us a step more than stock vLLM, which has no connector to time.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from layerkv.bench.engine_run import ENGINE_ENV, add_request
from layerkv.bench.load import PlannedRequest
from layerkv.bench.records import read_json

STAGES = ("schedule", "metadata", "worker", "update", "front_end")
"""Where a step's host time goes: the scheduler's `schedule` without the connector's metadata; that metadata
(`build_connector_meta`); the connector's methods in the worker; `update_from_output`; what the front end makes of the
step's outputs. The rest of a step is the model's work and vLLM's around it."""

_WORKER_METHODS = (
    "handle_preemptions",
    "bind_connector_metadata",
    "start_load_kv",
    "save_kv_layer",
    "wait_for_save",
    "get_transfer_results",
    "get_block_ids_with_load_errors",
    "get_kv_connector_stats",
    "get_kv_connector_kv_cache_events",
    "build_connector_worker_meta",
    "clear_connector_metadata",
)


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """Requests for an engine that has none, or none for it to go on with those it has; at most so many steps."""

    requests: list[PlannedRequest] = []
    steps: int | None = None


class Stretch(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine did in one turn; the pauses between turns count for nothing.

    Attributes:
        wall_s: From the turn's beginning to its end.
        cpu_s: CPU time of the engine's thread in it; less than `wall_s` where it waited, for copies or for a CPU.
        steps: Steps that ran the model.
        scheduled_tokens: Prompt and output tokens computed in them, those computed again included.
        output_tokens: Tokens delivered.
        ttft_s: By request id, of those whose first token came.
        host_s: Seconds by stage.
        is_last: All requests have ended.
    """

    wall_s: float
    cpu_s: float
    steps: int
    scheduled_tokens: int
    output_tokens: int
    ttft_s: dict[str, float]
    host_s: dict[str, float]
    is_last: bool


class StageTimers:
    """Totals by stage of an engine in this process since the last `take`; `steps` counts those that ran the model."""

    def __init__(self, engine: Any) -> None:
        self._seconds = dict.fromkeys((*STAGES, "core"), 0.0)
        self.steps = self._tokens = 0
        scheduler = engine.engine_core.engine_core.scheduler
        if scheduler.connector is not None:
            from vllm.distributed.kv_transfer import get_kv_transfer_group

            self._time(scheduler.connector, "build_connector_meta", "metadata", within="schedule")
            for method in _WORKER_METHODS:
                self._time(get_kv_transfer_group(), method, "worker")
        self._count(scheduler)
        self._time(scheduler, "schedule", "schedule")
        self._time(scheduler, "update_from_output", "update")
        self._time(engine.engine_core, "get_output", "core", within="front_end")
        self._time(engine, "step", "front_end")

    def _time(self, owner: Any, method: str, stage: str, *, within: str | None = None) -> None:
        call, seconds = getattr(owner, method), self._seconds

        def timed(*args: Any, **kwargs: Any) -> Any:
            began_s = time.perf_counter()
            result = call(*args, **kwargs)
            took_s = time.perf_counter() - began_s
            seconds[stage] += took_s
            if within is not None:
                seconds[within] -= took_s
            return result

        setattr(owner, method, timed)

    def _count(self, scheduler: Any) -> None:
        schedule = scheduler.schedule

        def counted(*args: Any) -> Any:
            output = schedule(*args)
            if output.total_num_scheduled_tokens:
                self.steps += 1
                self._tokens += output.total_num_scheduled_tokens
            return output

        scheduler.schedule = counted

    def take(self) -> tuple[int, int, dict[str, float]]:
        """Steps that ran the model, tokens scheduled, seconds by stage; counting begins anew."""
        taken = self.steps, self._tokens, {stage: self._seconds[stage] for stage in STAGES}
        self.steps = self._tokens = 0
        self._seconds.update(dict.fromkeys(self._seconds, 0.0))
        return taken


class Burst:
    """Requests on their way through an engine."""

    def __init__(self, engine: Any, timers: StageTimers, requests: Sequence[PlannedRequest]) -> None:
        self._engine, self._timers = engine, timers
        self._pending = deque(requests)
        self._arrival_s = {request.request_id: request.arrival_s for request in requests}
        self._ran_s = 0.0

    def go_on(self, steps: int | None) -> Stretch:
        """Steps so often, or to the end; requests come when they are due, or at the next gap between two steps."""
        began_s = now_s = self._ran_s
        start_s, cpu_start_s = time.perf_counter() - began_s, time.thread_time()
        ttft_s: dict[str, float] = {}
        output_tokens = 0
        while (self._pending or self._engine.has_unfinished_requests()) and self._timers.steps != steps:
            while self._pending and self._pending[0].arrival_s <= now_s:
                add_request(self._engine, self._pending.popleft())
            if self._engine.has_unfinished_requests():
                outputs = self._engine.step()
                now_s = time.perf_counter() - start_s
                for output in outputs:
                    output_tokens += len(output.outputs[0].token_ids)
                    if (arrival_s := self._arrival_s.pop(output.request_id, None)) is not None:
                        ttft_s[output.request_id] = now_s - arrival_s
            else:
                time.sleep(max(0.0, self._pending[0].arrival_s - now_s))
                now_s = time.perf_counter() - start_s
        self._ran_s, cpu_s = now_s, time.thread_time() - cpu_start_s
        num_steps, scheduled_tokens, host_s = self._timers.take()
        return Stretch(
            wall_s=now_s - began_s,
            cpu_s=cpu_s,
            steps=num_steps,
            scheduled_tokens=scheduled_tokens,
            output_tokens=output_tokens,
            ttft_s=ttft_s,
            host_s=host_s,
            is_last=not (self._pending or self._engine.has_unfinished_requests()),
        )


def main(argv: Sequence[str]) -> int:
    """Builds the engine of the file `argv[0]` and serves bursts until its input ends; returns the exit status."""
    os.environ.update(ENGINE_ENV)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what vLLM prints is no answer
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(**read_json(Path(argv[0]), dict), disable_log_stats=False))
    timers = StageTimers(engine)
    burst = None
    for line in sys.stdin.buffer:
        turn = msgspec.json.decode(line, type=Turn)
        burst = Burst(engine, timers, turn.requests) if turn.requests else burst
        assert burst is not None
        answers.write(msgspec.json.encode(burst.go_on(turn.steps)) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
