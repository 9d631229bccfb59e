"""How much of a pool can be given back at once while 30 % of it is in use, and what packing costs the prefix cache.

    python benchmarks/packing.py --json benchmarks/results/DATE-packing.json

vLLM's real block pool with prefix caching, under the two loads of tests/fakes/block_churn.py: with vLLM's own free
queue, and with layerkv's in its place, which hands blocks out segment by segment. No model and no engine: what is
counted is which blocks are in use, and which of a prompt's blocks were found. Run it from a checkout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from layerkv.bench.machine import measured_here
from layerkv.core.segments import SegmentLayout, SegmentPlan

sys.path.insert(0, str(Path(__file__).parents[1]))  # the loads are the tests'

from tests.fakes.block_churn import CHAT, LONG, Figures, Load, churn

LOADS = {"chat": CHAT, "long documents": LONG}
SEGMENT_BLOCKS = (32, 256)
NUM_BLOCKS = 8192
BLOCK_TOKENS = 16
IN_USE = 0.3
STEPS = 4000
SEEDS = (0, 1, 2)


class VLLMPool:
    """vLLM's block pool as `churn` drives it; with segments, layerkv's queue hands its blocks out."""

    def __init__(self, num_blocks: int, segments: SegmentLayout | None) -> None:
        from vllm.v1.core.block_pool import BlockPool

        from layerkv.vllm_plugin.segment_queue import SegmentQueue

        self.num_blocks = num_blocks
        self._pool = BlockPool(num_blocks, enable_caching=True, hash_block_size=BLOCK_TOKENS)
        if segments is not None:
            self._pool.free_block_queue = SegmentQueue(self._pool, SegmentPlan(segments, segments.num_segments))

    @property
    def num_used(self) -> int:
        """The null block among them."""
        return self.num_blocks - int(self._pool.get_num_free_blocks())

    def find(self, hashes: Sequence[int]) -> list[Any]:
        """The blocks that cache the longest known beginning."""
        found: list[Any] = []
        for number in hashes:
            blocks = self._pool.get_cached_block(_hash(number), [0])
            if blocks is None:
                break
            found += blocks
        return found

    def touch(self, blocks: Sequence[Any]) -> None:
        """A request begins with these, which are cached."""
        self._pool.touch(blocks)

    def take(self, num_blocks: int) -> list[Any]:
        """Blocks for one request."""
        return list(self._pool.get_new_blocks(num_blocks))

    def name(self, blocks: Sequence[Any], hashes: Sequence[int]) -> None:
        """All of a request's blocks but the last are whole, and found by these from now on."""
        num_found = next((i for i, block in enumerate(blocks) if block.block_hash is None), len(blocks))
        request = SimpleNamespace(block_hashes=[_hash(number) for number in hashes])
        self._pool.cache_full_blocks(request, list(blocks), num_found, len(hashes), BLOCK_TOKENS, 0)

    def give_back(self, blocks: Sequence[Any]) -> None:
        """A request has ended: as vLLM does, its last block is evicted first."""
        self._pool.free_blocks(reversed(blocks))

    def is_used(self, block_id: int) -> bool:
        """Whether a request has it; the null block counts."""
        block = self._pool.blocks[block_id]
        return bool(block.is_null or block.ref_cnt > 0)


def _hash(number: int) -> bytes:
    return number.to_bytes(32, "big")


def measure(load: Load, segment_blocks: int, steps: int) -> dict[str, list[Figures]]:
    """Of each seed, with vLLM's queue and with layerkv's."""
    layout = SegmentLayout(segment_blocks, NUM_BLOCKS // segment_blocks)
    return {
        way: [churn(load, VLLMPool(NUM_BLOCKS, segments), layout, seed=seed, steps=steps, at=IN_USE) for seed in SEEDS]
        for way, segments in (("vllm", None), ("layerkv", layout))
    }


def medians(runs: Sequence[Figures]) -> dict[str, Any]:
    """Of the seeds, each figure on its own; and all of them."""
    names = ("hit", "returnable", "in_the_way")
    return {name: median(getattr(run, name) for run in runs) for name in names} | {"seeds": [asdict(r) for r in runs]}


def main() -> None:
    """Measure, print, and write the JSON file if one is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    begun_s, rows = time.perf_counter(), []
    table = Table(box=SIMPLE)
    for title in ("load", "blocks of a segment", "queue", "returnable at once", "in the way of half", "hits"):
        table.add_column(title, justify="left" if title in ("load", "queue") else "right")
    for name, load in LOADS.items():
        for segment_blocks in SEGMENT_BLOCKS:
            for way, runs in measure(load, segment_blocks, arguments.steps).items():
                row = {"load": name, "segment_blocks": segment_blocks, "queue": way, **medians(runs)}
                rows.append(row)
                shares = (f"{row[figure]:.1%}" for figure in ("returnable", "in_the_way", "hit"))
                table.add_row(name, str(segment_blocks), way, *shares)
    Console().print(table)
    result = {
        "schema": 1,
        **msgspec.to_builtins(measured_here()),
        "seeds": list(SEEDS),
        "pool_blocks": NUM_BLOCKS,
        "in_use": IN_USE,
        "steps": arguments.steps,
        "rows": rows,
        "wall_s": round(time.perf_counter() - begun_s, 1),
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
