"""The outlook of the fluid policy: whose reader runs dry when, who has had a slice, and which streams can all flow.

A *stream* is a request past its first token; its reader takes a token per TPOT. It *flows* while its first token was on
time and its reader's waits together are within the class's ``max_lag``; what does not flow any more is *lost*. A stream
needs its blocks for ``step / TPOT`` of the time only: the pool's time is shared by slices, and a slice is long enough
that the copies of a turn are a small part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from heapq import heappop, heappush
from typing import TYPE_CHECKING, ClassVar

from layerkv.scheduler.lines import Claim
from layerkv.scheduler.needs import pool_blocks
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.prefill import late_prompts
from layerkv.scheduler.snapshot import ParkedRequest, ResidentRequest, WaitingRequest

if TYPE_CHECKING:
    from layerkv.scheduler.draft import Draft

LEAST_SLICE_S = 0.25
"""A slice is at least so long."""
COPIES_SHARE = 0.05
"""Copies of a turn over its slice, at most."""
URGENT_S = 1.0
"""Claims due within so long go by when they are due; the others, those with the fewest tokens left first: what ends
soon gives its blocks back for good."""
PLENTY_S = 8.0
"""Of residents whose readers have so much to read, those with the most tokens left leave first."""


HORIZON_S = 8.0
POOL_SHARE = 0.9


class FluidOutlook(Outlook):
    """See the module."""

    most_loads_s: ClassVar[float] = 0.1

    @cached_property
    def prefill_tokens(self) -> int:
        """What the smallest buffer among readers allows, unless a prompt that can be on time would become late."""
        s, paced = self.s, self.paced_tokens
        most = max(s.engine.budget_tokens - s.load.decode_tokens, 0)
        if paced >= most or not s.lines.waiting:
            return paced
        if len(late_prompts(s, s.lines.waiting, paced)) > len(late_prompts(s, s.lines.waiting, most)):
            return most
        return paced

    @cached_property
    def victims(self) -> Sequence[ResidentRequest]:
        """Spared are those of better rank, then those within their slice, then streams that flow, and of these those
        whose readers run dry first; where readers have plenty, those that end first."""
        keyed = []
        for r in self.s.load.resident:
            if not r.can_park:
                continue
            spare_s = self.spare_s(r)
            if not self.flows(r):
                kind, last = 0, -float(r.tokens_left)
            elif spare_s >= PLENTY_S:
                kind, last = 1, -float(r.tokens_left)
            else:
                kind, last = 2, -spare_s
            keyed.append((-r.rank, self.is_in_slice(r), kind, r.weight, last, r.request_id, r))
        keyed.sort()
        return [entry[-1] for entry in keyed]

    @cached_property
    def held(self) -> frozenset[str]:
        """Streams that are sacrificed so that the others flow: while they need more than the pool's time together, those
        that need most of it to their end, by weight.

        Until a time ``h`` from now a stream with a buffer of ``b`` seconds needs its blocks for ``(h - b) step / TPOT``
        seconds, and the pool has ``h`` seconds for all of its blocks.
        """
        s = self.s
        if s.cost is None:
            return frozenset()
        token_s = max(self.step_s, s.token_s)
        pool = s.shape.pool_blocks * POOL_SHARE
        flows: list[tuple[float, float, float, str]] = []  # buffer, need, need to its end by weight, id
        for view in (*s.load.resident, *s.lines.parked):
            if view.deadline_s < s.now_s:
                continue
            if view.dry_s == math.inf:
                continue
            need = view.num_blocks * min(token_s / view.tpot_s, 1.0)
            flows.append((max(view.dry_s - s.now_s, 0.0), need, need * view.tokens_left / view.weight, view.request_id))
        flows.sort()
        held: set[str] = set()
        seen = total = 0.0  # of those whose readers run dry so far: need, and need times buffer
        heap: list[tuple[float, str, float, float]] = []
        for k, (buffer_s, need, to_end, request_id) in enumerate(flows):
            if buffer_s > HORIZON_S:
                break
            seen += need
            total += need * buffer_s
            heappush(heap, (-to_end, request_id, need, buffer_s))
            until_s = min(flows[k + 1][0] if k + 1 < len(flows) else HORIZON_S, HORIZON_S)
            while heap and seen * until_s - total > pool * until_s:
                _, gone, gone_need, gone_buffer_s = heappop(heap)
                held.add(gone)
                seen -= gone_need
                total -= gone_need * gone_buffer_s
        return frozenset(held)

    def has_room(self, draft: Draft, claim: Claim) -> bool:
        """Whether the pool has blocks for a claim now, and a few steps on: whoever is in the way then is parked."""
        return pool_blocks(self.s, claim) + draft.headroom <= draft.pool

    def flows(self, r: ResidentRequest) -> bool:
        """Whether a resident's stream flows still, and may go on doing so."""
        return r.deadline_s >= self.s.now_s and r.request_id not in self.held

    def spare_s(self, r: ResidentRequest) -> float:
        """Seconds that a resident's reader is served by what it has, beyond the time of its load."""
        return max(r.dry_s - self.s.now_s, 0.0) - self.load_s(r.num_blocks)

    def is_in_slice(self, r: ResidentRequest) -> bool:
        """Whether a resident came so short ago that the copies of its turn are too large a part of it."""
        return r.resident_s < max(LEAST_SLICE_S, self._turn_s(r) / COPIES_SHARE)

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

    def _turn_s(self, r: ResidentRequest) -> float:
        first_s, block_s = self._store_line
        num_blocks = max(r.num_blocks - r.num_stored, 0)
        # compute waits for a park's stores, so all residents do
        stores_s = (first_s + block_s * num_blocks) * self.s.load.num_resident if num_blocks else 0.0
        return self.load_s(r.num_blocks) + stores_s

    @cached_property
    def _load_line(self) -> tuple[float, float]:
        cost = self.s.cost
        return (0.0, 0.0) if cost is None else _line(cost.load_s, self.s.shape.block_bytes, self.s.shape.pool_blocks)

    @cached_property
    def _store_line(self) -> tuple[float, float]:
        cost = self.s.cost
        return (0.0, 0.0) if cost is None else _line(cost.store_s, self.s.shape.block_bytes, self.s.shape.pool_blocks)

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
