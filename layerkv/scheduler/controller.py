"""The scheduler's memory and its decisions, for whoever runs the engine: vLLM's adapter, or the simulator.

The host tells what happens to requests and what the engine looks like before a step; the controller keeps the books
that decisions need (deadlines, lines, costs, lengths) and answers with a decision. It touches no engine and no clock:
every time is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from layerkv.config import SloPolicy
from layerkv.core.cost import CostProfile, StepWork
from layerkv.scheduler.backlog import Word
from layerkv.scheduler.books import RequestBooks
from layerkv.scheduler.engine import EngineShape, EngineState
from layerkv.scheduler.lengths import LengthPredictor
from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.policy import decide
from layerkv.scheduler.prefill import late_prompts, step_seconds
from layerkv.scheduler.reasons import LogEntry, Reason, Resource
from layerkv.scheduler.running import look, may_start
from layerkv.scheduler.slots import next_turn_s
from layerkv.scheduler.snapshot import Decision, Lines, ParkedRequest, PrefixHit, Snapshot, WaitingRequest
from layerkv.scheduler.standing import Standing, standing

EXCHANGE_STEPS = 3
"""Steps until the blocks of a request parked to make room are surely free, asynchronous scheduling included. Not
measured: chosen by judgement, to cover vLLM's deferred frees."""


TOKEN_MEMORY_S = 8.0
"""How far back steps count in what a token takes. Not measured: chosen by simulated loads (2026-11-28, no result
file)."""


class Controller(RequestBooks):
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
        super().__init__(
            policy,
            shape,
            profile,
            is_measured=is_measured,
            lengths=lengths,
            keep_log=keep_log,
            refuses_late=refuses_late,
        )
        self._limits = limits or PolicyLimits()
        self._blocks_per_token = shape.blocks_per_token
        self._is_cost_known = is_measured
        self._steps_without_prefill = 0
        self.token_s = 0.0
        """Seconds from token to token of requests that decode, prompts' share of the steps included; 0 at first."""
        self._last_exchange_step = -EXCHANGE_STEPS
        self._promised: dict[str, int] = {}
        self._last_decided: tuple[Snapshot, int] | None = None
        self._standing: Standing | None = None
        self.waits: Mapping[str, Reason] = {}
        """Why requests wait that were looked at in the last decision; empty while nobody does."""
        self.behind: Mapping[str, Resource] = {}
        """Of those who wait behind another, what that one lacks."""
        self._no_turn_before_s = -math.inf

    def step_done(self, work: StepWork, seconds: float, *, waited_s: float | None = None) -> None:
        """A step has ended: correct the costs.

        Args:
            work: What it did.
            seconds: How long it took.
            waited_s: How much of that it waited for copies; None if nobody knows.
        """
        self._is_cost_known |= self.cost.observe(work, seconds, waited_s)
        if work.num_decodes and 0 < seconds < math.inf:
            share = 1 - math.exp(-seconds / TOKEN_MEMORY_S)
            self.token_s += (seconds - self.token_s) * (share if self.token_s else 1.0)

    # Decisions ----------------------------------------------------------------------------------------------------

    def decide(
        self,
        engine: EngineState,
        now_s: float,
        *,
        is_startable: Callable[[WaitingRequest], bool] | None = None,
        is_fetchable: Callable[[ParkedRequest], bool] | None = None,
        stays_fetchable: bool = False,
        hits: Callable[[Sequence[WaitingRequest]], Mapping[str, PrefixHit]] | None = None,
    ) -> tuple[Snapshot, Decision]:
        """What to do before the next step, and what that was decided from.

        Args:
            engine: The engine before the step.
            now_s: Current time.
            is_startable: Whether the engine could start a waiting request now.
            is_fetchable: Whether it could resume a parked one.
            stays_fetchable: Whether one that it could resume can be for as long as it is parked.
            hits: Looks up prefix-cache hits of the first waiting requests. Not asked while none of them could start.
        """
        snapshot = self.snapshot(engine, now_s, is_startable, is_fetchable, hits, stays_fetchable=stays_fetchable)
        decision = decide(snapshot, self._limits)
        self._last_decided = snapshot, decision.prefill_tokens
        self.waits, self.behind = decision.waits, decision.behind
        self._note(decision, snapshot, engine.step)
        # nobody tells when one becomes ready
        has_unready = any(line.has_unready for line in (self.waiting, self.parked, self.parked_long))
        takes_turns = bool(snapshot.load.num_paused or decision.pause)
        self._standing = (
            None
            if self._promised or has_unready or takes_turns
            else standing(snapshot, decision, self._limits.look_steps)
        )
        if decision.pause:
            self._no_turn_before_s = -math.inf  # the next decision sees them
        elif self.paused:
            self._no_turn_before_s = next_turn_s(snapshot, self.step_s)
        return snapshot, decision

    def snapshot(
        self,
        engine: EngineState,
        now_s: float,
        is_startable: Callable[[WaitingRequest], bool] | None = None,
        is_fetchable: Callable[[ParkedRequest], bool] | None = None,
        hits: Callable[[Sequence[WaitingRequest]], Mapping[str, PrefixHit]] | None = None,
        *,
        stays_fetchable: bool = False,
    ) -> Snapshot:
        """The engine before a step, as the policy sees it; arguments as for :meth:`decide`.

        Renews predictions of lengths that are due, and remembers for later calls how long a bare step takes now.
        """
        self.catch_up()
        policy, scan_parked = self.policy, self._limits.scan_parked
        waiting = [] if engine.is_paused else self.waiting.head(self._limits.scan, now_s, is_startable)
        load, under_way_s = look(self, engine, now_s, self._limits.look_steps)
        self.line.look(now_s, under_way_s)
        cost = self.cost.view if self._is_cost_known and policy.slo_scheduling else None
        if cost is not None:
            self.step_s = cost.step_s(
                StepWork(num_decodes=max(load.decode_tokens, 1), decode_context=load.decode_context)
            )
        if cost is None or not self.shape.can_chunk:
            load = load._replace(decode_slack_s=math.inf)
        lines = Lines(
            waiting=waiting,
            parked=self.parked.head(scan_parked, now_s, is_fetchable, stays_ready=stays_fetchable),
            parked_long=self.parked_long.head(scan_parked, now_s, is_fetchable, stays_ready=stays_fetchable)
            if self.parked_long
            else (),
            hits=hits(waiting)
            if hits is not None and waiting and may_start(engine, load, self.shape.tokens_per_decode)
            else {},
            overtaken=self.overtaken,
            promised=self._still_promised(engine.step),
            gone_blocks=self.gone_blocks,
        )
        return Snapshot(
            now_s=now_s,
            shape=self.shape,
            engine=engine,
            load=load,
            lines=lines,
            cost=cost,
            policy=policy.policy,
            streamed_decode=policy.streamed_decode,
            steps_without_prefill=self._steps_without_prefill,
            can_exchange=engine.step - self._last_exchange_step >= EXCHANGE_STEPS,
            token_s=self.token_s,
            can_store_ahead=engine.step % self._limits.look_steps == 0,
        )

    def is_quiet(self, num_running: int, free_blocks: int, steps_ahead: int, now_s: float) -> bool:
        """Whether there is nothing to decide: nobody waits, no turn is due, and no shortage of blocks is in sight.

        The host must know besides that no prompt is under way. It counts paused requests as running.
        """
        if self.waiting or self.parked or self.parked_long:
            return False
        if self.paused and (now_s >= self._no_turn_before_s or num_running - len(self.paused) < self.shape.slots):
            return False
        self.waits = {}
        self.line.rest()
        shape = self.shape
        ahead_tokens = self._limits.ahead_steps * shape.tokens_per_decode
        per_request = shape.step_blocks * (1 + steps_ahead) + ahead_tokens // shape.block_tokens
        return free_blocks >= num_running * per_request

    def stands(self, step: int, moves: int, num_running: int, free_blocks: int) -> bool:
        """Whether what was decided last still holds for this step: nobody comes in, and nobody leaves.

        Arguments as in :class:`~layerkv.scheduler.engine.EngineState`.
        """
        return self._standing is not None and self._standing.holds(step, moves, num_running, free_blocks)

    def set_policy(self, policy: SloPolicy) -> None:
        """As of :class:`RequestBooks`; the next step decides by it."""
        super().set_policy(policy)
        self._standing = None

    @property
    def next_turn_s(self) -> float:
        """When a paused request will be due; infinite if nobody is paused."""
        return self._no_turn_before_s if self.paused else math.inf

    def has_prompts(self) -> bool:
        """Whether any prompt waits, or was under way when it was last decided."""
        return bool(self.waiting) or self.line.is_busy

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
        if snapshot.policy == "fluid":  # who would be late is not held back for readers
            prefill_tokens = snapshot.most_prefill_tokens
        tokens = max(prefill_tokens, self._limits.min_prefill_tokens)
        step_s = step_seconds(snapshot, self.cost.view, tokens)
        return self.line.word(
            self.policy,
            self.waiting,
            lambda request_id: self.tracked[request_id].slo,
            late_prompts(snapshot, snapshot.lines.waiting, prefill_tokens),
            now_s=now_s,
            age_s=max(now_s - taken_in_s, 0.0),
            expected_pace=self.nominal_s(tokens) / step_s if step_s > 0 else 1.0,
        )

    def take_log(self) -> list[LogEntry]:
        """Entries since the last call."""
        return self.journal.take()

    @property
    def reasons(self) -> dict[Reason, int]:
        """How often each reason was given; whoever reports them clears it."""
        return self.journal.reasons

    def _still_promised(self, step: int) -> Collection[str]:
        """Claims that room was made for in the last few steps; whoever was granted it stands in no line any more."""
        if self._promised:
            self._promised = {r: made for r, made in self._promised.items() if 0 <= step - made <= EXCHANGE_STEPS}
        return frozenset(self._promised)

    def _note(self, decision: Decision, snapshot: Snapshot, step: int) -> None:
        """Remember what the next decisions depend on, and say why."""
        for request_id in decision.overtaken:
            self.overtaken[request_id] = self.overtaken.get(request_id, 0) + 1
        if decision.made_room:
            self._last_exchange_step = step
        for request_id in decision.room_for:
            self._promised[request_id] = step
        if snapshot.policy == "fluid" and (
            decision.prefill_tokens < snapshot.most_prefill_tokens or Reason.HELD in decision.waits.values()
        ):
            self.line.hold_back()
        wants_prefill = bool(snapshot.lines.waiting) or snapshot.load.prefilling_tokens > 0
        self._steps_without_prefill = (
            self._steps_without_prefill + 1 if wants_prefill and decision.prefill_tokens == 0 else 0
        )
        self.journal.decided(snapshot, decision, self.tracked)
