"""What the decision log says of KV that is given up, on vLLM's own scheduler without an engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from layerkv.scheduler.decision_log import read_log
from layerkv.scheduler.reasons import Event, Reason
from layerkv.scheduler.snapshot import Decision
from tests.vllm.engines_in_turn import flag, prompt

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

pytestmark = pytest.mark.vllm

BLOCK = 32


@pytest.fixture(scope="module")
def vllm_config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    from vllm.engine.arg_utils import EngineArgs

    from layerkv.vllm_plugin import activate

    original = EngineArgs.create_engine_config
    activate.register_connector()
    activate.install()
    try:
        log_path = str(tmp_path_factory.mktemp("log") / "decisions.jsonl")
        config = EngineArgs(
            model=str(tiny_model),
            dtype="float32",
            enforce_eager=True,
            block_size=BLOCK,
            max_model_len=512,
            max_num_batched_tokens=512,
            kv_cache_memory_bytes=13 << 20,
            kv_transfer_config=flag(zone_tokens=512, host_memory="16MiB", decision_log=log_path),
        ).create_engine_config()
    finally:
        EngineArgs.create_engine_config = original  # type: ignore[method-assign]
    config.cache_config.num_gpu_blocks = 64
    return config


class Scheduler:
    """LayerKVScheduler over a made-up KV cache; every request that computes its last token makes another one."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        import torch
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from layerkv.vllm_plugin.host_memory import WorkerMemory
        from layerkv.vllm_plugin.scheduler import LayerKVScheduler
        from layerkv.vllm_plugin.spec import LayerKVSpec

        assert vllm_config.kv_transfer_config is not None
        self.log_path = Path(vllm_config.kv_transfer_config.kv_connector_extra_config["decision_log"])
        self.log_path.unlink(missing_ok=True)
        spec = LayerKVSpec(
            block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.float32, memory=WorkerMemory.here()
        )
        cache = KVCacheConfig(64, [], [KVCacheGroupSpec([f"layer{i}" for i in range(4)], spec)])
        structured = StructuredOutputManager(vllm_config)
        self.vllm = LayerKVScheduler(vllm_config, cache, structured, block_size=BLOCK, hash_block_size=BLOCK)

    def add(self, name: str, num_tokens: int = 100) -> Request:
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256)
        hasher = get_request_block_hasher(BLOCK, sha256)
        request = Request(name, prompt(num_tokens, seed=1), SamplingParams(max_tokens=50), None, block_hasher=hasher)
        self.vllm.add_request(request)
        return request

    def step(self, *, failed_blocks: set[int] | None = None) -> None:
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        output = self.vllm.schedule()
        names = list(output.num_scheduled_tokens)
        received = KVConnectorOutput(invalid_block_ids=failed_blocks or set())
        made = [[7] for _ in names]
        self.vllm.update_from_output(
            output, ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, made, kv_connector_output=received)
        )

    def told(self, name: str) -> list[tuple[Event, Reason | None]]:
        """All that the log has of a request; ends the scheduler."""
        self.vllm.shutdown()
        kinds = (Event.ADMITTED_RESIDENT, Event.ADMITTED_LAYERED, Event.PARKED, Event.RECOMPUTES)
        entries = [entry for entry in read_log(self.log_path) if entry.request_id == name]
        return [(entry.event, entry.reason) for entry in entries if entry.event in kinds]


@pytest.fixture
def scheduler(vllm_config: VllmConfig) -> Scheduler:
    return Scheduler(vllm_config)


ADMITTED = (Event.ADMITTED_RESIDENT, Reason.FITS)


def test_a_request_that_vllm_preempts_is_told_so(scheduler: Scheduler) -> None:
    """Regression: it was told that the pool had room for all of it, the reason of its admission."""
    request = scheduler.add("a")
    scheduler.step()
    scheduler.vllm.running.remove(request)
    scheduler.vllm._preempt_request(request, time.monotonic())
    assert scheduler.told("a") == [ADMITTED, (Event.RECOMPUTES, Reason.PREEMPTED)]


def test_after_a_reset_all_are_told_of_it_the_parked_too(scheduler: Scheduler) -> None:
    scheduler.add("running")
    parked = scheduler.add("parked")
    scheduler.step()
    decision = Decision(park=("parked",), reasons={"parked": Reason.MAKES_ROOM})
    scheduler.vllm._execution.park(decision, time.monotonic())
    assert scheduler.vllm.reset_prefix_cache(reset_running_requests=True)
    assert parked.num_computed_tokens == 0
    assert scheduler.vllm._arrivals._gives_up_for is Reason.PREEMPTED, "what comes after is vLLM's own again"
    told = scheduler.told("running")
    assert told == [ADMITTED, (Event.RECOMPUTES, Reason.CACHE_RESET)]
    entries = [(e.event, e.reason) for e in read_log(scheduler.log_path) if e.request_id == "parked"]
    assert entries[-2:] == [(Event.PARKED, Reason.MAKES_ROOM), (Event.RECOMPUTES, Reason.CACHE_RESET)]


def test_who_depended_on_a_load_that_failed_is_told_so(scheduler: Scheduler) -> None:
    request = scheduler.add("a")
    scheduler.step()
    block_ids = scheduler.vllm.kv_cache_manager.get_block_ids(request.request_id)[0]
    scheduler.step(failed_blocks={block_ids[1]})
    assert scheduler.told("a")[:2] == [ADMITTED, (Event.RECOMPUTES, Reason.LOAD_FAILED)]


def test_what_was_decided_is_told_with_the_decisions_reason(scheduler: Scheduler) -> None:
    request = scheduler.add("a")
    scheduler.step()
    with scheduler.vllm._arrivals.giving_up_for(Reason.RECOMPUTE_CHEAPER):
        scheduler.vllm._execution.give_up(request, time.monotonic())
    assert scheduler.told("a") == [ADMITTED, (Event.RECOMPUTES, Reason.RECOMPUTE_CHEAPER)]
