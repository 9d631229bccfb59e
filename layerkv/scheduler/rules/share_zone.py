"""Rule: requests that decode in the zone give way there to prompts and to each other, and come back by turns."""

from __future__ import annotations

import math

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.lines import Claim, overtaken_in
from layerkv.scheduler.needs import hit_of, layered_blocks, outgrows_pool
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.rules.rotate import SPARE_FOR_FRESH_S
from layerkv.scheduler.rules.start_prompts import start_prompts
from layerkv.scheduler.snapshot import ParkedRequest, WaitingRequest
from layerkv.scheduler.zone_turns import come_back, line_for_zone, make_room

_WAITS_FOR_ZONE = frozenset({Reason.ZONE_FULL, Reason.SMALL_REST})


def share_zone(now: Outlook, draft: Draft) -> None:
    """Start the prompt that waits for the zone in the place of who has had a slice there; then bring parked ones back.

    They come back while no prompt waits for the zone, and none that will need it and can be on time waits for tokens:
    a first token takes the zone for less than a slice.
    """
    s = now.s
    if not s.shape.long_contexts:
        return
    prompts = [w for _, prompts in now.ranks for w in prompts]
    _give_way_to_prompt(now, draft, prompts)
    if not s.lines.parked_long:
        return
    line = [p for p in line_for_zone(now) if p.request_id not in draft.reasons]
    needed_from = min((w.rank for w in prompts if _needs_zone(now, draft, w)), default=math.inf)
    for p in line:
        if p.rank >= needed_from:
            draft.wait_too(p, Reason.BEHIND)
        else:
            come_back(now, draft, p)
    _note_overtaken(now, draft, line, prompts)


def _note_overtaken(now: Outlook, draft: Draft, line: list[ParkedRequest], prompts: list[WaitingRequest]) -> None:
    """Whoever takes the zone passes those that wait for it; whoever takes a slot, too, while there is none."""
    has_slot = draft.slots > 0
    started = {a.request_id for a in (*draft.back_to_zone, *draft.admit) if a.layered or not has_slot}
    if not has_slot:
        started.update(draft.fetch)
    others: list[Claim] = [*prompts, *now.s.lines.parked]
    draft.overtake(list(overtaken_in([*(c for c in others if c.request_id in started), *line], started)))


def _give_way_to_prompt(now: Outlook, draft: Draft, prompts: list[WaitingRequest]) -> None:
    """At most one waits for the zone's blocks; others stand behind it."""
    w = next((w for w in prompts if draft.waits.get(w.request_id) is Reason.ZONE_FULL), None)
    if w is None:
        return
    num_blocks = layered_blocks(w) - hit_of(now.s, w).num_blocks
    is_due = w.request_id not in now.late or w.request_id in now.overdue
    least_s = -math.inf if is_due else SPARE_FOR_FRESH_S
    if make_room(now, draft, num_blocks, w.rank, least_s, spares_lost=False) and num_blocks <= draft.zone:
        draft.zone_promised_for = None
        start_prompts(now, draft, [w])


def _needs_zone(now: Outlook, draft: Draft, w: WaitingRequest) -> bool:
    reason = draft.waits.get(w.request_id)
    if reason in _WAITS_FOR_ZONE:
        return True
    if reason is not Reason.NO_TOKENS_LEFT or w.request_id in now.late or not now.can_ever_layer(w):
        return False
    return outgrows_pool(now.s, w) or draft.blocked is not None or not draft.fits_pool(w)
