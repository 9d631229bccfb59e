"""How much of a pool can be given back at once, and what that costs the prefix cache: packed, and in vLLM's order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layerkv.core.segments import SegmentLayout
from tests.fakes.block_churn import CHAT, LONG, Load, churn, prefix_pool

SEEDS = (0, 1)
NUM_BLOCKS = 8192


def both_ways(load: Load, segment_blocks: int) -> tuple[float, float, float]:
    """Share of the free memory in empty segments at 30 % in use, in vLLM's order and packed, and hit rate lost."""
    layout = SegmentLayout(segment_blocks, NUM_BLOCKS // segment_blocks)
    runs = [
        [churn(load, prefix_pool(NUM_BLOCKS, layout, packs=packs), layout, seed=seed, steps=2000) for seed in SEEDS]
        for packs in (False, True)
    ]
    assert all(run.num_samples >= 10 for way in runs for run in way)
    stock, packed = (sum(run.returnable for run in way) / len(way) for way in runs)
    hit, packed_hit = (sum(run.hit for run in way) / len(way) for way in runs)
    return stock, packed, hit - packed_hit


def test_half_of_the_free_memory_of_a_chat_is_in_empty_segments() -> None:
    stock, packed, lost = both_ways(CHAT, 32)
    assert stock < 0.4
    assert packed >= 0.5
    assert lost <= 0.02


@pytest.mark.parametrize("num_contexts", [22, 34])
def test_that_holds_whether_nearly_everything_fits_the_cache_or_much_does_not(num_contexts: int) -> None:
    _, packed, lost = both_ways(replace(CHAT, num_contexts=num_contexts), 32)
    assert packed >= 0.5
    assert lost <= (0.065 if num_contexts == 34 else 0.01)


def test_long_documents_pack_well_in_small_segments_and_in_large_ones() -> None:
    for segment_blocks, share in ((32, 0.9), (256, 0.65)):
        stock, packed, lost = both_ways(LONG, segment_blocks)
        assert packed >= max(stock, share)
        assert lost <= 0.01


def test_a_chat_does_not_pack_in_segments_as_large_as_its_requests() -> None:
    """Requests of about 200 blocks and segments of 256: what leaves must be parked."""
    _, packed, lost = both_ways(CHAT, 256)
    assert packed < 0.1
    assert lost <= 0.02
