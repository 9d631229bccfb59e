"""Rule: a resident whose reader has enough to read makes room for a claim whose reader is about to run dry."""

from __future__ import annotations

import math
from collections.abc import Sequence

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.fluid import FluidOutlook
from layerkv.scheduler.lines import Claim
from layerkv.scheduler.needs import pool_blocks
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.snapshot import ParkedRequest, ResidentRequest

MOST_SWAPS = 4
"""Claims that room is made for in one step. Not measured: chosen by judgement."""
SOON_S, SOON_STEPS = 0.05, 4
"""A claim that is due within so long has room made for it. Not measured: chosen by judgement."""
LAST_S = 0.5
"""A request that will end within so long is not parked any more. Not measured: chosen by judgement."""
SPARE_FOR_FRESH_S = 0.5
"""What must be left to read, its load time deducted, for who makes room for a request's second token,"""
SPARE_FOR_FLOWING_S = 0.1
"""beyond what the other reader has, for one that flows,"""
SPARE_FOR_LOST_S = 4.0
"""and for one that flows no longer. All three not measured: chosen by judgement."""


def rotate(now: Outlook, draft: Draft, claims: Sequence[Claim]) -> None:
    """Park residents that have had their time slice, for claims that are due.

    A swap must gain: the resident's reader is served longer by what it has than the claim's. A stream that flows no
    longer makes room for any that does; a claim that was overtaken too often takes the place of any resident that has
    had its slice.
    """
    assert isinstance(now, FluidOutlook)
    s = now.s
    if draft.is_relieving or draft.pool_is_closed or s.cost is None or not s.can_exchange:
        return
    soon_s = s.now_s + SOON_S + SOON_STEPS * now.step_s
    room, slots = draft.pool, draft.slots
    num_swaps = 0
    for claim in claims:
        if num_swaps >= MOST_SWAPS:
            return
        reason = draft.waits.get(claim.request_id)
        if reason not in (Reason.POOL_FULL, Reason.NO_SLOT, Reason.HELD):
            continue
        is_overdue = claim.request_id in now.overdue
        if not is_overdue and (reason is Reason.HELD or now.due_s(claim) > soon_s):
            continue
        room -= pool_blocks(s, claim) + draft.headroom
        slots -= 1
        leaving = _who_leaves(now, draft, claim, -room, -slots, is_overdue=is_overdue)
        if leaving is None:
            room += pool_blocks(s, claim) + draft.headroom
            slots += 1
            continue
        for r in leaving:
            draft.park_resident(r, Reason.TURN_OVER)
            room += r.num_blocks
            slots += 1
        num_swaps += bool(leaving)
        if draft.slots > 0 and draft.fits_pool(claim) and draft.has_link(claim):
            draft.grant(claim)


def _who_leaves(
    now: FluidOutlook, draft: Draft, claim: Claim, num_blocks: int, num_slots: int, *, is_overdue: bool
) -> list[ResidentRequest] | None:
    """Residents that together hold so many blocks, and slots, for a claim; None if there are not enough."""
    least_s = -math.inf if is_overdue else _least_spare_s(now, claim)
    claim_flows = claim.deadline_s >= now.s.now_s
    host = draft.host
    leaving: list[ResidentRequest] = []
    for r in now.victims:
        if num_blocks <= 0 and num_slots <= 0:
            break
        if r.request_id in draft.park or r.rank < claim.rank or r.num_blocks >= now.s.shape.pool_blocks:
            continue
        if r.tokens_left * now.step_s <= LAST_S and not is_overdue:
            continue
        if now.is_in_slice(r) or draft.blocks_to_store(r) > host:
            continue
        yields = claim_flows and not now.flows(r)
        if not yields and now.spare_s(r) < least_s:
            continue
        leaving.append(r)
        num_blocks -= r.num_blocks
        num_slots -= 1
        host -= draft.blocks_to_store(r)
    if num_blocks > 0 or num_slots > 0 or len(draft.park) + len(leaving) >= max(now.s.load.num_resident, 2):
        return None
    return leaving


def _least_spare_s(now: FluidOutlook, claim: Claim) -> float:
    if claim.deadline_s < now.s.now_s:
        return SPARE_FOR_LOST_S
    if not isinstance(claim, ParkedRequest) or claim.is_fresh:
        return SPARE_FOR_FRESH_S
    return max(claim.dry_s - now.s.now_s, 0.0) + SPARE_FOR_FLOWING_S
