"""The outlook of the fluid policy: whose reader runs dry when, who has had a slice, and which streams can all flow.

A *stream* is a request past its first token; its reader takes a token per TPOT. It *flows* while its first token was on
time and its reader's waits together are within the class's ``max_lag``; what does not flow any more is *lost*. A stream
needs its blocks for ``step / TPOT`` of the time only, so the pool's time is shared by slices, each long enough that the
copies of a turn are a small part of it. A request without a reader has its slack on the mean TPOT in the place of what
its reader has left to read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence, Set
from heapq import heappop, heappush
from typing import TYPE_CHECKING, ClassVar

from layerkv.scheduler.lines import Claim, in_order
from layerkv.scheduler.needs import outgrows_pool, pool_blocks
from layerkv.scheduler.once import once
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.prefill import late_prompts
from layerkv.scheduler.running import LAG_SHARE
from layerkv.scheduler.slots import PLENTY_S, Slotted, is_due, lender_to_claim, lenders
from layerkv.scheduler.snapshot import ParkedRequest, ResidentRequest, WaitingRequest

if TYPE_CHECKING:
    from layerkv.scheduler.draft import Draft

LEAST_SLICE_S = 0.25
"""A slice is at least so long. Not measured: chosen by simulated loads (2026-11-28, no result file)."""
COPIES_SHARE = 0.05
"""Of a slice, what the copies of its turn may be. Not measured: taken from the prototype of 2026-11."""
IDLE_STEPS = 1
"""Steps that a turn's blocks are idle where frees are deferred. Not measured: chosen by judgement."""
LAST_S = 0.5
"""Nobody who will have ended within so long is parked for a claim. Not measured: taken from the prototype of
2026-11."""
URGENT_S = 1.0
"""Claims due within so long go by when they are due; the others, those with the fewest tokens left first: what ends
soon gives its blocks back for good. Not measured: taken from the prototype of 2026-11."""
START_BY_S = 1.0
"""While streams are held, a prompt waits as long as it, and all before it in line, can be put off for longer. Not
measured: chosen by simulated loads (2026-11-29, no result file)."""
SPARE_FOR_LOST_S = 8.0
"""A stream that flows makes room for a lost one if its reader has so much to read. Not measured: chosen by simulated
loads (2026-11-29, no result file)."""
HORIZON_S = 8.0
"""How far ahead streams must be able to flow together. Not measured: chosen by simulated loads (2026-11-28, no result
file)."""
POOL_SHARE = 0.9
"""Of the pool's time, what they may need for that: turns and ends leave blocks idle. Not measured: chosen by simulated
loads (2026-11-28, no result file)."""
MOST_LOADS_S = 0.1
"""Seconds of fetches under way beyond which no further one begins: its blocks would be idle. Not measured: taken from
the prototype of 2026-11."""


Turn = tuple[ResidentRequest, float, bool, bool]
"""A resident that has had its slice; seconds that its reader is served by what it has, beyond the time of its load;
whether its stream flows, and is not held; whether it will have ended soon."""


class FluidOutlook(Outlook):
    """See the module."""

    most_loads_s: ClassVar[float] = MOST_LOADS_S

    @once
    def slack_s(self) -> float:
        """The smallest buffer among readers of streams that flow, with a share of the lag that each may still have.

        Those of parked streams too: they get their turn sooner the more steps there are, and a large step makes no more
        tokens than a small one.
        """
        s = self.s
        now_s, slack_s = s.now_s, s.load.decode_slack_s
        wants_prefill = bool(s.lines.waiting) or s.load.prefilling_tokens > 0
        if not (wants_prefill and s.load.decode_tokens and s.shape.can_chunk):
            return slack_s
        for p in s.lines.parked:
            if p.deadline_s >= now_s:
                buffer_s = p.dry_s - now_s if p.dry_s > now_s else 0.0
                lag_s = p.deadline_s - now_s - buffer_s
                slack_s = min(slack_s, buffer_s + max(lag_s, 0.0) * LAG_SHARE)
        return slack_s

    @once
    def prefill_tokens(self) -> int:
        """What the smallest buffer among readers allows, or as much more as keeps prompts on time that can be.

        Large steps compute prompts hardly faster than small ones, and readers wait for each to end.
        """
        return self._prefill[0]

    @once
    def late(self) -> Set[str]:
        """Prompts that cannot have their first token in time."""
        return self._prefill[1]

    @once
    def _prefill(self) -> tuple[int, Set[str]]:
        s, tokens, most = self.s, self.paced_tokens, self.s.most_prefill_tokens
        if tokens >= most:
            return tokens, self._at_best[0]
        late: Set[str] = late_prompts(s, s.lines.waiting, tokens)
        if not late:
            return tokens, late
        at_best = self._at_best[0]
        while tokens < most and late - at_best:
            tokens = min(max(2 * tokens, self.limits.min_prefill_tokens), most)
            late = at_best if tokens == most else late_prompts(s, s.lines.waiting, tokens)
        return tokens, late

    @once
    def next_in_pool(self) -> Set[str]:
        """Who was overtaken too often, and prompts that only the pool takes and whose turn by arrival has come."""
        return self.overdue | self._come_to_their_turn

    @once
    def _come_to_their_turn(self) -> Set[str]:
        """Prompts that only the pool can take, and that by arrival would be in it by now.

        First come, first served, a prompt starts when it fits the pool together with all that came before it and are
        there still. Engines make tokens alike fast whomever they serve first: work that was done on requests that came
        later would have been done on earlier ones, so parked requests count as if they were gone. Where nobody runs
        layered no prompt is passed for that, and objectives alone decide.
        """
        s = self.s
        if not s.shape.zone_blocks or not s.shape.host_blocks:
            return frozenset()
        of_pool = [
            w for w in s.lines.waiting[: self.limits.scan] if not self.can_ever_layer(w) and not outgrows_pool(s, w)
        ]
        if not of_pool:
            return frozenset()
        in_place = s.lines.gone_blocks + sum([view.num_blocks for view in s.lines.parked]) + s.pool_blocks
        return {w.request_id for w in of_pool if w.ticket_blocks <= in_place} - self.out_of_reach

    @once
    def victims(self) -> Sequence[ResidentRequest]:
        """Residents that may be parked, most readily first.

        Spared are those of better rank, those who have not run since they came in, those within their slice, streams
        that flow, the weighty, and of these those whose readers run dry first; where readers have plenty, those that
        end first.
        """
        return [entry[-1][0] for entry in sorted(self._leavers)]

    @once
    def turns(self) -> Sequence[Turn]:
        """The victims that have had their slice, in that order."""
        return [entry[-1] for entry in sorted([entry for entry in self._leavers if not entry[1]])]

    @once
    def most_spare_s(self) -> tuple[float, float]:
        """What the reader has left at most who would make room for another: of those that flow, and of the others."""
        most = [-math.inf, -math.inf]
        for _, spare_s, flows, _ in self.turns:
            if spare_s > most[not flows]:
                most[not flows] = spare_s
        return most[0], most[1]

    @once
    def held(self) -> frozenset[str]:
        """Streams that are sacrificed so that the others flow.

        While all together need more than the pool's time, those go that need most of it to their end, by weight: as
        Moore and Hodgson do it for first tokens. Until a time ``h`` from now a stream of ``n`` blocks with a buffer of
        ``b`` seconds needs ``n (h - b) step / TPOT`` block-seconds, and the pool has ``h`` seconds for all its blocks.
        """
        s = self.s
        if s.cost is None:
            return frozenset()
        now_s, token_s = s.now_s, max(self.step_s, s.token_s)
        pool = s.pool_blocks * POOL_SHARE
        views: list[ResidentRequest | ParkedRequest] = [*s.load.resident, *s.lines.parked]
        flowing = [v for v in views if v.deadline_s >= now_s and v.dry_s - now_s < HORIZON_S]
        if sum([v.num_blocks for v in flowing]) <= pool:
            return frozenset()
        shares = {tpot_s: min(token_s / tpot_s, 1.0) for tpot_s in {v.tpot_s for v in flowing}}  # of their blocks' time
        all_needs = [v.num_blocks * shares[v.tpot_s] for v in flowing]
        if sum(all_needs) <= pool:
            return frozenset()
        flows = sorted(  # buffer, need, need to its end by weight, id
            [
                (v.dry_s - now_s if v.dry_s > now_s else 0.0, need, need * v.tokens_left / v.weight, v.request_id)
                for v, need in zip(flowing, all_needs, strict=True)
            ]
        )
        held: set[str] = set()
        heap: list[tuple[float, str, float, float]] = []
        needs = buffered = 0.0  # of those whose readers have run dry by then: their needs, and needs times buffers
        ends_s = [*[flow[0] for flow in flows[1:]], HORIZON_S]
        for (buffer_s, need, to_end, request_id), until_s in zip(flows, ends_s, strict=True):
            needs += need
            buffered += need * buffer_s
            heappush(heap, (-to_end, request_id, need, buffer_s))
            while heap and needs * until_s - buffered > pool * until_s:
                _, gone, gone_need, gone_buffer_s = heappop(heap)
                held.add(gone)
                needs -= gone_need
                buffered -= gone_need * gone_buffer_s
        return frozenset(held)

    def may_start(self, w: WaitingRequest) -> bool:
        """Whether a prompt may start: while some streams are held, not before it must for the line's sake.

        It is put off for streams that go on; where none does, they may be those that wait for it by their rank. One
        that nobody passes any more is not put off: all others would wait with it.
        """
        if not self.held or not self.s.load.num_resident or w.request_id in self.overdue:
            return True
        return self._at_best[1].get(w.request_id, 0.0) <= START_BY_S

    @once
    def _at_best(self) -> tuple[Set[str], dict[str, float]]:
        """With all of the step's tokens: who is late, and by how much the others can be put off."""
        spare_s = dict[str, float]()
        return late_prompts(self.s, self.s.lines.waiting, self.s.most_prefill_tokens, spare_s), spare_s

    def has_room(self, draft: Draft, claim: Claim) -> bool:
        """Whether the pool has blocks for a claim now, and a few steps on: whoever is in the way then is parked."""
        return pool_blocks(self.s, claim) + draft.headroom <= draft.pool

    def due_s(self, claim: Claim) -> float:
        """When a claim must be granted for its reader not to wait."""
        if isinstance(claim, ParkedRequest):
            first_s, block_s = self._load_line
            return claim.dry_s - (first_s + block_s * claim.num_blocks)
        cost = self.s.cost
        return claim.deadline_s - (0.0 if cost is None else claim.prefill_cost_s * cost.prefill_factor)

    def free_slots(self, draft: Draft, claim: Claim) -> int:
        """A parked request that is not due leaves them to paused ones, which need no load."""
        if not self.s.load.num_paused or not isinstance(claim, ParkedRequest) or is_due(self, claim):
            return draft.slots
        return draft.slots - (self.s.load.num_paused - len(draft.resumed))

    def lender(self, claim: Claim, taken: Collection[str]) -> ResidentRequest | None:
        """See :func:`layerkv.scheduler.slots.lender_to_claim`."""
        return lender_to_claim(self, claim, taken)

    @once
    def lenders(self) -> Sequence[Slotted]:
        """Residents that may be paused, most readily first."""
        return lenders(self)

    def load_s(self, num_blocks: int) -> float:
        """As a line through the loads of one block and of the pool: it is asked for each resident."""
        first_s, block_s = self._load_line
        return first_s + block_s * num_blocks

    @once
    def _leavers(self) -> list[tuple[int, int, bool, int, float, float, str, Turn]]:
        """In no order; each with what decides its place; second, 1 within its slice, 2 before it has run in it."""
        s, held = self.s, self.held
        now_s = s.now_s
        load_first_s, load_block_s = self._load_line
        store_first_s, store_block_s = self._store_line
        num_waiting = s.load.num_resident  # for a park's stores, as compute does
        idle_s = IDLE_STEPS * s.engine.steps_ahead * self.step_s if s.cost is not None else 0.0
        last_tokens = LAST_S / self.step_s if s.cost is not None and self.step_s > 0 else 0.0
        keyed = []
        for r in s.load.resident:
            if not r.can_park:
                continue
            num_blocks, tokens_left = r.num_blocks, r.tokens_left
            load_s = load_first_s + load_block_s * num_blocks
            turn_s, to_store = load_s + idle_s, num_blocks - r.num_stored
            if to_store > 0:
                turn_s += (store_first_s + store_block_s * to_store) * num_waiting
            in_slice = r.resident_s < LEAST_SLICE_S or r.resident_s * COPIES_SHARE < turn_s
            is_new = not r.has_run and not r.is_paused  # however long its load and its first step take
            spare_s = r.dry_s - now_s
            spare_s = (spare_s if spare_s > 0 else 0.0) - load_s
            flows = r.deadline_s >= now_s and r.request_id not in held
            kind = 0 if not flows else 1 if spare_s >= PLENTY_S else 2
            last = -spare_s if kind == 2 else -float(tokens_left)
            turn = (r, spare_s, flows, tokens_left <= last_tokens)
            spared = 2 if is_new else int(in_slice)
            keyed.append((-r.rank, spared, not r.is_paused, kind, r.weight, last, r.request_id, turn))
        return keyed

    @once
    def _load_line(self) -> tuple[float, float]:
        cost, shape = self.s.cost, self.s.shape
        return (0.0, 0.0) if cost is None else _line(cost.load_s, shape.block_bytes, shape.pool_blocks)

    @once
    def _store_line(self) -> tuple[float, float]:
        cost, shape = self.s.cost, self.s.shape
        return (0.0, 0.0) if cost is None else _line(cost.store_s, shape.block_bytes, shape.pool_blocks)

    def _claims(self, waiting: Sequence[WaitingRequest]) -> list[Claim]:
        """In this order: who is next in any case; whom room was made for; what flows and is due, by when; what flows
        and will be due, by what is left of it; what is held; what is lost; what flows and has so much to read
        that lost ones take its place.
        """
        s, first, held, late = self.s, self.next_in_pool, self.held, self.late
        promised = s.lines.promised
        urgent_s, soon_s = s.now_s + URGENT_S, s.now_s + SPARE_FOR_LOST_S

        def turn(claim: Claim) -> tuple[int, int, float]:
            request_id = claim.request_id
            if request_id in first:
                return claim.rank, 0, claim.deadline_s
            if request_id in promised:
                return claim.rank, 1, claim.deadline_s
            if claim.deadline_s < s.now_s or request_id in late:
                return claim.rank, 5, claim.deadline_s
            if request_id in held:
                return claim.rank, 4, claim.deadline_s
            due_s = self.due_s(claim)
            if due_s <= urgent_s:
                return claim.rank, 2, due_s
            return claim.rank, 3 if due_s <= soon_s else 6, claim.tokens_left

        return sorted(self._claimants(waiting), key=turn)

    def _prompts(self, waiting: Sequence[WaitingRequest]) -> Sequence[WaitingRequest]:
        if not self._come_to_their_turn:
            return super()._prompts(waiting)
        return in_order(waiting, late=self.late, late_before_s=-math.inf, overdue=self.next_in_pool)


def _line(seconds: Callable[[int], float], block_bytes: int, pool_blocks: int) -> tuple[float, float]:
    first_s, all_s = seconds(block_bytes), seconds(block_bytes * max(pool_blocks, 2))
    block_s = (all_s - first_s) / max(pool_blocks - 1, 1)
    return first_s - block_s, block_s
