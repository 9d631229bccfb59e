"""What cannot be served yet, found in vLLM's configuration before anything is started."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from layerkv.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

VLLM_WORKERS = {"cpu": "vllm.v1.worker.cpu_worker.CPUWorker", "cuda": "vllm.v1.worker.gpu_worker.Worker"}
OUR_WORKERS = {
    "cpu": "layerkv.vllm_plugin.cpu_worker.LayerKVCPUWorker",
    "cuda": "layerkv.vllm_plugin.gpu_worker.LayerKVGPUWorker",
}
OUR_SCHEDULER = "layerkv.vllm_plugin.scheduler.LayerKVScheduler"
OUR_ASYNC_SCHEDULER = "layerkv.vllm_plugin.scheduler.LayerKVAsyncScheduler"
_OUR_MIXIN = "layerkv.vllm_plugin.scheduler.LayerKVSchedulerMixin"


@dataclass(frozen=True, slots=True)
class Unsupported:
    """One reason why layerkv cannot serve this configuration."""

    what: str
    why: str
    instead: str

    def __str__(self) -> str:
        return f"{self.what} is not supported by layerkv yet: {self.why}; {self.instead}"


def unsupported(vllm_config: VllmConfig) -> Unsupported | None:
    """The first thing in the configuration that cannot be served, or None."""
    return next(iter(_problems(vllm_config)), None)


def require_supported(vllm_config: VllmConfig) -> None:
    """Refuse a configuration that cannot be served.

    Raises:
        ConfigError: with what, why, and what to set.
    """
    if (problem := unsupported(vllm_config)) is not None:
        raise ConfigError(
            f'{problem}, or set "on_unsupported": "passthrough" in kv_connector_extra_config to run without layerkv'
        )


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


def _problems(c: VllmConfig) -> Iterable[Unsupported]:
    model, parallel, scheduler = c.model_config, c.parallel_config, c.scheduler_config
    transfer = c.kv_transfer_config
    assert transfer is not None
    device = c.device_config.device_type
    if device not in OUR_WORKERS:
        yield Unsupported(
            f"device type {device!r}",
            "it has no arena and no transfer engine",
            f"run one of {', '.join(OUR_WORKERS)}",
        )
    if device == "cuda":
        yield from _cuda_problems(c)
    if transfer.kv_role != "kv_both":
        yield Unsupported(f"kv_role {transfer.kv_role!r}", "one engine stores and loads", "set kv_role to kv_both")
    if model.runner_type != "generate":
        yield Unsupported(f"runner type {model.runner_type!r}", "only generation keeps KV", "use a generating model")
    if model.is_encoder_decoder:
        yield Unsupported(
            "an encoder-decoder model", "cross-attention KV has another layout", "use a decoder-only model"
        )
    if model.is_hybrid or model.is_attention_free:
        yield Unsupported("a hybrid or attention-free model", "its state is not per-token KV", "use a dense model")
    if model.is_multimodal_model:
        yield Unsupported("a multimodal model", "encoder inputs are untested with parking", "use a text model")
    if model.use_mla:
        yield Unsupported("MLA attention", "its KV layout is untested", "use a model with full attention")
    if c.speculative_config is not None:
        yield Unsupported("speculative decoding", "draft KV is not tracked", "leave out --speculative-config")
    if parallel.pipeline_parallel_size > 1:
        yield Unsupported("pipeline parallelism", "layers are counted per engine", "set --pipeline-parallel-size 1")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield Unsupported("context parallelism", "blocks are split between ranks", "leave out context parallelism")
    if model.enable_sleep_mode:
        yield Unsupported("sleep mode", "the arena is not part of its memory pool", "leave out --enable-sleep-mode")
    if model.original_max_model_len == -1:
        yield Unsupported(
            "max_model_len -1 (fit to memory)", "it would count the lane zone as memory", "set --max-model-len"
        )
    if parallel.worker_cls not in ("auto", VLLM_WORKERS.get(device), OUR_WORKERS.get(device)):
        yield Unsupported(f"worker class {parallel.worker_cls!r}", "layerkv brings its own", "leave out --worker-cls")
    if scheduler.scheduler_cls is not None and not is_our_scheduler(scheduler.scheduler_cls):
        yield Unsupported(
            f"scheduler class {scheduler.scheduler_cls!r}", "layerkv brings its own", "leave out --scheduler-cls"
        )


def _cuda_problems(c: VllmConfig) -> Iterable[Unsupported]:
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        yield Unsupported(
            "CUDA without the package cuda-bindings", "the arena maps memory through it", "install layerkv[cuda]"
        )
    if c.parallel_config.use_ubatching:
        yield Unsupported(
            "microbatching", "two halves of a step would run each layer's hook", "leave out --enable-dbo, --ubatch-size"
        )
