"""Rule: the likeliest victim of a coming shortage is copied to host memory before it: then its park costs nothing."""

from __future__ import annotations

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.outlook import Outlook


def store_ahead(now: Outlook, draft: Draft) -> None:
    """Copy one more likely victim in the background if the pool is going to run short.

    Half of host memory is left to prompts and parks that need it at once: a copy made ahead stays until its request
    is parked or ends. All of it is left to drain for a prompt that nobody passes any more.
    """
    s = now.s
    if not s.can_store_ahead or draft.park or draft.recompute or s.load.num_resident < 2 or draft.is_closed:
        return
    shortage = draft.forecast.shortage(now.limits.ahead_steps, draft.pool)
    if shortage <= 0:
        return
    for r in now.victims:
        whole_blocks = s.shape.whole_blocks(r.num_tokens)
        if r.num_stored * 2 < whole_blocks:
            if whole_blocks - r.num_stored <= draft.host - s.host_blocks // 2:
                draft.store_ahead(r, whole_blocks - r.num_stored)
            return
        shortage -= r.num_blocks
        if shortage <= 0:
            return
