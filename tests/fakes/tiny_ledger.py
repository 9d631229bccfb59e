"""A ledger small enough to follow by hand, and what tests ask of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from layerkv.core.geometry import KVGeometry
from layerkv.core.residency import Residency
from layerkv.core.segments import SegmentLayout
from layerkv.core.transfer import BlockRun
from tests.fakes.flat_ledger import FlatLedger

WAITING, RESIDENT, LAYERED, PARKED, FETCHING = Residency
TOKENS = 4
POOL = 16
ZONE = 10


def make_ledger(num_host_blocks: int = 12, host_layout: SegmentLayout | None = None) -> FlatLedger:
    geometry = KVGeometry(num_layers=3, page_bytes=64, block_tokens=TOKENS, pool_blocks=POOL, zone_blocks=ZONE, lanes=1)
    return FlatLedger(geometry, num_host_blocks, host_layout)


def books(ledger: FlatLedger) -> dict[str, Any]:
    """All that can be seen of a ledger from outside, but for the plan."""
    return {
        "residency": {request_id: ledger.residency[request_id] for request_id in ledger.residency},
        "counts": dict(ledger.residency.counts),
        "host": [ledger.host.is_free(block) for block in range(ledger.host.count)],
        "zone": (ledger.zone.num_available, ledger.zone.num_taken),
        "counters": asdict(ledger.counters),
        "layered": ledger.layered_ids,
        "idle": ledger.is_idle,
    }


def pairs(runs: tuple[BlockRun, ...]) -> dict[int, int]:
    """Host block of each device block."""
    return {run.device_block + i: run.host_block + i for run in runs for i in range(run.num_blocks)}


def layered(ledger: FlatLedger, request_id: str, num_blocks: int, hits: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Admit and start a layered prompt; its block table."""
    ledger.add(request_id)
    ledger.admit_layered(request_id, table_blocks=num_blocks, zone_blocks=num_blocks - len(hits))
    table = (*hits, *ledger.zone.take(request_id, num_blocks - len(hits)))
    ledger.started(request_id)
    return table


def resident(ledger: FlatLedger, request_id: str) -> None:
    ledger.add(request_id)
    ledger.started(request_id)


def finished(ledger: FlatLedger, request_id: str, table: tuple[int, ...], hashes: list[str], num_computed: int) -> None:
    """A resident request that has computed so many tokens ends, and its whole blocks are kept."""
    ledger.add(request_id)
    ledger.started(request_id)
    ledger.finish(request_id, hashes=hashes, block_ids=table, num_computed=num_computed)
