"""The books of requests that decisions need: who is here, who stands in which line, how long each will go on.

The host tells what happens to a request, in the order in which it happens; times are handed in.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from layerkv.config import SloClass, SloPolicy
from layerkv.core.cost import CostProfile
from layerkv.scheduler.backlog import PrefillLine
from layerkv.scheduler.costs import OnlineCost
from layerkv.scheduler.engine import EngineShape
from layerkv.scheduler.journal import Journal
from layerkv.scheduler.lengths import (
    LOW_QUANTILE,
    MIDDLE_QUANTILE,
    UNKNOWN_TOKENS,
    LengthPredictor,
    MaxTokens,
    QuantileLengths,
)
from layerkv.scheduler.reasons import End, Event, Reason
from layerkv.scheduler.snapshot import ParkedRequest, WaitingRequest
from layerkv.scheduler.steady import SteadySteps
from layerkv.scheduler.streams import Streams
from layerkv.scheduler.tracker import DeadlineQueue, TrackedRequest

REPREDICT_TOKENS = 32
"""Output tokens after which a request's length is predicted anew. Not measured: chosen by judgement."""


class RequestBooks:
    """See the module. One per engine; not thread-safe.

    Attributes:
        policy: The objectives in force.
        shape: The engine.
        cost: What steps and copies cost, as far as it is known by now.
        lengths: Predicts output lengths.
        journal: What is said of requests.
        tracked: All requests that are here.
        waiting: Those without KV.
        parked: Those with their KV in host memory that go on in the pool,
        parked_long: and those that go on in the zone, because they outgrow the pool.
        paused: Residents that steps leave out.
        line: Prompts under way and in line, for what front ends are told.
        overtaken: In how many steps a request was the one charged with being overtaken, by id.
        streams: What readers got, for whoever reports it.
        step_s: Seconds of a step that computes no prompt, as of the last look.
        come_blocks: Blocks of all prompts that ever came,
        gone_blocks: and of those whose requests are gone.
    """

    def __init__(
        self,
        policy: SloPolicy,
        shape: EngineShape,
        profile: CostProfile,
        *,
        is_measured: bool,
        lengths: LengthPredictor | None,
        keep_log: bool,
        refuses_late: bool,
    ) -> None:
        """Begin with empty books; arguments as for the controller."""
        self.policy = policy
        self.shape = shape
        self.cost = OnlineCost(profile, is_measured=is_measured)
        self.lengths = lengths or (QuantileLengths() if policy.length_prediction == "quantile" else MaxTokens())
        self.journal = Journal(keeps_log=keep_log)
        self.tracked: dict[str, TrackedRequest] = {}
        self.waiting: DeadlineQueue[WaitingRequest] = DeadlineQueue()
        self.parked: DeadlineQueue[ParkedRequest] = DeadlineQueue()
        self.parked_long: DeadlineQueue[ParkedRequest] = DeadlineQueue()
        self.paused: set[str] = set()
        self.line = PrefillLine()
        self.overtaken: dict[str, int] = {}
        self.streams = Streams()
        self.step_s = 0.0
        self.come_blocks = self.gone_blocks = 0
        self._refuses_late = refuses_late
        self._steady = SteadySteps()

    # What happens to requests -------------------------------------------------------------------------------------

    def arrive(
        self,
        request_id: str,
        slo: SloClass,
        *,
        now_s: float,
        arrival_s: float,
        num_tokens: int,
        max_tokens: int,
        rank: int = 0,
        can_layer: bool = True,
        in_one_step: bool = False,
        has_reader: bool = True,
        can_pause: bool = True,
    ) -> None:
        """A request has come in and waits."""
        self.catch_up()  # of one before it with the same id
        prompt_blocks = self.shape.blocks_at_most(num_tokens)
        self.come_blocks += prompt_blocks
        tracked = self.tracked[request_id] = TrackedRequest(
            slo=slo,
            arrival_s=arrival_s,
            max_tokens=max_tokens,
            rank=rank,
            can_layer=can_layer,
            in_one_step=in_one_step,
            has_reader=has_reader,
            prompt_blocks=prompt_blocks,
            ticket_blocks=self.come_blocks,
            can_pause=can_pause,
        )
        self.enqueue(request_id, num_tokens, 0)
        self.line.came(slo, tracked.prefill_cost_s, now_s)
        self.journal.tell_arrival(now_s, request_id, slo, num_tokens)

    def enqueue(self, request_id: str, num_tokens: int, num_output: int) -> None:
        """A request without KV waits for compute: a new one, or one whose KV was given up."""
        self.catch_up()
        tracked = self.tracked.get(request_id)
        if tracked is None:
            return
        self._leave_lines(request_id)
        self.paused.discard(request_id)
        self.refresh(tracked, num_output)
        if not self.policy.slo_scheduling:
            deadline_s = tracked.arrival_s
        elif tracked.first_token_s is None:
            deadline_s = tracked.ttft_deadline_s
        elif self.policy.policy == "fluid":
            dry_s = tracked.dry_s(num_output, tracked.first_token_s, self.step_s)
            deadline_s = tracked.flows_until_s(dry_s)
        else:
            deadline_s = tracked.start_by_s(num_output, tracked.first_token_s, self.step_s)
        most_blocks = self._blocks_if_it_outgrows_pool(tracked, num_tokens, num_output)
        tracked.most_blocks = most_blocks
        tracked.prefill_cost_s = self.nominal_s(num_tokens)
        self.waiting.add(
            WaitingRequest(
                request_id=request_id,
                deadline_s=deadline_s,
                num_tokens=num_tokens,
                num_blocks=self.shape.blocks_at_most(num_tokens + self.shape.lookahead_tokens),
                can_layer=tracked.can_layer,
                weight=tracked.slo.weight,
                rank=tracked.rank,
                prefill_cost_s=tracked.prefill_cost_s,
                tokens_left=max(tracked.middle_tokens - num_output, 1),
                may_refuse=self._refuses_late and tracked.slo.overload == "reject" and tracked.first_token_s is None,
                most_blocks=most_blocks,
                in_one_step=tracked.in_one_step,
                ticket_blocks=tracked.ticket_blocks if tracked.first_token_s is None else math.inf,
            )
        )

    def admitted(self, request_id: str, *, layered: bool, reason: Reason, step: int, now_s: float) -> float | None:
        """A waiting request has been given compute; returns how long it waited if that was the first time."""
        tracked = self.tracked[request_id]
        self.waiting.discard(request_id)
        self.overtaken.pop(request_id, None)
        tracked.prefill_rest_s = tracked.prefill_cost_s
        self.line.started(tracked.prefill_cost_s, was_last=not self.waiting)
        tracked.resident_since_step, tracked.resident_since_s, tracked.turn_since_step = step, now_s, step
        tracked.stream.comes_back()
        event = Event.ADMITTED_LAYERED if layered else Event.ADMITTED_RESIDENT
        self.journal.say(now_s, request_id, tracked, event, reason)
        if tracked.admitted_s is not None:
            return None
        tracked.admitted_s = now_s
        return max(now_s - tracked.arrival_s, 0.0)

    def park(
        self, request_id: str, *, num_computed: int, num_tokens: int, num_output: int, reason: Reason, now_s: float
    ) -> None:
        """A request has been parked: its KV of ``num_computed`` tokens is in host memory."""
        self.catch_up()
        tracked = self.tracked[request_id]
        self.paused.discard(request_id)
        self.refresh(tracked, num_output)
        tracked.prefill_rest_s = 0.0
        tracked.parked_tokens = num_computed
        num_blocks = self.shape.blocks_to_fetch(num_tokens, num_computed)
        dry_s = tracked.dry_s(num_output, now_s, self.step_s)  # whatever the policy: the next one may ask
        load_s = self.cost.view.load_s(num_blocks * self.shape.block_bytes)
        if self.policy.policy == "fluid":
            deadline_s = tracked.flows_until_s(dry_s) - load_s
        elif self.policy.slo_scheduling:
            deadline_s = tracked.start_by_s(num_output, now_s, self.step_s) - load_s
        else:
            deadline_s = tracked.arrival_s
        (self.parked_long if tracked.outgrows_pool else self.parked).add(
            ParkedRequest(
                request_id=request_id,
                deadline_s=deadline_s,
                num_blocks=num_blocks,
                weight=tracked.slo.weight,
                rank=tracked.rank,
                tokens_left=max(tracked.middle_tokens - num_output, 1),
                dry_s=dry_s,
                tpot_s=tracked.tpot_s,
                is_fresh=num_output <= 1,
                zone_blocks=tracked.most_blocks,
            )
        )
        tracked.stream.leaves(Event.PARKED, reason)
        self.journal.say(now_s, request_id, tracked, Event.PARKED, reason)

    def fetched(self, request_id: str, *, step: int, now_s: float, in_zone: bool = False) -> None:
        """A parked request is on its way back into the pool, or goes on in the zone."""
        tracked = self.tracked[request_id]
        self._leave_lines(request_id)
        self.overtaken.pop(request_id, None)
        tracked.resident_since_step, tracked.resident_since_s, tracked.turn_since_step = step, now_s, step
        tracked.stream.comes_back()
        event, reason = (Event.BACK_IN_ZONE, Reason.ZONE_TURN) if in_zone else (Event.FETCHED, Reason.ITS_TURN)
        self.journal.say(now_s, request_id, tracked, event, reason)

    def outgrows_pool(self, request_id: str) -> bool:
        """Whether it decodes in the zone, because it is expected to become longer than the pool."""
        tracked = self.tracked.get(request_id)
        return tracked is not None and tracked.outgrows_pool

    @property
    def num_parked(self) -> int:
        """Requests with their KV in host memory."""
        return len(self.parked) + len(self.parked_long)

    def pause(self, request_id: str, num_computed: int, reason: Reason, *, step: int, now_s: float) -> None:
        """A resident has left the batch, and keeps its blocks."""
        tracked = self.tracked[request_id]
        self.paused.add(request_id)
        tracked.turn_since_step, tracked.parked_tokens = step, num_computed
        tracked.stream.leaves(Event.PAUSED, reason)
        self.journal.say(now_s, request_id, tracked, Event.PAUSED, reason)

    def resume(self, request_id: str, *, step: int, now_s: float) -> None:
        """A paused request is in the batch again."""
        tracked = self.tracked[request_id]
        self.paused.discard(request_id)
        tracked.turn_since_step = step
        tracked.stream.comes_back()
        self.journal.say(now_s, request_id, tracked, Event.RESUMED, Reason.SLOT_FREE)

    def recomputes(self, request_id: str, num_tokens: int, num_output: int, reason: Reason, now_s: float) -> None:
        """A request's KV has been given up: it waits to be computed again."""
        tracked = self.tracked.get(request_id)
        if tracked is not None:
            self._give_up_prefill(tracked)
            self.enqueue(request_id, num_tokens, num_output)
            tracked.stream.leaves(Event.RECOMPUTES, reason)
            self.journal.say(now_s, request_id, tracked, Event.RECOMPUTES, reason)

    def copy_failed(self, request_id: str, num_output: int) -> bool:
        """A request's KV is lost to a failed copy; whether it is to be ended, and not to be computed again."""
        tracked = self.tracked.get(request_id)
        return tracked is not None and tracked.copy_failed(num_output)

    def stored_ahead(self, request_id: str, now_s: float) -> None:
        """Blocks of a resident request are being copied to host memory."""
        tracked = self.tracked[request_id]
        if tracked.said is not Event.STORED_AHEAD:
            self.journal.say(now_s, request_id, tracked, Event.STORED_AHEAD, None)

    def first_token(self, request_id: str, now_s: float) -> tuple[SloClass, bool] | None:
        """A request's first token has come out; its class and whether that was on time."""
        tracked = self.tracked.get(request_id)
        if tracked is None or tracked.first_token_s is not None:
            return None
        tracked.first_token_s = now_s
        tracked.prefill_rest_s = 0.0
        on_time = now_s <= tracked.ttft_deadline_s
        ttft_s = round(now_s - tracked.arrival_s, 6)
        self.journal.write(now_s, request_id, Event.FIRST_TOKEN, ttft_s=ttft_s, on_time=on_time)
        return tracked.slo, on_time

    def made_tokens(self, request_id: str, at_s: float, num_tokens: int = 1, every_s: float = 0.0) -> None:
        """Tokens of a request have come out: see :meth:`layerkv.figures.ReaderClock.add`."""
        tracked = self.tracked.get(request_id)
        if tracked is not None and (pause := self.streams.made(tracked, at_s, num_tokens, every_s)) is not None:
            self.journal.tell_pause(at_s, request_id, pause)

    def made_one_each(self, request_ids: Collection[str], at_s: float) -> None:
        """Each of these has made one token, in a step in which nothing was decided; noted with those of like steps."""
        if not self._steady.add(request_ids, at_s):
            self.catch_up()
            self._steady.add(request_ids, at_s)

    def catch_up(self) -> None:
        """Note what :meth:`made_one_each` has not noted yet: from now on readers' clocks are right."""
        if (tokens := self._steady.take()) is not None:
            for request_id in self._steady.request_ids:
                self.made_tokens(request_id, *tokens)

    def catch_up_with(self, request_id: str) -> None:
        """As :meth:`catch_up`, for one request that is about to end."""
        if (tokens := self._steady.leave(request_id)) is not None:
            self.made_tokens(request_id, *tokens)

    def leave(self, request_id: str, *, num_output: int, end: End, now_s: float, made_tokens: bool = True) -> None:
        """A request is gone, after ``num_output`` tokens: what that says about lengths is learned.

        ``made_tokens`` is False if it made none when it left: it waited, was parked, or was being fetched.
        """
        self.catch_up_with(request_id)
        tracked = self.tracked.pop(request_id, None)
        # nor does a paused one; it ends by a token that was on its way
        made_tokens &= end is End.FINISHED or request_id not in self.paused
        self._leave_lines(request_id)
        self.paused.discard(request_id)
        self.overtaken.pop(request_id, None)
        if tracked is None:
            return
        self.gone_blocks += tracked.prompt_blocks
        if end is not End.FINISHED:
            self._give_up_prefill(tracked)
        if tracked.awaits_input:
            return  # the end of its last turn was its own
        if num_output and end is not End.REFUSED:
            self.lengths.observe(tracked.slo.name, num_output, is_bound=end is End.CUT_OFF or not made_tokens)
        pause = self.streams.ended(tracked, end, now_s)
        self.journal.tell_end(now_s, request_id, tracked, num_output, end, pause)

    def refused(self, request_id: str, reason: Reason, text: str, now_s: float) -> None:
        """A request is not served."""
        self.waiting.discard(request_id)
        self.journal.count((reason,))
        self.journal.write(now_s, request_id, Event.REFUSED, reason, text=text)

    def _leave_lines(self, request_id: str) -> None:
        for line in (self.waiting, self.parked, self.parked_long):
            line.discard(request_id)

    def _give_up_prefill(self, tracked: TrackedRequest) -> None:
        """If a request's prefill is under way, it does not go on."""
        self.line.gave_up(tracked.prefill_rest_s)
        tracked.prefill_rest_s = 0.0

    def set_policy(self, policy: SloPolicy) -> None:
        """New objectives, for requests that come from now on; those here keep the ones they came under.

        What a policy says beside its classes (its switches) holds for all at once, but who waits or is parked keeps
        its place in line.
        """
        if policy.length_prediction != self.policy.length_prediction:
            self.lengths = QuantileLengths() if policy.length_prediction == "quantile" else MaxTokens()
        self.policy = policy

    # Predictions ---------------------------------------------------------------------------------------------------

    def _blocks_if_it_outgrows_pool(self, tracked: TrackedRequest, num_tokens: int, num_output: int) -> int:
        """Blocks of the most tokens it may have, if by its predicted length the pool will not hold it; else 0.

        A wrong guess for the pool is put right when it has filled that: its KV is given up, and it comes here again.
        """
        shape = self.shape
        prompt_tokens = num_tokens - num_output
        most_tokens = min(prompt_tokens + tracked.max_tokens, shape.longest_tokens)
        likely_tokens = min(prompt_tokens + tracked.middle_tokens, most_tokens)
        if not shape.long_contexts or max(likely_tokens, num_tokens + 1) <= shape.fetchable_blocks * shape.block_tokens:
            return 0
        num_drafts = 2 * (shape.tokens_per_decode - 1) + shape.lookahead_tokens  # of a step in flight and of the next
        most_tokens = min(max(most_tokens, num_tokens) + num_drafts, shape.longest_tokens)
        return -(-most_tokens // shape.block_tokens)

    def _predict(self, tracked: TrackedRequest, num_output: int) -> None:
        """Without anything known: slack as if it made all it may, memory for a while ahead."""
        name, total = tracked.slo.name, self.lengths.total_tokens
        most = max(tracked.max_tokens, num_output + 1)
        low = total(name, num_output, most, LOW_QUANTILE)
        middle = total(name, num_output, most, MIDDLE_QUANTILE)
        tracked.low_tokens = most if low is None else low
        if middle is None:  # by slices, a pool is shared whatever the lengths are: nobody is taken to end soon
            middle = most if self.policy.policy == "fluid" else min(most, num_output + UNKNOWN_TOKENS)
        tracked.middle_tokens = middle
        tracked.predict_again_at = num_output + REPREDICT_TOKENS

    def refresh(self, tracked: TrackedRequest, num_output: int) -> None:
        """Predict a request's length anew if that is due."""
        if num_output >= tracked.predict_again_at:
            self._predict(tracked, num_output)

    def nominal_s(self, num_tokens: int) -> float:
        """Seconds of a prefill by the profile, not corrected online."""
        return self.cost.view._replace(prefill_factor=1.0).prefill_s(num_tokens)
