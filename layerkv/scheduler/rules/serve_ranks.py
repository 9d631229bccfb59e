"""Rule: ranks are served one after the other, each with what better ones have left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.lines import Claim, View, overtaken_in
from layerkv.scheduler.needs import outgrows_pool
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.reasons import Reason, Resource
from layerkv.scheduler.rules.grant_claims import grant_claims
from layerkv.scheduler.rules.start_prompts import start_prompts
from layerkv.scheduler.snapshot import ParkedRequest, WaitingRequest

_WAITS_FOR_ROOM = frozenset(
    {
        Reason.NO_SLOT,
        Reason.POOL_FULL,
        Reason.LINK_BUSY,
        Reason.HELD,
        Reason.ZONE_FULL,
        Reason.HOST_FULL,
        Reason.WAIT_IS_SHORTER,
    }
)
"""And not for a step's tokens, of which the next step has more."""


MakeRoom = Callable[[Outlook, Draft, Sequence[Claim]], None]


def serve_ranks(now: Outlook, draft: Draft, *, make_room: MakeRoom) -> None:
    """Grant pool blocks, make room, start prompts: rank by rank. Nearly always there is one."""
    for claims, prompts in now.ranks:
        served = claims
        if draft.compute_closed_for and not draft.is_relieving and not draft.pool_closed_for:
            served = [claim for claim in claims if isinstance(claim, ParkedRequest)]  # prompts cannot use any now
        grant_claims(now, draft, served)
        make_room(now, draft, served)
        start_prompts(now, draft, prompts)
        if now.out_of_reach:
            served, claims = _in_reach(now, served), _in_reach(now, claims)
            prompts = _in_reach(now, prompts)
        _note_overtaken(draft, served, prompts)
        if len(now.ranks) > 1:
            _close_to_worse_ranks(now, draft, claims, prompts)


def _in_reach(now: Outlook, line: Sequence[View]) -> list[View]:
    """Those of a line whom others could make room for."""
    return [view for view in line if view.request_id not in now.out_of_reach]


def _note_overtaken(draft: Draft, claims: Sequence[Claim], prompts: Sequence[WaitingRequest]) -> None:
    admitted = {admission.request_id for admission in draft.admit}
    if draft.fetch or draft.granted:
        # a prompt that was granted blocks but no tokens neither was left behind in this line nor has started
        if draft.granted:
            claims = [c for c in claims if c.request_id not in draft.granted or c.request_id in admitted]
        draft.overtake(list(overtaken_in(claims, admitted.union(draft.fetch))))
    if admitted:
        if draft.refuse:
            refused = {refusal.request_id for refusal in draft.refuse}
            prompts = [w for w in prompts if w.request_id not in refused]
        draft.overtake(list(overtaken_in(prompts, admitted)))


def _close_to_worse_ranks(
    now: Outlook, draft: Draft, claims: Sequence[Claim], prompts: Sequence[WaitingRequest]
) -> None:
    """Keep the room that a request of this rank waits for.

    One that waits for tokens needs no room yet; one that outgrows the pool needs none of the pool's, but host memory
    that parked requests have.
    """
    blocked = [claim.request_id for claim in claims if claim.request_id in draft.waits]
    if blocked:
        draft.pool_closed_for = draft.pool_closed_for or draft.lacks(blocked[0])
        draft.keep_slots(len(blocked))
        if draft.slots <= 0:
            draft.compute_closed_for = draft.compute_closed_for or Resource.SLOT
    for w in prompts:
        reason = draft.waits.get(w.request_id)
        if reason is not None:
            lacks = draft.lacks(w.request_id)
            draft.compute_closed_for = draft.compute_closed_for or lacks
            if reason in _WAITS_FOR_ROOM and not outgrows_pool(now.s, w):
                draft.pool_closed_for = draft.pool_closed_for or lacks
