"""Rule: copies that residents keep in host memory give way before prompts and parks want for room there."""

from __future__ import annotations

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.needs import layered_blocks
from layerkv.scheduler.outlook import Outlook


def give_way(now: Outlook, draft: Draft) -> None:
    """Drop residents' copies, the largest first, until the first prompt in line and a few parks find room."""
    s = now.s
    wanted = max(s.shape.host_blocks // 8, *(layered_blocks(w) for w in s.lines.waiting[:1]), s.load.growth_blocks)
    if draft.host >= wanted:
        return
    for r in sorted(s.load.resident, key=lambda r: -r.num_stored):
        if draft.host >= wanted or r.num_stored <= 0:
            return
        draft.drop_copy(r)
