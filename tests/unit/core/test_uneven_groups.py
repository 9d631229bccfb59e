"""Layers divided unevenly into KV-cache groups: what one group leaves behind no other group writes too early."""

from __future__ import annotations

import pytest

from layerkv.core.geometry import KVGeometry
from layerkv.core.groups import Group, host_blocks
from layerkv.core.ledger import KVLedger
from layerkv.core.transfer import BlockRun
from layerkv.device.rows import Rows

TOKENS, WINDOW = 16, 512


def groups_as_vllm_makes_them(num_layers: int, every: int) -> tuple[Group, ...]:
    """Each ``every``-th layer keeps all, the others a window; ``layers[i::n]`` are one group, as in vLLM."""
    full = [layer for layer in range(num_layers) if layer % every == every - 1]
    windowed = [layer for layer in range(num_layers) if layer % every != every - 1]
    num_slots = min(len(full), len(windowed))
    groups = []
    for layers, window in ((windowed, WINDOW), (full, 0)):
        parts = -(-len(layers) // num_slots)
        for part in range(parts):
            own = tuple(layers[part::parts])
            groups.append(Group(TOKENS, len(own), window=window, most_blocks=200 if window else 0, places=own))
    return tuple(groups)


def host_blocks_of(runs: tuple[BlockRun, ...]) -> set[int]:
    return {block for run in runs for block in range(run.host_block, run.host_block + run.num_blocks)}


@pytest.mark.parametrize("chunk", [96, 512, 1024])
@pytest.mark.parametrize(("num_layers", "every"), [(26, 6), (34, 6), (48, 6), (24, 2)])
def test_no_row_stores_into_a_host_block_that_a_later_row_still_loads(num_layers: int, every: int, chunk: int) -> None:
    groups = groups_as_vllm_makes_them(num_layers, every)
    num_slots = max(group.num_layers for group in groups)
    geometry = KVGeometry(
        num_layers=num_slots,
        page_bytes=4096,
        block_tokens=TOKENS,
        pool_blocks=1000,
        zone_blocks=400,
        lanes=2,
        groups=groups,
    )
    ledger, rows, prompt = KVLedger(geometry, 5000), Rows.of(geometry), 4000
    place = {(row.group, row.slot): at for at, row in enumerate(geometry.rows())}
    ledger.add("r")
    ledger.admit_layered("r", table_blocks=host_blocks(groups, prompt), zone_blocks=-(-prompt // TOKENS))
    tables: list[list[int]] = [[] for _ in groups]
    for done in range(0, prompt, chunk):
        num_tokens = min(chunk, prompt - done)
        for index, (group, table) in enumerate(zip(groups, tables, strict=True)):
            for entry in range(min(group.first_needed(done), len(table))):
                if table[entry]:
                    ledger.zone.give_back([table[entry]])
                    table[entry] = 0
            table += ledger.zone.take("r", group.num_entries(done + num_tokens) - len(table), index)
        ledger.started("r")
        ledger.step_layered("r", tables, num_computed=done, num_scheduled=num_tokens)
        plan = ledger.take_plan(num_tokens)
        loaded = [host_blocks_of(tuple(runs)) for runs in rows.divide(plan.loads)]
        stored = [host_blocks_of(tuple(runs)) for runs in rows.divide(plan.stores)]
        for (loads, slot), at in place.items():
            for stores, blocks in enumerate(stored):
                if stores != loads and place.get((stores, slot), at) < at:
                    assert not loaded[loads] & blocks, f"{stores} writes slot {slot} before {loads} reads"
    assert ledger.num_host_blocks_of("r") == host_blocks(groups, prompt), "no more than was promised"
