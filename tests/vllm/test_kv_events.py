"""KV events of the host prefix cache, by vLLM's real scheduler and block manager, without an engine or a model.

Two routers listen: one that drops all of an engine's blocks when it hears `AllBlocksCleared`, and one that does not
know that event and counts how often it was told of a block. Both must know what host memory caches after every step.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from layerkv.core.host_tier import HostTier
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.snapshot import Decision
from tests.vllm.engines_in_turn import flag, prompt

pytestmark = pytest.mark.vllm

BLOCK_TOKENS = 16
NUM_LAYERS = 2


class Routers:
    """What they know, from the batches that the scheduler publishes in the place of a socket."""

    def __init__(self) -> None:
        self.on_host: set[Any] = set()
        self.counted = Counter[Any]()
        self.events: list[Any] = []
        self.blocks: dict[str, dict[Any, dict[str, Any]]] = {"GPU": {}, "CPU": {}}

    def publish(self, batch: Any) -> None:
        from vllm.distributed.kv_events import AllBlocksCleared, BlockStored

        for event in batch.events:
            self.events.append(event)
            if isinstance(event, AllBlocksCleared):
                self.on_host.clear()
                continue
            if isinstance(event, BlockStored):
                self.blocks[event.medium] |= by_block(event)
            if event.medium != "CPU":
                continue
            if isinstance(event, BlockStored):
                assert not self.on_host & set(event.block_hashes), "a block is told of once"
                self.on_host |= set(event.block_hashes)
                self.counted.update(event.block_hashes)
            else:
                self.on_host -= set(event.block_hashes)
                self.counted.subtract(event.block_hashes)

    def shutdown(self) -> None:
        pass

    def check(self, tier: HostTier) -> None:
        from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

        cached = {maybe_convert_block_hash(block_hash) for block_hash in tier._block_of}
        assert self.on_host == cached
        counted = {block_hash: count for block_hash, count in self.counted.items() if count > 0}
        assert counted == dict.fromkeys(cached, 1)

    def of_host(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind) and getattr(event, "medium", "") == "CPU"]


def by_block(event: Any) -> dict[Any, dict[str, Any]]:
    """What an event says of each of its blocks."""
    size, found, parent = event.block_size, {}, event.parent_block_hash
    assert len(event.token_ids) == size * len(event.block_hashes)
    for i, block_hash in enumerate(event.block_hashes):
        found[block_hash] = {
            "parent": parent,
            "tokens": event.token_ids[i * size : (i + 1) * size],
            "extra_keys": event.extra_keys[i] if event.extra_keys else None,
            "of_all": (
                size,
                event.lora_id,
                event.lora_name,
                event.group_idx,
                event.kv_cache_spec_kind,
                event.kv_cache_spec_sliding_window,
                event.session_id,
            ),
        }
        parent = block_hash
    return found


class Driver:
    """Schedules steps, and answers every request with token 7."""

    def __init__(self, model: Path, *, publishes: bool = True, pool_blocks: int = 40, host_blocks: int = 24) -> None:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.structured_output import StructuredOutputManager

        from layerkv.vllm_plugin.scheduler import LayerKVScheduler

        config, kv_cache_config = configs(model, pool_blocks, host_blocks, publishes=publishes)
        self.scheduler: Any = LayerKVScheduler(
            config, kv_cache_config, StructuredOutputManager(config), BLOCK_TOKENS, log_stats=True
        )
        self.routers = self.scheduler.kv_event_publisher = Routers()
        self.ledger = self.scheduler.connector.scheduler_side.ledger
        hash_fn = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, hash_fn)
        self.hits = Counter[Any]()

    @property
    def tier(self) -> HostTier:
        return self.ledger.host

    def request(self, name: str, tokens: list[int], max_tokens: int = 2, **extra_args: Any) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, extra_args=extra_args or None)
        params.update_from_generation_config({}, None)
        return Request(name, tokens, params, None, block_hasher=self._hasher)

    def add(self, name: str, tokens: list[int], max_tokens: int = 2, **extra_args: Any) -> None:
        self.scheduler.add_request(self.request(name, tokens, max_tokens, **extra_args))

    def park(self, name: str) -> None:
        self.scheduler._execution.park(Decision(park=(name,), reasons={name: Reason.MAKES_ROOM}), 0.0)

    def step(self) -> Any:
        """One step; what vLLM's scheduler scheduled."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        scheduled = self.scheduler.schedule()
        plan = scheduled.kv_connector_metadata.plan
        requests, names = self.scheduler.requests, list(scheduled.num_scheduled_tokens)
        sampled = [[7] if requests[n].num_computed_tokens >= requests[n].num_tokens else [] for n in names]
        fetched = {fetch.request_id for fetch in plan.fetches}
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=KVConnectorOutput(finished_recving=fetched) if fetched else None,
        )
        for of_client in self.scheduler.update_from_output(scheduled, output).values():
            if of_client.scheduler_stats is not None:
                stats = of_client.scheduler_stats.connector_prefix_cache_stats
                self.hits.update(stats.hits_by_source)
                self.hits["all"] += stats.hits
        self.ledger.check()
        if self.scheduler.enable_kv_cache_events:
            self.routers.check(self.tier)
        return scheduled

    def run(self) -> None:
        for _ in range(500):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError("requests do not come to an end")


def configs(model: Path, pool_blocks: int, host_blocks: int, *, publishes: bool) -> tuple[Any, Any]:
    """vLLM's configurations as an engine core has them after start-up."""
    import torch
    from vllm.config import KVEventsConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    try:
        from vllm.v1.core.kv_cache_planning import get_kv_cache_configs
    except ImportError:  # before 0.33
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    from layerkv.core.geometry import geometry_for_memory
    from layerkv.vllm_plugin.host_memory import WorkerMemory
    from layerkv.vllm_plugin.setup import engine_config, geometry_request
    from layerkv.vllm_plugin.spec import ours

    full = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=2, head_size=64, dtype=torch.float32)
    spec = ours(full, WorkerMemory.here())
    block_bytes = spec.page_size_bytes * NUM_LAYERS
    config = EngineArgs(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        block_size=BLOCK_TOKENS,
        max_model_len=256,
        max_num_batched_tokens=256,
        kv_transfer_config=flag(host_memory=f"{host_blocks * block_bytes}B", zone_tokens=4 * BLOCK_TOKENS),
        kv_events_config=KVEventsConfig(enable_kv_cache_events=publishes, publisher="null"),
    ).create_engine_config()
    resolve_kv_cache_layout(config, [["LBHNC"]])
    request = geometry_request(config, engine_config(config), spec, NUM_LAYERS)
    geometry = geometry_for_memory(request, pool_blocks * block_bytes)
    specs = {f"layers.{i}.attn": spec for i in range(NUM_LAYERS)}
    kv_cache_config = get_kv_cache_configs(config, [specs], [geometry.virtual_bytes])[0]
    config.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
    return config, kv_cache_config


def one_that_ended(driver: Driver, num_blocks: int = 4) -> list[int]:
    """The prompt of a request that has ended just now."""
    tokens = prompt(num_blocks * BLOCK_TOKENS, seed=1)
    driver.add("first", tokens)
    while driver.scheduler.requests:
        driver.step()
    assert driver.tier.num_cached == num_blocks
    return tokens


# What is told -------------------------------------------------------------------------------------------------------


def test_routers_know_after_every_step_what_host_memory_caches_and_by_which_hashes(tiny_model: Path) -> None:
    """Conversations that go on, more than fit anywhere; every third request is parked and comes back."""
    from vllm.distributed.kv_events import BlockRemoved

    driver, choose = Driver(tiny_model, pool_blocks=28, host_blocks=60), random.Random(3)
    said: list[list[int]] = [prompt(20, seed=seed) for seed in range(6)]
    for turn in range(60):
        number = choose.randrange(len(said))
        said[number] = [*said[number], *prompt(choose.randrange(1, 40), seed=100 + turn)][:200]
        driver.add(f"{turn}", said[number], max_tokens=choose.randrange(1, 30))
        driver.step()
        while len(driver.scheduler.requests) > 2:
            driver.step()
        running = driver.scheduler.running
        if turn % 3 == 0 and running and -(-running[-1].num_tokens // BLOCK_TOKENS) <= driver.ledger.host.num_free:
            driver.park(running[-1].request_id)
    driver.run()
    assert driver.ledger.counters.parks > 3
    assert driver.ledger.counters.prefix_hit_blocks > 0
    assert driver.routers.of_host(BlockRemoved), "more was cached than host memory holds"
    on_device, on_host = driver.routers.blocks["GPU"], driver.routers.blocks["CPU"]
    assert len(on_host) > 20
    assert on_host.items() <= on_device.items(), "what is said of a block is what vLLM says of it"


def test_who_comes_because_of_an_event_loads_the_blocks_in_the_very_next_step(tiny_model: Path) -> None:
    driver = Driver(tiny_model)
    tokens = one_that_ended(driver)
    assert len(driver.routers.on_host) == 4, "it was told with the last output of the request"
    assert driver.scheduler.reset_prefix_cache(), "so that only host memory has it"
    driver.add("second", [*tokens, 5])
    scheduled = driver.step()
    assert scheduled.scheduled_new_reqs[0].num_computed_tokens == 4 * BLOCK_TOKENS
    plan = scheduled.kv_connector_metadata.plan
    loaded = {host + i for _, host, length in plan.hits for i in range(length)}
    stored = {host + i for _, host, length in plan.ahead for i in range(length)}
    assert loaded == stored, "stored and loaded by one plan, in which stores come first (rule 8)"


def test_nobody_pays_where_vllm_publishes_nothing(tiny_model: Path) -> None:
    driver = Driver(tiny_model, publishes=False)
    one_that_ended(driver)
    assert driver.tier.news is None
    assert list(driver.scheduler.connector.take_events()) == []


@pytest.mark.parametrize("as_integers", [False, True])
def test_what_is_said_of_a_block_is_what_vllms_own_pool_says_of_it(
    monkeypatch: pytest.MonkeyPatch, as_integers: bool
) -> None:
    """Adapters, salts and sessions too, for which the engine above has no requests."""
    from vllm.lora.request import LoRARequest
    from vllm.utils.hashing import sha256
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    from layerkv.vllm_plugin.kv_events import HostPrefixEvents

    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", str(int(as_integers)))
    from vllm import SamplingParams

    init_none_hash(sha256)
    request = Request(
        "one",
        prompt(3 * BLOCK_TOKENS + 5, seed=1),
        SamplingParams(max_tokens=1),
        None,
        lora_request=LoRARequest("adapter", 3, "/adapter"),
        cache_salt="salt",
        session_id="session",
        block_hasher=get_request_block_hasher(BLOCK_TOKENS, sha256),
    )
    pool = BlockPool(8, enable_caching=True, hash_block_size=BLOCK_TOKENS, enable_kv_cache_events=True)
    pool.cache_full_blocks(request, pool.get_new_blocks(3), 0, 3, BLOCK_TOKENS, 0)
    [on_device] = pool.take_events()
    tier = HostTier(8)
    events = HostPrefixEvents(tier, BLOCK_TOKENS, "full_attention", None)
    tier.keep(tier.take(3), events.describe(request))
    [on_host] = events.take()
    assert on_host.medium == "CPU"
    assert isinstance(on_host.block_hashes[0], int) is as_integers
    assert type(on_host.block_hashes[0]) in (int, bytes), "as it can be sent"
    on_device.medium, on_device.kv_cache_spec_kind = "CPU", "full_attention"  # vLLM says the kind later
    assert on_host == on_device


def test_a_router_hears_of_a_block_after_its_parent_and_of_a_row_of_blocks_at_once() -> None:
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    from layerkv.vllm_plugin.kv_events import HostPrefixEvents

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
    begin = prompt(2 * BLOCK_TOKENS, seed=1)
    longer = [
        Request(name, [*begin, *prompt(2 * BLOCK_TOKENS, seed=seed)], SamplingParams(), None, block_hasher=hasher)
        for seed, name in ((2, "b"), (3, "c"))
    ]
    tier = HostTier(8)
    events = HostPrefixEvents(tier, BLOCK_TOKENS, "full_attention", None)
    for request in longer:  # ends first
        described = events.describe(request)[::-1]
        tier.keep(tier.take(4), described)
    stored = events.take()
    heard: set[Any] = {None}
    for event in stored:
        assert event.parent_block_hash in heard
        heard |= set(event.block_hashes)
    assert sorted(len(event.block_hashes) for event in stored) == [2, 4]


# Resets --------------------------------------------------------------------------------------------------------------


def test_a_plain_reset_keeps_what_host_memory_caches_and_routers_go_on_knowing_it(tiny_model: Path) -> None:
    from vllm.distributed.kv_events import AllBlocksCleared

    driver = Driver(tiny_model)
    tokens = one_that_ended(driver)
    assert driver.scheduler.reset_prefix_cache()
    assert driver.tier.num_cached == 4
    driver.add("another", prompt(10, seed=9))
    driver.step()  # checks what the routers know
    assert any(isinstance(event, AllBlocksCleared) for event in driver.routers.events)
    driver.run()
    driver.add("again", [*tokens, 5])
    assert driver.step().scheduled_new_reqs[0].num_computed_tokens == 4 * BLOCK_TOKENS


@pytest.mark.parametrize("flags", [{"reset_connector": True}, {"reset_running_requests": True}])
def test_a_reset_of_the_connector_or_of_running_requests_forgets_it_and_says_so(
    tiny_model: Path, flags: dict[str, bool]
) -> None:
    from vllm.distributed.kv_events import BlockRemoved

    driver = Driver(tiny_model)
    tokens = one_that_ended(driver)
    assert driver.scheduler.reset_prefix_cache(**flags)
    assert driver.tier.num_cached == 0
    driver.add("again", [*tokens, 5])
    assert driver.step().scheduled_new_reqs[0].num_computed_tokens == 0
    assert [len(event.block_hashes) for event in driver.routers.of_host(BlockRemoved)] == [4]


def test_a_reset_that_fails_forgets_nothing_in_host_memory_unless_asked_to(tiny_model: Path) -> None:
    driver = Driver(tiny_model)
    one_that_ended(driver)
    driver.add("running", prompt(10, seed=9), max_tokens=20)
    driver.step()
    assert not driver.scheduler.reset_prefix_cache()
    assert driver.tier.num_cached == 4
    driver.park("running")
    assert not driver.scheduler.reset_prefix_cache()
    assert driver.tier.num_cached == 4
    assert not driver.scheduler.reset_prefix_cache(reset_connector=True)
    assert driver.tier.num_cached == 0
    driver.run()


# What else sees it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["incremental", "full"])
def test_hits_of_waiting_prompts_are_known_with_events_on_and_looking_publishes_nothing(
    tiny_model: Path, mode: str
) -> None:
    driver = Driver(tiny_model)
    tokens = one_that_ended(driver)
    driver.add("waiting", [*tokens, 5], kv_cache_report_mode=mode)
    reader, manager = driver.scheduler._reader, driver.scheduler.kv_cache_manager
    manager.take_events()
    [view] = driver.scheduler._controller.waiting.views
    hits = reader.prefix_hits.of([view])
    assert hits["waiting"].num_blocks == 4
    assert manager.take_events() == []
    for block in manager.block_pool.blocks:  # what is not on the device is in host memory
        manager.evict_blocks({block.block_id})
    hits = reader.prefix_hits.of([view])
    assert (hits["waiting"].num_blocks, hits["waiting"].num_host_blocks) == (0, 4)


def test_prompts_loaded_from_host_memory_are_hits_for_vllms_metrics_and_fetches_are_not(tiny_model: Path) -> None:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    driver = Driver(tiny_model)
    tokens = one_that_ended(driver)
    driver.scheduler.reset_prefix_cache()
    driver.add("again", [*tokens, 5], max_tokens=10)
    request = driver.scheduler.requests["again"]
    prefill = request.prefill_stats
    driver.step()
    assert (prefill.num_cached_tokens, prefill.num_external_cached_tokens) == (64, 64), "cached_tokens in the usage"
    driver.park("again")
    driver.run()
    assert driver.ledger.counters.fetches == 1
    assert driver.hits == {"all": 64, CacheHitSource.HOST: 64}
