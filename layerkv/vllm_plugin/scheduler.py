"""The scheduler classes: vLLM's own, with a decision taken before each step.

Each step: take a snapshot, let the policy decide, and let vLLM schedule what :mod:`.execution` leaves visible. Here are
the methods of vLLM's that are overridden; what they do besides vLLM's own has a file for each concern.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from layerkv.config import SloPolicy
from layerkv.core.cost import StepWork
from layerkv.core.residency import Residency
from layerkv.errors import ConfigError
from layerkv.scheduler.decision_log import DecisionLog
from layerkv.scheduler.desk import Desk
from layerkv.scheduler.reasons import Reason
from layerkv.vllm_plugin.arrivals import Arrivals
from layerkv.vllm_plugin.connector import LayerKVConnector
from layerkv.vllm_plugin.elastic_engine import elasticity_for
from layerkv.vllm_plugin.engine_reader import EngineReader, controller_for
from layerkv.vllm_plugin.execution import Execution
from layerkv.vllm_plugin.pausing import Pausing
from layerkv.vllm_plugin.quiet_work import QuietWork
from layerkv.vllm_plugin.recovery import Recovery
from layerkv.vllm_plugin.reload import follow_policy
from layerkv.vllm_plugin.slo_gate import require_gate
from layerkv.vllm_plugin.support import require_heard
from layerkv.vllm_plugin.telling import Telling
from layerkv.vllm_plugin.waiting_queue import WaitingQueue

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

logger = init_logger(f"vllm.{__name__}")

QUIET_STEPS_PER_SAMPLE = 4
"""Steps without a decision are timed for the cost model once in so many: they are all alike. Not measured: chosen by
judgement."""


class _Step(NamedTuple):
    """A step whose output has not been processed; ``work`` only if it is timed."""

    started_s: float
    work: StepWork | None
    is_quiet: bool


if TYPE_CHECKING:
    _VLLMScheduler = Any  # a checker sees vLLM as Any: its methods and attributes are found there at run time
else:
    _VLLMScheduler = object


class LayerKVSchedulerMixin(_VLLMScheduler):
    """Over either of vLLM's schedulers. Without our spec (passthrough) it adds nothing."""

    running: list[Request]
    log_stats: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.connector, LayerKVConnector):
            raise ConfigError(
                f"scheduler_cls: {type(self).__name__} works with LayerKVConnector only; set "
                '--kv-transfer-config \'{"kv_connector":"LayerKVConnector","kv_role":"kv_both"}\''
            )
        side = self.connector.scheduler_side
        self._is_active = side is not None
        self._paused = PauseState.UNPAUSED
        if side is None:
            return
        self._side = side
        self._ledger = side.ledger
        self._managers = side.managers
        policy = side.config.read_policy()
        require_gate(policy, self.vllm_config.model_config.logits_processors)
        self._policy_source = follow_policy(side.config.policy_path, policy)
        self._policy_source.require = self._require_keepable
        self._controller = controller_for(self, side, self._policy_source.policy)
        side.lookahead_tokens = self.num_lookahead_tokens
        desk = Desk(self._controller, side.ledger)
        path, rank = side.config.decision_log, self.vllm_config.parallel_config.data_parallel_index
        if path is not None and rank > 0:
            path = f"{path}.rank{rank}"  # each engine writes a log of its own
        self._log = DecisionLog(path, on_error=logger.error) if path is not None else None
        self._steps_in_flight: deque[_Step] = deque()  # oldest first
        self._num_quiet_steps = 0
        self._last_output_s = 0.0
        self._reader = EngineReader(self, side, side.managers, self._controller)
        self._quiet_work = QuietWork(self, side, self._reader)
        self._arrivals = Arrivals(self, side, self._controller, desk, self._policy_source)
        self._recovery = Recovery(self, side, self._controller, desk, self._arrivals)
        side.follow(self.requests, desk, self._controller.streams, self._arrivals.end_of, self._leaves)
        # The policy chooses who is found and in which order; under priority scheduling, priorities go before deadlines.
        self.waiting = queue = WaitingQueue()
        self._pausing = Pausing(self, self._controller, desk)
        self._execution = Execution(
            self, side, self._controller, desk, self._arrivals, queue, self._reader.prefix_hits, self._pausing
        )
        self.kv_cache_manager.watermark_blocks = 0  # the policy's headroom takes its place
        self._telling = Telling(self, side, self._controller)
        self._telling.capacity()
        self._elastic = side.elastic = elasticity_for(self, side, side.managers, self._controller, desk)
        # vLLM's V1 model runner keeps what it is told of a request when that starts, and nothing else.
        self._keeps_images = self.vllm_config.model_config.is_multimodal_model and not self.use_v2_model_runner

    def _require_keepable(self, policy: SloPolicy) -> None:
        """A policy comes into force only if this engine's front end can keep it.

        Raises:
            ConfigError: it refuses requests under overload, and there are no metrics to do so by, or no gate.
        """
        require_heard(policy, has_metrics=self.log_stats)
        require_gate(policy, self.vllm_config.model_config.logits_processors)

    # What the engine calls -----------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Take a request in and find out its SLO class."""
        super().add_request(request)
        if not self._is_active:
            return
        known = self.requests.get(request.request_id)
        if known is request:
            self._arrivals.track(request)
            self._telling.came_from(request.client_index)
        elif known is not None:
            self._arrivals.next_input(known)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:  # noqa: FBT001, FBT002 (vLLM's signature)
        """Decide, carry the decision out, and let vLLM schedule what is left visible."""
        if not self._is_active:
            return super().schedule(throttle_prefills)
        if self._elastic is not None:
            self._elastic.before_step(time.monotonic())
        if self._paused is PauseState.PAUSED_ALL:
            self._managers.stand_aside()
            self._quiet_work.forget()
            with self._pausing.left_out():
                output = super().schedule(throttle_prefills)
            self._recovery.scheduled()
            return output
        started_s = self._telling.taken_in_s = time.monotonic()
        policy = self._policy_source.policy
        if policy is not self._controller.policy:
            self._controller.set_policy(policy)
        if is_quiet := self._reader.has_nothing_to_decide(started_s):
            self._managers.stand_aside()
            if self._controller.paused:
                with self._pausing.left_out():
                    output = super().schedule(throttle_prefills)
            else:
                output = super().schedule(throttle_prefills)
            self._num_quiet_steps += 1
        else:
            self._quiet_work.forget()
            snapshot, decision = self._controller.decide(
                self._reader.state(),
                started_s,
                is_startable=self._reader.is_startable,
                is_fetchable=self._reader.is_fetchable,
                stays_fetchable=self.lora_config is None,
                hits=self._reader.prefix_hits.of,
            )
            with self._execution.of(snapshot, decision, started_s):
                self._managers.stand_aside()
                output = super().schedule(throttle_prefills)
        self._recovery.scheduled()
        if self._keeps_images:
            self._with_all_images(output)
        if output.total_num_scheduled_tokens:
            if self._elastic is not None:
                self._elastic.note_tokens(output.total_num_scheduled_tokens)
            work = None
            if not is_quiet:
                work = self._reader.work(output, self._side.last_plan)
            elif self._num_quiet_steps % QUIET_STEPS_PER_SAMPLE == 0:
                work = self._quiet_work.of(output)
            self._steps_in_flight.append(_Step(started_s, work, is_quiet))
        return output

    def _with_all_images(self, output: SchedulerOutput) -> None:
        """vLLM tells workers nothing of images that a cached prefix covers. Who gives its KV up later, and finds
        that prefix no more, needs them: the engine would end for want of them."""
        for new in output.scheduled_new_reqs:
            if new.mm_features:
                new.mm_features = self.requests[new.req_id].mm_features

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Note first tokens and step times, and send refusals out with the step's outputs."""
        if not self._is_active:
            return super().update_from_output(scheduler_output, model_runner_output)
        received, step, waited_s = model_runner_output.kv_connector_output, None, None
        if received is not None:
            self._recovery.copies_failed(received)
        if scheduler_output.total_num_scheduled_tokens and self._steps_in_flight:
            step = self._steps_in_flight.popleft()
            if step.work is not None:
                waited_s = self._reader.waited_s(received)  # before vLLM adds the scheduler's own figures to it
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._recovery.processed()
        now_s = time.monotonic()
        if step is not None and step.is_quiet:
            self._arrivals.note_quiet_tokens(scheduler_output, outputs.values(), now_s)
        else:
            self._arrivals.note_tokens(outputs.values(), now_s)
        if step is not None and step.work is not None:
            seconds = now_s - max(step.started_s, self._last_output_s)
            self._controller.step_done(step.work, seconds, waited_s=waited_s)
        self._last_output_s = now_s
        self._telling.step_done(outputs, now_s)
        if self._log is not None:
            self._log.write(self._controller.take_log(), now_s)
        self._arrivals.send_refusals(outputs)
        return outputs

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:  # noqa: FBT001, FBT002
        """vLLM's reset. Cached prefixes in host memory outlive it unless the connector is reset too.

        When running requests start over, so do parked ones, and nothing is kept: all KV may be of old weights.
        """
        if not self._is_active:
            return super().reset_prefix_cache(reset_running_requests, reset_connector)
        with self._arrivals.giving_up_for(Reason.CACHE_RESET):
            if not self._recovery.prepare_reset(reset_running_requests=reset_running_requests):
                if reset_connector:  # as vLLM does, whatever became of its own
                    self.reset_connector_cache()
                return False
            has_reset: bool = super().reset_prefix_cache(reset_running_requests, reset_connector)
        if has_reset:
            self._recovery.tell_what_is_kept()
        return has_reset

    def set_pause_state(self, pause_state: PauseState) -> None:
        """vLLM's, but that no new request starts (`PAUSED_NEW`) is seen to here: nobody is shown whom vLLM could start.

        Parked requests are in mid-output and come back all the same, which vLLM's own scan would not let them, by rules
        that are not the same in all its releases.
        """
        self._paused = pause_state
        if self._is_active and pause_state is PauseState.PAUSED_NEW:
            logger.info("setting pause state to PAUSED_NEW: nobody new starts, parked requests come back")
            if super().pause_state is PauseState.UNPAUSED:
                return
            pause_state = PauseState.UNPAUSED
        super().set_pause_state(pause_state)

    @property
    def pause_state(self) -> PauseState:
        return self._paused if self._is_active else super().pause_state

    def get_num_unfinished_requests(self) -> int:
        """Parked requests are in mid-output: a pause that waits for running requests waits for them too."""
        if self._is_active and self._paused is PauseState.PAUSED_NEW:
            holding = len(self.kv_holding_waiting) - self.num_waiting_for_streaming_input
            return len(self.running) + holding + self._controller.num_parked
        num_unfinished: int = super().get_num_unfinished_requests()
        return num_unfinished

    def shutdown(self) -> None:
        """vLLM's shutdown, and the end of the decision log."""
        if self._is_active and self._log is not None:
            self._log.write(self._controller.take_log())
            self._log.close()
        if self._is_active and self._elastic is not None:
            self._elastic.close()
        super().shutdown()

    @property
    def residency_listener(self) -> Callable[[str, str, str, float], None] | None:
        """Called as ``(request_id, old, new, monotonic_s)`` at every change of residency; for tools only."""
        return None

    @residency_listener.setter
    def residency_listener(self, listener: Callable[[str, str, str, float], None]) -> None:
        if self._is_active:
            self._ledger.residency.listener = lambda request_id, old, new: listener(
                request_id, old, new, time.monotonic()
            )

    # vLLM's own moves, watched ---------------------------------------------------------------------------------

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:  # noqa: FBT001, FBT002
        """A preemption that is not a park gives the request's KV up."""
        if self._is_active:
            self._recovery.leaves(request)
        super()._preempt_request(request, timestamp, drop_stale_output)
        if self._is_active and self._ledger.residency.get(request.request_id) is not Residency.PARKED:
            self._arrivals.recomputes(request)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """vLLM's; a request that is ended with all others says little about how long requests become."""
        if not self._is_active:
            return super().finish_requests(request_ids, finished_status)
        with self._arrivals.ending(everybody=request_ids is None):
            ended: list[Request] = super().finish_requests(request_ids, finished_status)
        if request_ids is None and self._elastic is not None:
            self._elastic.all_ended()
        return ended

    def _leaves(self, request: Request) -> None:
        """Every way out passes here, before the request's blocks are free: finished, aborted, refused."""
        self._recovery.leaves(request)
        self._arrivals.untrack(request)


class LayerKVScheduler(LayerKVSchedulerMixin, Scheduler):
    """layerkv over vLLM's synchronous scheduler."""


class LayerKVAsyncScheduler(LayerKVSchedulerMixin, AsyncScheduler):
    """layerkv over vLLM's asynchronous scheduler."""
