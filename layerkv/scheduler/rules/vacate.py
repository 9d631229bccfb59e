"""Rule: residents leave memory that the pool gives back, while host memory has room for them."""

from __future__ import annotations

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.reasons import Reason


def vacate(now: Outlook, draft: Draft) -> None:
    """Park those with blocks in segments that leave. Without room they go on where they are: nothing is recomputed."""
    vacating = now.s.engine.vacating
    if not vacating:
        return
    for r in now.victims:
        if r.request_id in vacating and draft.blocks_to_store(r) <= draft.host:
            draft.park_resident(r, Reason.SEGMENT_LEAVES)
