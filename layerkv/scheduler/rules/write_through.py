"""Rule: residents are copied to host memory bit by bit while they run, the likeliest to be parked first."""

from __future__ import annotations

from layerkv.core.cost import seconds_per_byte
from layerkv.scheduler.draft import Draft
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.rules.give_way import wanted_by_prompt

LINK_SHARE = 0.2
"""Of the link's time, what such copies may take. Not measured: taken from the prototype of 2026-11."""


def write_through(now: Outlook, draft: Draft) -> None:
    """Copy the next victims' next blocks in the background, if the pool is more than half full.

    A part of host memory is left to prompts and parks that need it at once. All of it is left to drain for a prompt
    that nobody passes any more.
    """
    s = now.s
    if not s.can_store_ahead or s.cost is None or draft.is_closed or s.load.num_resident < 2:
        return
    if draft.pool * 2 > s.pool_blocks:
        return
    block_s = max(seconds_per_byte(s.cost.profile.store) * s.shape.block_bytes, 1e-9)
    blocks = max(int(LINK_SHARE * now.limits.look_steps * now.step_s / block_s), 1)
    room = draft.host - max(s.host_blocks // 4, wanted_by_prompt(now))  # or it would give way in the next step
    for r in now.victims:
        if blocks <= 0 or room <= 0:
            return
        if r.request_id in draft.park or r.request_id in draft.recompute or r.request_id in draft.dropped:
            continue
        num_blocks = min(s.shape.whole_blocks(r.num_tokens) - r.num_stored, blocks, room)
        if num_blocks > 0:
            draft.store_ahead(r, num_blocks)
            blocks -= num_blocks
            room -= num_blocks
