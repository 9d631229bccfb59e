"""vLLM's CPU worker with a lane zone. Imported on the CPU only: see :mod:`layerkv.vllm_plugin.worker`."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from layerkv.vllm_plugin.worker import LayerKVWorkerMixin


class LayerKVCPUWorker(LayerKVWorkerMixin, CPUWorker):
    """vLLM's CPU worker with a lane zone."""
