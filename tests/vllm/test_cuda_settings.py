"""What layerkv asks of vLLM on CUDA, without a GPU: graphs left out step by step, and what is refused."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

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
    worker.model_runner = v2_runner()
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
    assert "layerkv[cuda]" in bindings.instead


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
