"""What the prefix caches, the device's and the host's, hold of waiting prompts: looked up once, and remembered.

A look-up takes time for every block that it finds, and prompts that begin with the same long document wait for many
steps. So a step asks only whether the last block that was found is still there, and the next one still is not: a cache
gives up the end of a prefix before its beginning. What is remembered is a hint for decisions. vLLM looks up again when
a prompt starts, and what was decided from a hint that is wrong by then it declines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.request import Request

from layerkv.scheduler.snapshot import PrefixHit, WaitingRequest
from layerkv.vllm_plugin.scheduler_view import SchedulerView

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from layerkv.vllm_plugin.connector_scheduler import SchedulerSide

MOST_PROMPTS = 4
"""First waiting prompts whose hits are known. Not measured: chosen by what a look-up took (3 ms with 90,000 cached
tokens, 2026-11-28, no result file)."""

LOOK_AGAIN_STEPS = 32
"""Steps after which a hit is looked up again, for how many of its blocks nobody uses may have changed unseen. Not
measured: chosen by judgement."""

_GROUP = [0]  # with several, a hit is looked up anew


class _Known(NamedTuple):
    hit: PrefixHit
    num_tokens: int
    step: int
    last_is_idle: bool


class PrefixHits:
    """Reads one scheduler's caches and changes nothing there. Remembers only prompts that it was last asked about."""

    def __init__(self, scheduler: SchedulerView, side: SchedulerSide) -> None:
        self._scheduler = scheduler
        self._side = side
        self._known: dict[str, _Known] = {}

    def of(self, waiting: Sequence[WaitingRequest]) -> dict[str, PrefixHit]:
        """The hits of the first waiting prompts that have any."""
        s = self._scheduler
        if not s.kv_cache_manager.enable_caching:
            return {}
        known: dict[str, _Known] = {}
        for view in waiting[:MOST_PROMPTS]:
            request: Request = s.requests[view.request_id]
            if request.skip_reading_prefix_cache:
                continue
            last = self._known.get(view.request_id)
            known[view.request_id] = last if last is not None and self._holds(request, last) else self._look(request)
        self._known = known
        return {r: entry.hit for r, entry in known.items() if entry.hit.num_blocks or entry.hit.num_host_blocks}

    def forget(self, request_id: str) -> None:
        """Look up again: vLLM declined what was decided from what was remembered."""
        self._known.pop(request_id, None)

    def _look(self, request: Request) -> _Known:
        s = self._scheduler
        manager = s.kv_cache_manager
        tables: Sequence[Sequence[KVCacheBlock]] = ((),)
        num_tokens = 0
        if manager.prefix_cache_lookup_enabled(request):
            # not `get_computed_blocks`: it publishes the blocks of a request that asks for that, at each look
            tables, num_tokens, _ = manager.coordinator.find_longest_cache_hit(
                request.block_hashes, request.num_tokens - 1
            )
        if not self._side.geometry.is_plain:
            held = [block for table in tables for block in table if not block.is_null]
            hit = PrefixHit(len(held), sum(block.ref_cnt == 0 for block in held), num_tokens=num_tokens)
            return _Known(hit, request.num_tokens, s.current_step, last_is_idle=False)
        found = tables[0]
        num_on_host = self._side.num_prefix_blocks(request.request_id, len(found))
        num_held = self._side.num_held_prefix_blocks(request, range(len(found), len(found) + num_on_host))
        hit = PrefixHit(len(found), sum(block.ref_cnt == 0 for block in found), num_on_host, num_held)
        return _Known(hit, request.num_tokens, s.current_step, bool(found) and found[-1].ref_cnt == 0)

    def _holds(self, request: Request, known: _Known) -> bool:
        s, (hit, num_tokens, step, last_is_idle) = self._scheduler, known
        pool, block_tokens = s.kv_cache_manager.block_pool, self._side.geometry.block_tokens
        if request.num_tokens != num_tokens or s.current_step - step >= LOOK_AGAIN_STEPS:
            return False
        if pool.hash_block_size != block_tokens or not self._side.geometry.is_plain:  # hashes are not of blocks
            return False
        num_blocks, hashes = hit.num_blocks, request.block_hashes
        if num_blocks:
            last = pool.get_cached_block(hashes[num_blocks - 1], _GROUP)
            if last is None or (last[0].ref_cnt == 0) != last_is_idle:
                return False
        if num_blocks < (num_tokens - 1) // block_tokens and pool.get_cached_block(hashes[num_blocks], _GROUP):
            return False
        # on the host: the last one found, if any, and the next one
        num_before, num_found = max(hit.num_host_blocks - 1, 0), min(hit.num_host_blocks, 1)
        seen = self._side.num_prefix_blocks(request.request_id, num_blocks + num_before, most=num_found + 1)
        return seen == num_found
