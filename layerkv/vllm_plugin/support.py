"""What cannot be served yet, found in vLLM's configuration before anything is started.

Every option of vLLM has a decision in :mod:`layerkv.vllm_plugin.options`; those that are refused are refused here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from layerkv.config import SloPolicy
from layerkv.errors import ConfigError
from layerkv.vllm_plugin.drafts import DRAFTS_WITH_KV, DRAFTS_WITHOUT_KV
from layerkv.vllm_plugin.our_classes import CONNECTOR, OUR_WORKERS, VLLM_WORKERS, is_our_scheduler

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_EXECUTORS = (None, "mp", "uni")


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
    refuse(unsupported(vllm_config))


def require_heard(policy: SloPolicy, *, has_metrics: bool) -> None:
    """Refuse a policy with ``overload: reject`` where the front end would never hear how much waits.

    Raises:
        ConfigError: with what, why, and what to set.
    """
    rejecting = [slo.name for slo in policy.classes.values() if slo.overload == "reject"]
    if rejecting and not has_metrics:
        refuse(
            Unsupported(
                f"overload: reject (class {', '.join(rejecting)}) with --disable-log-stats",
                "the front end hears with the engine's metrics how much waits, and would refuse nobody",
                "leave out --disable-log-stats, set overload to queue",
            )
        )


def refuse(problem: Unsupported | None) -> None:
    """Nothing, without a problem.

    Raises:
        ConfigError: there is one; with the way out that is always there.
    """
    if problem is not None:
        raise ConfigError(
            f'{problem}, or set "on_unsupported": "passthrough" in kv_connector_extra_config to run without layerkv'
        )


def _problems(c: VllmConfig) -> Iterable[Unsupported]:
    yield from _connector_problems(c)
    yield from _device_problems(c)
    yield from _model_problems(c)
    yield from _parallel_problems(c)
    yield from _scheduler_problems(c)


def _connector_problems(c: VllmConfig) -> Iterable[Unsupported]:
    transfer = c.kv_transfer_config
    assert transfer is not None
    if c.cache_config.kv_offloading_size is not None:
        yield Unsupported(
            "--kv-offloading-size",
            "with it vLLM's own connector takes layerkv's place",
            "leave it out, and set host_memory in kv_connector_extra_config",
        )
    if transfer.kv_connector != CONNECTOR:
        yield Unsupported(
            f"{CONNECTOR} inside {transfer.kv_connector}",
            "it moves requests by itself, and two connectors would own their KV",
            f"set kv_connector to {CONNECTOR} alone",
        )
    if transfer.kv_role != "kv_both":
        yield Unsupported(f"kv_role {transfer.kv_role!r}", "one engine stores and loads", "set kv_role to kv_both")


def _device_problems(c: VllmConfig) -> Iterable[Unsupported]:
    device = c.device_config.device_type
    if device not in OUR_WORKERS:
        yield Unsupported(
            f"device type {device!r}",
            "it has no arena and no transfer engine",
            f"run one of {', '.join(OUR_WORKERS)}",
        )
    if device == "cuda":
        yield from _cuda_problems(c)


def _cuda_problems(c: VllmConfig) -> Iterable[Unsupported]:
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        yield Unsupported(
            "CUDA without the package cuda-bindings",
            "the arena maps memory through it",
            "pip install cuda-bindings (layerkv's extra cuda brings it)",
        )
    if c.parallel_config.use_ubatching:
        yield Unsupported(
            "microbatching", "two halves of a step would run each layer's hook", "leave out --enable-dbo, --ubatch-size"
        )


def _model_problems(c: VllmConfig) -> Iterable[Unsupported]:
    model = c.model_config
    if model.runner_type != "generate":
        yield Unsupported(f"runner type {model.runner_type!r}", "only generation keeps KV", "use a generating model")
    if model.is_encoder_decoder:
        yield Unsupported(
            "an encoder-decoder model", "cross-attention KV has another layout", "use a decoder-only model"
        )
    if model.is_attention_free:
        yield Unsupported(
            "an attention-free model", "its states do not grow with the context", "use a model with attention"
        )
    if model.multimodal_config is not None and model.multimodal_config.mm_encoder_only:
        yield Unsupported("--mm-encoder-only", "an encoder alone has no KV", "leave it out, or layerkv")
    if model.is_multimodal_model and model.is_mm_prefix_lm:
        yield Unsupported(
            "a model in which an image's tokens read each other in both directions",
            "a prompt is computed in chunks of what a step has time for, which may end within an image",
            "set --language-model-only, or use a model with causal attention",
        )
    if c.ec_transfer_config is not None:
        yield Unsupported(
            "--ec-transfer-config",
            "prompts would wait for an encoder elsewhere, beside those that wait for KV",
            "leave it out",
        )
    if c.diffusion_config is not None:
        yield Unsupported("a diffusion model", "its steps write KV more than once", "leave out --diffusion-config")
    yield from _speculation_problems(c)
    if model.enable_sleep_mode:
        yield Unsupported("sleep mode", "the arena is not part of its memory pool", "leave out --enable-sleep-mode")
    if model.original_max_model_len == -1:
        yield Unsupported(
            "max_model_len -1 (fit to memory)", "it would count the lane zone as memory", "set --max-model-len"
        )
    if c.aux_output_config.enabled:
        yield Unsupported(
            "returning routed experts",
            "they are not kept for tokens whose KV comes from host memory",
            "leave out --enable-return-routed-experts",
        )
    if c.cache_config.kv_cache_dtype_skip_layers and c.cache_config.cache_dtype != "auto":
        yield Unsupported(
            "--kv-cache-dtype-skip-layers", "the layers would differ in KV shape", "leave it out, or --kv-cache-dtype"
        )


def _speculation_problems(c: VllmConfig) -> Iterable[Unsupported]:
    speculation = c.speculative_config
    if speculation is None:
        return
    if speculation.method not in (*DRAFTS_WITHOUT_KV, *DRAFTS_WITH_KV):
        yield Unsupported(
            f"speculative decoding by {speculation.method}",
            "what it keeps beside the model's KV, and when, is untested",
            f"set method in --speculative-config to one of {', '.join((*DRAFTS_WITHOUT_KV, *DRAFTS_WITH_KV))}",
        )
    if speculation.parallel_drafting:
        yield Unsupported(
            "parallel drafting", "its drafts' slots are untested", "leave parallel_drafting out of --speculative-config"
        )


def _parallel_problems(c: VllmConfig) -> Iterable[Unsupported]:
    parallel = c.parallel_config
    device = c.device_config.device_type
    if parallel.pipeline_parallel_size > 1:
        yield Unsupported("pipeline parallelism", "layers are counted per engine", "set --pipeline-parallel-size 1")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield Unsupported("context parallelism", "blocks are split between ranks", "leave out context parallelism")
    if parallel.distributed_executor_backend == "external_launcher":
        yield Unsupported(
            "the executor backend external_launcher",
            "each rank would schedule by its own clock, and they would compute different steps",
            "set --distributed-executor-backend mp",
        )
    elif parallel.distributed_executor_backend not in _EXECUTORS:
        yield Unsupported(
            f"the executor backend {parallel.distributed_executor_backend!r}",
            "its workers are untested",
            "set --distributed-executor-backend mp",
        )
    if parallel.data_parallel_backend != "mp":
        yield Unsupported(
            f"the data-parallel backend {parallel.data_parallel_backend!r}",
            "its engines would not hear of a changed policy",
            "set --data-parallel-backend mp",
        )
    if parallel.nnodes_within_dp > 1:
        yield Unsupported(
            "an engine on several nodes",
            "host memory is counted on one machine",
            "set --nnodes to the number of engines at most",
        )
    if parallel.enable_elastic_ep:
        yield Unsupported(
            "elastic expert parallelism",
            "engines would come and go, and host memory is divided among those at the start",
            "leave out --enable-elastic-ep",
        )
    if parallel.enable_fault_tolerance:
        yield Unsupported(
            "fault tolerance",
            "an engine would go on after a step whose copies failed",
            "leave out --enable-fault-tolerance",
        )
    if parallel.worker_cls not in ("auto", VLLM_WORKERS.get(device), OUR_WORKERS.get(device)):
        yield Unsupported(f"worker class {parallel.worker_cls!r}", "layerkv brings its own", "leave out --worker-cls")


def _scheduler_problems(c: VllmConfig) -> Iterable[Unsupported]:
    scheduler = c.scheduler_config
    if scheduler.scheduler_cls is not None and not is_our_scheduler(scheduler.scheduler_cls):
        yield Unsupported(
            f"scheduler class {scheduler.scheduler_cls!r}", "layerkv brings its own", "leave out --scheduler-cls"
        )
    if scheduler.prefill_schedule_interval > 1:
        yield Unsupported(
            f"--prefill-schedule-interval {scheduler.prefill_schedule_interval}",
            "it would hold back prompts that the policy starts in this step",
            "leave out --prefill-schedule-interval",
        )
    if scheduler.watermark > 0:
        yield Unsupported(
            f"--watermark {scheduler.watermark:g}", "the forecast keeps the pool's headroom", "leave out --watermark"
        )
