"""Made-up views and snapshots for tests of the policy: an engine whose blocks have 16 tokens."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from layerkv.core.cost import CostView
from layerkv.scheduler.engine import EngineShape, EngineState
from layerkv.scheduler.snapshot import (
    Decision,
    Lines,
    Load,
    ParkedRequest,
    ResidentRequest,
    Snapshot,
    WaitingRequest,
)
from tests.fakes.tiny_scheduler import BLOCK_BYTES, BLOCK_TOKENS, profile

BLOCK = BLOCK_TOKENS
POOL, ZONE, HOST = 100, 40, 120
NOW_S = 100.0
IDLE = Snapshot(
    now_s=NOW_S,
    shape=EngineShape(
        mode="auto",
        block_tokens=BLOCK,
        block_bytes=BLOCK_BYTES,
        streamed_block_bytes=BLOCK_BYTES,
        pool_blocks=POOL,
        zone_blocks=ZONE,
        host_blocks=HOST,
    ),
    engine=EngineState(
        step=0,
        running=(),
        arriving=(),
        free_blocks=POOL,
        reserved_blocks=0,
        free_zone_blocks=ZONE,
        free_host_blocks=HOST,
        free_slots=16,
        budget_tokens=2048,
    ),
    load=Load(),
    lines=Lines(),
    policy="slo",
)
_PARTS = {
    **dict.fromkeys((f.name for f in fields(EngineShape)), "shape"),
    **dict.fromkeys((*EngineState._fields, "frees_are_deferred"), "engine"),
    **dict.fromkeys(Load._fields, "load"),
    **dict.fromkeys(Lines._fields, "lines"),
}


def snapshot(**changes: Any) -> Snapshot:
    """An idle engine with room for everything, and nothing known of costs."""
    return changed(IDLE, **changes)


def changed(s: Snapshot, **changes: Any) -> Snapshot:
    """A snapshot with other values, named without the part that holds them."""
    if "frees_are_deferred" in changes:
        changes["steps_ahead"] = int(changes.pop("frees_are_deferred"))
    if "slo_scheduling" in changes:
        changes["policy"] = "slo" if changes.pop("slo_scheduling") else "arrival"
    parts: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        parts.setdefault(_PARTS.get(name, ""), {})[name] = value
    whole: dict[str, Any] = parts.pop("", {})
    for part, values in parts.items():
        before = getattr(s, part)
        whole[part] = replace(before, **values) if part == "shape" else before._replace(**values)
    return replace(s, **whole)


class Flat:
    """A snapshot whose values are asked for without the part that holds them."""

    def __init__(self, s: Snapshot) -> None:
        self._s = s

    def __getattr__(self, name: str) -> Any:
        part = _PARTS.get(name)
        return getattr(self._s if part is None else getattr(self._s, part), name)


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
