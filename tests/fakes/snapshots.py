"""Made-up views and snapshots for tests of the policy: an engine whose blocks have 16 tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layerkv.core.cost import CostView
from layerkv.scheduler.snapshot import Decision, ParkedRequest, ResidentRequest, Snapshot, WaitingRequest
from tests.fakes.tiny_scheduler import BLOCK_BYTES, BLOCK_TOKENS, profile

BLOCK = BLOCK_TOKENS
POOL, ZONE, HOST = 100, 40, 120
NOW_S = 100.0
IDLE = Snapshot(
    now_s=NOW_S,
    mode="auto",
    block_tokens=BLOCK,
    block_bytes=BLOCK_BYTES,
    streamed_block_bytes=BLOCK_BYTES,
    pool_blocks=POOL,
    free_blocks=POOL,
    growth_blocks=0,
    reserved_blocks=0,
    zone_blocks=ZONE,
    free_zone_blocks=ZONE,
    host_blocks=HOST,
    free_host_blocks=HOST,
    free_slots=16,
    budget_tokens=2048,
)


def snapshot(**changes: Any) -> Snapshot:
    """An idle engine with room for everything, and nothing known of costs."""
    return replace(IDLE, **changes)


def cost(**changes: Any) -> CostView:
    """10 ms a step, 0.1 ms a token, 0.5 ms a block copied."""
    return CostView(profile(**changes))


def prompt(name: str, blocks: int = 10, deadline_s: float = 101.0, **changes: Any) -> WaitingRequest:
    """A prompt that fills its blocks."""
    view = WaitingRequest(name, deadline_s, blocks * BLOCK, blocks, prefill_cost_s=blocks * BLOCK * 1e-4)
    return view._replace(**changes)


def parked(name: str, deadline_s: float = 101.0, blocks: int = 10, **changes: Any) -> ParkedRequest:
    """A parked request that is on time."""
    return ParkedRequest(name, deadline_s, blocks)._replace(**changes)


def resident(name: str, deadline_s: float = 105.0, **changes: Any) -> ResidentRequest:
    """A resident of ten blocks that may be parked."""
    view = ResidentRequest(name, deadline_s, num_blocks=10, steps_resident=100, num_tokens=10 * BLOCK)
    return view._replace(**changes)


def crowd(num: int, **changes: Any) -> dict[str, Any]:
    """So many residents who may not be parked, and will end with their next token."""
    residents = [resident(f"resident{i}", can_park=False, **changes) for i in range(num)]
    return {"resident": residents, "num_resident": num}


def admitted(decision: Decision) -> list[tuple[str, bool]]:
    """Who starts, and whether layered."""
    return [(admission.request_id, admission.layered) for admission in decision.admit]
