"""Which vLLM this adapter stands on, and whether the installed one still has what it stands on.

Every surface listed here is used by a module of this package. They are checked once, at start-up, so that a vLLM
that moved one of them is refused with its name and not met in the middle of a request.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from layerkv.errors import IncompatibleVLLMError

SUPPORTED_VLLM: tuple[str, ...] = ("0.32.0",)


@dataclass(frozen=True, slots=True)
class Surface:
    """A name in vLLM that this package relies on, and the parameters it passes by name."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SurfaceProblem:
    """A surface that is not what it was."""

    what: str
    why: str


_SURFACES: tuple[Surface, ...] = (
    Surface("vllm.engine.arg_utils", "EngineArgs.create_engine_config"),
    Surface("vllm.v1.kv_cache_spec_registry", "register_kv_cache_spec", ("manager_class", "uniform_type_base_spec")),
    Surface("vllm.v1.kv_cache_spec_registry", "KVCacheSpecRegistry._ensure_registered"),
    Surface("vllm.v1.kv_cache_interface", "FullAttentionSpec"),
    Surface(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.get_num_blocks_to_allocate",
        ("request_id", "num_tokens", "new_computed_blocks"),
    ),
    Surface(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.allocate_new_blocks",
        ("request_id", "num_tokens"),
    ),
    Surface(
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.allocate_external_computed_blocks",
        ("request_id", "num_local_computed_tokens", "num_external_computed_tokens"),
    ),
    Surface(
        "vllm.v1.core.single_type_kv_cache_manager", "FullAttentionManager.cache_blocks", ("request", "num_tokens")
    ),
    Surface("vllm.v1.core.block_pool", "BlockPool.free_blocks", ("ordered_blocks",)),
    Surface("vllm.v1.core.block_pool", "BlockPool.get_new_blocks", ("num_blocks",)),
    Surface("vllm.v1.core.block_pool", "BlockPool.get_cached_block", ("block_hash", "kv_cache_group_ids")),
    Surface("vllm.v1.core.block_pool", "BlockPool.evict_blocks", ("block_ids",)),
    Surface("vllm.v1.core.kv_cache_utils", "FreeKVCacheBlockQueue.remove"),
    Surface("vllm.v1.core.kv_cache_utils", "FreeKVCacheBlockQueue.popleft_n", ("n",)),
    Surface("vllm.v1.core.kv_cache_utils", "FreeKVCacheBlockQueue.append_n", ("blocks",)),
    Surface("vllm.v1.core.kv_cache_utils", "FreeKVCacheBlockQueue.prepend_n", ("blocks",)),
    Surface("vllm.distributed.kv_transfer.kv_connector.v1.base", "KVConnectorBase_V1.update_connector_output"),
    Surface("vllm.v1.core.kv_cache_manager", "KVCacheManager.get_block_ids", ("request_id",)),
    Surface("vllm.v1.core.kv_cache_manager", "KVCacheManager.prefix_cache_lookup_enabled", ("request",)),
    Surface(
        "vllm.v1.core.kv_cache_coordinator",
        "KVCacheCoordinator.find_longest_cache_hit",
        ("block_hashes", "max_cache_hit_length"),
    ),
    Surface("vllm.v1.core.kv_cache_utils", "generate_block_hash_extra_keys", ("request",)),
    Surface("vllm.v1.core.kv_cache_utils", "maybe_convert_block_hash"),
    Surface("vllm.v1.core.kv_cache_utils", "to_event_extra_keys", ("extra_keys",)),
    Surface(
        "vllm.distributed.kv_events",
        "BlockStored",
        (
            "block_hashes",
            "parent_block_hash",
            "token_ids",
            "block_size",
            "lora_id",
            "medium",
            "lora_name",
            "extra_keys",
            "group_idx",
            "kv_cache_spec_kind",
            "kv_cache_spec_sliding_window",
            "session_id",
        ),
    ),
    Surface("vllm.distributed.kv_events", "BlockRemoved", ("block_hashes", "medium", "group_idx")),
    Surface(
        "vllm.distributed.kv_transfer.kv_connector.v1.base",
        "KVConnectorBase_V1.get_transfer_results",
        ("finished_req_ids",),
    ),
    Surface(
        "vllm.distributed.kv_transfer.kv_connector.v1.base",
        "KVConnectorTransferResults",
        ("finished_sending", "finished_recving", "failed_recving"),
    ),
    Surface("vllm.distributed.kv_transfer.kv_connector.v1.base", "KVConnectorBase_V1.take_events"),
    Surface("vllm.distributed.kv_transfer.kv_connector.v1.base", "KVConnectorBase_V1.reset_cache"),
    Surface("vllm.v1.core.sched.scheduler", "Scheduler.reset_connector_cache"),
    Surface("vllm.v1.core.sched.scheduler", "Scheduler.schedule", ("throttle_prefills",)),
    Surface(
        "vllm.v1.core.sched.scheduler", "Scheduler._preempt_request", ("request", "timestamp", "drop_stale_output")
    ),
    Surface("vllm.v1.core.sched.scheduler", "Scheduler._inflight_prefill_reserved_blocks"),
    Surface("vllm.v1.core.sched.scheduler", "Scheduler.get_num_unfinished_requests"),
    Surface("vllm.v1.core.sched.scheduler", "Scheduler.finish_requests", ("request_ids", "finished_status")),
    Surface("vllm.v1.core.sched.scheduler", "Scheduler._handle_blocked_waiting_request", ("request",)),
    Surface("vllm.v1.core.kv_cache_manager", "KVCacheManager.evict_blocks", ("block_ids",)),
    Surface("vllm.distributed.kv_transfer.kv_connector.v1.base", "KVConnectorBase_V1.has_pending_push_work"),
    Surface(
        "vllm.v1.core.sched.scheduler", "Scheduler.reset_prefix_cache", ("reset_running_requests", "reset_connector")
    ),
    Surface("vllm.v1.core.sched.async_scheduler", "AsyncScheduler"),
    Surface("vllm.distributed.kv_transfer.kv_connector.factory", "KVConnectorFactory.register_connector"),
    Surface("vllm.distributed.kv_transfer.kv_connector.v1.base", "SupportsHMA"),
    Surface("vllm.distributed.kv_transfer.kv_connector.v1.base", "KVConnectorBase_V1.bind_kv_cache_manager"),
    Surface("vllm.distributed.kv_transfer.kv_connector.v1.base", "KVConnectorBase_V1.get_mem_pool_context"),
    Surface("vllm.distributed.kv_transfer.kv_connector.v1.base", "KVConnectorBase_V1.has_connector_metadata"),
    Surface("vllm.distributed.kv_transfer.kv_connector.v1.base", "KVConnectorBase_V1.build_connector_worker_meta"),
    Surface("vllm.distributed.kv_transfer.kv_connector.v1.base", "KVConnectorWorkerMetadata.aggregate", ("other",)),
    Surface("vllm.distributed.kv_transfer.kv_connector.v1.metrics", "KVConnectorPromMetrics"),
    Surface("vllm.v1.worker.gpu_worker", "Worker.get_kv_cache_spec"),
    Surface("vllm.v1.worker.gpu_worker", "Worker.execute_model", ("scheduler_output",)),
    Surface("vllm.v1.worker.gpu_worker", "Worker.init_device"),
    Surface("vllm.v1.worker.gpu_worker", "Worker.compile_or_warm_up_model"),
    Surface("vllm.v1.worker.utils", "request_memory", ("init_snapshot", "cache_config")),
    Surface("vllm.v1.kv_cache_interface", "KVCacheConfig", ("num_blocks",)),
    Surface("vllm.config", "CacheConfig.gpu_memory_utilization"),
    Surface("vllm.v1.request", "Request.get_skip_reading_prefix_cache"),
    Surface("vllm.sampling_params", "RequestOutputKind.FINAL_ONLY"),
    Surface("vllm.config", "ParallelConfig.use_ubatching"),
    Surface("vllm.config", "ParallelConfig.nnodes_within_dp"),
    Surface("vllm.config", "ParallelConfig.rank"),
    Surface("vllm.config", "ModelConfig.get_num_layers", ("parallel_config",)),
    Surface("vllm.config", "AuxOutputConfig.enabled"),
    Surface("vllm.usage.usage_lib", "UsageContext.LLM_CLASS"),
    Surface("vllm.sampling_params", "RequestOutputKind.DELTA"),
    Surface("vllm.v1.kv_cache_interface", "FullAttentionSpec.merge", ("specs",)),
    Surface("vllm.config", "ParallelConfig._api_process_count"),
    Surface("vllm.v1.metrics.stats", "SchedulerStats", ("prefix_cache_stats", "kv_connector_stats")),
)


# Not looked at elsewhere: importing it puts CPU buffers in the place of the GPU's.
_CPU_SURFACE = Surface("vllm.v1.worker.cpu_worker", "CPUWorker.determine_available_memory")


def check_version(version: str) -> None:
    """Refuse a vLLM that this adapter was not made for.

    Raises:
        IncompatibleVLLMError: naming what was found and what is supported.
    """
    if version.split("+")[0] not in SUPPORTED_VLLM:
        raise IncompatibleVLLMError(
            f"vLLM {version} is installed, but this layerkv supports {', '.join(SUPPORTED_VLLM)} only; "
            f"install vllm=={SUPPORTED_VLLM[-1]} or a layerkv release for {version}, or set "
            f'"on_unsupported": "passthrough" in kv_connector_extra_config to run without layerkv'
        )


def check_surfaces() -> list[SurfaceProblem]:
    """Every surface of the installed vLLM that is missing or has lost a parameter."""
    from vllm.platforms import current_platform

    surfaces = (*_SURFACES, _CPU_SURFACE) if current_platform.is_cpu() else _SURFACES
    return [problem for surface in surfaces if (problem := _check(surface)) is not None]


def require_compatible() -> None:
    """Refuse the installed vLLM if anything is wrong with it.

    Raises:
        IncompatibleVLLMError: with the version, or with the first surface that changed.
    """
    from vllm import __version__

    check_version(__version__)
    if problems := check_surfaces():
        first = problems[0]
        raise IncompatibleVLLMError(
            f"vLLM {__version__} is not what layerkv expects: {first.what} {first.why} "
            f"({len(problems)} such surfaces in all); reinstall vllm=={SUPPORTED_VLLM[-1]}"
        )


def _check(surface: Surface) -> SurfaceProblem | None:
    what = f"{surface.module}.{surface.name}"
    try:
        found: Any = importlib.import_module(surface.module)
        for part in surface.name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        return SurfaceProblem(what, f"is missing ({error})")
    if surface.parameters:
        known = inspect.signature(found).parameters
        missing = [name for name in surface.parameters if name not in known]
        if missing:
            return SurfaceProblem(what, f"no longer takes {', '.join(missing)}")
    return None
