"""Rule: a resident that can wait makes room for a claim that cannot."""

from __future__ import annotations

from collections.abc import Sequence

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.lines import Claim
from layerkv.scheduler.needs import fills_pool, pool_blocks
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.snapshot import ResidentRequest


def exchange(now: Outlook, draft: Draft, _claims: Sequence[Claim]) -> None:
    """Park residents that can afford it for the first blocked claim if that is about to become late.

    Only for one that still can be on time, and only residents whose laxity covers its whole stay and their own way
    back: each exchange uses laxity up, so exchanges end.
    """
    s, claim = now.s, draft.blocked
    if draft.is_relieving or draft.pool_closed_for or claim is None:
        return
    if s.cost is None or not s.slo_scheduling or not s.can_exchange or claim.deadline_s < s.now_s:
        return
    if claim.deadline_s - s.now_s > now.limits.rescue_steps * now.step_s:
        return
    for r in _who_can_wait(now, draft, claim):
        draft.park_resident(r, Reason.MAKES_ROOM)


def _who_can_wait(now: Outlook, draft: Draft, claim: Claim) -> Sequence[ResidentRequest]:
    """Residents whose blocks together make room for the claim; none if there are not enough."""
    s = now.s
    stay_s = claim.tokens_left * now.step_s
    missing = pool_blocks(s, claim) + draft.headroom - draft.pool
    host = draft.host
    chosen: list[ResidentRequest] = []
    for r in now.victims:
        if missing <= 0:
            break
        has_laxity = r.deadline_s - s.now_s > stay_s + now.fetch_s(r.num_blocks)
        is_lost = r.deadline_s < s.now_s and r.weight < claim.weight
        may_wait = r.rank >= claim.rank and r.steps_resident >= now.limits.min_resident_steps
        has_room = draft.blocks_to_store(r) <= host and not fills_pool(s, r)
        if (has_laxity or is_lost) and may_wait and has_room:
            chosen.append(r)
            missing -= r.num_blocks
            host -= draft.blocks_to_store(r)
    return chosen if missing <= 0 and len(chosen) < max(s.load.num_resident, 2) else ()
