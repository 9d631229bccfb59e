"""vLLM's CUDA worker with a lane zone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from vllm.v1.worker.gpu_worker import Worker

from layerkv.vllm_plugin.connector import LayerKVMetadata
from layerkv.vllm_plugin.elastic_setup import told_num_blocks, told_to_use_what_is_free
from layerkv.vllm_plugin.graphs import without_graphs
from layerkv.vllm_plugin.worker import LayerKVWorkerMixin

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class LayerKVGPUWorker(LayerKVWorkerMixin, Worker):
    """vLLM's CUDA worker with a lane zone."""

    def init_device(self) -> None:
        """vLLM's; an elastic engine starts beside others, which may have most of the device.

        With ``on_unsupported: passthrough`` it may yet become a stock engine, which takes its share of the device.
        """
        starts_beside_others = self._layerkv.is_elastic and self._layerkv.on_unsupported == "error"
        with told_to_use_what_is_free(self.vllm_config) if starts_beside_others else nullcontext():
            super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's; of a pool that grows and shrinks it uses the segments that have memory."""
        if self._layerkv_specs is None or not self._layerkv.is_elastic:
            return super().compile_or_warm_up_model()
        plan = self._elastic_sizes().plan
        with told_num_blocks(self.model_runner, plan.num_mapped * plan.layout.segment_blocks):
            return super().compile_or_warm_up_model()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """vLLM's step; one that copies layer by layer runs without CUDA graphs."""
        metadata = scheduler_output.kv_connector_metadata
        if not isinstance(metadata, LayerKVMetadata) or not metadata.plan.needs_layer_hooks:
            return super().execute_model(scheduler_output)
        with without_graphs(self.model_runner):
            return super().execute_model(scheduler_output)
