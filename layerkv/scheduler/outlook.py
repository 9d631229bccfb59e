"""What follows from a snapshot alone, before anything is decided: asked by every rule, worked out once."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from layerkv.core.cost import StepWork
from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.lines import Claim, by_rank, in_order
from layerkv.scheduler.needs import can_ever_layer, outgrows_pool, pool_blocks
from layerkv.scheduler.once import once
from layerkv.scheduler.prefill import late_prompts, prefill_budget
from layerkv.scheduler.snapshot import ResidentRequest, Snapshot, WaitingRequest
from layerkv.scheduler.victims import by_reluctance

if TYPE_CHECKING:
    from layerkv.scheduler.draft import Draft


@dataclass(frozen=True)
class Outlook:
    """A snapshot and what it comes to. Immutable: what takes time is worked out when it is first asked for."""

    s: Snapshot
    limits: PolicyLimits

    most_loads_s: ClassVar[float] = math.inf
    """Seconds of fetches under way beyond which no further one begins."""

    @once
    def prefill_tokens(self) -> int:
        """Most prompt tokens of this step."""
        return self.paced_tokens

    @once
    def paced_tokens(self) -> int:
        """Prompt tokens whose step those who wait for its end have time for."""
        limits = self.limits
        return prefill_budget(
            self.s,
            slack_s=self.slack_s,
            min_tokens=limits.min_prefill_tokens,
            max_idle_steps=limits.max_idle_steps,
        )

    @once
    def slack_s(self) -> float:
        """How long a step may take before the first of those who wait for its end has waited too long."""
        return self.s.load.decode_slack_s

    @once
    def late(self) -> Set[str]:
        """Prompts that cannot have their first token in time."""
        return late_prompts(self.s, self.s.lines.waiting, self.prefill_tokens)

    @once
    def overdue(self) -> frozenset[str]:
        """Requests that were overtaken so often that nobody of their rank passes them any more."""
        often = frozenset(r for r, num in self.s.lines.overtaken.items() if num >= self.limits.max_overtakes)
        return often - self.out_of_reach if often else often

    @once
    def out_of_reach(self) -> frozenset[str]:
        """Claims that the pool has no room for while sessions wait for their clients, whoever else leaves it.

        A session keeps its blocks between two turns, and nobody knows for how long: whoever stood behind such a claim
        would wait for that client too.
        """
        s = self.s
        if not (idle_blocks := self._idle_blocks):
            return frozenset()
        most_blocks = max(s.shape.pool_blocks, s.pool_blocks) - idle_blocks
        of_pool: list[Claim] = [*s.lines.parked[: self.limits.scan_parked]]
        of_pool += [
            w for w in s.lines.waiting[: self.limits.scan] if not self.can_ever_layer(w) and not outgrows_pool(s, w)
        ]
        return frozenset(claim.request_id for claim in of_pool if pool_blocks(s, claim) > most_blocks)

    @property
    def _idle_blocks(self) -> int:
        """Pool blocks of requests between two turns: they are no fetches, and vLLM lists them with those."""
        arriving = self.s.engine.arriving
        return sum([num_blocks for _, num_blocks, _ in arriving]) - self.s.load.loading_blocks if arriving else 0

    @property
    def next_in_pool(self) -> Set[str]:
        """Claims that nobody of their rank gets pool blocks before."""
        return self.overdue

    @once
    def ranks(self) -> Sequence[tuple[Sequence[Claim], Sequence[WaitingRequest]]]:
        """The line for pool blocks and the line for compute, each in order of turns, for each rank, best first."""
        waiting = self.s.lines.waiting[: self.limits.scan]
        return by_rank(self._claims(waiting), self._prompts(waiting))

    @once
    def victims(self) -> Sequence[ResidentRequest]:
        """Residents that may be parked, most readily first."""
        return by_reluctance(self.s, recent_steps=self.limits.min_resident_steps)

    @once
    def step_s(self) -> float:
        """Seconds of a step that decodes and computes no prompt. Only with a cost model."""
        assert self.s.cost is not None
        return self.s.cost.step_s(
            StepWork(num_decodes=self.s.load.decode_tokens, decode_context=self.s.load.decode_context)
        )

    def can_ever_layer(self, w: WaitingRequest) -> bool:
        """Whether an empty zone and empty host memory would take a prompt. Asked several times for each."""
        return w.request_id in self._layerable

    @once
    def _layerable(self) -> frozenset[str]:
        return frozenset(w.request_id for w in self.s.lines.waiting[: self.limits.scan] if can_ever_layer(self.s, w))

    def may_start(self, w: WaitingRequest) -> bool:
        """Whether a prompt may start if it finds room."""
        return True

    def has_room(self, draft: Draft, claim: Claim) -> bool:
        """Whether the pool has blocks for a claim now, and by the forecast will until it ends."""
        need = pool_blocks(self.s, claim)
        if need + draft.headroom > draft.pool:
            return False
        return draft.residents == 0 or draft.forecast.fits(need, claim.tokens_left)

    def free_slots(self, draft: Draft, claim: Claim) -> int:
        """Free slots that a request may take which comes in."""
        return draft.slots

    def lender(self, claim: Claim, taken: Collection[str]) -> ResidentRequest | None:
        """Who gives its slot to a request that comes in; none of those that have been ``taken``."""
        return None

    def load_s(self, num_blocks: int) -> float:
        """Seconds of a fetch of so many blocks; 0 while costs are not known."""
        cost = self.s.cost
        return 0.0 if cost is None else cost.load_s(num_blocks * self.s.shape.block_bytes)

    def fetch_s(self, num_blocks: int) -> float:
        """Seconds until a parked request of so many blocks decodes again. Only with a cost model."""
        assert self.s.cost is not None
        return self.s.cost.load_s(num_blocks * self.s.shape.block_bytes) + self.step_s

    def _claims(self, waiting: Sequence[WaitingRequest]) -> list[Claim]:
        """The line for pool blocks."""
        s = self.s
        late_before_s = s.now_s if s.slo_scheduling else -math.inf
        return in_order(self._claimants(waiting), late=self.late, late_before_s=late_before_s, overdue=self.overdue)

    def _claimants(self, waiting: Sequence[WaitingRequest]) -> list[Claim]:
        """Parked requests and prompts that can only go on in the pool; a request overtaken too often is among them.

        So is a prompt that was overtaken too often in the line for compute, though it may still run layered: else
        claims would take each slot, and hold the host memory, that it waits for.
        """
        s, overdue = self.s, self.overdue
        prompts = [
            w
            for w in waiting
            if not outgrows_pool(s, w) and ((overdue and w.request_id in overdue) or not self.can_ever_layer(w))
        ]
        for first in waiting if overdue else ():
            if first.request_id in overdue and outgrows_pool(s, first):  # not in this line, and nobody passes it
                prompts = [
                    w
                    for w in prompts
                    if w.rank != first.rank or (w.request_id in overdue and w.deadline_s <= first.deadline_s)
                ]
        return [*s.lines.parked[: self.limits.scan_parked], *prompts]

    def _prompts(self, waiting: Sequence[WaitingRequest]) -> Sequence[WaitingRequest]:
        if not self.late and not self.overdue:
            return waiting  # they come by rank and deadline
        return in_order(waiting, late=self.late, late_before_s=-math.inf, overdue=self.overdue)
