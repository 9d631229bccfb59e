"""Who gives a slot up for whom. A slot is a place in a step's batch: it passes from stream to stream without a copy.

A resident that is *paused* keeps its blocks and has no slot. Its reader goes on reading what it has made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

from layerkv.scheduler.lines import Claim
from layerkv.scheduler.running import LAG_SHARE
from layerkv.scheduler.snapshot import ParkedRequest, ResidentRequest, Snapshot

if TYPE_CHECKING:
    from layerkv.scheduler.fluid import FluidOutlook
    from layerkv.scheduler.outlook import Outlook

SOON_S = 0.05
"""A claim for the pool, or a paused stream for a slot, is due so long, and :data:`SOON_STEPS` more, before its reader
waits. Not measured: taken from the prototype of 2026-11."""
SOON_STEPS = 4
"""See :data:`SOON_S`. Not measured: taken from the prototype of 2026-11."""
MORE_S = 0.1
"""So much more the reader must have left whose stream gives its slot to another stream. Not measured: chosen by
judgement."""
TURN_STEPS = 20
"""Steps of a turn among streams whose readers all wait. Not measured: taken from a trial of 2026-11."""
PLENTY_S = 4.0
"""Of residents whose readers have so much to read, those with the most tokens left leave first. Not measured: chosen by
simulated loads (2026-11-29, no result file)."""


class Slotted(NamedTuple):
    """A resident, as what it is to slots.

    Attributes:
        request: The resident.
        spare_s: Seconds that its reader has to read; below 0 if it waits.
        wait_s: Those, and the share of its lag that the reader may be made to wait for the sake of a prompt.
        flows: Whether its stream flows, and is not held.
    """

    request: ResidentRequest
    spare_s: float
    wait_s: float
    flows: bool


def slotted(now: FluidOutlook, r: ResidentRequest) -> Slotted:
    """What a resident that decodes, or is paused, is to slots."""
    now_s = now.s.now_s
    spare_s = r.dry_s - now_s
    flows = r.deadline_s >= now_s and r.request_id not in now.held
    wait_s = spare_s if not flows else max(spare_s, 0.0) + (r.deadline_s - max(r.dry_s, now_s)) * LAG_SHARE
    return Slotted(r, spare_s, wait_s, flows)


def lenders(now: FluidOutlook) -> list[Slotted]:
    """Residents that may give their slots up, most readily first.

    The worst rank first; then those that flow no more, and those whose readers have plenty, most tokens left first;
    then those whose readers have most to read.
    """

    def turn(lender: Slotted) -> tuple[int, int, float, float, str]:
        r = lender.request
        kind = 0 if not lender.flows else 1 if lender.spare_s >= PLENTY_S else 2
        return -r.rank, kind, r.weight, -lender.spare_s if kind == 2 else -float(r.tokens_left), r.request_id

    return sorted((slotted(now, r) for r in now.s.load.resident if r.can_pause), key=turn)


def paused(now: FluidOutlook) -> list[Slotted]:
    """Paused residents in the order in which they go on: by rank; who was left out too long; who flows, by when its
    reader waits; the others, fewest tokens left first."""

    def turn(p: Slotted) -> tuple[int, int, float, str]:
        r = p.request
        if is_overdue(now, p):
            return r.rank, 0, -r.turn_steps, r.request_id
        return r.rank, 1 if p.flows else 2, p.spare_s if p.flows else r.tokens_left, r.request_id

    return sorted((slotted(now, r) for r in now.s.load.resident if r.is_paused), key=turn)


def is_due(now: FluidOutlook, claim: ParkedRequest) -> bool:
    """Whether a parked request must come in for its reader not to wait."""
    return now.due_s(claim) - now.s.now_s <= soon_s(now)


def next_turn_s(s: Snapshot, step_s: float) -> float:
    """Until when nobody takes another's slot, if nobody comes, ends, or has more to read by then than now."""
    dry_s = min((r.dry_s for r in s.load.resident if r.is_paused), default=s.now_s)
    return dry_s - SOON_S - SOON_STEPS * step_s


def soon_s(now: Outlook) -> float:
    """Seconds before a reader waits at which its stream is due."""
    return SOON_S + (SOON_STEPS * now.step_s if now.s.cost is not None else 0.0)


def is_overdue(now: FluidOutlook, p: Slotted) -> bool:
    """Whether a paused stream's reader waits, and has been left out for so many steps that it goes first."""
    return p.spare_s <= 0 and p.request.turn_steps >= now.limits.max_overtakes


def lender_to_stream(now: FluidOutlook, p: Slotted, taken: Collection[str]) -> ResidentRequest | None:
    """Who gives its slot to a stream that is due: its reader has more to read, or it flows no more and the other does.

    One whose reader waits as well gives it up after its turn to one that was left out too long.
    """
    overdue = is_overdue(now, p)
    for lender in _of_no_better_rank(now, p.request.rank, taken):
        if overdue and lender.request.turn_steps >= TURN_STEPS:
            return lender.request
        if p.flows and (not lender.flows or lender.spare_s >= max(p.spare_s, 0.0) + MORE_S):
            return lender.request
    return None


def lender_to_claim(now: FluidOutlook, claim: Claim, taken: Collection[str]) -> ResidentRequest | None:
    """Who gives its slot to a request that comes in; None if nobody can, or a parked one is not due yet."""
    flows = claim.deadline_s >= now.s.now_s
    least_s, by_wait = soon_s(now), True
    if isinstance(claim, ParkedRequest):
        if not is_due(now, claim):
            return None
        least_s, by_wait = max(claim.dry_s - now.s.now_s, 0.0) + MORE_S, False
    overdue = claim.request_id in now.overdue
    for lender in _of_no_better_rank(now, claim.rank, taken):
        if lender.flows:
            if (lender.wait_s if by_wait else lender.spare_s) >= least_s:
                return lender.request
        elif flows or not isinstance(claim, ParkedRequest):
            return lender.request
        if overdue and lender.request.turn_steps >= TURN_STEPS:
            return lender.request
    return None


def _of_no_better_rank(now: FluidOutlook, rank: int, taken: Collection[str]) -> Iterator[Slotted]:
    for lender in now.lenders:
        if lender.request.rank < rank:
            return
        if lender.request.request_id not in taken:
            yield lender
