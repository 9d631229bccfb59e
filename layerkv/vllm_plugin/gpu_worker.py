"""vLLM's CUDA worker with a lane zone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.gpu_worker import Worker

from layerkv.vllm_plugin.connector import LayerKVMetadata
from layerkv.vllm_plugin.graphs import without_graphs
from layerkv.vllm_plugin.worker import LayerKVWorkerMixin

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class LayerKVGPUWorker(LayerKVWorkerMixin, Worker):
    """vLLM's CUDA worker with a lane zone."""

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """vLLM's step; one that copies layer by layer runs without CUDA graphs."""
        metadata = scheduler_output.kv_connector_metadata
        if not isinstance(metadata, LayerKVMetadata) or not metadata.plan.needs_layer_hooks:
            return super().execute_model(scheduler_output)
        with without_graphs(self.model_runner):
            return super().execute_model(scheduler_output)
