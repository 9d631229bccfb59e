"""The managers of one engine's KV blocks, one for each KV-cache group: who hands out what, and who holds it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerkv.core.groups import Group
from layerkv.core.ledger import KVLedger
from layerkv.core.segments import SegmentPlan
from layerkv.errors import IncompatibleVLLMError
from layerkv.vllm_plugin.segment_queue import SegmentQueue
from layerkv.vllm_plugin.spec import LayeredBlocks, WatchedPool, ZonePool

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager


class BlockManagers:
    """See the module. One per scheduler.

    Attributes:
        segments: Which blocks of a pool that grows and shrinks are in service; None where all are.
    """

    def __init__(
        self, managers: Sequence[SingleTypeKVCacheManager], ledger: KVLedger, segments: SegmentPlan | None = None
    ) -> None:
        """Withhold the zone's ids from the pool, and those without memory. Called once, before the first request.

        Raises:
            IncompatibleVLLMError: vLLM did not build our managers for our specs.
        """
        groups = ledger.geometry.groups
        ours: list[LayeredBlocks] = [manager for manager in managers if isinstance(manager, LayeredBlocks)]
        if len(managers) != len(groups) or len(ours) != sum(not group.is_state for group in groups):
            raise IncompatibleVLLMError(
                f"vLLM made {', '.join(type(m).__name__ for m in managers)} to manage KV blocks where "
                f"{len(groups)} of layerkv's were registered; use the vLLM version that layerkv supports"
            )
        self._ledger, self._groups = ledger, groups
        self._all, self._ours = managers, ours
        self._is_plain = ledger.geometry.is_plain
        pool = ours[0].block_pool
        self.segments = _withhold(pool, ledger, segments)
        for manager in ours:
            manager.attach(ledger)
        self._pools = pool, WatchedPool(pool, ledger.gave_out)
        self._watches_pool = self._stands_aside = False

    @property
    def only(self) -> LayeredBlocks:
        """The manager of the only group."""
        (manager,) = self._ours
        return manager

    def stand_aside(self) -> None:
        """Before a step: what our managers override is vLLM's own in it, if nobody is there whom it concerns.

        While stores of prefixes read blocks that may be given out, the pool tells which are: only who gets blocks pays
        for that.
        """
        ledger = self._ledger
        if ledger.stores_prefixes != self._watches_pool:
            self._watches_pool = not self._watches_pool
            for manager in self._all:
                manager.block_pool = self._pools[self._watches_pool]
        if ledger.has_layered != self._stands_aside:
            return
        self._stands_aside = not self._stands_aside
        for own in self._ours:
            own.stand_aside(aside=self._stands_aside)

    def num_held(self, request_id: str) -> int:
        """Blocks that a request holds in all groups."""
        if self._is_plain:
            return len(self._all[0].req_to_blocks[request_id])
        return sum(
            [
                _num_held(group, manager.req_to_blocks[request_id])
                for group, manager in zip(self._groups, self._all, strict=True)
            ]
        )

    def num_held_of_zone(self, request_id: str) -> int:
        """Of those of a layered request, blocks of the lane zone."""
        geometry = self._ledger.geometry
        of_zone = [
            -(-geometry.num_zone_blocks([block.block_id for block in manager.req_to_blocks[request_id]]) // share)
            for manager, share in zip(self._all, geometry.zone_shares, strict=True)
            if share
        ]
        return max(of_zone)

    def holds(self, request_id: str) -> bool:
        """Whether a request has block tables."""
        return request_id in self._all[0].req_to_blocks


def _withhold(pool: BlockPool, ledger: KVLedger, segments: SegmentPlan | None) -> SegmentQueue | None:
    geometry, zone_pool = ledger.geometry, ZonePool(ledger.zone)
    for block in pool.blocks[geometry.pool_blocks :]:
        pool.free_block_queue.remove(block)
        block.pool = zone_pool
    pool.num_gpu_blocks = geometry.pool_blocks  # usage and reset count the pool only
    if segments is None:
        return None
    queue = pool.free_block_queue = SegmentQueue(pool, segments)
    return queue


def _num_held(group: Group, blocks: Sequence[KVCacheBlock]) -> int:
    """Without those given back, which are the first ones."""
    if group.keeps_all or not blocks:
        return len(blocks)
    return len(blocks) - bisect_left(blocks, True, key=lambda block: not block.is_null)
