"""The scheduler classes: vLLM's own, with a decision taken before each step.

Each step: take a snapshot, let the policy decide, park, put the chosen requests (and only those) into vLLM's
waiting queue in the chosen order, and let vLLM schedule. Decisions are the policy's and books the ledger's; this
module carries out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from layerkv.config import SloClass, slo_class_of
from layerkv.core.cost import StepWork, generic_profile, load_profile
from layerkv.core.residency import Residency
from layerkv.errors import CapacityError, ConfigError
from layerkv.metrics import COPY_WAIT
from layerkv.scheduler.controller import Controller
from layerkv.scheduler.decision_log import DecisionLog
from layerkv.scheduler.desk import Desk
from layerkv.scheduler.engine import EngineShape
from layerkv.scheduler.prefill import prefill_share
from layerkv.scheduler.reasons import End, Reason
from layerkv.scheduler.refusals import refusal_text
from layerkv.scheduler.snapshot import Decision, Snapshot
from layerkv.units import format_bytes
from layerkv.vllm_plugin.connector import LayerKVConnector
from layerkv.vllm_plugin.recovery import Recovery
from layerkv.vllm_plugin.reload import follow_policy
from layerkv.vllm_plugin.seeded import cannot_cut_seeded, is_seeded
from layerkv.vllm_plugin.snapshot import EngineReader
from layerkv.vllm_plugin.spec import LayerKVManager
from layerkv.vllm_plugin.support import require_heard
from layerkv.vllm_plugin.waiting_queue import WaitingQueue
from layerkv.vllm_plugin.words import tell

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

logger = init_logger(f"vllm.{__name__}")

MAX_CLOCK_SKEW_S = 3600.0
"""An arrival time further back than this is a clock that jumped, not a request that waited."""

QUIET_STEPS_PER_SAMPLE = 4
"""Steps without a decision are timed for the cost model once in so many: they are all alike."""

ENDS = {
    RequestStatus.FINISHED_STOPPED: End.FINISHED,
    RequestStatus.FINISHED_LENGTH_CAPPED: End.FINISHED,
    RequestStatus.FINISHED_REPETITION: End.FINISHED,
    RequestStatus.FINISHED_ABORTED: End.LEFT,
}
"""What vLLM's ends mean here; all others were not served."""

BACKLOG_INTERVAL_S = 0.05
"""How often the front ends are told what a new request would meet, if their policy refuses under overload."""


if TYPE_CHECKING:
    _VLLMScheduler = Any  # a checker sees vLLM as Any: its methods and attributes are found there at run time
else:
    _VLLMScheduler = object


class LayerKVSchedulerMixin(_VLLMScheduler):
    """Over either of vLLM's schedulers. Without our spec (passthrough) it adds nothing."""

    running: list[Request]
    _ends_all = False
    adaptive_long_prefill_threshold: bool
    max_num_scheduled_tokens: int
    max_num_active_reqs: int
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
        if side is None:
            return
        self._side = side
        self._ledger = side.ledger
        manager = self.kv_cache_manager.coordinator.single_type_managers[0]
        assert isinstance(manager, LayerKVManager)
        self._policy_source = follow_policy(side.config.policy_path, side.config.policy)
        self._policy_source.require = partial(require_heard, has_metrics=self.log_stats)
        self._controller = self._make_controller()
        self._desk = Desk(self._controller, side.ledger)
        side.follow(self.requests, self._desk, self._end_of)
        path, rank = side.config.decision_log, self.vllm_config.parallel_config.data_parallel_index
        if path is not None and rank > 0:
            path = f"{path}.rank{rank}"  # each engine writes a log of its own
        self._log = DecisionLog(path, on_error=logger.error) if path is not None else None
        self._cannot_cut_seeded = cannot_cut_seeded(self.vllm_config)
        self._refused: dict[str, str] = {}
        self._no_first_token: set[str] = set()
        self._gives_up_for = Reason.PREEMPTED  # why KV is given up just now; vLLM's own preemptions say nothing
        self._steps_in_flight: deque[tuple[float, StepWork | None]] = deque()  # (start, work if sampled), oldest first
        self._num_quiet_steps = 0
        self._last_output_s = self._last_word_s = self._taken_in_s = 0.0
        self._owes_word = False
        self._tells_waits = self.vllm_config.device_config.device_type == "cpu"
        # Of a server on another node, an engine learns how many there are from its requests only.
        self._front_ends = set(range(self.vllm_config.parallel_config._api_process_count))
        self._reader = EngineReader(self, side, manager)
        self._recovery = Recovery(self, side)
        # The policy chooses who is found and in which order; under priority scheduling, priorities go before deadlines.
        self.waiting = self._queue = WaitingQueue()
        self.kv_cache_manager.watermark_blocks = 0  # the policy's headroom takes its place
        self._report_capacity()

    # What the engine calls -----------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Take a request in and find out its SLO class."""
        super().add_request(request)
        if self._is_active and self.requests.get(request.request_id) is request:
            self._track(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:  # noqa: FBT001, FBT002 (vLLM's signature)
        """Decide, carry the decision out, and let vLLM schedule what is left visible."""
        if not self._is_active:
            return super().schedule(throttle_prefills)
        if self._pause_state is PauseState.PAUSED_ALL:
            output = super().schedule(throttle_prefills)
            self._recovery.scheduled()
            return output
        started_s = self._taken_in_s = time.monotonic()
        policy = self._policy_source.policy
        if policy is not self._controller.policy:
            self._controller.set_policy(policy)
        is_sampled = True
        if self._reader.is_quiet():
            output = super().schedule(throttle_prefills)
            self._num_quiet_steps += 1
            is_sampled = self._num_quiet_steps % QUIET_STEPS_PER_SAMPLE == 0
        else:
            output = self._schedule_decided(started_s, throttle_prefills)
        self._recovery.scheduled()
        if output.total_num_scheduled_tokens:
            work = self._reader.work(output, self._side.last_plan) if is_sampled else None
            self._steps_in_flight.append((started_s, work))
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Note first tokens and step times, and send refusals out with the step's outputs."""
        received = model_runner_output.kv_connector_output
        if self._is_active and received is not None:
            self._recovery.copies_failed(received)
        waited_s = self._waited_s(received)  # before vLLM adds the scheduler's own figures to it
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if not self._is_active:
            return outputs
        self._recovery.processed()
        now_s = time.monotonic()
        firsts_late = self._note_first_tokens(outputs.values(), now_s) if self._no_first_token else None
        if scheduler_output.total_num_scheduled_tokens and self._steps_in_flight:
            started_s, work = self._steps_in_flight.popleft()
            if work is not None:
                seconds = now_s - max(started_s, self._last_output_s)
                self._controller.step_done(work, seconds, waited_s=waited_s, firsts_late=firsts_late)
        self._last_output_s = now_s
        self._report_reasons()
        self._report_backlog(outputs, now_s)
        if self._log is not None:
            self._log.write(self._controller.take_log(), now_s)
        if self._refused:
            self._send_refusals(outputs)
        return outputs

    def _waited_s(self, received: KVConnectorOutput | None) -> float | None:
        """Seconds that the step waited for copies, as its workers saw it; None where devices do not tell."""
        if not self._tells_waits:
            return None
        stats = None if received is None else received.kv_connector_stats
        counters = {} if stats is None else stats.data.get("counters", {})
        waited_s: float = counters.get(COPY_WAIT, 0.0)
        return waited_s / self.vllm_config.parallel_config.tensor_parallel_size

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:  # noqa: FBT001, FBT002
        """vLLM's reset. Cached prefixes in host memory outlive it unless the connector is reset too.

        When running requests start over, so do parked ones, and nothing is kept: all KV may be of old weights.
        """
        if not self._is_active:
            return super().reset_prefix_cache(reset_running_requests, reset_connector)
        with self._giving_up_for(Reason.CACHE_RESET):
            if not self._recovery.prepare_reset(reset_running_requests=reset_running_requests):
                if reset_connector:  # as vLLM does, whatever became of its own
                    self.reset_connector_cache()
                return False
            has_reset: bool = super().reset_prefix_cache(reset_running_requests, reset_connector)
        if has_reset:
            self._recovery.tell_what_is_kept()
        return has_reset

    def get_num_unfinished_requests(self) -> int:
        """Parked requests are in mid-output: a pause that waits for running requests waits for them too."""
        num_unfinished: int = super().get_num_unfinished_requests()
        if self._is_active and self._pause_state is PauseState.PAUSED_NEW:
            num_unfinished += len(self._controller.parked)
        return num_unfinished

    def shutdown(self) -> None:
        """vLLM's shutdown, and the end of the decision log."""
        if self._is_active and self._log is not None:
            self._log.write(self._controller.take_log())
            self._log.close()
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
            self._recomputes(request)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """vLLM's; a request that is ended with all others says little about how long requests become."""
        self._ends_all = request_ids is None
        try:
            ended: list[Request] = super().finish_requests(request_ids, finished_status)
        finally:
            self._ends_all = False
        return ended

    @contextmanager
    def _giving_up_for(self, reason: Reason) -> Iterator[None]:
        """Whoever gives KV up inside does so for this reason."""
        before, self._gives_up_for = self._gives_up_for, reason
        try:
            yield
        finally:
            self._gives_up_for = before

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:  # noqa: FBT001, FBT002
        """Every way out passes here: finished, aborted, refused."""
        if self._is_active:
            self._recovery.leaves(request)
            self._untrack(request)
        return super()._free_request(request, delay_free_blocks)

    # Carrying a decision out -----------------------------------------------------------------------------------

    def _schedule_decided(self, now_s: float, throttle_prefills: bool) -> SchedulerOutput:  # noqa: FBT001
        reader = self._reader
        snapshot, decision = self._controller.decide(
            reader.state(),
            now_s,
            is_startable=reader.is_startable,
            is_fetchable=reader.is_fetchable,
            hits=reader.prefix_hits.of,
        )
        self._desk.begin_step(self.current_step + 1, now_s)  # vLLM counts it when it begins to schedule
        for refusal in decision.refuse:
            self._refuse(refusal.request_id, refusal_text(snapshot, refusal), refusal.reason)
        for request_id in decision.store_ahead:
            block_ids = self.kv_cache_manager.get_block_ids(request_id)[0]
            self._desk.store_ahead(request_id, block_ids, self.requests[request_id].num_computed_tokens)
        if decision.park:
            self._park(decision, now_s)
        for request_id in decision.recompute:
            with self._giving_up_for(decision.reasons[request_id]):
                self._give_up(self.requests[request_id], now_s)
        chosen = self._chosen(decision)
        is_paused = self._pause_state is not PauseState.UNPAUSED
        saved = (
            self.max_num_scheduled_tokens,
            self.scheduler_config.long_prefill_token_threshold,
            self.adaptive_long_prefill_threshold,
            self.max_num_active_reqs,
        )
        held: list[Request] = []
        self._side.metrics.add("layerkv_decide_seconds", time.monotonic() - now_s)
        try:
            held = self._limit_prefill(snapshot, decision)
            if is_paused:
                self._drain(chosen)
            else:
                self._queue.show(chosen)
            output = super().schedule(throttle_prefills)
        finally:
            (
                self.max_num_scheduled_tokens,
                self.scheduler_config.long_prefill_token_threshold,
                self.adaptive_long_prefill_threshold,
                self.max_num_active_reqs,
            ) = saved
            self.running += held
            self._queue.show(())
            if is_paused:
                self._undrain(chosen)
        self._note_started(decision)
        return output

    def _limit_prefill(self, snapshot: Snapshot, decision: Decision) -> list[Request]:
        """Hold prompts to the decided tokens, so that decodes and resuming requests get theirs.

        vLLM serves running requests in list order and a prompt takes all it can, so prompts go last and each is
        limited to its share. Starting a fetch costs no token, but vLLM's scan ends when none is left.

        Returns:
            Running prompts that vLLM must not see in this step. No limit is low enough for a share of nothing: a
            single token of a layered prompt would load all its chunks again, and take the token a fetch needs.
        """
        prefilling = [request for request in self.running if request.is_prefill_chunk]
        self.max_num_scheduled_tokens, share = prefill_share(
            self.max_num_scheduled_tokens,
            decode_tokens=snapshot.decode_tokens,
            prefill_tokens=decision.prefill_tokens,
            num_prompts=len(prefilling),
            spare_tokens=1 if decision.fetch else 0,
        )
        if decision.has_whole_prompt:
            self.scheduler_config.long_prefill_token_threshold = 0
        if prefilling:
            decoding = [request for request in self.running if not request.is_prefill_chunk]
            if decision.prefill_tokens == 0 and decoding:
                self.running = decoding
                self.max_num_active_reqs -= len(prefilling)
                return prefilling
            self.running = decoding + prefilling
            threshold = self.scheduler_config.long_prefill_token_threshold
            self.scheduler_config.long_prefill_token_threshold = min(share, threshold) if threshold else share
            self.adaptive_long_prefill_threshold = False  # it would raise the share again
        return []

    def _drain(self, fetched: list[Request]) -> None:
        """While new requests are paused, vLLM looks only at those that hold KV; parked ones do, in host memory."""
        for request in fetched:
            self._queue.remove_request(request)
            self.kv_holding_waiting.add_request(request)

    def _undrain(self, fetched: list[Request]) -> None:
        for request in fetched:
            if self._ledger.residency.get(request.request_id) is Residency.PARKED:
                self.kv_holding_waiting.remove_requests((request,))  # vLLM may have moved it back already
                self._queue.add_request(request)

    def _park(self, decision: Decision, now_s: float) -> None:
        parked = [self.requests[request_id] for request_id in decision.park]
        leaving = set(parked)
        self.running = [request for request in self.running if request not in leaving]
        for request in parked:
            request_id = request.request_id
            block_ids = self.kv_cache_manager.get_block_ids(request_id)[0]
            self._desk.park(
                request_id,
                block_ids,
                num_computed=request.num_computed_tokens,
                num_tokens=request.num_tokens,
                num_output=request.num_output_tokens,
                reason=decision.reasons[request_id],
            )
            self._preempt_request(request, now_s)  # resets its counts; its in-flight token is still delivered

    def _give_up(self, request: Request, now_s: float) -> None:
        """vLLM's own preemption: the request's KV is computed again."""
        self.running.remove(request)
        self._preempt_request(request, now_s)

    def _chosen(self, decision: Decision) -> list[Request]:
        """Whom vLLM shall find in its waiting queue in this step, in order; layered ones get their reservations."""
        chosen = [self.requests[request_id] for request_id in decision.fetch]
        for admission in decision.admit:
            request = self.requests[admission.request_id]
            try:
                self._desk.reserve(admission)
            except CapacityError as error:  # what it was decided from has changed: it waits for the next step
                logger.debug("request %s is not admitted in this step: %s", admission.request_id, error)
                continue
            chosen.append(request)
        return chosen + self._strangers()

    def _strangers(self) -> list[Request]:
        """Requests in the queue that the policy does not know: vLLM alone moves them, so they stay visible."""
        controller = self._controller
        if len(self.waiting) == len(controller.waiting) + len(controller.parked) + len(self._refused):
            return []
        known = (controller.waiting, controller.parked, self._refused)
        return [request for request in self.waiting if not any(request.request_id in views for views in known)]

    def _note_started(self, decision: Decision) -> None:
        """Bring the books in line with what vLLM did of what was decided."""
        metrics = self._side.metrics
        for request_id in decision.fetch:
            if self._ledger.residency[request_id] is Residency.PARKED:
                metrics.add("layerkv_declined", 1)
        for admission in decision.admit:
            request = self.requests.get(admission.request_id)
            if request is None:
                continue
            if request.status is RequestStatus.RUNNING:
                waited_s = self._desk.admitted(admission.request_id, decision.reasons[admission.request_id])
                if waited_s is not None:
                    metrics.observe("layerkv_admission_wait_seconds", waited_s)
                continue
            metrics.add("layerkv_declined", 1)
            self._reader.prefix_hits.forget(admission.request_id)
            self._desk.declined(admission.request_id)

    # Requests coming and going ---------------------------------------------------------------------------------

    def _track(self, request: Request) -> None:
        slo = self._slo_class_of(request)
        now_s = time.monotonic()
        waited_s = min(max(time.time() - request.arrival_time, 0.0), MAX_CLOCK_SKEW_S)
        self._controller.arrive(
            request.request_id,
            slo,
            now_s=now_s,
            arrival_s=now_s - waited_s,
            num_tokens=request.num_tokens,
            max_tokens=request.max_tokens,
            rank=request.priority if self.policy is SchedulingPolicy.PRIORITY else 0,
            # vLLM does not load external KV for these, or keeps their KV between turns
            can_layer=not request.skip_reading_prefix_cache and not request.resumable,
            in_one_step=self._cannot_cut_seeded and is_seeded(request.sampling_params),
        )
        self._keep_from_pool(request)
        self._no_first_token.add(request.request_id)
        self._front_ends.add(request.client_index)
        self._owes_word = True

    def _slo_class_of(self, request: Request) -> SloClass:
        """Its class. Who has passed the gate is served, though the policy in force here may not have its class.

        The class may have gone since, or have come to a front end on another machine only. With explicit class flags
        there need not be a gate.
        """
        policy, params = self._policy_source.policy, request.sampling_params
        extra_args = (params.extra_args if params is not None else None) or {}
        try:
            return slo_class_of(extra_args, policy)
        except ConfigError as error:
            name = extra_args.get("slo_class")
            if (past := self._policy_source.past_class(name)) is not None:
                return past
            logger.warning_once("a request is served as of class %s: %s", policy.default_class, str(error))
            return policy.classes[policy.default_class]

    def _recomputes(self, request: Request) -> None:
        """Give the request's KV up: it waits for compute again, with the token that is still on its way."""
        is_token_coming = request.num_stale_output_tokens > 0 and not request.drop_stale_output
        num_tokens = request.num_tokens + (1 if is_token_coming else 0)
        num_output, reason = request.num_output_tokens, self._gives_up_for
        self._desk.recomputes(
            request.request_id, num_tokens=num_tokens, num_output=num_output, reason=reason, now_s=time.monotonic()
        )
        self._keep_from_pool(request)

    def _keep_from_pool(self, request: Request) -> None:
        """A request that decodes in the zone to its end would hold blocks of a cached prefix as long."""
        tracked = self._controller.tracked.get(request.request_id)
        if tracked is not None and tracked.can_layer:  # others may have asked for it themselves
            request.skip_reading_prefix_cache = tracked.outgrows_pool

    def _untrack(self, request: Request) -> None:
        request_id = request.request_id
        if request.num_output_tokens and request_id in self._no_first_token:  # it ends with its first token
            self._note_first_token(request_id, time.monotonic())
        self._no_first_token.discard(request_id)
        self._refused.pop(request_id, None)

    def _end_of(self, request: Request) -> End:
        return End.CUT_OFF if self._ends_all else ENDS.get(request.status, End.REFUSED)

    def _refuse(self, request_id: str, text: str, reason: Reason) -> None:
        self._refused[request_id] = text
        self._controller.refused(request_id, reason, text, time.monotonic())

    def _send_refusals(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        for request_id, reason in list(self._refused.items()):
            logger.error("request %s refused: %s", request_id, reason)
            self._side.metrics.add("layerkv_refused", 1)
            for request in self.finish_requests(request_id, RequestStatus.FINISHED_ERROR):
                of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
                of_client.outputs.append(
                    EngineCoreOutput(
                        request_id=request.request_id,
                        new_token_ids=[],
                        finish_reason=request.get_finished_reason(),
                        stop_reason=reason,
                        events=request.take_events(),
                        trace_headers=request.trace_headers,
                    )
                )

    def _note_first_tokens(self, outputs: Iterable[EngineCoreOutputs], now_s: float) -> bool | None:
        """Whether any first token of this step was late; None if there was none."""
        were_late: bool | None = None
        for of_client in outputs:
            for output in of_client.outputs:
                if output.new_token_ids and output.request_id in self._no_first_token:
                    self._no_first_token.discard(output.request_id)
                    were_late = bool(were_late) or not self._note_first_token(output.request_id, now_s)
        return were_late

    def _note_first_token(self, request_id: str, now_s: float) -> bool:
        """Count a first token; whether it was on time."""
        found = self._controller.first_token(request_id, now_s)
        if found is None:
            return True
        slo, on_time = found
        self._side.metrics.add("layerkv_ttft_slo_met" if on_time else "layerkv_ttft_slo_missed", 1, slo.name)
        return on_time

    # Telling -----------------------------------------------------------------------------------------------------

    def _make_controller(self) -> Controller:
        side, config = self._side, self._side.config
        geometry = side.geometry
        block_bytes = geometry.block_bytes  # of one worker: tensor-parallel ranks copy side by side
        shape = EngineShape(
            mode=config.mode,
            block_tokens=geometry.block_tokens,
            block_bytes=block_bytes,
            streamed_block_bytes=geometry.streamed_block_bytes,
            pool_blocks=geometry.pool_blocks - 1,
            zone_blocks=geometry.zone_blocks,
            host_blocks=side.ledger.host.count,
            can_chunk=self.scheduler_config.enable_chunked_prefill,
            longest_tokens=self.max_model_len,
            long_contexts=config.long_contexts,
        )
        profile = (
            generic_profile(block_bytes // geometry.block_tokens)
            if config.cost_profile is None
            else load_profile(config.cost_profile)
        )
        return Controller(
            self._policy_source.policy,
            shape,
            profile,
            is_measured=config.cost_profile is not None,
            keep_log=config.decision_log is not None,
            refuses_late=False,  # the gate does, with HTTP 429; who has passed it is served
        )

    def _report_reasons(self) -> None:
        reasons = self._controller.reasons
        if reasons:
            for reason, count in reasons.items():
                self._side.metrics.add("layerkv_decisions", count, reason)
            reasons.clear()

    def _report_backlog(self, outputs: dict[int, EngineCoreOutputs], now_s: float) -> None:
        """Tell the front ends what a new request would meet, if the policy refuses any under overload.

        As long as there are prompts, and once after the last: nothing waits, and all that came is counted.
        """
        controller = self._controller
        rejecting = [slo.name for slo in controller.policy.classes.values() if slo.overload == "reject"]
        is_due = now_s - self._last_word_s >= BACKLOG_INTERVAL_S
        if not rejecting or not self._owes_word or not (is_due or not controller.has_prompts()):
            return
        word = controller.word(self._taken_in_s, now_s)
        if word is None:
            return
        self._last_word_s, self._owes_word = now_s, controller.has_prompts()
        for name in rejecting:
            self._side.metrics.set("layerkv_prefill_backlog_seconds", word.classes[name].wait_s, name)
        tell(outputs, word, self._front_ends)

    def _report_capacity(self) -> None:
        """Tell what is active, and correct what vLLM counted as capacity."""
        geometry, config = self._side.geometry, self._side.config
        pool_tokens = (geometry.pool_blocks - 1) * geometry.block_tokens
        self.cache_config.kv_cache_size_tokens = pool_tokens
        self.cache_config.kv_cache_max_concurrency = pool_tokens / self.max_model_len
        logger.info(
            "layerkv is on (mode %s): pool %d blocks (%d tokens), lane zone %d blocks (%d tokens) in %d lane(s) taking "
            "%s of %s, host memory %d blocks (%s per worker), policy %s (%s); vLLM's own figures above count zone "
            "blocks as if they were pool blocks",
            config.mode,
            geometry.pool_blocks - 1,
            pool_tokens,
            geometry.zone_blocks,
            geometry.zone_blocks * geometry.block_tokens,
            geometry.num_lanes,
            format_bytes(geometry.num_lanes * geometry.lane_bytes),
            format_bytes(geometry.physical_bytes),
            self._ledger.host.count,
            format_bytes(self._ledger.host.count * geometry.block_bytes),
            config.policy_path or "built in",
            ", ".join(config.policy.classes),
        )


class LayerKVScheduler(LayerKVSchedulerMixin, Scheduler):
    """layerkv over vLLM's synchronous scheduler."""


class LayerKVAsyncScheduler(LayerKVSchedulerMixin, AsyncScheduler):
    """layerkv over vLLM's asynchronous scheduler."""
