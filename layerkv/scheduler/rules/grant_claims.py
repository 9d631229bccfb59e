"""Rule: requests that can only go on in the pool get blocks there, in order of their turns."""

from __future__ import annotations

from collections.abc import Sequence

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.lines import Claim
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.reasons import Reason


def grant_claims(now: Outlook, draft: Draft, claims: Sequence[Claim]) -> None:
    """Give pool blocks to the claims of one rank in order, past those that do not fit now.

    Nobody comes in through the door by which others must leave (hysteresis), and nobody of a worse rank while a better
    one waits for the pool.
    """
    if draft.is_relieving:
        for claim in claims:
            draft.block(claim)
            draft.wait(claim, Reason.VICTIMS_LEAVE)
        return
    if draft.pool_closed_for:
        for claim in claims:
            draft.wait(claim, Reason.BEHIND_RANK, draft.pool_closed_for)
        return
    if not now.out_of_reach and _fit_nowhere(now, draft, claims):
        draft.wait_for_pool(claims, now.next_in_pool)
        return
    for i, claim in enumerate(claims):
        has_slot = draft.has_slot(claim)
        has_room = has_slot and draft.fits_pool(claim)
        if has_room and draft.has_link(claim):
            draft.grant(claim)
            continue
        draft.wait(claim, Reason.LINK_BUSY if has_room else Reason.POOL_FULL if has_slot else Reason.NO_SLOT)
        if claim.request_id in now.out_of_reach:
            continue
        if draft.block(claim) and claim.request_id in now.next_in_pool:
            for behind in claims[i + 1 :]:
                draft.wait(behind, Reason.BEHIND_OVERDUE, draft.lacks(claim.request_id))
            return


def _fit_nowhere(now: Outlook, draft: Draft, claims: Sequence[Claim]) -> bool:
    """Whether it is plain that each of these finds a slot, and none of them room: mostly so with a full pool."""
    s = now.s
    if not claims or s.lines.hits or s.load.num_paused or draft.slots <= 0:
        return False
    return min([claim.num_blocks for claim in claims]) + draft.headroom > draft.pool
