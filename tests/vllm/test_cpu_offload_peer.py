"""The benchmark's CPU form of vLLM's CPU offload: its copies, and a real engine that finds prefixes in host memory."""

from __future__ import annotations

import itertools
import json
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from layerkv.errors import TransferError
from tests.vllm.engines_in_turn import prompt
from tests.vllm.forked import Ended, Forks

pytestmark = pytest.mark.vllm


# Copies ------------------------------------------------------------------------------------------------------------

NUM_LAYERS, BLOCK_BYTES = 3, 7


@pytest.fixture
def regions() -> tuple[list[Any], list[Any]]:
    """Device memory of 6 blocks in 3 layers, every byte of a block telling which it is, and empty host memory of 9."""
    torch = pytest.importorskip("torch")
    ids = torch.arange(NUM_LAYERS * 6, dtype=torch.int8).view(NUM_LAYERS, 6, 1)
    device = ids.expand(NUM_LAYERS, 6, BLOCK_BYTES).contiguous()
    return list(device), [torch.full((9, BLOCK_BYTES), -1, dtype=torch.int8) for _ in range(NUM_LAYERS)]


def test_blocks_travel_to_the_host_and_back_and_no_others_are_touched(regions: tuple[list[Any], list[Any]]) -> None:
    from layerkv.bench.suite.cpu_offload import CopyEvent, CpuCopyBackend

    device, host = regions
    backend = CpuCopyBackend(device, host)
    stores: list[tuple[int, CopyEvent]] = []
    loads: list[tuple[int, CopyEvent]] = []
    backend.launch_copy([0, 1, 2, 5], [4, 5, 0, 8], is_store=True, event_idx=0, events_list=stores)
    backend.launch_copy([8, 4], [3, 4], is_store=False, event_idx=0, events_list=loads)  # reads what was just stored
    loads[0][1].synchronize()
    assert stores[0][1].query()
    for layer in range(NUM_LAYERS):
        a = layer * 6  # the layer's first block
        assert host[layer][:, 0].tolist() == [a + 2, -1, -1, -1, a, a + 1, -1, -1, a + 5]
        assert device[layer][:, -1].tolist() == [a, a + 1, a + 2, a + 5, a, a + 5]
        assert all((region == region[:, :1]).all() for region in (host[layer], device[layer]))  # whole blocks
    backend.shutdown()


def test_a_flush_waits_for_copies_that_have_not_begun(regions: tuple[list[Any], list[Any]]) -> None:
    from layerkv.bench.suite.cpu_offload import CpuCopyBackend, CpuOffloadWorker

    device, host = regions
    worker = object.__new__(CpuOffloadWorker)  # its constructor wants an engine's configuration
    worker._load_events, worker._store_events, worker._load_hwm, worker._store_hwm = [], [], -1, -1
    backend = CpuCopyBackend(device, host)
    may_copy, copy = threading.Event(), backend._copy

    def copy_when_allowed(*blocks: Any, is_store: bool) -> None:
        may_copy.wait()
        copy(*blocks, is_store=is_store)

    backend._copy = copy_when_allowed  # type: ignore[method-assign]
    for index in range(3):
        backend.launch_copy([index], [index], is_store=True, event_idx=index, events_list=worker._store_events)
    assert worker._poll_stream_events(is_store=True) == -1
    threading.Timer(0.05, may_copy.set).start()
    worker._flush_and_sync_all()
    assert (worker._store_hwm, worker._store_events) == (2, [])
    assert [int(host[0][index, 0]) for index in range(3)] == [0, 1, 2]
    backend.shutdown()


def test_a_copy_that_fails_is_raised_by_whoever_asks_for_it(regions: tuple[list[Any], list[Any]]) -> None:
    from layerkv.bench.suite.cpu_offload import CopyEvent, CpuCopyBackend

    backend = CpuCopyBackend(*regions)
    events: list[tuple[int, CopyEvent]] = []
    backend.launch_copy([5], [9], is_store=True, event_idx=0, events_list=events)
    with pytest.raises(TransferError, match="outside"):
        events[0][1].synchronize()
    with pytest.raises(TransferError, match="outside"):
        events[0][1].query()
    backend.shutdown()


def test_after_shutdown_every_queued_copy_is_done_and_none_is_taken(regions: tuple[list[Any], list[Any]]) -> None:
    from layerkv.bench.suite.cpu_offload import CopyEvent, CpuCopyBackend

    backend = CpuCopyBackend(*regions)
    events: list[tuple[int, CopyEvent]] = []
    for index in range(5):
        backend.launch_copy([index], [index], is_store=True, event_idx=index, events_list=events)
    backend.shutdown()
    backend.shutdown()
    assert all(event.query() for _, event in events)
    with pytest.raises(TransferError, match="shut down"):
        backend.launch_copy([0], [0], is_store=True, event_idx=5, events_list=events)


# Engines -----------------------------------------------------------------------------------------------------------

RUN = """
import json, sys
from vllm import LLM, SamplingParams

def generate(llm, prompts):
    params = SamplingParams(max_tokens=16, min_tokens=16, ignore_eos=True, temperature=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]

spec = json.loads(sys.argv[1])
llm = LLM(**spec["engine"], disable_log_stats=False)
tokens = [generate(llm, prompts) for prompts in spec["calls"]]
metrics = {
    ",".join([metric.name, *(v for k, v in metric.labels.items() if k not in ("engine", "model_name"))]): metric.value
    for metric in llm.get_metrics() if hasattr(metric, "value")
}
core = llm.llm_engine.engine_core.engine_core
result = {"tokens": tokens, "metrics": metrics, "usage": core.scheduler.kv_cache_manager.usage}
failure = None
if spec["break_copies"]:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    def fail(*blocks, is_store):
        raise OSError("made to fail by the test")

    get_kv_transfer_group().worker_handler._backend._copy = fail
    try:
        generate(llm, spec["break_copies"])
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
core.shutdown()
print(json.dumps({**result, "failure": failure}))
"""

PROMPTS = [prompt(300, seed=seed) for seed in range(20)]
"""Each needs 10 blocks of the engine's 68: three times as much as there is."""


@pytest.fixture(scope="module")
def engines(forks: Forks, small_engine: dict[str, Any]) -> dict[str, Future[Ended]]:
    """The first call fills the caches, the second repeats two prompts long gone; then the peer's copies fail."""
    from layerkv.bench.suite.engines import offload_connector

    transfer = offload_connector(256 << 20, on_cpu=True)
    calls = [PROMPTS, PROMPTS[:2]]
    specs: dict[str, dict[str, Any]] = {
        "peer": {
            "engine": {**small_engine, "kv_transfer_config": transfer},
            "calls": calls,
            "break_copies": [prompt(300, seed=99)],
        },
        "stock": {"engine": small_engine, "calls": calls, "break_copies": []},
    }
    return {
        name: forks.start(RUN, json.dumps(spec), VLLM_ENABLE_V1_MULTIPROCESSING="0") for name, spec in specs.items()
    }


def outcome_of(engines: dict[str, Future[Ended]], name: str) -> dict[str, Any]:
    ended = engines[name].result()
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def peer(engines: dict[str, Future[Ended]]) -> dict[str, Any]:
    return outcome_of(engines, "peer")


@pytest.fixture(scope="module")
def stock(engines: dict[str, Future[Ended]]) -> dict[str, Any]:
    return outcome_of(engines, "stock")


@pytest.mark.slow
def test_prefixes_that_left_the_device_are_loaded_from_the_host(peer: dict[str, Any]) -> None:
    assert peer["metrics"]["vllm:prompt_tokens_cached_by_source,host"] == 2 * 9 * 32  # all full blocks of two prompts
    assert peer["metrics"]["vllm:prompt_tokens_cached_by_source,device"] == 0
    assert peer["metrics"]["vllm:external_prefix_cache_hits"] == 2 * 9 * 32
    assert peer["metrics"]["vllm:simple_kv_offload_load_blocks"] == 2 * 9


@pytest.mark.slow
def test_every_block_is_given_back(peer: dict[str, Any]) -> None:
    assert peer["usage"] == 0
    assert peer["metrics"]["vllm:simple_kv_offload_pending_store_blocks"] == 0


@pytest.mark.slow
def test_tokens_from_loaded_prefixes_are_stocks(peer: dict[str, Any], stock: dict[str, Any]) -> None:
    assert peer["tokens"] == stock["tokens"]
    assert len({tuple(tokens) for tokens in itertools.chain(*stock["tokens"])}) == len(PROMPTS)


@pytest.mark.slow
def test_stock_has_those_prefixes_no_more(stock: dict[str, Any]) -> None:
    assert stock["metrics"]["vllm:prefix_cache_hits"] == 0


@pytest.mark.slow
def test_a_copy_that_fails_ends_the_engine_and_names_the_cause(peer: dict[str, Any]) -> None:
    assert peer["failure"] == "TransferError: a copy of vllm-cpu-offload failed: made to fail by the test"
