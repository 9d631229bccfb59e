"""Leaving paused requests out of vLLM's steps.

Between steps a paused request is one that runs, so that ends, preemptions and resets find it as any other. For each
step it is taken out of ``running``. vLLM's V1 model runner keeps the state of a request that a step leaves out. V2 has
places for ``max_num_seqs`` states: there the worker is told that the request is preempted, and it comes back as a
preempted one that holds its blocks, the way a request does whose KV has been loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.v1.request import Request, RequestStatus

from layerkv.scheduler.snapshot import Decision
from layerkv.vllm_plugin.scheduler_view import SchedulerView

if TYPE_CHECKING:
    from layerkv.scheduler.controller import Controller
    from layerkv.scheduler.desk import Desk


class Pausing:
    """See the module. One per scheduler; decides nothing."""

    def __init__(self, scheduler: SchedulerView, controller: Controller, desk: Desk) -> None:
        self._scheduler = scheduler
        self._controller = controller
        self._desk = desk

    def pause(self, decision: Decision) -> None:
        """Pause as decided. A token that is on its way is still delivered."""
        s = self._scheduler
        for request_id in decision.pause:
            request = s.requests[request_id]
            request.spec_token_ids = []  # as in a preemption: drafts are known to the worker by the last batch
            if s.use_v2_model_runner:
                s.reset_preempted_req_ids.add(request_id)
            self._desk.pause(request_id, request.num_computed_tokens, decision.reasons[request_id])

    @contextmanager
    def left_out(self, decision: Decision | None = None) -> Iterator[None]:
        """vLLM schedules inside without those who are paused, and with those who are decided to go on."""
        paused = self._controller.paused
        if not paused:
            yield
            return
        s = self._scheduler
        back = [s.requests[r] for r in decision.resume if self._may_resume(r)] if decision is not None else []
        if not s.use_v2_model_runner:
            self._note_resumed(back)
            back = []
        away = [request for request in s.running if request.request_id in paused]
        s.running = [request for request in s.running if request.request_id not in paused]
        for request in back:
            request.status = RequestStatus.PREEMPTED
            s.kv_holding_waiting.prepend_request(request)
        try:
            yield
        finally:
            resumed = [request for request in back if request.status is RequestStatus.RUNNING]
            for request in back:
                if request not in resumed:  # no token or block was left for it
                    s.kv_holding_waiting.remove_requests((request,))
                    s.deferred_waiting.discard(request)
                    request.status = RequestStatus.RUNNING
            s.running += [request for request in away if request not in resumed]
            self._note_resumed(resumed)

    def _may_resume(self, request_id: str) -> bool:
        """Whether its last token has come: the worker is told it then."""
        return not self._scheduler.requests[request_id].num_in_flight_tokens

    def _note_resumed(self, requests: list[Request]) -> None:
        for request in requests:
            self._desk.resume(request.request_id)
