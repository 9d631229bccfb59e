"""Rule: layered requests leave the zone after their first token, or stream from it while that is worth it."""

from __future__ import annotations

import math

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.needs import layered_blocks, zone_blocks
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.snapshot import LayeredRequest


def leave_zone(now: Outlook, draft: Draft) -> None:
    """Park layered requests that have their first token.

    With ``streamed_decode`` they go on instead while nobody wants the zone, the pool has no room for them, and what
    they load per step fits the link's budget. Those that outgrow the pool always go on; one of them that its room no
    longer suffices for starts over.
    """
    s = now.s
    stream_bytes = _stream_budget(now)
    wanted = min((zone_blocks(s, w) if s.shape.groups else layered_blocks(w) for w in s.lines.waiting[:1]), default=0)
    pool = draft.pool
    for r in s.load.layered:
        if not r.prefill_done:
            draft.stay_in_zone(r)
            continue
        zone, host = draft.zone, draft.host
        if not r.outgrows_pool:
            zone, host = zone - int(r.needs_zone_block), host - r.needs_host_block
        stream_bytes -= r.num_zone_blocks * (s.shape.streamed_block_bytes or s.shape.block_bytes)
        if r.outgrows_pool or r.num_blocks > s.shape.pool_blocks:  # it could not be fetched
            if (zone < 0 or host < 0) and not s.engine.is_paused:
                draft.give_up_layered(r, Reason.LONGER_THAN_POOL)
            else:
                draft.stay_in_zone(r)
            continue
        is_wanted = zone < wanted or host < 0 or r.num_blocks <= pool
        reason = _why_parked(r, streams=s.streamed_decode and not is_wanted, has_link=stream_bytes >= 0)
        if reason is None:
            draft.stay_in_zone(r)
            continue
        stream_bytes += r.num_zone_blocks * (s.shape.streamed_block_bytes or s.shape.block_bytes)
        pool -= r.num_blocks
        draft.park_layered(r, reason)


def _why_parked(r: LayeredRequest, *, streams: bool, has_link: bool) -> Reason | None:
    if not streams:  # a first token for another, or the pool for this one, is better
        return Reason.FIRST_TOKEN_DONE
    return None if has_link else Reason.STREAM_BUDGET


def _stream_budget(now: Outlook) -> float:
    """Bytes per step that the TPOT objectives leave time to load: ``(TPOT_SLO - T_step) * link``."""
    s = now.s
    if s.cost is None or not s.slo_scheduling or not s.streamed_decode or s.load.tightest_tpot_s == math.inf:
        return math.inf
    return s.cost.load_bytes_in(s.load.tightest_tpot_s - now.step_s)
