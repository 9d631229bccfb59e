"""Carrying a decision out: before vLLM schedules, and after it has done what it would of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from layerkv.core.residency import Residency
from layerkv.errors import CapacityError
from layerkv.metrics import DECIDE_TIME
from layerkv.scheduler.prefill import prefill_share
from layerkv.scheduler.refusals import refusal_text
from layerkv.scheduler.snapshot import Decision, Snapshot
from layerkv.vllm_plugin.engine_reader import adapters, num_computed_for_good
from layerkv.vllm_plugin.pausing import Pausing
from layerkv.vllm_plugin.scheduler_view import SchedulerView
from layerkv.vllm_plugin.waiting_queue import WaitingQueue

if TYPE_CHECKING:
    from layerkv.scheduler.controller import Controller
    from layerkv.scheduler.desk import Desk
    from layerkv.vllm_plugin.arrivals import Arrivals
    from layerkv.vllm_plugin.connector_scheduler import SchedulerSide
    from layerkv.vllm_plugin.prefix_hits import PrefixHits

logger = init_logger(f"vllm.{__name__}")


class Execution:
    """See the module. One per scheduler; decides nothing."""

    def __init__(
        self,
        scheduler: SchedulerView,
        side: SchedulerSide,
        controller: Controller,
        desk: Desk,
        arrivals: Arrivals,
        queue: WaitingQueue,
        prefix_hits: PrefixHits,
        pausing: Pausing,
    ) -> None:
        self._scheduler = scheduler
        self._side = side
        self._metrics = side.metrics
        self._ledger = side.ledger
        self._controller = controller
        self._desk = desk
        self._arrivals = arrivals
        self._queue = queue
        self._prefix_hits = prefix_hits
        self._pausing = pausing

    @contextmanager
    def of(self, snapshot: Snapshot, decision: Decision, now_s: float) -> Iterator[None]:
        """Whatever vLLM schedules inside is what was decided; its limits and queues are its own again afterwards."""
        s = self._scheduler
        self._desk.begin_step(s.current_step + 1, now_s)  # vLLM counts it when it begins to schedule
        for refusal in decision.refuse:
            self._arrivals.refuse(refusal.request_id, refusal_text(snapshot, refusal), refusal.reason)
        for request_id in decision.drop_copy:
            self._desk.drop_ahead(request_id)
        for ahead in decision.store_ahead:
            tables = s.kv_cache_manager.get_block_ids(ahead.request_id)
            try:
                self._desk.store_ahead(ahead, tables, num_computed_for_good(s, s.requests[ahead.request_id]))
            except CapacityError as error:  # its park copies it then
                logger.debug("request %s is not stored ahead in this step: %s", ahead.request_id, error)
        if decision.park:
            self.park(decision, now_s)
        for request_id in decision.recompute:
            with self._arrivals.giving_up_for(decision.reasons[request_id]):
                self.give_up(s.requests[request_id], now_s)
        self._pausing.pause(decision)
        chosen = self._chosen(decision)
        saved = (
            s.max_num_scheduled_tokens,
            s.scheduler_config.long_prefill_token_threshold,
            s.adaptive_long_prefill_threshold,
            s.max_num_active_reqs,
        )
        max_loras = 0 if s.lora_config is None else s.lora_config.max_loras
        held: list[Request] = []
        self._metrics.add(DECIDE_TIME, time.monotonic() - now_s)
        try:
            with self._pausing.left_out(decision):
                held = limit_prefill(s, snapshot, decision)
                self._queue.show(chosen)
                yield
        finally:
            (
                s.max_num_scheduled_tokens,
                s.scheduler_config.long_prefill_token_threshold,
                s.adaptive_long_prefill_threshold,
                s.max_num_active_reqs,
            ) = saved
            if s.lora_config is not None:
                s.lora_config.max_loras = max_loras
            s.running += held
            self._queue.show(())
            if decision.back_to_zone:  # whom vLLM skips that has computed tokens, it takes for one with KV
                self._take_back(chosen)
        self._note_started(decision)

    def park(self, decision: Decision, now_s: float) -> None:
        """Park as decided; vLLM sees preemptions."""
        s = self._scheduler
        parked = [s.requests[request_id] for request_id in decision.park]
        leaving = set(parked)
        s.running = [request for request in s.running if request not in leaving]
        for request in parked:
            request_id = request.request_id
            tables = s.kv_cache_manager.get_block_ids(request_id)
            self._desk.park(
                request_id,
                tables,
                num_computed=num_computed_for_good(s, request),
                num_tokens=request.num_tokens,
                num_output=request.num_output_tokens,
                reason=decision.reasons[request_id],
            )
            s._preempt_request(request, now_s)  # resets its counts; what it has in flight is still delivered

    def give_up(self, request: Request, now_s: float) -> None:
        """vLLM's own preemption: the request's KV is computed again."""
        s = self._scheduler
        s.running.remove(request)
        s._preempt_request(request, now_s)

    def _chosen(self, decision: Decision) -> list[Request]:
        """Whom vLLM shall find in its waiting queue in this step, in order; layered ones get their reservations."""
        s = self._scheduler
        chosen = [s.requests[request_id] for request_id in decision.fetch]
        for admission in (*decision.back_to_zone, *decision.admit):
            request = s.requests[admission.request_id]
            try:
                hashes = self._side.hashes_to_find(request) if admission.layered else ()
                self._desk.reserve(admission, hashes)
            except CapacityError as error:  # what it was decided from has changed: it waits for the next step
                logger.debug("request %s is not admitted in this step: %s", admission.request_id, error)
                continue
            # One that comes back to the zone goes on there: vLLM asks no cache for what it says it has computed.
            request.num_computed_tokens = self._ledger.parked_tokens(admission.request_id)
            chosen.append(request)
        return chosen + self._strangers()

    def _strangers(self) -> list[Request]:
        """Requests in the queue that the policy does not know: vLLM alone moves them, so they stay visible.

        While no new request may start, none of them does: whoever is in this queue has no KV.
        """
        s = self._scheduler
        if s.pause_state is not PauseState.UNPAUSED:
            return []
        controller = self._controller
        if len(s.waiting) == len(controller.waiting) + controller.num_parked + len(self._arrivals.refused):
            return []
        known = (controller.waiting, controller.parked, controller.parked_long, self._arrivals.refused)
        return [request for request in s.waiting if not any(request.request_id in views for views in known)]

    def _take_back(self, chosen: list[Request]) -> None:
        """Who has not started waits in our queue, wherever vLLM has put it."""
        for request in chosen:
            if self._ledger.residency.get(request.request_id) is Residency.PARKED:
                self._scheduler.kv_holding_waiting.remove_requests((request,))
                self._queue.add_request(request)

    def _note_started(self, decision: Decision) -> None:
        """Bring the books in line with what vLLM did of what was decided."""
        metrics = self._metrics
        for request_id in decision.fetch:
            if self._ledger.residency[request_id] is Residency.PARKED:
                metrics.add("layerkv_declined", 1)
        for admission in decision.back_to_zone:
            if self._ledger.residency[admission.request_id] is Residency.PARKED:
                metrics.add("layerkv_declined", 1)
                self._scheduler.requests[admission.request_id].num_computed_tokens = 0
                self._desk.declined(admission.request_id)
        for admission in decision.admit:
            request = self._scheduler.requests.get(admission.request_id)
            if request is None:
                continue
            if request.status is RequestStatus.RUNNING:
                waited_s = self._desk.admitted(admission.request_id, decision.reasons[admission.request_id])
                if waited_s is not None:
                    metrics.observe("layerkv_admission_wait_seconds", waited_s)
                continue
            metrics.add("layerkv_declined", 1)
            self._prefix_hits.forget(admission.request_id)
            self._desk.declined(admission.request_id)


def limit_prefill(s: SchedulerView, snapshot: Snapshot, decision: Decision) -> list[Request]:
    """Hold prompts to the decided tokens, so that decodes and resuming requests get theirs.

    vLLM serves running requests in list order and a prompt takes all it can, so prompts go last and each is
    limited to its share. Starting a fetch costs no token, but vLLM's scan ends when none is left.

    Returns:
        Running prompts that vLLM must not see in this step. No limit is low enough for a share of nothing: a
        single token of a layered prompt would load all its chunks again, and take the token a fetch needs.
    """
    prefilling = [request for request in s.running if request.is_prefill_chunk]
    num_decodes = snapshot.load.decode_tokens - len(decision.pause) + len(decision.resume)
    tokens_per_decode = 1 + s.num_spec_tokens
    s.max_num_scheduled_tokens, share = prefill_share(
        s.max_num_scheduled_tokens,
        decode_tokens=num_decodes + _num_drafts(s, snapshot),
        prefill_tokens=decision.prefill_tokens,
        num_prompts=len(prefilling),
        spare_tokens=(1 if decision.fetch else 0) + len(decision.back_to_zone) * tokens_per_decode,
    )
    if decision.has_whole_prompt:
        s.scheduler_config.long_prefill_token_threshold = 0
    if prefilling:
        decoding = [request for request in s.running if not request.is_prefill_chunk]
        if decision.prefill_tokens == 0 and decoding:
            s.running = decoding
            s.max_num_active_reqs -= len(prefilling)
            if s.lora_config is not None:  # nor is the place of an adapter free that comes back with the next step
                s.lora_config.max_loras -= len(adapters(prefilling) - adapters(decoding))
            return prefilling
        s.running = decoding + prefilling
        share = max(share, tokens_per_decode)  # vLLM makes room for drafts, and does not look at the threshold first
        threshold = s.scheduler_config.long_prefill_token_threshold
        s.scheduler_config.long_prefill_token_threshold = min(share, threshold) if threshold else share
        s.adaptive_long_prefill_threshold = False  # it would raise the share again
    return []


def _num_drafts(s: SchedulerView, snapshot: Snapshot) -> int:
    """Tokens that the step computes for requests which decode, beyond one for each."""
    if not s.num_spec_tokens:
        return 0
    drafts = sum(len(request.spec_token_ids) for request in s.running if not request.is_prefill_chunk)
    return drafts + snapshot.engine.resuming * s.num_spec_tokens  # vLLM makes room for drafts that are not there yet
