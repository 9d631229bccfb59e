"""The outlook of the fluid policy: whose reader runs dry when, who has had a slice, and which streams can all flow.

A *stream* is a request past its first token; its reader takes a token per TPOT. It *flows* while its first token was on
time and its reader's waits together are within the class's ``max_lag``; what does not flow any more is *lost*. A stream
needs its blocks for ``step / TPOT`` of the time only, so the pool's time is shared by slices, each long enough that the
copies of a turn are a small part of it. A request without a reader has its slack on the mean TPOT in the place of what
its reader has left to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from heapq import heappop, heappush
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from layerkv.scheduler.lines import Claim
from layerkv.scheduler.needs import pool_blocks
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.prefill import late_prompts
from layerkv.scheduler.snapshot import ParkedRequest, ResidentRequest, WaitingRequest

if TYPE_CHECKING:
    from layerkv.scheduler.draft import Draft

LEAST_SLICE_S = 0.25
"""A slice is at least so long,"""
COPIES_SHARE = 0.05
"""and the copies of its turn are no more of it."""
LAST_S = 0.5
"""Nobody who will have ended within so long is parked for a claim."""
PLENTY_S = 8.0
"""Of residents whose readers have so much to read, those with the most tokens left leave first."""
URGENT_S = 1.0
"""Claims due within so long go by when they are due; the others, those with the fewest tokens left first: what ends
soon gives its blocks back for good."""
HORIZON_S = 8.0
"""How far ahead streams must be able to flow together,"""
POOL_SHARE = 0.9
"""in so much of the pool's time: turns and ends leave blocks idle."""
MOST_LOADS_S = 0.1
"""Seconds of fetches under way beyond which no further one begins: its blocks would be idle."""


class Turn(NamedTuple):
    """A resident that has had its slice.

    Attributes:
        resident: It.
        spare_s: Seconds that its reader is served by what it has, beyond the time of its load.
        flows: Whether its stream flows, and is not held.
        ends_soon: Whether it will have ended soon.
    """

    resident: ResidentRequest
    spare_s: float
    flows: bool
    ends_soon: bool


class FluidOutlook(Outlook):
    """See the module."""

    most_loads_s: ClassVar[float] = MOST_LOADS_S

    @cached_property
    def prefill_tokens(self) -> int:
        """What the smallest buffer among readers allows, or as much more as keeps prompts on time that can be.

        Large steps compute prompts hardly faster than small ones, and readers wait for each to end.
        """
        s, tokens = self.s, self.paced_tokens
        most = max(s.engine.budget_tokens - s.load.decode_tokens, 0)
        if tokens >= most or not s.lines.waiting:
            return tokens
        late = late_prompts(s, s.lines.waiting, most)
        while tokens < most and late_prompts(s, s.lines.waiting, tokens) - late:
            tokens = min(max(2 * tokens, self.limits.min_prefill_tokens), most)
        return tokens

    @cached_property
    def victims(self) -> Sequence[ResidentRequest]:
        """Residents that may be parked, most readily first.

        Spared are those of better rank, those within their slice, streams that flow, the weighty, and of these those
        whose readers run dry first; where readers have plenty, those that end first.
        """
        return self._leavers[0]

    @cached_property
    def turns(self) -> Sequence[Turn]:
        """The victims that have had their slice, in that order."""
        return self._leavers[1]

    @cached_property
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
        pool = s.shape.pool_blocks * POOL_SHARE
        flows: list[tuple[float, float, float, str]] = []  # buffer, need, need to its end by weight, id
        views: list[ResidentRequest | ParkedRequest] = [*s.load.resident, *s.lines.parked]
        for view in views:
            buffer_s = max(view.dry_s - now_s, 0.0)
            if view.deadline_s >= now_s and buffer_s < HORIZON_S:
                need = view.num_blocks * min(token_s / view.tpot_s, 1.0)
                flows.append((buffer_s, need, need * view.tokens_left / view.weight, view.request_id))
        if sum(need for _, need, _, _ in flows) <= pool:
            return frozenset()
        flows.sort()
        held: set[str] = set()
        heap: list[tuple[float, str, float, float]] = []
        needs = buffered = 0.0  # of those whose readers have run dry by then: their needs, and needs times buffers
        ends_s = [*(flow[0] for flow in flows[1:]), HORIZON_S]
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

    def has_room(self, draft: Draft, claim: Claim) -> bool:
        """Whether the pool has blocks for a claim now, and a few steps on: whoever is in the way then is parked."""
        return pool_blocks(self.s, claim) + draft.headroom <= draft.pool

    def due_s(self, claim: Claim) -> float:
        """When a claim must be granted for its reader not to wait."""
        if isinstance(claim, ParkedRequest):
            return claim.dry_s - self.load_s(claim.num_blocks)
        cost = self.s.cost
        return claim.deadline_s - (0.0 if cost is None else claim.prefill_cost_s * cost.prefill_factor)

    def load_s(self, num_blocks: int) -> float:
        """As a line through the loads of one block and of the pool: it is asked for each resident."""
        first_s, block_s = self._load_line
        return first_s + block_s * num_blocks

    @cached_property
    def _leavers(self) -> tuple[list[ResidentRequest], list[Turn]]:
        s, held = self.s, self.held
        now_s = s.now_s
        load_first_s, load_block_s = self._load_line
        store_first_s, store_block_s = self._store_line
        num_waiting = s.load.num_resident  # for a park's stores, as compute does
        last_tokens = LAST_S / self.step_s if s.cost is not None and self.step_s > 0 else 0.0
        keyed = []
        for r in s.load.resident:
            if not r.can_park:
                continue
            load_s = load_first_s + load_block_s * r.num_blocks
            turn_s, to_store = load_s, r.num_blocks - r.num_stored
            if to_store > 0:
                turn_s += (store_first_s + store_block_s * to_store) * num_waiting
            in_slice = r.resident_s < LEAST_SLICE_S or r.resident_s * COPIES_SHARE < turn_s
            in_slice |= not r.has_run  # however long its load and its first step take
            spare_s = max(r.dry_s - now_s, 0.0) - load_s
            flows = r.deadline_s >= now_s and r.request_id not in held
            kind = 0 if not flows else 1 if spare_s >= PLENTY_S else 2
            last = -spare_s if kind == 2 else -float(r.tokens_left)
            turn = Turn(r, spare_s, flows, r.tokens_left <= last_tokens)
            keyed.append((-r.rank, in_slice, kind, r.weight, last, r.request_id, turn))
        keyed.sort()
        return [entry[-1].resident for entry in keyed], [entry[-1] for entry in keyed if not entry[1]]

    @cached_property
    def _load_line(self) -> tuple[float, float]:
        cost, shape = self.s.cost, self.s.shape
        return (0.0, 0.0) if cost is None else _line(cost.load_s, shape.block_bytes, shape.pool_blocks)

    @cached_property
    def _store_line(self) -> tuple[float, float]:
        cost, shape = self.s.cost, self.s.shape
        return (0.0, 0.0) if cost is None else _line(cost.store_s, shape.block_bytes, shape.pool_blocks)

    def _claims(self, waiting: Sequence[WaitingRequest]) -> list[Claim]:
        """Who was overtaken too often; then what flows, by when it is due, or if that is not soon, by what is left of
        it; then what is held; then what is lost."""
        s, overdue, held, late = self.s, self.overdue, self.held, self.late
        urgent_s = s.now_s + URGENT_S

        def turn(claim: Claim) -> tuple[int, int, float]:
            request_id = claim.request_id
            if request_id in overdue:
                return claim.rank, 0, claim.deadline_s
            if claim.deadline_s < s.now_s or request_id in late:
                return claim.rank, 4, claim.tokens_left
            if request_id in held:
                return claim.rank, 3, claim.deadline_s
            due_s = self.due_s(claim)
            return (claim.rank, 1, due_s) if due_s <= urgent_s else (claim.rank, 2, claim.tokens_left)

        return sorted(self._claimants(waiting), key=turn)


def _line(seconds: Callable[[int], float], block_bytes: int, pool_blocks: int) -> tuple[float, float]:
    first_s, all_s = seconds(block_bytes), seconds(block_bytes * max(pool_blocks, 2))
    block_s = (all_s - first_s) / max(pool_blocks - 1, 1)
    return first_s - block_s, block_s
