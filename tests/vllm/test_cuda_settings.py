"""What layerkv asks of vLLM on CUDA, without a GPU: graphs left out step by step, and what is refused."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layerkv.core.transfer import BlockRun, StepPlan
from layerkv.errors import IncompatibleVLLMError

pytestmark = pytest.mark.vllm

RUN = (BlockRun(0, 0, 1),)


def v2_runner() -> Any:
    """vLLM's own manager of graphs, after it has captured one for a step of one token."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

    manager = object.__new__(CudaGraphManager)
    graph = BatchExecutionDescriptor(cg_mode=CUDAGraphMode.FULL, num_tokens=1, num_reqs=1, uniform_token_count=1)
    manager._graphs_captured = True
    manager._candidates = {(1, 0): [graph]}
    manager._resolve_effective_loras = lambda num_loras: num_loras
    return SimpleNamespace(cudagraph_manager=manager)


def v1_runner() -> Any:
    """vLLM's own dispatcher, likewise."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    dispatcher = object.__new__(CudagraphDispatcher)
    graph = BatchDescriptor(num_tokens=1, num_reqs=1, uniform=True)
    dispatcher.keys_initialized = True
    dispatcher.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    dispatcher.compilation_config = SimpleNamespace(max_cudagraph_capture_size=8)
    dispatcher.cudagraph_keys = {CUDAGraphMode.FULL: {graph}, CUDAGraphMode.PIECEWISE: set()}
    dispatcher._create_padded_batch_descriptor = lambda *args: graph
    return SimpleNamespace(cudagraph_dispatcher=dispatcher)


def graph_of_one_token(runner: Any) -> str:
    """What vLLM would replay for a step in which one request computes one token."""
    if hasattr(runner, "cudagraph_manager"):
        return runner.cudagraph_manager.dispatch(1, 1, 1, 0).cg_mode.name
    return runner.cudagraph_dispatcher.dispatch(1, uniform_decode=True)[0].name


@pytest.mark.parametrize("make", [v2_runner, v1_runner])
def test_vllm_replays_no_graph_while_told_not_to_and_does_again_afterwards(make: Any) -> None:
    from layerkv.vllm_plugin.graphs import without_graphs

    runner = make()
    assert graph_of_one_token(runner) == "FULL"
    with without_graphs(runner):
        assert graph_of_one_token(runner) == "NONE"
    assert graph_of_one_token(runner) == "FULL"
    with pytest.raises(KeyError), without_graphs(runner):
        raise KeyError("vLLM's own")
    assert graph_of_one_token(runner) == "FULL"


def test_eager_execution_has_no_graphs_to_leave_out_and_unknown_runners_are_refused() -> None:
    from layerkv.vllm_plugin.graphs import without_graphs

    with without_graphs(SimpleNamespace(cudagraph_manager=None)):
        pass
    for runner in (SimpleNamespace(), SimpleNamespace(cudagraph_manager=object())):
        with pytest.raises(IncompatibleVLLMError, match="CUDA graphs"), without_graphs(runner):
            pass


@pytest.mark.parametrize(
    ("plan", "needs"),
    [
        (StepPlan(stores=RUN, num_tokens=1), True),
        (StepPlan(hits=RUN, num_tokens=1), True),
        (StepPlan(parks=RUN, ahead=RUN, settle=True, num_tokens=9), False),
        (StepPlan(parks=RUN), False),
    ],
)
def test_only_steps_that_copy_layer_by_layer_run_without_graphs(
    plan: StepPlan, needs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    from layerkv.vllm_plugin.connector import LayerKVMetadata
    from layerkv.vllm_plugin.gpu_worker import LayerKVGPUWorker

    worker = object.__new__(LayerKVGPUWorker)
    worker.model_runner, worker._zeroes_blocks = v2_runner(), False
    monkeypatch.setattr(Worker, "execute_model", lambda self, output: graph_of_one_token(self.model_runner))
    ran = worker.execute_model(SimpleNamespace(kv_connector_metadata=LayerKVMetadata(plan)))
    assert ran == ("NONE" if needs else "FULL")
    assert worker.execute_model(SimpleNamespace(kv_connector_metadata=None)) == "FULL"


def test_what_cuda_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from layerkv.vllm_plugin import support

    find_spec = importlib.util.find_spec
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace(use_ubatching=False))
    monkeypatch.setattr(support, "find_spec", lambda name: object() if name.startswith("cuda") else find_spec(name))
    assert list(support._cuda_problems(config)) == []
    config.parallel_config.use_ubatching = True
    [microbatches] = support._cuda_problems(config)
    assert "--enable-dbo" in microbatches.instead
    config.parallel_config.use_ubatching = False
    monkeypatch.setattr(support, "find_spec", lambda name: None if name == "cuda" else find_spec(name))
    [bindings] = support._cuda_problems(config)
    assert "pip install cuda-bindings" in bindings.instead


def elastic_worker(**others: Any) -> Any:
    """A worker of an engine that may grow to 1 GiB beside a broker; nothing of vLLM's has been made."""
    from layerkv.config import EngineConfig
    from layerkv.vllm_plugin.gpu_worker import LayerKVGPUWorker

    extra = {"kv_ceiling": "1GiB", "broker": "broker.sock", "allow_untested_elastic_cuda": True, **others}
    worker = object.__new__(LayerKVGPUWorker)
    worker._layerkv = EngineConfig.from_extra_config(extra)
    worker._layerkv_specs = {"layer": object()}
    worker.cache_config = SimpleNamespace(gpu_memory_utilization=0.92, kv_cache_memory_bytes=None)
    worker.vllm_config = SimpleNamespace(cache_config=worker.cache_config)
    return worker


@pytest.mark.parametrize(("others", "starts"), [({}, True), ({"on_unsupported": "passthrough"}, False)])
def test_an_elastic_engine_starts_beside_one_that_has_most_of_the_device(
    others: dict[str, Any], starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By vLLM's own check, which looks at the share of the device whatever size the KV cache is told to have."""
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.utils import request_memory

    snapshot: Any = SimpleNamespace(total_memory=80 << 30, free_memory=1 << 30, device_="cuda:0")
    monkeypatch.setattr(Worker, "init_device", lambda self: request_memory(snapshot, self.cache_config))
    worker = elastic_worker(**others)
    if starts:
        worker.init_device()
    else:
        with pytest.raises(ValueError, match="GPU memory utilization"):
            worker.init_device()
    assert worker.cache_config.gpu_memory_utilization == 0.92


@pytest.mark.parametrize("num_mapped", [1, 3])
def test_vllms_warm_up_touches_no_segment_that_has_no_memory(num_mapped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own steps for Model Runner V2, which number their blocks from 1 on; without a word they touch others."""
    from vllm.v1.worker.gpu_worker import Worker

    from layerkv.core.segments import SegmentLayout, SegmentPlan

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    worker, touched = elastic_worker(), list[int]()
    worker.model_runner = warmed_up_runner(num_blocks=60)
    plan = SegmentPlan(SegmentLayout(segment_blocks=5, num_segments=10), num_mapped)
    monkeypatch.setattr(type(worker), "_elastic_sizes", lambda self: SimpleNamespace(plan=plan))
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: warm_up(self.model_runner, touched))
    worker.compile_or_warm_up_model()
    assert 0 < max(touched) < 5 * num_mapped
    assert worker.model_runner.kv_cache_config.num_blocks == 60
    worker._layerkv = elastic_worker(kv_ceiling=None, broker=None)._layerkv
    worker.compile_or_warm_up_model()
    assert max(touched) >= 15, "or this test sees nothing"


def warmed_up_runner(num_blocks: int) -> Any:
    """What vLLM's warm-up asks of a model runner."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
    groups = [SimpleNamespace(kv_cache_spec=spec)]
    return SimpleNamespace(
        is_pooling_model=False,
        is_encoder_decoder=False,
        is_last_pp_rank=True,
        max_num_reqs=40,
        max_model_len=512,
        num_speculative_steps=0,
        decode_query_len=1,
        adaptive_verification=None,
        rejection_sampler=None,
        kv_block_zeroer=None,
        model_state=object(),
        kv_connector=SimpleNamespace(set_disabled=lambda is_disabled: None),
        kv_cache_config=SimpleNamespace(num_blocks=num_blocks, kv_cache_groups=groups),
        scheduler_config=SimpleNamespace(max_num_seqs=40, max_num_batched_tokens=512),
        model_config=SimpleNamespace(get_vocab_size=lambda: 128),
        vllm_config=SimpleNamespace(num_lookahead_tokens=0, is_mm_encoder_only=False),
    )


def warm_up(runner: Any, touched: list[int]) -> None:
    """vLLM's two warm-ups; every block that they compute is noted."""
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels

    def execute(output: Any) -> None:
        new = [request.block_ids for request in output.scheduled_new_reqs]
        more = [ids for ids in output.scheduled_cached_reqs.new_block_ids if ids is not None]
        touched.extend(block for groups in (*new, *more) for ids in groups for block in ids)

    run_mixed_prefill_decode_warmup(runner, execute, lambda grammar: None, 500)
    warmup_kernels(runner, execute, lambda grammar: None)


NO_CPU_WORKER = """
import sys
import vllm.platforms
vllm.platforms.current_platform.is_cpu = lambda: False
import layerkv.vllm_plugin.gpu_worker
from layerkv.vllm_plugin.compat import check_surfaces
print(check_surfaces(), [name for name in sys.modules if name.startswith("vllm.v1.worker.cpu")])
"""


def test_nothing_on_the_way_to_the_gpu_worker_imports_vllms_cpu_worker() -> None:
    """It replaces the buffers that vLLM's GPU kernels read by CPU tensors, for the whole process."""
    ran = subprocess.run(
        [sys.executable, "-c", NO_CPU_WORKER], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.splitlines()[-1] == "[] []"
