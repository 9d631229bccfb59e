"""Who leaves the pool when somebody must, and whether its KV is copied or computed again."""

from __future__ import annotations

import math

from layerkv.scheduler.snapshot import ResidentRequest, Snapshot


def by_reluctance(s: Snapshot, *, recent_steps: int) -> list[ResidentRequest]:
    """Residents that may be parked, most readily first.

    Spared are those of better rank, then those that came less than ``recent_steps`` ago, those that can be on time, the
    weighty, and the urgent.
    """
    now_s = s.now_s if s.slo_scheduling else math.inf
    keyed = [
        (-r.rank, r.steps_resident < recent_steps, r.deadline_s >= now_s, r.weight, -r.deadline_s, r.request_id, r)
        for r in s.load.resident
        if r.can_park
    ]
    keyed.sort()
    return [entry[-1] for entry in keyed]


def recompute_is_cheaper(s: Snapshot, r: ResidentRequest, blocks_to_store: int) -> bool:
    """Swap or recompute: two copies, less what is stored already, against computing its tokens again."""
    if s.cost is None or not r.num_tokens:
        return False
    stored_s = s.cost.store_s(blocks_to_store * s.shape.block_bytes)
    return s.cost.prefill_s(r.num_tokens) < stored_s + s.cost.load_s(r.num_blocks * s.shape.block_bytes)
