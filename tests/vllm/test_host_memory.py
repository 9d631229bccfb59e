"""Host memory, KV memory and weights together fit what the machine, or a control group, allows; found out at start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from layerkv.errors import ConfigError
from layerkv.machine_memory import MemoryLimit
from tests.vllm.engines_in_turn import flag

if TYPE_CHECKING:
    from vllm.config import VllmConfig

pytestmark = pytest.mark.vllm

GIB = 1 << 30
GROUP = MemoryLimit(8 * GIB, "control group /a/b (memory.max)")


def config_of(engine: dict[str, Any], **extra_config: Any) -> VllmConfig:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**{**engine, "kv_transfer_config": flag(**extra_config)}).create_engine_config()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may use 8 GiB, by the limit of a control group."""
    monkeypatch.setattr("layerkv.vllm_plugin.host_memory.memory_limit", lambda: GROUP)


@pytest.mark.usefixtures("group")
def test_more_host_memory_than_a_control_group_allows_is_refused_by_its_name(small_engine: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of({**small_engine, "kv_cache_memory_bytes": GIB}, host_memory="9GiB")
    assert str(refused.value) == (
        "kv_connector_extra_config.host_memory: found 9GiB beside 1GiB of KV memory, together 10GiB, but control "
        "group /a/b (memory.max) has 8GiB of memory; set host_memory to less than 7GiB, or set "
        "--kv-cache-memory-bytes (on a CPU also VLLM_CPU_KVCACHE_SPACE) to less"
    )


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("host_memory", "fits"), [("4GiB", True), ("5GiB", False)])
def test_kv_memory_of_a_cpu_counts_before_anything_is_started(
    small_engine: dict[str, Any], host_memory: str, fits: bool
) -> None:
    engine = {**small_engine, "kv_cache_memory_bytes": 4 * GIB}
    if fits:
        config_of(engine, host_memory=host_memory)
    else:
        with pytest.raises(ConfigError, match="found 5GiB beside 4GiB of KV memory"):
            config_of(engine, host_memory=host_memory)


@pytest.mark.usefixtures("group")
def test_what_an_engine_may_grow_to_counts_and_with_a_broker_what_it_gets_back(small_engine: dict[str, Any]) -> None:
    message = r"found 1GiB beside 9GiB of KV memory, together 10GiB, but .* has 8GiB of memory; set kv_ceiling to less$"
    with pytest.raises(ConfigError, match=message):
        config_of(small_engine, host_memory="1GiB", kv_ceiling="9GiB")
    config_of(small_engine, host_memory="1GiB", kv_ceiling="9GiB", kv_floor="1GiB", broker="broker.sock")


@pytest.mark.usefixtures("group")
def test_each_engine_of_a_machine_takes_host_memory_of_its_own(small_engine: dict[str, Any]) -> None:
    from layerkv.vllm_plugin.host_memory import require_host_memory
    from layerkv.vllm_plugin.setup import engine_config

    config = config_of(small_engine, host_memory="3GiB")
    config.parallel_config.data_parallel_size_local = 3
    with pytest.raises(ConfigError, match=r"found 3GiB for each of this machine's 3 engines .* together 9\.04GiB"):
        require_host_memory(config, engine_config(config))


def worker_memory(held_bytes: int) -> Any:
    from layerkv.vllm_plugin.host_memory import WorkerMemory

    return WorkerMemory(GROUP, held_bytes)


def host_bytes(config: VllmConfig, *, kv_bytes: int, held_bytes: int) -> int:
    """Host memory of all workers, by the function that scheduler and workers ask."""
    from layerkv.core.geometry import KVGeometry
    from layerkv.vllm_plugin.host_memory import host_blocks_per_worker
    from layerkv.vllm_plugin.setup import engine_config

    page_bytes, num_layers = 1 << 20, 8
    pool_blocks = kv_bytes // (page_bytes * num_layers)
    geometry = KVGeometry(num_layers, page_bytes, 32, pool_blocks, zone_blocks=0, lanes=2)
    blocks = host_blocks_per_worker(config, engine_config(config), geometry, worker_memory(held_bytes))
    return blocks * config.parallel_config.tensor_parallel_size * geometry.block_bytes


def test_weights_count_as_soon_as_they_are_loaded(small_engine: dict[str, Any]) -> None:
    config = config_of(small_engine, host_memory="4GiB")
    assert host_bytes(config, kv_bytes=2 * GIB, held_bytes=2 * GIB) == 4 * GIB
    with pytest.raises(ConfigError) as refused:
        host_bytes(config, kv_bytes=2 * GIB, held_bytes=3 * GIB)
    assert str(refused.value) == (
        "kv_connector_extra_config.host_memory: found 4GiB beside 2GiB of KV memory and 3GiB that its workers hold "
        "already (weights), together 9GiB, but control group /a/b (memory.max) has 8GiB of memory; set host_memory to "
        "less than 3GiB, or set --kv-cache-memory-bytes (on a CPU also VLLM_CPU_KVCACHE_SPACE) to less"
    )


def test_on_cuda_kv_memory_is_not_the_hosts(small_engine: dict[str, Any]) -> None:
    config = config_of(small_engine, host_memory="7GiB")
    with pytest.raises(ConfigError):
        host_bytes(config, kv_bytes=2 * GIB, held_bytes=0)
    config.device_config.device_type = "cuda"
    assert host_bytes(config, kv_bytes=2 * GIB, held_bytes=GIB) == 7 * GIB
    with pytest.raises(ConfigError, match="beside 2GiB that its workers hold already"):
        host_bytes(config, kv_bytes=2 * GIB, held_bytes=2 * GIB)


@pytest.mark.parametrize(
    ("kv_gib", "held_gib", "expected_gib"),
    [
        (0.25, 0, 1),  # four times the KV memory
        (1, 1, 2),  # a quarter of what the group may use
        (4, 2, 1),  # half of what is left
        (5, 2.5, 0.25),
    ],
)
def test_the_default_fits_beside_kv_memory_and_weights(
    small_engine: dict[str, Any], kv_gib: float, held_gib: float, expected_gib: float
) -> None:
    config = config_of(small_engine)
    found = host_bytes(config, kv_bytes=int(kv_gib * GIB), held_bytes=int(held_gib * GIB))
    assert found == expected_gib * GIB


def test_the_default_is_divided_among_engines_and_workers(small_engine: dict[str, Any]) -> None:
    config = config_of(small_engine)
    config.parallel_config.data_parallel_size_local = 2
    config.parallel_config.tensor_parallel_size = 2
    assert host_bytes(config, kv_bytes=GIB, held_bytes=GIB // 2) == GIB // 2  # half of 4 GiB less 2 of 1.5 GiB


def test_without_room_for_any_host_memory_the_default_says_what_there_is(small_engine: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"the default leaves 0B beside 6GiB of KV memory and 2GiB .*; set --kv-cache"
    ):
        host_bytes(config_of(small_engine), kv_bytes=6 * GIB, held_bytes=2 * GIB)


def test_what_the_first_worker_found_goes_with_the_spec_to_everybody(small_engine: dict[str, Any]) -> None:
    import pickle

    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from layerkv.vllm_plugin.spec import LayerKVSpec, ours

    full = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
    first, second = (ours(full, worker_memory(held)) for held in (1, 2))
    assert first == second  # or vLLM would refuse workers that differ by a byte
    merged = pickle.loads(pickle.dumps(LayerKVSpec.merge([first, second])))
    assert merged == first
    assert merged.memory == worker_memory(1)


@pytest.mark.slow
def test_an_engine_counts_its_weights_in_a_control_group_smaller_than_it_needs(
    small_engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start-up of a real engine: what is known early fits, and the worker finds the rest."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    limit = MemoryLimit(96 << 20, "control group /small (memory.max)")
    monkeypatch.setattr("layerkv.vllm_plugin.host_memory.memory_limit", lambda: limit)
    with pytest.raises(ConfigError, match=r"that its workers hold already \(weights\), together .* group /small"):
        LLM(**small_engine, kv_transfer_config=flag(host_memory="64MiB"))
    cleanup_dist_env_and_memory()
