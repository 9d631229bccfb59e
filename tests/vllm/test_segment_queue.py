"""The queue of segments under vLLM's real block pool: every block is free, in use or withheld, whatever happens."""

from __future__ import annotations

import random
from typing import Any

import pytest

from layerkv.core.segments import SegmentLayout, SegmentPlan

pytestmark = pytest.mark.vllm

LAYOUT = SegmentLayout(segment_blocks=6, num_segments=10)
NUM_BLOCKS = LAYOUT.segment_blocks * LAYOUT.num_segments


def make(num_mapped: int = LAYOUT.num_segments, *, enable_caching: bool = True) -> tuple[Any, Any]:
    """A pool of 60 blocks, with a queue of segments for a free queue."""
    from vllm.v1.core.block_pool import BlockPool

    from layerkv.vllm_plugin.segment_queue import SegmentQueue

    pool = BlockPool(NUM_BLOCKS, enable_caching=enable_caching, hash_block_size=16)
    queue = pool.free_block_queue = SegmentQueue(pool, SegmentPlan(LAYOUT, num_mapped))
    return pool, queue


def cache(pool: Any, block: Any, number: int) -> None:
    """A block is full, and found by its hash from now on."""
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    pool._insert_block_hash(make_block_hash_with_group_id(number.to_bytes(32), 0), block, num_tokens=16)


def find(pool: Any, number: int) -> list[Any]:
    return pool.get_cached_block(number.to_bytes(32), [0]) or []


class Churn:
    """Requests that come and go by chance, and segments that go out of service and come back."""

    def __init__(self, seed: int, *, enable_caching: bool) -> None:
        self.chance = random.Random(seed)
        self.pool, self.queue = make(self.chance.randint(1, LAYOUT.num_segments), enable_caching=enable_caching)
        self.held: list[list[Any]] = []
        self.withheld = {s for s in range(LAYOUT.num_segments) if s in self.queue.blocks._withheld}
        self.num_cached = 0
        self.done: dict[str, int] = {}

    def step(self) -> None:
        kinds = ("take", "take", "fill", "fill", "give_back", "give_back", "hit", "leave", "come", "reset")
        kind = self.chance.choice(kinds)
        self.done[kind] = self.done.get(kind, 0) + bool(getattr(self, kind)())
        self.queue.check()
        assert self.pool.get_num_free_blocks() == len(self.queue.get_all_free_blocks())
        assert 0 <= self.pool.get_usage() <= 1

    def take(self) -> bool:
        num_blocks = self.chance.randint(1, 8)
        if num_blocks > self.pool.get_num_free_blocks():
            with pytest.raises(ValueError, match="Cannot get"):
                self.pool.get_new_blocks(num_blocks)
            return False
        new = self.pool.get_new_blocks(num_blocks)
        assert not any(LAYOUT.segment_of(block.block_id) in self.withheld for block in new)
        assert not any(block.is_null or block.block_hash for block in new)
        self.held.append(new)
        return True

    def fill(self) -> bool:
        """Blocks in use are cached, those of segments that leave among them."""
        of_request = self.chance.choice(self.held) if self.held else []
        empty = [block for block in of_request if block.block_hash is None and block.ref_cnt == 1]
        for block in empty if self.pool.enable_caching else ():
            cache(self.pool, block, self.num_cached)
            self.num_cached += 1
        return bool(empty)

    def give_back(self) -> bool:
        if not self.held:
            return False
        self.pool.free_blocks(reversed(self.held.pop(self.chance.randrange(len(self.held)))))
        return True

    def hit(self) -> bool:
        if not self.num_cached:
            return False
        found = find(self.pool, self.chance.randrange(max(self.num_cached - 40, 0), self.num_cached))
        if found:
            self.pool.touch(found)
            self.held.append(found)
        return bool(found)

    def leave(self) -> bool:
        left = [s for s in range(1, LAYOUT.num_segments) if s not in self.withheld]
        if not left:
            return False
        segment = self.chance.choice(left)
        self.queue.withhold(segment)
        self.withheld.add(segment)
        assert all(self.pool.blocks[block].block_hash is None for block in LAYOUT.blocks(segment))
        return True

    def come(self) -> bool:
        if not self.withheld:
            return False
        segment = self.chance.choice(sorted(self.withheld))
        if self.queue.is_empty(segment):
            self.queue.forget(segment)
            assert all(self.pool.blocks[block].block_hash is None for block in LAYOUT.blocks(segment))
        self.queue.restore(segment)
        self.withheld.remove(segment)
        return True

    def reset(self) -> bool:
        if self.chance.random() > 0.1:
            return False
        num_used = sum(block.ref_cnt > 0 for block in self.pool.blocks[1:])
        assert self.pool.reset_prefix_cache() == (num_used == 0)
        return num_used == 0


@pytest.mark.parametrize("enable_caching", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_every_block_has_its_place_whatever_happens(seed: int, enable_caching: bool) -> None:
    churn = Churn(seed, enable_caching=enable_caching)
    for _ in range(5_000):
        churn.step()
    rare = {"reset"} | (set() if enable_caching else {"hit"})
    assert all(churn.done[kind] > 100 for kind in churn.done.keys() - rare), churn.done
    while churn.held:
        churn.give_back()
    assert churn.pool.reset_prefix_cache()
    assert churn.pool.get_usage() == 0


def test_a_block_cached_in_a_segment_that_leaves_is_hit_until_it_is_forgotten() -> None:
    pool, queue = make()
    blocks = pool.get_new_blocks(8)  # 1 to 5, 6 to 8
    queue.withhold(1)
    assert pool.num_gpu_blocks == NUM_BLOCKS - 3, "three free ones are out of service, three live ones are not yet"
    cache(pool, blocks[6], 0)
    pool.free_blocks(blocks)
    assert queue.is_empty(1)
    assert pool.num_gpu_blocks == NUM_BLOCKS - 6
    assert find(pool, 0) == [blocks[6]]
    pool.touch(find(pool, 0))
    assert not queue.is_empty(1)
    pool.free_blocks([blocks[6]])
    queue.forget(1)
    assert not find(pool, 0)
    queue.check()


def test_vllms_queue_has_no_method_that_ours_lacks() -> None:
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

    from layerkv.vllm_plugin.segment_queue import SegmentQueue

    of_vllm = {name for name in vars(FreeKVCacheBlockQueue) if not name.startswith("_")}
    of_others = {"iter_blocks_after"}  # a connector of vLLM's own goes through it
    assert of_vllm - of_others <= set(vars(SegmentQueue))
