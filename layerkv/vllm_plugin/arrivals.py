"""Requests that come, start over, are refused and go: what the scheduler's books are told of them."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from layerkv.config import SloClass, slo_class_of
from layerkv.errors import ConfigError
from layerkv.scheduler.reasons import End, Reason
from layerkv.scheduler.sessions import turn_begins, turn_ended
from layerkv.vllm_plugin.compat import error_of_output
from layerkv.vllm_plugin.scheduler_view import SchedulerView
from layerkv.vllm_plugin.seeded import cannot_cut_seeded, is_seeded

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from layerkv.scheduler.controller import Controller
    from layerkv.scheduler.desk import Desk
    from layerkv.vllm_plugin.connector_scheduler import SchedulerSide
    from layerkv.vllm_plugin.reload import PolicySource

logger = init_logger(f"vllm.{__name__}")

MAX_CLOCK_SKEW_S = 3600.0
"""An arrival time further back than this is a clock that jumped, not a request that waited. Not measured: chosen by
judgement."""

ENDS = {
    RequestStatus.FINISHED_STOPPED: End.FINISHED,
    RequestStatus.FINISHED_LENGTH_CAPPED: End.FINISHED,
    RequestStatus.FINISHED_REPETITION: End.FINISHED,
    RequestStatus.FINISHED_ABORTED: End.LEFT,
}
"""What vLLM's ends mean here; all others were not served."""

PASSING = frozenset({Reason.OVERLOAD, Reason.COPIES_FAIL})
"""Why a request is refused that may be served if it comes again; all other reasons are in the request."""


class Refused(NamedTuple):
    """What the client of a request is told that ends unserved, and whether it helps to send it again."""

    text: str
    can_retry: bool


class Arrivals:
    """See the module. One per scheduler.

    Attributes:
        refused: Why, of requests that are ended with the next step's outputs.
    """

    def __init__(
        self,
        scheduler: SchedulerView,
        side: SchedulerSide,
        controller: Controller,
        desk: Desk,
        policy_source: PolicySource,
    ) -> None:
        self._scheduler = scheduler
        self._metrics = side.metrics
        self._controller = controller
        self._desk = desk
        self._policy_source = policy_source
        self._cannot_cut_seeded = cannot_cut_seeded(scheduler.vllm_config)
        self._no_first_token: set[str] = set()
        self._sessions: set[str] = set()
        self._gives_up_for = Reason.PREEMPTED  # why KV is given up just now; vLLM's own preemptions say nothing
        self.refused: dict[str, Refused] = {}
        self._ends_all = False

    def track(self, request: Request) -> None:
        """A request has come: find out its class and let it wait."""
        slo = self._slo_class_of(request)
        now_s = time.monotonic()
        self._controller.arrive(
            request.request_id,
            slo,
            now_s=now_s,
            arrival_s=now_s - _waited_s(request),
            num_tokens=request.num_tokens,
            max_tokens=request.max_tokens,
            rank=request.priority if self._scheduler.policy is SchedulingPolicy.PRIORITY else 0,
            # vLLM does not load external KV for these, or keeps their KV between turns
            can_layer=not request.skip_reading_prefix_cache and not request.resumable,
            in_one_step=self._cannot_cut_seeded and is_seeded(request.sampling_params),
            has_reader=_is_streamed(request),
            # while it is left out of steps, others could take all places for adapters, or a session's next turn begin
            can_pause=request.lora_request is None and not request.resumable,
        )
        self._keep_from_pool(request)
        self._no_first_token.add(request.request_id)
        if request.resumable:
            self._sessions.add(request.request_id)

    def next_input(self, session: Request) -> None:
        """A session's client has sent more: if it was waited for, the session's next turn begins."""
        if session.status is not RequestStatus.WAITING_FOR_STREAMING_REQ:
            now_s = time.monotonic()
            self._begin_turn(session, now_s - _waited_s(session), now_s)

    def _begin_turn(self, session: Request, arrival_s: float, now_s: float) -> None:
        self._no_first_token.add(session.request_id)
        turn_begins(
            self._controller,
            session.request_id,
            arrival_s=arrival_s,
            now_s=now_s,
            num_tokens=session.num_tokens - session.num_computed_tokens,
            max_tokens=session.max_tokens,
        )

    def _turn_ended(self, request_id: str, now_s: float) -> None:
        """A session has answered. What its client has sent meanwhile begins the next turn now."""
        session = self._scheduler.requests.get(request_id)
        if session is None:
            return
        turn_ended(self._controller, request_id, now_s)
        if session.status is not RequestStatus.WAITING_FOR_STREAMING_REQ:
            self._begin_turn(session, now_s, now_s)

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

    def _keep_from_pool(self, request: Request) -> None:
        """A request that decodes in the zone would hold blocks of a cached prefix all the while."""
        tracked = self._controller.tracked.get(request.request_id)
        if tracked is not None and tracked.can_layer:  # others may have asked for it themselves
            request.skip_reading_prefix_cache = tracked.outgrows_pool

    def recomputes(self, request: Request) -> None:
        """Give the request's KV up: it waits for compute again, with the tokens that are still on their way."""
        is_token_coming = request.num_stale_output_tokens > 0 and not request.drop_stale_output
        num_tokens = request.num_tokens + (self._controller.shape.tokens_per_decode if is_token_coming else 0)
        num_output, reason = request.num_output_tokens, self._gives_up_for
        self._desk.recomputes(
            request.request_id, num_tokens=num_tokens, num_output=num_output, reason=reason, now_s=time.monotonic()
        )
        self._keep_from_pool(request)

    @contextmanager
    def giving_up_for(self, reason: Reason) -> Iterator[None]:
        """Whoever gives KV up inside does so for this reason."""
        before, self._gives_up_for = self._gives_up_for, reason
        try:
            yield
        finally:
            self._gives_up_for = before

    def untrack(self, request: Request) -> None:
        """A request is about to end, or to be ended."""
        request_id = request.request_id
        now_s = time.monotonic()
        if request.num_output_tokens and request_id in self._no_first_token:  # it ends with its first token
            self._note_first_token(request_id, now_s)
        self._controller.catch_up_with(request_id)
        tracked = self._controller.tracked.get(request_id)
        if tracked is not None and (num_last := request.num_output_tokens - tracked.reader.num_tokens) > 0:
            self._controller.made_tokens(request_id, now_s, num_last)  # it ends before its last ones are noted
        self._no_first_token.discard(request_id)
        self._sessions.discard(request_id)
        self.refused.pop(request_id, None)

    @contextmanager
    def ending(self, *, everybody: bool) -> Iterator[None]:
        """Whoever ends inside does so with all others, or by itself."""
        self._ends_all = everybody
        try:
            yield
        finally:
            self._ends_all = False

    def end_of(self, request: Request) -> End:
        """How a request ended that vLLM has finished."""
        return End.CUT_OFF if self._ends_all else ENDS.get(request.status, End.REFUSED)

    def refuse(self, request_id: str, text: str, reason: Reason) -> None:
        """End a request with the next step's outputs; until then nobody looks at it."""
        self.refused[request_id] = Refused(text, can_retry=reason in PASSING)
        self._controller.refused(request_id, reason, text, time.monotonic())

    def send_refusals(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """End those that are refused, with these outputs."""
        if not self.refused:
            return
        for request_id, refused in list(self.refused.items()):
            logger.error("request %s refused: %s", request_id, refused.text)
            self._metrics.add("layerkv_refused", 1)
            ended: list[Request] = self._scheduler.finish_requests(request_id, RequestStatus.FINISHED_ERROR)
            for request in ended:
                # an error in its place takes tokens with it that its client has not read, and is in no metric
                error = {} if request.num_output_tokens else error_of_output(refused.text, can_retry=refused.can_retry)
                of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
                of_client.outputs.append(
                    EngineCoreOutput(
                        request_id=request.request_id,
                        new_token_ids=[],
                        finish_reason=request.get_finished_reason(),
                        stop_reason=refused.text,
                        events=request.take_events(),
                        trace_headers=request.trace_headers,
                        **error,
                    )
                )

    def note_tokens(self, outputs: Iterable[EngineCoreOutputs], now_s: float) -> None:
        """Tokens of this step have come out."""
        self._controller.catch_up()  # readers' clocks are fed in order
        made_tokens, no_first_token = self._controller.made_tokens, self._no_first_token
        for of_client in outputs:
            for output in of_client.outputs:
                num_tokens, request_id = len(output.new_token_ids), output.request_id
                if num_tokens:
                    if request_id in no_first_token:
                        no_first_token.discard(request_id)
                        self._note_first_token(request_id, now_s)
                    made_tokens(request_id, now_s, num_tokens)
                if output.finish_reason is not None and request_id in self._sessions:
                    self._turn_ended(request_id, now_s)

    def note_quiet_tokens(
        self, scheduled: SchedulerOutput, outputs: Collection[EngineCoreOutputs], now_s: float
    ) -> None:
        """As :meth:`note_tokens`, of a step in which nothing was decided: nearly always everybody made one token."""
        num_scheduled = scheduled.num_scheduled_tokens
        num_outputs = 0
        for of_client in outputs:
            num_outputs += len(of_client.outputs)
        is_one_each = num_outputs == len(num_scheduled) == scheduled.total_num_scheduled_tokens
        if self._no_first_token or self._sessions or not is_one_each:
            self.note_tokens(outputs, now_s)
        else:
            self._controller.made_one_each(num_scheduled, now_s)

    def _note_first_token(self, request_id: str, now_s: float) -> None:
        """Count a first token as on time or late."""
        found = self._controller.first_token(request_id, now_s)
        if found is not None:
            slo, on_time = found
            self._metrics.add("layerkv_ttft_slo_met" if on_time else "layerkv_ttft_slo_missed", 1, slo.name)


def _waited_s(request: Request) -> float:
    """Seconds since a request, or a session's latest input, came to the server."""
    waited_s: float = time.time() - request.arrival_time
    return waited_s if 0 <= waited_s <= MAX_CLOCK_SKEW_S else 0.0


def _is_streamed(request: Request) -> bool:
    """Whether somebody gets its tokens as they come."""
    params = request.sampling_params
    return params is None or params.output_kind is not RequestOutputKind.FINAL_ONLY
