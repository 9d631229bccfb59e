"""Turns in the zone: who gives it up for whom, among requests that decode there and prompts that need it.

Such a request outgrows the pool. Its KV is whole in host memory after every step, and it loads that layer by layer in
each of its steps wherever it was before: giving the zone up costs it nothing, and coming back only the loads of layers
that have a lane for themselves. So its slices are as short as any.
"""

from __future__ import annotations

import math

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.fluid import LEAST_SLICE_S
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.rules.rotate import least_spare_s
from layerkv.scheduler.slots import soon_s
from layerkv.scheduler.snapshot import LayeredRequest, ParkedRequest


def line_for_zone(now: Outlook) -> list[ParkedRequest]:
    """Parked requests that decode in the zone, in order of turns: the overtaken, those that flow, those run dry."""
    now_s, overdue = now.s.now_s, now.overdue

    def turn(p: ParkedRequest) -> tuple[int, bool, bool, float]:
        return p.rank, p.request_id not in overdue, p.deadline_s < now_s, p.dry_s

    return sorted(now.s.lines.parked_long, key=turn)


def come_back(now: Outlook, draft: Draft, p: ParkedRequest) -> bool:
    """A parked request takes its turn in the zone if there is room, or can be made; whether it does in this step."""
    is_overdue = p.request_id in now.overdue
    if p.zone_blocks > draft.zone and (is_overdue or p.dry_s <= now.s.now_s + soon_s(now)):
        flows = p.deadline_s >= now.s.now_s
        least_s = -math.inf if is_overdue else least_spare_s(now, p)
        if make_room(now, draft, p.zone_blocks, p.rank, least_s, spares_lost=not (flows or is_overdue)):
            draft.room_for.append(p.request_id)
    has_slot = draft.slots > 0 or draft.has_slot(p)  # one that somebody lends, if it is due
    if p.zone_blocks > draft.zone or not has_slot:
        draft.wait(p, Reason.NO_SLOT if p.zone_blocks <= draft.zone else Reason.ZONE_FULL)
        return False
    draft.return_to_zone(p)
    return True


def make_room(now: Outlook, draft: Draft, num_blocks: int, rank: int, spare_s: float, *, spares_lost: bool) -> bool:
    """Park requests that decode in the zone until so many blocks are free, or will be when frees are not deferred.

    Those leave that have had their slice and whose readers have so much to read, or whose streams are lost anyway
    unless those are spared too: these first, then those who have most to read.

    Returns:
        Whether anybody leaves. Nobody does in vain.
    """
    s = now.s
    missing = num_blocks - draft.zone - s.engine.freeing_zone_blocks
    if s.policy != "fluid" or missing <= 0:
        return False
    leaving: list[LayeredRequest] = []
    for r in sorted(s.load.layered, key=lambda r: (-r.rank, r.deadline_s >= s.now_s, -r.dry_s)):
        if missing <= 0:
            break
        if not _has_had_slice(r) or r.rank < rank or r.request_id in draft.reasons:
            continue
        is_lost = r.deadline_s < s.now_s and not spares_lost
        if is_lost or max(r.dry_s - s.now_s, 0.0) >= spare_s:
            leaving.append(r)
            missing -= r.room_blocks
    if missing > 0:
        return False
    for r in leaving:
        draft.park_layered(r, Reason.ZONE_TURN_OVER)
    return True


def _has_had_slice(r: LayeredRequest) -> bool:
    return r.outgrows_pool and r.prefill_done and r.has_run and r.in_zone_s >= LEAST_SLICE_S
