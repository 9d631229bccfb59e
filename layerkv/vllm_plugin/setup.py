"""From vLLM's configuration to ours: geometry and host memory, the same in scheduler and workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from layerkv.config import EngineConfig
from layerkv.core.geometry import GeometryRequest, KVGeometry, geometry_for_blocks
from layerkv.device.mechanism import ALIGNMENT_BYTES
from layerkv.errors import ConfigError
from layerkv.units import format_bytes
from layerkv.vllm_plugin.spec import LayerKVSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

DEFAULT_LANES = 2
"""One lane is written while the other is copied: enough to overlap wherever copying is faster than computing."""

_DEFAULT_HOST_SHARE = 0.25
_DEFAULT_HOST_FACTOR = 4
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def engine_config(vllm_config: VllmConfig) -> EngineConfig:
    """Our part of ``--kv-transfer-config``.

    Raises:
        ConfigError: something in it is wrong.
    """
    assert vllm_config.kv_transfer_config is not None
    return EngineConfig.from_extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config)


def geometry_request(
    vllm_config: VllmConfig, config: EngineConfig, spec: LayerKVSpec, num_layers: int
) -> GeometryRequest:
    """What the division into pool and zone depends on."""
    return GeometryRequest(
        num_layers=num_layers,
        page_bytes=spec.page_size_bytes,
        block_tokens=spec.block_size,
        lanes=config.lanes or DEFAULT_LANES,
        retained_layers=config.retained_layers,
        step_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        zone_tokens=0 if config.mode == "resident" else config.zone_tokens,
        alignment_bytes=ALIGNMENT_BYTES[vllm_config.device_config.device_type],
        longest_tokens=vllm_config.model_config.max_model_len,
        may_outgrow_pool=config.long_contexts,
    )


def geometry_of(vllm_config: VllmConfig, config: EngineConfig, kv_cache_config: KVCacheConfig) -> KVGeometry | None:
    """The division that follows from the number of blocks vLLM settled on; None if vLLM runs without our spec.

    Raises:
        ConfigError: pool and ``max_model_len`` do not go together.
    """
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, LayerKVSpec):
        return None
    request = geometry_request(vllm_config, config, groups[0].kv_cache_spec, len(groups[0].layer_names))
    geometry = geometry_for_blocks(request, kv_cache_config.num_blocks)
    require_room_for_one(vllm_config, config, geometry)
    return geometry


def require_room_for_one(vllm_config: VllmConfig, config: EngineConfig, geometry: KVGeometry) -> None:
    """vLLM's own start-up check counts zone blocks as memory; this one does not.

    Raises:
        ConfigError: a request of ``max_model_len`` tokens fits neither into the pool nor, with ``long_contexts``, into
            lane zone and host memory, or would not run there.
    """
    pool_tokens = (geometry.pool_blocks - 1) * geometry.block_tokens  # vLLM keeps one block as its null block
    zone_tokens = geometry.zone_blocks * geometry.block_tokens
    max_model_len = vllm_config.model_config.max_model_len
    if max_model_len <= pool_tokens:
        return
    found = (
        f"max_model_len: found {max_model_len}, but the KV pool holds {pool_tokens} tokens beside a lane zone of "
        f"{zone_tokens} tokens"
    )
    less = f"max_model_len to {pool_tokens} or less, or give more KV memory (--kv-cache-memory-bytes or "
    less += "--gpu-memory-utilization)"
    if not config.long_contexts:
        raise ConfigError(
            f"{found}; set {less}, or a smaller zone_tokens; or set long_contexts to true in kv_connector_extra_config "
            "to serve requests that are longer than the pool from host memory, slowly"
        )
    if config.mode == "resident":
        raise ConfigError(
            f"{found}, and mode: resident runs nothing in the zone, where a request that is longer than the pool must "
            f"run; set mode to auto, or {less}"
        )
    if zone_tokens < max_model_len:
        raise ConfigError(
            f"{found}, which must hold a request that is longer than the pool; set zone_tokens to {max_model_len} or "
            f"more, fewer lanes, or {less}"
        )
    host_tokens = host_blocks_per_worker(vllm_config, config, geometry) * geometry.block_tokens
    if host_tokens < max_model_len:
        raise ConfigError(
            f"{found}, and host memory {host_tokens} tokens, which must hold a request that is longer than the pool; "
            f"set host_memory to {format_bytes(-(-max_model_len // geometry.block_tokens) * geometry.block_bytes)} "
            "for each worker or more"
        )


def require_host_memory(config: EngineConfig) -> None:
    """Check ``host_memory`` as far as it needs no engine, so that a mistake ends start-up at once.

    Raises:
        ConfigError: it is more than the machine has.
    """
    machine = machine_memory_bytes()
    if config.host_memory_bytes is not None and config.host_memory_bytes > machine:
        raise ConfigError(
            f"kv_connector_extra_config.host_memory: found {format_bytes(config.host_memory_bytes)}, but this machine "
            f"has {format_bytes(machine)} of memory; set host_memory to less"
        )


def host_blocks_per_worker(vllm_config: VllmConfig, config: EngineConfig, geometry: KVGeometry) -> int:
    """Host blocks of each worker: ``host_memory`` is for the whole engine, divided among tensor-parallel ranks.

    Raises:
        ConfigError: it is more than the machine has, or less than one block.
    """
    require_host_memory(config)
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size
    total = config.host_memory_bytes
    if total is None:
        share = int(machine_memory_bytes() * _DEFAULT_HOST_SHARE) // parallel.data_parallel_size_local
        total = min(_DEFAULT_HOST_FACTOR * geometry.physical_bytes * ranks, share)
    blocks = total // ranks // geometry.block_bytes
    if blocks == 0:
        raise ConfigError(
            f"kv_connector_extra_config.host_memory: found {format_bytes(total)} for {ranks} worker(s), but one host "
            f"block takes {format_bytes(geometry.block_bytes)} on each; set host_memory to more"
        )
    return blocks


def machine_memory_bytes() -> int:
    """Memory of this machine, or of the container that this process runs in if that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CGROUP_LIMITS:
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(limits)
