"""Rules: streams that are paused get slots again, by when their readers run dry.

Pausing is no rule: whoever comes in takes a free slot, or one that somebody lends (:mod:`layerkv.scheduler.slots`).
"""

from __future__ import annotations

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.fluid import FluidOutlook
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.slots import is_overdue, lender_to_stream, paused, soon_s


def resume_due(now: Outlook, draft: Draft) -> None:
    """Before anybody comes in: streams go on whose readers have waited as long as they may for the sake of prompts."""
    if not now.s.load.num_paused:
        return
    assert isinstance(now, FluidOutlook)
    due_s = soon_s(now)
    for p in paused(now):
        if not draft.may_resume(p.request) or not (is_overdue(now, p) or (p.flows and p.wait_s <= due_s)):
            continue
        lender = None if draft.slots > 0 else lender_to_stream(now, p, draft.left)
        if draft.slots > 0 or lender is not None:
            draft.resume(p.request, lender)


def fill_slots(now: Outlook, draft: Draft) -> None:
    """After everybody else: paused streams take what slots are left, and those of streams that can wait longer."""
    if not now.s.load.num_paused:
        return
    assert isinstance(now, FluidOutlook)
    due_s = soon_s(now)
    for p in paused(now):
        if not draft.may_resume(p.request):
            continue
        if draft.unused_slots > 0:
            draft.resume(p.request)
        elif p.flows and p.spare_s <= due_s and (lender := lender_to_stream(now, p, draft.left)) is not None:
            draft.resume(p.request, lender)


def resume_all(now: Outlook, draft: Draft) -> None:
    """Where streams take no turns (the policy has changed): those that are paused go on first."""
    for r in now.s.load.resident if now.s.load.num_paused else ():
        if r.is_paused and draft.slots > 0 and draft.may_resume(r):
            draft.resume(r)
