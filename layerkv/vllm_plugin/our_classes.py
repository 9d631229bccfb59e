"""The classes that take the place of vLLM's, by the names and paths that vLLM's flags take."""

from __future__ import annotations

from importlib import import_module

CONNECTOR = "LayerKVConnector"
VLLM_WORKERS = {"cpu": "vllm.v1.worker.cpu_worker.CPUWorker", "cuda": "vllm.v1.worker.gpu_worker.Worker"}
OUR_WORKERS = {
    "cpu": "layerkv.vllm_plugin.cpu_worker.LayerKVCPUWorker",
    "cuda": "layerkv.vllm_plugin.gpu_worker.LayerKVGPUWorker",
}
OUR_SCHEDULER = "layerkv.vllm_plugin.scheduler.LayerKVScheduler"
OUR_ASYNC_SCHEDULER = "layerkv.vllm_plugin.scheduler.LayerKVAsyncScheduler"
SMOOTH_MIDDLEWARE = "layerkv.vllm_plugin.pace.SmoothStream"
"""Takes no class's place: what vLLM's `--middleware` takes."""
_OUR_MIXIN = "layerkv.vllm_plugin.scheduler.LayerKVSchedulerMixin"


def is_our_scheduler(scheduler_cls: str | type | None) -> bool:
    """Whether a scheduler class, or the path of one as ``--scheduler-cls`` takes it, is layerkv's or derives from it.

    Finding out about another path imports it. One that cannot be imported is not ours: vLLM says what is wrong with it.
    """
    if scheduler_cls is None or scheduler_cls in (OUR_SCHEDULER, OUR_ASYNC_SCHEDULER):
        return scheduler_cls is not None
    if isinstance(scheduler_cls, str):
        module, _, name = scheduler_cls.rpartition(".")
        try:
            scheduler_cls = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            return False
    # By name: importing the mixin could fail under a vLLM that layerkv is about to refuse.
    return any(f"{base.__module__}.{base.__qualname__}" == _OUR_MIXIN for base in getattr(scheduler_cls, "__mro__", ()))
