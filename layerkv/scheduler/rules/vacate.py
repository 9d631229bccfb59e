"""Rule: residents leave memory that the pool gives back."""

from __future__ import annotations

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.reasons import Reason


def vacate(now: Outlook, draft: Draft) -> None:
    """Park those with blocks in segments that leave. Without host memory they go on where they are: nothing is lost.

    To compare with, by the engine's ``give``: with ``wait`` all of them go on there, and a segment leaves when the last
    one has ended (kvcached's way); with ``recompute`` their KV is given up (vLLM's preemption). That would end whoever
    cannot be computed again, who is parked, and all of an engine that lets nobody start just now.
    """
    s = now.s
    vacating = s.engine.vacating
    if not vacating or s.shape.give == "wait":
        return
    for r in now.victims:
        if r.request_id not in vacating:
            continue
        if s.shape.give == "recompute" and not (r.cannot_recompute or s.engine.is_paused):
            draft.give_up_resident(r, Reason.SEGMENT_LEAVES)
        elif draft.blocks_to_store(r) <= draft.host:
            draft.park_resident(r, Reason.SEGMENT_LEAVES)
