"""Rule: copies that residents keep in host memory give way before prompts and parks want for room there."""

from __future__ import annotations

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.needs import can_ever_layer, host_blocks_to_take
from layerkv.scheduler.outlook import Outlook


def give_way(now: Outlook, draft: Draft) -> None:
    """Drop residents' copies, the largest first, until the first prompt in line and a few parks find room."""
    s = now.s
    wanted = max(s.host_blocks // 8, wanted_by_prompt(now), s.load.growth_blocks)
    if draft.host >= wanted:
        return
    for r in sorted(s.load.resident, key=lambda r: r.num_shared - r.num_stored):
        if draft.host >= wanted or r.num_stored <= r.num_shared:
            return
        draft.drop_copy(r)


def wanted_by_prompt(now: Outlook) -> int:
    """Free host blocks that the first prompt in line takes to start layered; 0 if it never can."""
    s = now.s
    return max((host_blocks_to_take(s, w) for w in s.lines.waiting[:1] if can_ever_layer(s, w)), default=0)
