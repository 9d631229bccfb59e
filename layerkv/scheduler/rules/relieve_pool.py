"""Rule: residents leave the pool until what runs has the blocks it needs in this step."""

from __future__ import annotations

from collections.abc import Iterator

from layerkv.scheduler.draft import Draft
from layerkv.scheduler.needs import fills_pool
from layerkv.scheduler.outlook import Outlook
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.snapshot import ResidentRequest
from layerkv.scheduler.victims import recompute_is_cheaper


def relieve_pool(now: Outlook, draft: Draft) -> None:
    """Park residents, or give their KV up where that is cheaper, until the running requests' growth fits."""
    s = now.s
    growth = s.load.growth_blocks
    if s.load.num_paused and s.load.num_paused == s.load.num_resident:
        growth += s.shape.step_blocks  # somebody must go on
    deficit = growth - s.engine.free_blocks
    if deficit <= 0:
        return
    deficit -= sum(map(draft.blocks_to_free, draft.vacated))
    least_left = 1 if s.pool_blocks >= s.shape.pool_blocks else 0  # of a pool that has shrunk, the last leaves too
    for num_victims, (r, reason) in enumerate(_leavers(now, draft), start=len(draft.vacated)):
        if deficit <= 0 or num_victims + least_left >= max(s.load.num_resident, 1 + least_left):
            break  # the last resident goes on, unless it fills the pool
        if reason is Reason.POOL_SHORT:
            draft.park_resident(r, reason)
        else:
            draft.give_up_resident(r, reason)
        deficit -= draft.blocks_to_free(r)


def _leavers(now: Outlook, draft: Draft) -> Iterator[tuple[ResidentRequest, Reason]]:
    """Residents in the order in which they leave the pool, and why: parked if it is short, else computed again.

    One that cannot be computed again is parked even where that is dearer, and gives its KV up only after all others:
    that ends it.
    """
    s = now.s
    without_room: list[ResidentRequest] = []
    for r in now.victims:
        if r in draft.vacated:
            continue
        if fills_pool(s, r):
            if not s.engine.is_paused:
                yield r, Reason.LONGER_THAN_POOL
        elif not s.engine.is_paused and not r.cannot_recompute and recompute_is_cheaper(s, r, draft.blocks_to_store(r)):
            yield r, Reason.RECOMPUTE_CHEAPER
        elif draft.blocks_to_store(r) <= draft.host:
            yield r, Reason.POOL_SHORT
        else:
            without_room.append(r)
    # Left to vLLM, layered prompts would be preempted first, which hold no pool blocks. While paused that must be: KV
    # that is given up then could not be computed again.
    if not s.engine.is_paused:
        without_room.sort(key=lambda r: r.cannot_recompute)
        yield from ((r, Reason.NO_ROOM_TO_PARK) for r in without_room)
