"""Instruments read or hung into an in-process vLLM engine while a load runs.

Runs in the engine process. Each probe only watches: it changes no decision of the engine, and what it costs
per step (microseconds) is the same for every engine. Times are `time.monotonic()` seconds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from layerkv.bench.records import StateChange

if TYPE_CHECKING:
    import torch
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.llm_engine import LLMEngine


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """Totals since the process started, from its Prometheus registry; 0 for a counter that does not exist."""

    vllm_preemptions: int = 0
    parks: int = 0
    fetches: int = 0
    bytes_stored: int = 0
    bytes_loaded: int = 0

    @classmethod
    def read(cls) -> EngineCounters:
        """Adds up the counters over all engines and label values of this process."""
        from prometheus_client import REGISTRY

        totals: dict[tuple[str, str], float] = {}
        for metric in REGISTRY.collect():
            for sample in metric.samples:
                key = sample.name, sample.labels.get("direction", "")
                totals[key] = totals.get(key, 0.0) + sample.value
        return cls(
            vllm_preemptions=int(totals.get(("vllm:num_preemptions_total", ""), 0)),
            parks=int(totals.get(("layerkv_parks_total", ""), 0)),
            fetches=int(totals.get(("layerkv_fetches_total", ""), 0)),
            bytes_stored=int(totals.get(("layerkv_bytes_total", "store"), 0)),
            bytes_loaded=int(totals.get(("layerkv_bytes_total", "load"), 0)),
        )

    def __sub__(self, earlier: EngineCounters) -> EngineCounters:
        return EngineCounters(
            vllm_preemptions=self.vllm_preemptions - earlier.vllm_preemptions,
            parks=self.parks - earlier.parks,
            fetches=self.fetches - earlier.fetches,
            bytes_stored=self.bytes_stored - earlier.bytes_stored,
            bytes_loaded=self.bytes_loaded - earlier.bytes_loaded,
        )

    @property
    def recomputing_preemptions(self) -> int:
        """Preemptions that threw KV away: vLLM counts a park as a preemption too."""
        return max(0, self.vllm_preemptions - self.parks)


@dataclass(slots=True)
class StepTimer:
    """Splits the duration of every step that runs the model into forward pass and host time.

    The forward pass is the model's own call: it includes the attention hooks of a KV connector and excludes
    scheduling, input preparation, logits, sampling and bookkeeping of outputs.
    """

    num_steps: int = 0
    total_step_s: float = 0.0
    total_forward_s: float = 0.0
    _forward_began_s: float = 0.0
    _forward_in_step_s: float = 0.0
    _num_forwards_in_step: int = 0

    def watch(self, model: torch.nn.Module) -> None:
        """From now on, counts the calls of `model`, which outlive this timer only as two no-cost hooks."""
        model.register_forward_pre_hook(self._on_forward_begin)
        model.register_forward_hook(self._on_forward_end)

    def _on_forward_begin(self, _module: Any, _inputs: Any) -> None:
        self._forward_began_s = time.monotonic()

    def _on_forward_end(self, _module: Any, _inputs: Any, _output: Any) -> None:
        self._forward_in_step_s += time.monotonic() - self._forward_began_s
        self._num_forwards_in_step += 1

    def end_step(self, step_s: float) -> None:
        """Adds one engine step that took `step_s`; a step that did not run the model is left out."""
        if self._num_forwards_in_step:
            self.num_steps += 1
            self.total_step_s += step_s
            self.total_forward_s += self._forward_in_step_s
        self._forward_in_step_s = 0.0
        self._num_forwards_in_step = 0

    @property
    def mean_step_s(self) -> float:
        """Mean duration of the steps that ran the model; 0 when there was none."""
        return self.total_step_s / self.num_steps if self.num_steps else 0.0

    @property
    def mean_host_s(self) -> float:
        """Mean host time of the steps that ran the model; 0 when there was none."""
        return (self.total_step_s - self.total_forward_s) / self.num_steps if self.num_steps else 0.0


@dataclass(slots=True)
class StateLog:
    """The moves of every request between states, by vLLM's internal request id.

    A scheduler with a `residency_listener` attribute reports its moves itself. For any other, `look` compares
    the running requests after each step: `resident` when one has begun to run, `preempted` when an unfinished
    one has stopped, `gone` at its end; the times are then those of the end of the step.
    """

    scheduler: Scheduler
    moves: dict[str, list[StateChange]] = field(default_factory=dict)
    _is_reported: bool = False
    _running: frozenset[str] = frozenset()

    @classmethod
    def attach(cls, engine: LLMEngine) -> StateLog:
        """Starts the log of an engine that runs in this process."""
        core: Any = engine.engine_core
        log = cls(scheduler=core.engine_core.scheduler)
        if hasattr(log.scheduler, "residency_listener"):
            log.scheduler.residency_listener = log._on_move
            log._is_reported = True
        return log

    def look(self, now_s: float) -> None:
        """Notes the moves of the step that ended at `now_s`, when the scheduler does not report them."""
        if self._is_reported:
            return
        running = frozenset(request.request_id for request in self.scheduler.running)
        if running == self._running:
            return
        for request_id in running - self._running:
            self._add(request_id, now_s, "resident")
        for request_id in self._running - running:
            self._add(request_id, now_s, "preempted" if request_id in self.scheduler.requests else "gone")
        self._running = running

    def _on_move(self, request_id: str, _old: str, new: str, time_s: float) -> None:
        self._add(request_id, time_s, new)

    def _add(self, request_id: str, time_s: float, state: str) -> None:
        self.moves.setdefault(request_id, []).append(StateChange(time_s, state))
