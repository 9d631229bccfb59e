"""The scheduler's memory and its decisions, for whoever runs the engine: vLLM's adapter, or the simulator.

The host tells what happens to requests and what the engine looks like before a step; the controller keeps the books
that decisions need (deadlines, lines, costs, lengths) and answers with a decision. It touches no engine and no clock:
every time is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from layerkv.config import SloClass, SloPolicy
from layerkv.core.cost import CostProfile, StepWork
from layerkv.scheduler.backlog import PrefillLine, Word
from layerkv.scheduler.costs import OnlineCost
from layerkv.scheduler.engine import EngineShape, EngineState
from layerkv.scheduler.host_share import HostShare
from layerkv.scheduler.lengths import (
    LOW_QUANTILE,
    MIDDLE_QUANTILE,
    UNKNOWN_TOKENS,
    LengthPredictor,
    MaxTokens,
    QuantileLengths,
)
from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.policy import decide
from layerkv.scheduler.prefill import late_prompts, step_seconds
from layerkv.scheduler.reasons import End, Event, LogEntry, Reason
from layerkv.scheduler.snapshot import (
    Decision,
    LayeredRequest,
    ParkedRequest,
    PrefixHit,
    ResidentRequest,
    Snapshot,
    WaitingRequest,
)
from layerkv.scheduler.tracker import DeadlineQueue, TrackedRequest

REPREDICT_TOKENS = 32
EXCHANGE_STEPS = 3
"""Steps until the blocks of a request parked to make room are surely free, asynchronous scheduling included."""


STORE_AHEAD_STEPS = 4
"""Steps between looks for a victim to store ahead; the forecast looks many times as far."""


class _Seen(NamedTuple):
    """What one pass over the running requests finds."""

    resident: list[ResidentRequest]
    layered: list[LayeredRequest]
    num_resident: int
    growth_blocks: int
    num_decodes: int
    decode_context: int
    prefilling_tokens: int
    under_way_s: float
    num_late: int
    decode_slack_s: float
    tightest_tpot_s: float


def _may_start(engine: EngineState, seen: _Seen) -> bool:
    """Whether a waiting prompt could start at all: there are tokens for it, and a slot, or somebody may leave one."""
    has_tokens = seen.prefilling_tokens + engine.held_tokens + seen.num_decodes < engine.budget_tokens
    somebody_leaves = any(r.prefill_done for r in seen.layered) or seen.growth_blocks > engine.free_blocks
    return has_tokens and (engine.free_slots > 0 or somebody_leaves)


class Controller:
    """See the module. One per engine; not thread-safe."""

    def __init__(
        self,
        policy: SloPolicy,
        shape: EngineShape,
        profile: CostProfile,
        *,
        is_measured: bool,
        limits: PolicyLimits | None = None,
        lengths: LengthPredictor | None = None,
        keep_log: bool = False,
        refuses_late: bool = True,
    ) -> None:
        """Begin with empty books.

        Args:
            policy: The objectives.
            shape: The engine.
            profile: Its costs.
            is_measured: Whether the profile's scale is that of this engine; else it is learned from the first steps.
            limits: The policy's constants.
            lengths: Predicts output lengths; by default what the policy says.
            keep_log: Whether :meth:`take_log` has entries.
            refuses_late: Whether decisions refuse what its class asks to be refused; False where a front end does.
        """
        self.policy = policy
        self.shape = shape
        self.cost = OnlineCost(profile, is_measured=is_measured)
        self.lengths = lengths or (QuantileLengths() if policy.length_prediction == "quantile" else MaxTokens())
        self.host_share = HostShare(shape.host_blocks, floor=shape.zone_blocks)
        self.tracked: dict[str, TrackedRequest] = {}
        self.waiting: DeadlineQueue[WaitingRequest] = DeadlineQueue()
        self.parked: DeadlineQueue[ParkedRequest] = DeadlineQueue()
        self._limits = limits or PolicyLimits()
        self._overtaken: dict[str, int] = {}
        self._is_cost_known = is_measured
        self._stored_blocks: dict[str, int] = {}
        self._steps_without_prefill = 0
        self._last_exchange_step = -EXCHANGE_STEPS
        self._step_s = 0.0
        self._line = PrefillLine()
        self._last_decided: tuple[Snapshot, int] | None = None
        self._most_are_late: bool | None = None
        self._keeps_log = keep_log
        self._refuses_late = refuses_late
        self._log: list[LogEntry] = []
        self.reasons: dict[Reason, int] = {}

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
    ) -> None:
        """A request has come in and waits."""
        tracked = TrackedRequest(
            slo=slo,
            arrival_s=arrival_s,
            max_tokens=max_tokens,
            rank=rank,
            can_layer=can_layer,
            in_one_step=in_one_step,
        )
        self.tracked[request_id] = tracked
        self.enqueue(request_id, num_tokens, 0)
        self._line.came(slo, tracked.prefill_cost_s, now_s)
        if self._keeps_log:
            facts = {"slo_class": slo.name, "ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "prompt_tokens": num_tokens}
            self._log.append(LogEntry(now_s, request_id, Event.ARRIVED, None, facts))

    def enqueue(self, request_id: str, num_tokens: int, num_output: int) -> None:
        """A request without KV waits for compute: a new one, or one whose KV was given up."""
        tracked = self.tracked.get(request_id)
        if tracked is None:
            return
        self.waiting.discard(request_id)
        self.parked.discard(request_id)
        self._stored_blocks.pop(request_id, None)
        self._refresh(tracked, num_output)
        if not self.policy.slo_scheduling:
            deadline_s = tracked.arrival_s
        elif tracked.first_token_s is None:
            deadline_s = tracked.ttft_deadline_s
        else:
            deadline_s = tracked.start_by_s(num_output, tracked.first_token_s, self._step_s)
        most_blocks = self._blocks_if_it_outgrows_pool(tracked, num_tokens, num_output)
        tracked.outgrows_pool = most_blocks > 0
        tracked.prefill_cost_s = self._nominal_s(num_tokens)
        self.waiting.add(
            WaitingRequest(
                request_id=request_id,
                deadline_s=deadline_s,
                num_tokens=num_tokens,
                num_blocks=-(-num_tokens // self.shape.block_tokens),
                can_layer=tracked.can_layer,
                weight=tracked.slo.weight,
                rank=tracked.rank,
                prefill_cost_s=tracked.prefill_cost_s,
                tokens_left=max(tracked.middle_tokens - num_output, 1),
                may_refuse=self._refuses_late and tracked.slo.overload == "reject" and tracked.first_token_s is None,
                most_blocks=most_blocks,
                in_one_step=tracked.in_one_step,
            )
        )

    def admitted(self, request_id: str, *, layered: bool, reason: Reason, step: int, now_s: float) -> float | None:
        """A waiting request has been given compute; returns how long it waited if that was the first time."""
        tracked = self.tracked[request_id]
        self.waiting.discard(request_id)
        self._overtaken.pop(request_id, None)
        self._line.started(tracked.prefill_cost_s, was_last=not self.waiting)
        tracked.resident_since_step = step
        event = Event.ADMITTED_LAYERED if layered else Event.ADMITTED_RESIDENT
        self._say(now_s, request_id, tracked, event, reason)
        if tracked.admitted_s is not None:
            return None
        tracked.admitted_s = now_s
        return max(now_s - tracked.arrival_s, 0.0)

    def park(
        self, request_id: str, *, num_computed: int, num_tokens: int, num_output: int, reason: Reason, now_s: float
    ) -> None:
        """A request has been parked: its KV of ``num_computed`` tokens is in host memory."""
        tracked = self.tracked[request_id]
        self._refresh(tracked, num_output)
        self._stored_blocks.pop(request_id, None)
        num_blocks = -(-max(num_computed + 1, num_tokens) // self.shape.block_tokens)
        if self.policy.slo_scheduling:
            deadline_s = tracked.start_by_s(num_output, now_s, self._step_s)
            deadline_s -= self.cost.view.load_s(num_blocks * self.shape.block_bytes)
        else:
            deadline_s = tracked.arrival_s
        self.parked.add(
            ParkedRequest(
                request_id=request_id,
                deadline_s=deadline_s,
                num_blocks=num_blocks,
                weight=tracked.slo.weight,
                rank=tracked.rank,
                tokens_left=max(tracked.middle_tokens - num_output, 1),
            )
        )
        self._say(now_s, request_id, tracked, Event.PARKED, reason)

    def fetched(self, request_id: str, *, step: int, now_s: float) -> None:
        """A parked request is on its way back into the pool."""
        tracked = self.tracked[request_id]
        self.parked.discard(request_id)
        self._overtaken.pop(request_id, None)
        tracked.resident_since_step = step
        self._say(now_s, request_id, tracked, Event.FETCHED, Reason.ITS_TURN)

    def recomputes(self, request_id: str, num_tokens: int, num_output: int, reason: Reason, now_s: float) -> None:
        """A request's KV has been given up: it waits to be computed again."""
        self.enqueue(request_id, num_tokens, num_output)
        tracked = self.tracked.get(request_id)
        if tracked is not None:
            self._say(now_s, request_id, tracked, Event.RECOMPUTES, reason)

    def copy_failed(self, request_id: str, num_output: int) -> bool:
        """A request's KV is lost to a failed copy; whether it is to be ended, and not to be computed again."""
        tracked = self.tracked.get(request_id)
        return tracked is not None and tracked.copy_failed(num_output)

    def dropped_ahead(self, request_id: str) -> None:
        """Nothing of a resident request is in host memory any more."""
        self._stored_blocks.pop(request_id, None)

    def stored_ahead(self, request_id: str, num_blocks: int, now_s: float) -> None:
        """So many leading blocks of a resident request are (or are being) copied to host memory."""
        self._stored_blocks[request_id] = num_blocks
        self._say(now_s, request_id, self.tracked[request_id], Event.STORED_AHEAD, None)

    def first_token(self, request_id: str, now_s: float) -> tuple[SloClass, bool] | None:
        """A request's first token has come out; its class and whether that was on time."""
        tracked = self.tracked.get(request_id)
        if tracked is None or tracked.first_token_s is not None:
            return None
        tracked.first_token_s = now_s
        on_time = now_s <= tracked.ttft_deadline_s
        if self._keeps_log:
            facts = {"ttft_s": round(now_s - tracked.arrival_s, 6), "on_time": on_time}
            self._log.append(LogEntry(now_s, request_id, Event.FIRST_TOKEN, None, facts))
        return tracked.slo, on_time

    def leave(self, request_id: str, *, num_output: int, end: End, now_s: float) -> None:
        """A request is gone, after ``num_output`` tokens: what that says about lengths is learned."""
        tracked = self.tracked.pop(request_id, None)
        makes_tokens = request_id not in self.parked and request_id not in self.waiting
        self.waiting.discard(request_id)
        self.parked.discard(request_id)
        self._overtaken.pop(request_id, None)
        self._stored_blocks.pop(request_id, None)
        if tracked is None:
            return
        if num_output and end is not End.REFUSED:
            is_bound = end is End.CUT_OFF or not makes_tokens
            self.lengths.observe(tracked.slo.name, num_output, is_bound=is_bound)
        if self._keeps_log:
            facts = {"output_tokens": num_output, "end": end.value}
            self._log.append(LogEntry(now_s, request_id, Event.FINISHED, None, facts))

    def refused(self, request_id: str, reason: Reason, text: str, now_s: float) -> None:
        """A request is not served."""
        self.waiting.discard(request_id)
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if self._keeps_log:
            self._log.append(LogEntry(now_s, request_id, Event.REFUSED, reason, {"text": text}))

    def step_done(
        self, work: StepWork, seconds: float, *, waited_s: float | None = None, firsts_late: bool | None = None
    ) -> None:
        """A step has ended: correct the costs, and eLLM's share of host memory.

        Args:
            work: What it did.
            seconds: How long it took.
            waited_s: How much of that it waited for copies; None if nobody knows.
            firsts_late: Whether any first token of it was late; None if there was none.
        """
        self._is_cost_known |= self.cost.observe(work, seconds, waited_s)
        if self.policy.adapt_host_share and (self._most_are_late is not None or firsts_late is not None):
            self.host_share.observe(decodes_are_late=self._most_are_late, first_was_late=firsts_late)
        self._most_are_late = None

    def set_policy(self, policy: SloPolicy) -> None:
        """New objectives, for requests that come from now on; those here keep the ones they came under.

        What a policy says beside its classes (its switches) holds for all at once, but who waits or is parked keeps
        its place in line.
        """
        if policy.length_prediction != self.policy.length_prediction:
            self.lengths = QuantileLengths() if policy.length_prediction == "quantile" else MaxTokens()
        self.policy = policy

    # Decisions ----------------------------------------------------------------------------------------------------

    def decide(
        self,
        engine: EngineState,
        now_s: float,
        *,
        is_startable: Callable[[WaitingRequest], bool] | None = None,
        is_fetchable: Callable[[ParkedRequest], bool] | None = None,
        hits: Callable[[Sequence[WaitingRequest]], Mapping[str, PrefixHit]] | None = None,
    ) -> tuple[Snapshot, Decision]:
        """What to do before the next step, and what that was decided from.

        Args:
            engine: The engine before the step.
            now_s: Current time.
            is_startable: Whether the engine could start a waiting request now.
            is_fetchable: Whether it could resume a parked one.
            hits: Looks up prefix-cache hits of the first waiting requests. Not asked while none of them could start.
        """
        snapshot = self.snapshot(engine, now_s, is_startable, is_fetchable, hits)
        decision = decide(snapshot, self._limits)
        self._last_decided = snapshot, decision.prefill_tokens
        self._note(decision, snapshot, engine.step)
        return snapshot, decision

    def snapshot(
        self,
        engine: EngineState,
        now_s: float,
        is_startable: Callable[[WaitingRequest], bool] | None = None,
        is_fetchable: Callable[[ParkedRequest], bool] | None = None,
        hits: Callable[[Sequence[WaitingRequest]], Mapping[str, PrefixHit]] | None = None,
    ) -> Snapshot:
        """The engine before a step, as the policy sees it; arguments as for :meth:`decide`.

        Renews predictions of lengths that are due, and remembers for later calls how long a bare step takes now and
        whether most requests that decode are late.
        """
        shape, policy = self.shape, self.policy
        waiting = [] if engine.is_paused else self.waiting.head(self._limits.scan, now_s, is_startable)
        seen = self._look(engine, now_s)
        self._line.look(now_s, seen.under_way_s)
        self._most_are_late = 2 * seen.num_late > seen.num_decodes if seen.num_decodes else None
        cost = self.cost.view if self._is_cost_known and policy.slo_scheduling else None
        num_decodes = seen.num_decodes + engine.resuming
        if cost is not None:
            self._step_s = cost.step_s(StepWork(num_decodes=max(num_decodes, 1), decode_context=seen.decode_context))
        host_used = shape.host_blocks - engine.free_host_blocks
        return Snapshot(
            now_s=now_s,
            mode=shape.mode,
            streamed_decode=policy.streamed_decode,
            long_contexts=shape.long_contexts,
            slo_scheduling=policy.slo_scheduling,
            frees_are_deferred=engine.steps_ahead > 0,
            block_tokens=shape.block_tokens,
            block_bytes=shape.block_bytes,
            streamed_block_bytes=shape.streamed_block_bytes or shape.block_bytes,
            pool_blocks=shape.pool_blocks,
            free_blocks=engine.free_blocks,
            growth_blocks=seen.growth_blocks,
            reserved_blocks=engine.reserved_blocks,
            zone_blocks=shape.zone_blocks,
            free_zone_blocks=engine.free_zone_blocks,
            host_blocks=shape.host_blocks,
            free_host_blocks=engine.free_host_blocks,
            early_host_blocks=max(min(self.host_share.limit - host_used, engine.free_host_blocks), 0),
            free_slots=engine.free_slots,
            budget_tokens=engine.budget_tokens,
            decode_tokens=num_decodes,
            decode_context=seen.decode_context,
            prefilling_tokens=seen.prefilling_tokens + engine.held_tokens,
            decode_slack_s=seen.decode_slack_s if shape.can_chunk and cost is not None else math.inf,
            tightest_tpot_s=seen.tightest_tpot_s,
            steps_without_prefill=self._steps_without_prefill,
            is_paused=engine.is_paused,
            can_exchange=engine.step - self._last_exchange_step >= EXCHANGE_STEPS,
            can_store_ahead=engine.step % STORE_AHEAD_STEPS == 0,
            cost=cost,
            num_resident=seen.num_resident,
            waiting=waiting,
            parked=self.parked.head(self._limits.scan_parked, now_s, is_fetchable),
            resident=seen.resident,
            layered=seen.layered,
            hits=hits(waiting) if hits is not None and waiting and _may_start(engine, seen) else {},
            overtaken=self._overtaken,
        )

    def is_quiet(self, num_running: int, free_blocks: int, steps_ahead: int) -> bool:
        """Whether there is nothing to decide: nobody stands in line, and no shortage of blocks is in sight.

        The host must know besides that no prompt is under way.
        """
        if self.waiting or self.parked:
            return False
        self._line.rest()
        per_request = 1 + steps_ahead + self._limits.ahead_steps // self.shape.block_tokens
        return free_blocks >= num_running * per_request

    def has_prompts(self) -> bool:
        """Whether any prompt waits, or was under way when it was last decided."""
        return bool(self.waiting) or self._line.is_busy

    def word(self, taken_in_s: float, now_s: float) -> Word | None:
        """What to tell front ends whose policy refuses under overload; None while nothing is known of costs,
        or nothing was decided.

        Args:
            taken_in_s: When the engine last took requests in.
            now_s: Current time.
        """
        if not self._is_cost_known or self._last_decided is None:
            return None
        snapshot, prefill_tokens = self._last_decided
        tokens = max(prefill_tokens, self._limits.min_prefill_tokens)
        step_s = step_seconds(snapshot, self.cost.view, tokens)
        return self._line.word(
            self.policy,
            self.waiting,
            lambda request_id: self.tracked[request_id].slo,
            late_prompts(snapshot, snapshot.waiting, prefill_tokens),
            now_s=now_s,
            age_s=max(now_s - taken_in_s, 0.0),
            expected_pace=self._nominal_s(tokens) / step_s if step_s > 0 else 1.0,
        )

    def _nominal_s(self, num_tokens: int) -> float:
        return self.cost.view._replace(prefill_factor=1.0).prefill_s(num_tokens)

    def take_log(self) -> list[LogEntry]:
        """Entries since the last call."""
        log, self._log = self._log, []
        return log

    def _look(self, engine: EngineState, now_s: float) -> _Seen:
        """One pass over the running requests; with hundreds of them, the dearest part of a decision."""
        tokens, steps_ahead, budget = self.shape.block_tokens, engine.steps_ahead, engine.budget_tokens
        step_s, step = self._step_s, engine.step
        tracked_of, stored_of = self.tracked, self._stored_blocks
        resident: list[ResidentRequest] = []
        layered: list[LayeredRequest] = []
        growth = num_decodes = num_late = context = prefilling = num_resident = 0
        under_way_s = 0.0
        slack_s = tpot_s = math.inf
        for r in engine.running:
            tracked = tracked_of.get(r.request_id)
            due_s = math.inf
            left = 1
            remaining = r.num_tokens - r.num_computed
            if tracked is not None:
                if r.num_output >= tracked.predict_again_at:
                    self._refresh(tracked, r.num_output)
                left = max(tracked.middle_tokens - r.num_output, 1)
                if not r.is_prefilling:
                    # TrackedRequest.start_by_s, written out: this line runs hundreds of times per decision
                    made, tpot = r.num_output or 1, tracked.tpot_s
                    first_s = tracked.first_token_s
                    due_s = (now_s if first_s is None else first_s) + tpot * made
                    if tracked.low_tokens > r.num_output and tpot > step_s:
                        due_s += (tracked.low_tokens - r.num_output) * (tpot - step_s)
                    if due_s - now_s > tracked.max_stall_s:
                        due_s = now_s + tracked.max_stall_s
                    if due_s < now_s:
                        num_late += 1  # who is late already holds nobody back
                    elif due_s < now_s + slack_s:
                        slack_s = due_s - now_s
                    if tpot < tpot_s:
                        tpot_s = tpot
            if r.is_prefilling:
                prefilling += remaining
                if tracked is not None:
                    under_way_s += tracked.prefill_cost_s * remaining / r.num_tokens
                new_tokens = min(remaining, budget)
            else:
                num_decodes += 1
                context += r.num_computed
                new_tokens = 1 + steps_ahead
            last_block = -(-(r.num_computed + new_tokens) // tokens)
            missing = max(last_block - r.num_blocks, 0)
            if r.is_layered:
                layered.append(
                    LayeredRequest(
                        r.request_id,
                        not r.is_prefilling,
                        -(-max(r.num_computed + 1, r.num_tokens) // tokens),
                        r.num_zone_blocks,
                        missing > 0 and not r.is_prefilling,  # a prompt's room is reserved
                        last_block > r.num_host_blocks,
                        tracked is not None and tracked.outgrows_pool,
                    )
                )
                continue
            num_resident += 1
            growth += missing
            if tracked is not None:
                num_blocks = -(-r.num_tokens // tokens) if r.is_prefilling else r.num_blocks
                resident.append(
                    ResidentRequest(
                        r.request_id,
                        due_s,
                        num_blocks,
                        step - tracked.resident_since_step,
                        tracked.can_layer and r.num_computed > 0 and not r.is_prefilling,
                        tracked.weight,
                        left,
                        r.num_computed,
                        stored_of.get(r.request_id, 0),
                        tracked.rank,
                    )
                )
        for request_id, num_blocks, num_output in engine.arriving:
            num_resident += 1
            tracked = tracked_of.get(request_id)
            left = 1 if tracked is None else max(tracked.middle_tokens - num_output, 1)
            resident.append(ResidentRequest(request_id, math.inf, num_blocks, 0, can_park=False, tokens_left=left))
        return _Seen(
            resident,
            layered,
            num_resident,
            growth,
            num_decodes,
            context,
            prefilling,
            under_way_s,
            num_late,
            slack_s,
            tpot_s,
        )

    def _blocks_if_it_outgrows_pool(self, tracked: TrackedRequest, num_tokens: int, num_output: int) -> int:
        """Blocks of the most tokens it may have, if by its predicted length the pool will not hold it; else 0.

        A wrong guess for the pool is put right when it has filled that: its KV is given up, and it comes here again.
        """
        shape = self.shape
        prompt_tokens = num_tokens - num_output
        most_tokens = min(prompt_tokens + tracked.max_tokens, shape.longest_tokens)
        likely_tokens = min(prompt_tokens + tracked.middle_tokens, most_tokens)
        if not shape.long_contexts or max(likely_tokens, num_tokens + 1) <= shape.pool_blocks * shape.block_tokens:
            return 0
        return -(-max(most_tokens, num_tokens) // shape.block_tokens)

    def _predict(self, tracked: TrackedRequest, num_output: int) -> None:
        """Without anything known: slack as if it made all it may, memory for a while ahead."""
        name, total = tracked.slo.name, self.lengths.total_tokens
        most = max(tracked.max_tokens, num_output + 1)
        low = total(name, num_output, most, LOW_QUANTILE)
        middle = total(name, num_output, most, MIDDLE_QUANTILE)
        tracked.low_tokens = most if low is None else low
        tracked.middle_tokens = min(most, num_output + UNKNOWN_TOKENS) if middle is None else middle
        tracked.predict_again_at = num_output + REPREDICT_TOKENS

    def _refresh(self, tracked: TrackedRequest, num_output: int) -> None:
        if num_output >= tracked.predict_again_at:
            self._predict(tracked, num_output)

    def _note(self, decision: Decision, snapshot: Snapshot, step: int) -> None:
        """Remember what the next decisions depend on, and say why."""
        for request_id in decision.overtaken:
            self._overtaken[request_id] = self._overtaken.get(request_id, 0) + 1
        if decision.made_room:
            self._last_exchange_step = step
        wants_prefill = bool(snapshot.waiting) or snapshot.prefilling_tokens > 0
        self._steps_without_prefill = (
            self._steps_without_prefill + 1 if wants_prefill and decision.prefill_tokens == 0 else 0
        )
        for reason in decision.reasons.values():
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        for request_id, reason in decision.waits.items():
            tracked = self.tracked.get(request_id)
            if tracked is not None and tracked.said is not reason:
                tracked.said = reason
                self.reasons[reason] = self.reasons.get(reason, 0) + 1
                if self._keeps_log:
                    facts = {
                        "free_blocks": snapshot.free_blocks,
                        "free_zone_blocks": snapshot.free_zone_blocks,
                        "free_host_blocks": snapshot.free_host_blocks,
                        "prefill_tokens": decision.prefill_tokens,
                    }
                    self._log.append(LogEntry(snapshot.now_s, request_id, Event.WAITS, reason, facts))

    def _say(self, now_s: float, request_id: str, tracked: TrackedRequest, event: Event, reason: Reason | None) -> None:
        tracked.said = event
        if self._keeps_log:
            self._log.append(LogEntry(now_s, request_id, event, reason))
