"""layerkv on the virtual engine: the production controller decides, the production ledger keeps the books.

What vLLM's adapter does with a decision is done here on counts and virtual copies: loads of fetches queue on one link,
stores before a step hold it up, layer-wise copies are part of the step's cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from layerkv.config import Mode, SloPolicy
from layerkv.core.cost import StepWork, seconds_per_byte
from layerkv.core.ledger import KVLedger
from layerkv.core.residency import Residency
from layerkv.core.transfer import StepPlan, num_blocks
from layerkv.scheduler.controller import Controller
from layerkv.scheduler.desk import Desk
from layerkv.scheduler.engine import EngineShape, EngineState, Running
from layerkv.scheduler.lengths import LengthPredictor
from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.prefill import prefill_share
from layerkv.scheduler.reasons import End, Reason
from layerkv.scheduler.refusals import refusal_text
from layerkv.scheduler.snapshot import Decision, Refusal, Snapshot
from layerkv.sim.engine import EngineSetup, Live, Scheduled, SimRequest, VirtualEngine
from layerkv.sim.outcome import SimOutcome

GROWTH_TOKENS = 64
"""For so many tokens more of each running request memory is asked for before they are there. Not measured: chosen by
trials of a prototype (2026-11-22, no result file)."""


class LayeredEngine(VirtualEngine):
    """See the module."""

    def __init__(
        self,
        setup: EngineSetup,
        requests: Iterable[SimRequest],
        policy: SloPolicy,
        *,
        mode: Mode = "auto",
        limits: PolicyLimits | None = None,
        lengths: LengthPredictor | None = None,
        is_measured: bool = True,
        keep_log: bool = False,
        refuses_late: bool = True,
        least_pool: int | None = None,
    ) -> None:
        super().__init__(setup, requests)
        # What the pool can have whenever it needs that much: so long requests fit, however small it is now.
        self._least_pool = setup.geometry.pool_blocks - 1 if least_pool is None else least_pool
        geometry = setup.geometry
        self.ledger = KVLedger(geometry, setup.num_host_blocks)
        shape = EngineShape(
            mode=mode,
            block_tokens=geometry.block_tokens,
            block_bytes=geometry.block_bytes,
            pool_blocks=geometry.pool_blocks - 1,
            zone_blocks=geometry.zone_blocks,
            host_blocks=setup.num_host_blocks,
            long_contexts=setup.long_contexts,
            slots=setup.max_num_seqs,
        )
        self.controller = Controller(
            policy,
            shape,
            setup.profile,
            is_measured=is_measured,
            limits=limits,
            lengths=lengths,
            keep_log=keep_log,
            refuses_late=refuses_late,
        )
        self.desk = Desk(self.controller, self.ledger)
        self.lives: dict[str, Live] = {}
        self.refused: list[str] = []
        self.decision = Decision()
        self._loading: dict[str, float] = {}  # requests being fetched: when their load ends
        self._link_free_s = 0.0
        self._plan = StepPlan()
        self._was_quiet = False
        self._has_preempted = False

    # The engine's side --------------------------------------------------------------------------------------------

    def arrive(self, live: Live) -> None:
        request = live.request
        self.lives[live.request_id] = live
        self.ledger.add(live.request_id)
        self.controller.arrive(
            live.request_id,
            request.slo,
            now_s=self.now_s,
            arrival_s=request.arrival_s,
            num_tokens=request.prompt_tokens,
            max_tokens=request.max_tokens,
            rank=request.rank,
            can_layer=request.can_layer,
        )

    def schedule(self) -> Scheduled:
        self._finish_loads()
        if self.num_to_leave:
            return self._decide_and_compute()
        is_busy = self._loading or self.ledger.layered_ids or any(live.is_prefilling for live in self.running)
        steps_ahead = 1 if self.setup.frees_are_deferred else 0
        num_running, num_free = len(self.running), len(self.free_ids)
        self._was_quiet = not is_busy and self.controller.is_quiet(num_running, num_free, steps_ahead, self.now_s)
        moves = self.ledger.residency.version
        if self._was_quiet or self.controller.stands(self.step, moves, num_running, num_free):
            self._plan = StepPlan()
            self.decision = Decision(prefill_tokens=self.setup.max_num_batched_tokens)
            return self._compute([])
        return self._decide_and_compute()

    def _decide_and_compute(self) -> Scheduled:
        self._was_quiet = False
        snapshot, self.decision = self._decide()
        self._apply(snapshot, self.decision)
        starting = (*self.decision.back_to_zone, *self.decision.admit)
        scheduled = self._compute([self.lives[admission.request_id] for admission in starting])
        self._plan = self.ledger.take_plan(sum(num_tokens for _, num_tokens in scheduled))
        return scheduled

    def left(self, live: Live) -> None:
        request_id = live.request_id
        self.free(live)
        del self.lives[request_id]
        self.desk.leave(request_id, num_output=live.num_made, end=live.request.end, now_s=self.now_s)

    def copies(self) -> tuple[int, int, int, bool]:
        size = self.geometry.block_bytes
        plan = self._plan
        return (
            num_blocks(plan.stores) * size,
            (num_blocks(plan.loads) + num_blocks(plan.zone_hits)) * size,
            num_blocks(plan.parks) * size,
            plan.is_layered,
        )

    def made_tokens(self, live: Live, at_s: float, num_tokens: int, every_s: float) -> None:
        self.controller.made_tokens(live.request_id, at_s, num_tokens, every_s)

    def stepped(self, work: StepWork, seconds: float, firsts: Sequence[Live]) -> None:
        for live in firsts:
            self.controller.first_token(live.request_id, self.now_s)
        self.controller.step_done(work, seconds)

    def has_acted(self) -> bool:
        decision = self.decision
        return self._has_preempted or bool(
            decision.pause or decision.park or decision.recompute or decision.fetch or decision.refuse
        )

    def most_repeats(self) -> int:
        return 1 << 30 if self._was_quiet else self.setup.stride

    def next_event_s(self) -> float:
        return min(self._loading.values(), default=self.controller.next_turn_s if self._was_quiet else math.inf)

    def give_back_zone(self, block_ids: list[int]) -> None:
        self.ledger.zone.give_back(block_ids)

    def resize(self, pool_blocks: int) -> None:
        super().resize(pool_blocks)
        shape = self.controller.shape
        if shape.pool_blocks != (in_service := max(self._pool_goal, self._least_pool)):
            self.controller.shape = replace(shape, pool_blocks=in_service)

    def num_needed(self) -> int:
        running = {live.request_id for live in self.running}
        return sum(
            self.blocks(live.num_tokens + (GROWTH_TOKENS if live.request_id in running else 0))
            for live in self.lives.values()
        )

    def num_that_could_leave(self) -> int:
        is_layered, paused = self.ledger.is_layered, self.controller.paused
        could = sum(
            len(live.block_ids)
            for live in self.running
            if (live.request_id in paused or not live.is_prefilling) and not is_layered(live.request_id)
        )
        return min(could, self.ledger.host.num_free)

    def outcome(self) -> SimOutcome:
        counters = self.ledger.counters
        return SimOutcome(
            self.outcomes,
            self.gaps,
            self.now_s,
            self.step,
            preemptions=counters.recomputes,
            parks=counters.parks,
            fetches=counters.fetches,
            stored_bytes=counters.stored_blocks * self.geometry.block_bytes,
            loaded_bytes=counters.loaded_blocks * self.geometry.block_bytes,
            link_s_per_byte=(seconds_per_byte(self.truth.profile.store), seconds_per_byte(self.truth.profile.load)),
            reasons={reason.value: count for reason, count in self.controller.reasons.items()},
        )

    # Deciding -----------------------------------------------------------------------------------------------------

    def _decide(self) -> tuple[Snapshot, Decision]:
        running = [self._seen(live) for live in self.running]
        reserved = sum(
            max(self.blocks(r.num_tokens) - r.num_blocks, 0) for r in running if r.is_prefilling and not r.is_layered
        )
        state = EngineState(
            step=self.step,
            running=running,
            arriving=[(r, len(self.lives[r].block_ids), self.lives[r].num_made) for r in self._loading],
            # A shortage, until so much is parked.
            free_blocks=len(self.free_ids) - self.num_to_leave,
            reserved_blocks=reserved,
            free_zone_blocks=self.ledger.zone.num_available,
            free_host_blocks=self.ledger.host.num_free,
            free_slots=self.setup.max_num_seqs + len(self.controller.paused) - len(self.running) - len(self._loading),
            budget_tokens=self.setup.max_num_batched_tokens,
            steps_ahead=1 if self.setup.frees_are_deferred else 0,
            moves=self.ledger.residency.version,
            freeing_blocks=sum(not self.geometry.is_zone_block(block) for block in self._freed),
            freeing_zone_blocks=sum(map(self.geometry.is_zone_block, self._freed)),
        )
        return self.controller.decide(state, self.now_s)

    def _seen(self, live: Live) -> Running:
        request_id, made, computed = live.request_id, live.num_made, live.num_computed
        num_tokens = live.prompt_tokens + made
        num_blocks = len(live.block_ids)
        is_prefilling = made == 0 or num_tokens - computed > 1
        in_host = self.ledger.num_host_blocks_of(request_id)
        if not self.ledger.is_layered(request_id):
            is_paused = request_id in self.controller.paused
            return Running(
                request_id, num_tokens, computed, made, is_prefilling, num_blocks, 0, False, in_host, 0, is_paused
            )
        in_zone = self.geometry.num_zone_blocks(live.block_ids)
        return Running(request_id, num_tokens, computed, made, is_prefilling, num_blocks, in_zone, True, in_host)

    # Carrying a decision out --------------------------------------------------------------------------------------

    def _apply(self, snapshot: Snapshot, decision: Decision) -> None:
        self.desk.begin_step(self.step, self.now_s)
        for refusal in decision.refuse:
            self._refuse(refusal, refusal_text(snapshot, refusal))
        for request_id in decision.drop_copy:
            self.desk.drop_ahead(request_id)
        for ahead in decision.store_ahead:
            live = self.lives[ahead.request_id]
            self.desk.store_ahead(ahead, (live.block_ids,), live.num_computed)
        for request_id in decision.park:
            self._park(self.lives[request_id])
        for request_id in decision.recompute:
            self._give_up(self.lives[request_id], decision.reasons[request_id])
        for request_id in decision.pause:
            self.desk.pause(request_id, self.lives[request_id].num_computed, decision.reasons[request_id])
        for request_id in decision.resume:
            self.desk.resume(request_id)
        for request_id in decision.fetch:
            self._fetch(self.lives[request_id])
        for admission in (*decision.back_to_zone, *decision.admit):
            self.desk.reserve(admission)

    def _refuse(self, refusal: Refusal, text: str) -> None:
        request_id = refusal.request_id
        live = self.lives.pop(request_id)
        self.refused.append(request_id)
        self.controller.refused(request_id, refusal.reason, text, self.now_s)
        self.desk.leave(request_id, num_output=0, end=End.REFUSED, now_s=self.now_s)
        self.end(live, None)

    def _park(self, live: Live) -> None:
        self.desk.park(
            live.request_id,
            (live.block_ids,),
            num_computed=live.num_computed,
            num_tokens=live.num_tokens,
            num_output=live.num_made,
            reason=self.decision.reasons[live.request_id],
        )
        self.running.remove(live)
        self.free(live)
        live.num_parks += 1

    def _give_up(self, live: Live, reason: Reason = Reason.PREEMPTED) -> None:
        """Stock vLLM's preemption: the KV is computed again."""
        self.running.remove(live)
        self.free(live)
        self.desk.recomputes(
            live.request_id, num_tokens=live.num_tokens, num_output=live.num_made, reason=reason, now_s=self.now_s
        )
        live.num_computed = 0
        live.num_recomputes += 1

    def _fetch(self, live: Live) -> None:
        num_tokens = max(live.num_computed + 1, live.num_tokens)
        has_room = self.hold(live, num_tokens)
        assert has_room, "the pool was promised twice"
        self.desk.fetch(live.request_id, (live.block_ids,))
        size = self.blocks(live.num_computed) * self.geometry.block_bytes
        self._link_free_s = max(self._link_free_s, self.now_s) + self.setup.profile.load(size)
        self._loading[live.request_id] = self._link_free_s

    def back_to_zone(self, live: Live) -> None:
        """A parked request goes on in the zone, from this step on."""
        self.running.append(live)
        self.desk.back_in_zone(live.request_id)

    def _finish_loads(self) -> None:
        for request_id in [r for r, end_s in self._loading.items() if end_s <= self.now_s]:
            del self._loading[request_id]
            self.ledger.complete_fetch(request_id)
            self.running.append(self.lives[request_id])

    def _compute(self, starting: list[Live]) -> Scheduled:
        """As the adapter has vLLM do it: decodes first, then prompts under way, each with its share, then new ones."""
        decoding: list[Live] = []
        prefilling: list[Live] = []
        paused = self.controller.paused
        for live in self.running:
            if live.request_id not in paused:
                (prefilling if live.is_prefilling else decoding).append(live)
        left, share = prefill_share(
            self.setup.max_num_batched_tokens,
            decode_tokens=len(decoding),
            prefill_tokens=self.decision.prefill_tokens,
            num_prompts=len(prefilling),
            spare_tokens=len(self.decision.back_to_zone),
        )
        scheduled: Scheduled = []
        gone: set[str] = set()
        tokens, is_layered = self.geometry.block_tokens, self.ledger.is_layered
        for live in decoding:  # hundreds in every step: a token for which there is a block needs no more than this
            if live.request_id in gone or left <= 0:
                continue
            has_block = live.num_computed < len(live.block_ids) * tokens
            if (has_block and not is_layered(live.request_id)) or self._allocate(live, 1, gone, is_new=False):
                left -= 1
                scheduled.append((live, 1))
        for live in (*prefilling, *starting):
            if live.request_id in gone:
                continue
            num_tokens = min(live.remaining, left, share)
            state = self.ledger.residency[live.request_id]
            is_new, is_back = state is Residency.WAITING, state is Residency.PARKED
            if num_tokens <= 0 or not self._allocate(live, num_tokens, gone, is_new=is_new):
                if is_new or is_back:
                    self.desk.declined(live.request_id)
                continue
            if is_back:
                self.back_to_zone(live)
            elif is_new:
                self.running.append(live)
                self.desk.admitted(live.request_id, self.decision.reasons[live.request_id])
            left -= num_tokens
            scheduled.append((live, num_tokens))
        self._has_preempted = bool(gone)
        return [entry for entry in scheduled if entry[0].request_id not in gone] if gone else scheduled

    def _allocate(self, live: Live, num_tokens: int, gone: set[str], *, is_new: bool) -> bool:
        ledger, request_id = self.ledger, live.request_id
        if ledger.is_layered(request_id):
            missing = max(self.blocks(live.num_computed + num_tokens) - len(live.block_ids), 0)
            live.block_ids += ledger.zone.take(request_id, missing)
            ledger.started(request_id)
            ledger.step_layered(request_id, (live.block_ids,), num_computed=live.num_computed, num_scheduled=num_tokens)
            return True
        if is_new and self.blocks(live.num_tokens) > len(self.free_ids):
            return False  # vLLM starts a prompt only when all of it fits
        while not self.hold(live, live.num_computed + num_tokens):
            if self._freed:
                return False  # deferred: a victim's blocks would not be here sooner than these
            victim = next(
                other
                for other in reversed(self.running)
                if other.request_id not in self.controller.paused and not ledger.is_layered(other.request_id)
            )
            gone.add(victim.request_id)
            self._give_up(victim)
            if victim is live:
                return False
        ledger.started(request_id)
        return True
