"""Takes the place of the free queue in vLLM's block pool: which block is handed out next, and which are in service.

vLLM's pool sees its own methods; what they mean here is :class:`~layerkv.core.free_blocks.FreeBlocks`. Blocks of
segments that are not in service are neither handed out nor counted, as zone blocks are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerkv.core.free_blocks import FreeBlocks
from layerkv.core.segments import SegmentPlan

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


class SegmentQueue:
    """See the module. One per pool; made before the first request, while all blocks but the null block are free.

    ``BlockPool.num_gpu_blocks`` follows: it counts what is free and what is in use, in service or not, so that vLLM's
    usage and the conditions of its cache reset stay true.
    """

    def __init__(self, pool: BlockPool, plan: SegmentPlan) -> None:
        layout = plan.layout
        num_blocks = layout.num_segments * layout.segment_blocks
        self.layout = layout
        self.blocks = FreeBlocks(layout)
        self._pool = pool
        self._of_id: Sequence[KVCacheBlock] = pool.blocks[:num_blocks]
        self._num_withheld = 0
        self.blocks.put_loose(range(1, num_blocks))  # block 0 is vLLM's null block
        pool.num_gpu_blocks = num_blocks
        for segment in range(plan.num_mapped, layout.num_segments):
            self.withhold(segment)

    # What vLLM's pool calls --------------------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out."""
        return self.blocks.num_free

    def popleft(self) -> KVCacheBlock:
        """Hand out a block.

        Raises:
            ValueError: none is free.
        """
        if not self.blocks.num_free:
            raise ValueError("No free blocks available")
        return self._of_id[self.blocks.take(1)[0]]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """Hand out blocks; as many must be free."""
        of_id = self._of_id
        return [of_id[block] for block in self.blocks.take(n)]

    def remove(self, block: KVCacheBlock) -> None:
        """A free block is in use again.

        Raises:
            RuntimeError: it is in use.
        """
        num_free = self.blocks.num_free
        try:
            self.blocks.remove(block.block_id)
        except KeyError:
            raise RuntimeError(f"remove() called on an invalid block: {block}") from None
        if self.blocks.num_free == num_free:
            self._now_withheld(-1)

    def append(self, block: KVCacheBlock) -> None:
        """As :meth:`append_n`, of one."""
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        """Blocks are free that cache something: the first is evicted first, after all others."""
        num_free = self.blocks.num_free
        self.blocks.put_cached([block.block_id for block in blocks])
        self._now_withheld(len(blocks) - (self.blocks.num_free - num_free))

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Blocks are free that cache nothing: the first is handed out first."""
        num_free = self.blocks.num_free
        self.blocks.put_loose([block.block_id for block in blocks])
        self._now_withheld(len(blocks) - (self.blocks.num_free - num_free))

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        """All that can be handed out, in no particular order."""
        return [self._of_id[block] for block in self.blocks.free_ids()]

    # What segments do --------------------------------------------------------------------------------------------

    def withhold(self, segment: int) -> None:
        """The segment goes out of service. Nothing in it is found by its hash any more, blocks in use among it: else
        new requests would begin with them, and it would never be empty."""
        self.forget(segment)
        num_free = self.blocks.num_free
        self.blocks.withhold(segment)
        self._now_withheld(num_free - self.blocks.num_free)

    def restore(self, segment: int) -> None:
        """A withheld segment is in service, again or for the first time."""
        num_free = self.blocks.num_free
        self.blocks.restore(segment)
        self._now_withheld(num_free - self.blocks.num_free)

    def is_empty(self, segment: int) -> bool:
        """Whether none of its blocks is in use."""
        return self.blocks.num_used(segment) == 0

    def forget(self, segment: int) -> None:
        """Before a withheld segment loses its memory: who was still in it has cached what it filled since."""
        its = self.layout.blocks(segment)
        # Most cache nothing where memory was plenty, and vLLM goes through all it is given one by one.
        if cached := {block.block_id for block in self._of_id[its.start : its.stop] if block.block_hash is not None}:
            self._pool.evict_blocks(cached)

    def check(self) -> None:
        """Assert that pool and books agree (tests call it after every operation)."""
        self.blocks.check()
        free = set(self.blocks.free_ids())
        withheld = {block for blocks in self.blocks._withheld.values() for block in blocks}
        assert len(withheld) == self._num_withheld
        assert self._pool.num_gpu_blocks == len(self._of_id) - len(withheld)
        for block in self._of_id[1:]:
            is_used = block.block_id not in free and block.block_id not in withheld
            assert is_used == (block.ref_cnt > 0), f"block {block.block_id} has {block.ref_cnt} users"

    def _now_withheld(self, more: int) -> None:
        if more:
            self._num_withheld += more
            self._pool.num_gpu_blocks -= more
