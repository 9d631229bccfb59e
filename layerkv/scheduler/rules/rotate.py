"""Rule: a resident whose reader has enough to read makes room for a claim whose reader is about to run dry."""

from __future__ import annotations

import math
from collections.abc import Sequence

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.fluid import SPARE_FOR_LOST_S, FluidOutlook
from layerkv.scheduler.lines import Claim
from layerkv.scheduler.needs import pool_blocks
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.slots import soon_s
from layerkv.scheduler.snapshot import ParkedRequest, ResidentRequest

MOST_SWAPS = 4
"""Claims that room is made for in one step. Not measured: taken from the prototype of 2026-11."""
MOST_VAIN = 16
"""Claims for which nobody can leave, after which a step gives up. Not measured: chosen by judgement."""
SPARE_FOR_FRESH_S = 0.5
"""What the reader must have left who makes room for a request's second token. Not measured: taken from the prototype of
2026-11."""
SPARE_FOR_FLOWING_S = 0.5
"""And beyond what the other reader has, for one that flows. Not measured: chosen by simulated loads (2026-11-29, no
result file)."""

_WAITS_FOR_PLACE = frozenset({Reason.POOL_FULL, Reason.NO_SLOT})


def rotate(now: Outlook, draft: Draft, claims: Sequence[Claim]) -> None:
    """Park residents that have had their slice, for claims that are due.

    A swap must gain: the resident's reader is served longer by what it has than the claim's. A stream that flows no
    longer makes room for any that does, and for no other that does not: such turns would gain nothing. A claim that was
    overtaken too often takes the place of any resident that has had its slice: so everybody comes to a slice, and a
    slice makes tokens.
    """
    assert isinstance(now, FluidOutlook)
    s = now.s
    if draft.is_relieving or draft.pool_closed_for or s.cost is None:
        return
    due_before_s = s.now_s + soon_s(now)
    room, slots = draft.pool + s.engine.freeing_blocks, draft.slots
    num_swaps = num_vain = 0
    for claim in claims:
        if num_swaps >= MOST_SWAPS or num_vain >= MOST_VAIN:
            return
        if draft.waits.get(claim.request_id) not in _WAITS_FOR_PLACE:
            continue
        is_next = claim.request_id in now.next_in_pool
        if not is_next and now.due_s(claim) > due_before_s:
            continue
        need = pool_blocks(s, claim) + draft.headroom
        num_slots = 0 if draft.has_slot(claim) else 1 - slots
        leaving = _who_leaves(now, draft, claim, need - room, num_slots, is_next=is_next)
        if leaving is None:
            num_vain += 1
            continue
        for r in leaving:
            slots += draft.holds_slot(r)
            draft.park_resident(r, Reason.TURN_OVER)
            room += r.num_blocks
        room, slots = room - need, slots - 1  # or the next claim would count on them too
        num_swaps += bool(leaving)
        if draft.has_slot(claim) and draft.fits_pool(claim) and draft.has_link(claim):
            draft.grant(claim)
        elif leaving:
            draft.room_for.append(claim.request_id)


def _who_leaves(
    now: FluidOutlook, draft: Draft, claim: Claim, num_blocks: int, num_slots: int, *, is_next: bool
) -> list[ResidentRequest] | None:
    """Residents that together hold so many blocks, and slots, for a claim; None if there are not enough."""
    least_s = -math.inf if is_next else least_spare_s(now, claim)
    claim_flows = claim.deadline_s >= now.s.now_s
    if num_blocks > 0 or num_slots > 0:
        of_flowing_s, of_lost_s = now.most_spare_s
        if of_flowing_s < least_s and (of_lost_s == -math.inf if claim_flows else of_lost_s < least_s):
            return None
    host = draft.host
    leaving: list[ResidentRequest] = []
    for r, spare_s, flows, ends_soon in now.turns:
        if num_blocks <= 0 and num_slots <= 0:
            break
        if spare_s < least_s and (flows or not claim_flows):
            continue
        if r.deadline_s < now.s.now_s and not (claim_flows or is_next):
            continue  # of those that are lost, one after the other runs to its end
        if r.rank < claim.rank or (ends_soon and not is_next) or r.request_id in draft.park:
            continue
        holds_slot = draft.holds_slot(r)
        if draft.blocks_to_store(r) > host or (num_blocks <= 0 and not holds_slot):
            continue
        leaving.append(r)
        num_blocks -= r.num_blocks
        num_slots -= holds_slot
        host -= draft.blocks_to_store(r)
    stay = now.s.load.num_resident - len(draft.park) - len(leaving)
    return leaving if num_blocks <= 0 and num_slots <= 0 and (stay > 0 or is_next) else None


def least_spare_s(now: Outlook, claim: Claim) -> float:
    """Seconds that the reader must have left whose stream makes room for a claim."""
    if claim.deadline_s < now.s.now_s:
        return SPARE_FOR_LOST_S
    if not isinstance(claim, ParkedRequest) or claim.is_fresh:
        return SPARE_FOR_FRESH_S
    return max(claim.dry_s - now.s.now_s, 0.0) + SPARE_FOR_FLOWING_S
