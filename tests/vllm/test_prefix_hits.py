"""What caches hold of waiting prompts, by vLLM's own block manager: right in every step, and seldom looked up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from layerkv.core.geometry import KVGeometry
from layerkv.scheduler.snapshot import PrefixHit, WaitingRequest
from tests.fakes.flat_ledger import FlatLedger

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from layerkv.vllm_plugin.prefix_hits import PrefixHits

pytestmark = pytest.mark.vllm

BLOCK = 16
POOL = 100


class Caches:
    """vLLM's block manager and prefix cache, our host tier, and waiting prompts that all begin alike."""

    def __init__(self) -> None:
        import torch
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.request import Request

        from layerkv.vllm_plugin.prefix_hits import PrefixHits

        init_none_hash(sha256)
        self._request, self._params, self._hasher = Request, SamplingParams, get_request_block_hasher(BLOCK, sha256)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        self.manager = KVCacheManager(
            KVCacheConfig(POOL, [], [KVCacheGroupSpec(["layer"], spec)]), 4096, BLOCK, BLOCK, enable_caching=True
        )
        geometry = KVGeometry(num_layers=1, page_bytes=64, block_tokens=BLOCK, pool_blocks=POOL, zone_blocks=0, lanes=1)
        self.ledger = FlatLedger(geometry, 50)
        self.scheduler = SimpleNamespace(
            kv_cache_manager=self.manager, enable_kv_cache_events=False, requests={}, current_step=0
        )
        side = SimpleNamespace(
            geometry=geometry,
            num_prefix_blocks=self._num_on_host,
            num_held_prefix_blocks=lambda request, blocks: self.ledger.num_held_prefix_blocks(
                request.block_hashes, blocks
            ),
        )
        self.hits: PrefixHits = PrefixHits(self.scheduler, side)  # type: ignore[arg-type]
        self.num_lookups = self.num_probes = 0
        self._count()

    def _count(self) -> None:
        manager: Any = self.manager
        look_up, probe = manager.coordinator.find_longest_cache_hit, manager.block_pool.get_cached_block

        def counted_lookup(*args: Any) -> Any:
            self.num_lookups += 1
            return look_up(*args)

        def counted_probe(*args: Any) -> Any:
            self.num_probes += 1
            return probe(*args)

        manager.coordinator.find_longest_cache_hit, manager.block_pool.get_cached_block = counted_lookup, counted_probe

    def _num_on_host(self, request_id: str, num_local_blocks: int, *, most: int | None = None) -> int:
        request = self.scheduler.requests[request_id]
        last = (request.num_tokens - 1) // BLOCK
        last = last if most is None else min(last, num_local_blocks + most)
        return self.ledger.num_prefix_blocks(request_id, request.block_hashes, range(num_local_blocks, last))

    def request(self, name: str, num_tokens: int = 20 * BLOCK, *, first: int = 0) -> Request:
        request = self._request(
            name, list(range(first, first + num_tokens)), self._params(max_tokens=9), None, block_hasher=self._hasher
        )
        self.scheduler.requests[name] = request
        self.ledger.add(name)
        return request

    def compute(self, request: Request, num_blocks: int) -> None:
        assert self.manager.allocate_slots(request, num_blocks * BLOCK) is not None
        request.num_computed_tokens += num_blocks * BLOCK

    def cache_on_host(self, request: Request, blocks: range) -> None:
        taken = self.ledger.host.take(len(blocks))
        self.ledger.host.keep(taken, request.block_hashes[blocks.start : blocks.stop])
        self.ledger.host.unpin()

    def step(self, *names: str) -> dict[str, PrefixHit]:
        """The hits of a step, which are those of a fresh look-up."""
        self.scheduler.current_step += 1
        hits = self.hits.of([WaitingRequest(name, 0.0, 20 * BLOCK, 20) for name in names])
        counts = self.num_lookups, self.num_probes
        for name in names[:4]:
            found = self.manager.get_computed_blocks(self.scheduler.requests[name])[0].blocks[0]
            num_on_host = self._num_on_host(name, len(found))
            fresh = PrefixHit(len(found), sum(block.ref_cnt == 0 for block in found), num_on_host)
            assert hits.get(name, PrefixHit()) == fresh
        self.num_lookups, self.num_probes = counts
        return hits


@pytest.fixture
def caches() -> Caches:
    return Caches()


def test_while_nothing_changes_each_prompt_is_looked_up_once(caches: Caches) -> None:
    """Regression: each of the first four was looked up in every step, at a cost that grew with what was found."""
    caches.compute(caches.request("running"), 18)
    waiting = [f"w{i}" for i in range(6)]
    for name in waiting:
        caches.request(name)
    for _ in range(20):
        assert caches.step(*waiting)["w3"] == PrefixHit(18, 0, 0)
    assert caches.num_lookups == 4
    assert caches.num_probes <= 4 * 19 + 2 * 4 * 19, "the first time all blocks, then two a step"


def test_what_a_running_request_adds_is_seen_at_once(caches: Caches) -> None:
    running = caches.request("running")
    caches.request("w")
    assert caches.step("w") == {}
    for num_blocks in (3, 6, 9):
        caches.compute(running, 3)
        assert caches.step("w") == {"w": PrefixHit(num_blocks, 0, 0)}


def test_what_is_evicted_or_used_by_nobody_any_more_is_seen_at_once(caches: Caches) -> None:
    running = caches.request("running")
    caches.request("w")
    caches.compute(running, 10)
    assert caches.step("w") == {"w": PrefixHit(10, 0, 0)}
    caches.manager.free(running)
    assert caches.step("w") == {"w": PrefixHit(10, 10, 0)}
    other = caches.request("other", 95 * BLOCK, first=5000)
    caches.compute(other, 95)
    assert caches.step("w").get("w", PrefixHit()).num_blocks < 10


def test_the_host_tier_is_watched_too(caches: Caches) -> None:
    w = caches.request("w")
    caches.compute(caches.request("running"), 4)
    caches.cache_on_host(w, range(4, 6))
    assert caches.step("w") == {"w": PrefixHit(4, 0, 2)}
    assert caches.step("w") == {"w": PrefixHit(4, 0, 2)}
    assert caches.num_lookups == 1
    caches.cache_on_host(w, range(6, 8))
    assert caches.step("w") == {"w": PrefixHit(4, 0, 4)}
    caches.ledger.host.forget_all()
    assert caches.step("w") == {"w": PrefixHit(4, 0, 0)}


def test_what_vllm_declined_is_looked_up_again(caches: Caches) -> None:
    caches.compute(caches.request("running"), 4)
    caches.request("w")
    caches.step("w")
    caches.hits.forget("w")
    caches.step("w")
    assert caches.num_lookups == 2


def test_a_prompt_that_reads_no_cache_is_not_looked_up(caches: Caches) -> None:
    caches.compute(caches.request("running"), 4)
    caches.request("w").skip_reading_prefix_cache = True
    assert caches.hits.of([WaitingRequest("w", 0.0, 20 * BLOCK, 20)]) == {}
    assert caches.num_lookups == 0
