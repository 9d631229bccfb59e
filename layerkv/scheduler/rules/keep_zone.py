"""Rule: a parked request that decodes in the zone comes back before prompts and claims when it can wait no longer."""

from __future__ import annotations

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.slots import soon_s
from layerkv.scheduler.snapshot import ParkedRequest
from layerkv.scheduler.zone_turns import come_back, line_for_zone


def keep_zone(now: Outlook, draft: Draft) -> None:
    """Bring back who would stop flowing, was overtaken too often, had room made for it, or is of better rank.

    While one of them finds no room, no prompt takes any of the zone.
    """
    lines = now.s.lines
    ranks = [line[0].rank for line in (lines.waiting, lines.parked) if line]
    if not lines.parked_long or not ranks:
        return
    for p in line_for_zone(now):
        if _cannot_wait(now, p, min(ranks)) and not come_back(now, draft, p):
            draft.zone_promised_for = draft.lacks(p.request_id)
            return


def _cannot_wait(now: Outlook, p: ParkedRequest, best_rank: int) -> bool:
    s = now.s
    if p.rank != best_rank:
        return p.rank < best_rank
    if p.request_id in now.overdue or p.request_id in s.lines.promised:
        return True
    return s.policy == "fluid" and s.now_s <= p.deadline_s <= s.now_s + soon_s(now)
