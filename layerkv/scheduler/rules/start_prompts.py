"""Rule: prompts start in order of their turns, in the pool if that hurts nobody, else in the zone if that helps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.needs import (
    host_blocks_to_take,
    needs_longer_step,
    outgrows_pool,
    pool_blocks,
    pool_blocks_layered,
    tokens_to_compute,
    zone_blocks,
)
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.reasons import WAITS_FOR, Reason, Resource
from layerkv.scheduler.snapshot import WaitingRequest

Place = Literal["pool", "zone"]


def start_prompts(now: Outlook, draft: Draft, prompts: Sequence[WaitingRequest]) -> None:
    """Start, refuse or leave waiting the prompts of one rank.

    Once a prompt that was overtaken too often cannot start, no other of its rank does, but for those that have blocks
    already.
    """
    closed, lacks = (Reason.BEHIND_RANK if draft.compute_closed_for else None), draft.compute_closed_for
    for w in prompts:
        refusal = _why_refused(now, draft, w)
        if refusal is not None:
            draft.turn_away(w, refusal)
            continue
        has_place = w.request_id in draft.granted and not draft.step_is_promised
        if closed is not None and not has_place:
            draft.wait_too(w, closed, lacks)
            continue
        place, reason = _where_to_start(now, draft, w)
        if place == "pool":
            draft.start_resident(w, reason)
        elif place == "zone":
            draft.start_layered(w, reason)
        else:
            # an overdue prompt that may run layered stands in line for the pool too, but does not need it
            tell = draft.wait if now.can_ever_layer(w) else draft.wait_too
            tell(w, reason, draft.zone_promised_for if reason is Reason.BEHIND else None)
            if w.request_id in now.overdue:
                closed, draft.is_closed = Reason.BEHIND_OVERDUE, True
                lacks = draft.lacks(w.request_id)
            elif draft.step_is_promised:
                closed, lacks = Reason.BEHIND, Resource.COMPUTE


def _why_refused(now: Outlook, draft: Draft, w: WaitingRequest) -> Reason | None:
    if needs_longer_step(now.s, w):
        return Reason.NEVER_FITS
    if w.request_id in draft.granted:
        return None
    if w.may_refuse and w.request_id in now.late:
        return Reason.OVERLOAD
    if outgrows_pool(now.s, w) and not now.can_ever_layer(w):
        return Reason.NEVER_FITS
    return None


def _where_to_start(now: Outlook, draft: Draft, w: WaitingRequest) -> tuple[Place | None, Reason]:
    """Where a prompt may start in this step, if it may, and why there or why not.

    A prompt that is to run layered, but cannot just now, holds back later ones that want the zone: it is next.
    """
    s = now.s
    if draft.tokens <= 0:
        return None, Reason.LATE if w.request_id in now.late else Reason.NO_TOKENS_LEFT
    if w.in_one_step and not _has_step_for_all_of_it(now, draft, w):
        draft.step_is_promised = True
        return None, Reason.NO_TOKENS_LEFT
    if w.request_id in draft.granted:
        return "pool", Reason.FITS
    if not now.may_start(w):
        return None, Reason.HELD
    if not now.can_ever_layer(w):
        return None, Reason.POOL_FULL
    if not draft.has_slot(w):
        return None, Reason.NO_SLOT  # not an end: a later prompt may have been granted the slot
    is_free = draft.blocked is None and not draft.is_relieving and not outgrows_pool(s, w)
    fits = is_free and draft.fits_pool(w)
    if fits and s.shape.mode == "auto":
        return "pool", Reason.FITS
    if draft.zone_promised_for is not None:
        return None, Reason.BEHIND
    obstacle = _why_not_layered(now, draft, w)
    if obstacle is None:
        return "zone", Reason.POOL_CONTENDED
    if obstacle is Reason.HOST_FULL and fits:
        return "pool", Reason.HOST_FULL_RESIDENT  # stock behaviour
    draft.zone_promised_for = None if obstacle is Reason.WAIT_IS_SHORTER else WAITS_FOR[obstacle]
    return None, obstacle


def _has_step_for_all_of_it(now: Outlook, draft: Draft, w: WaitingRequest) -> bool:
    """Whether this step's tokens hold a prompt that must not be cut: no other prompt may come before it.

    Hits are not counted on: they may be gone by the time that the engine looks.
    """
    s = now.s
    is_first = not draft.admit and s.load.prefilling_tokens == 0
    return is_first and w.num_tokens + len(draft.fetch) <= s.most_prefill_tokens


def _why_not_layered(now: Outlook, draft: Draft, w: WaitingRequest) -> Reason | None:
    """None if zone, host memory and this step's tokens have room for the prompt and that helps it; else why not."""
    s = now.s
    if host_blocks_to_take(s, w) > draft.host:
        return Reason.HOST_FULL
    pool_blocks_too = pool_blocks_layered(s, w)
    if zone_blocks(s, w) > draft.zone or pool_blocks_too > max(draft.pool, 0):
        return Reason.ZONE_FULL
    first = draft.blocked
    if pool_blocks_too and first is not None and first.request_id in now.next_in_pool - {w.request_id}:
        return Reason.BEHIND_OVERDUE
    if draft.tokens < min(tokens_to_compute(s, w), now.prefill_tokens // 2):
        return Reason.SMALL_REST
    if _waiting_is_shorter(now, draft, w):
        return Reason.WAIT_IS_SHORTER
    return None


def _waiting_is_shorter(now: Outlook, draft: Draft, w: WaitingRequest) -> bool:
    """Whether pool blocks come free sooner than the copies of a layered prefill take, and in time.

    Two copies of its KV is what LAYERED costs; a first token that much sooner is what it gives (LayerKV Eq. 4).
    """
    s = now.s
    if (
        s.shape.mode != "auto"
        or s.cost is None
        or draft.blocked is not None
        or draft.residents == 0
        or outgrows_pool(s, w)
    ):
        return False
    steps = draft.forecast.steps_until_free(pool_blocks(s, w), draft.pool)
    if steps is None:
        return False
    wait_s = steps * now.step_s
    in_time = s.now_s + wait_s + w.prefill_cost_s * s.cost.prefill_factor <= w.deadline_s
    return in_time and wait_s < now.fetch_s(w.num_blocks)
