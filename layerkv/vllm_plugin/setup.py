"""From vLLM's configuration to ours: the geometry, the same in scheduler and workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerkv.config import EngineConfig
from layerkv.core.cost import load_profile
from layerkv.core.geometry import (
    GeometryRequest,
    KVGeometry,
    geometry_for_blocks,
    require_retained_layers,
    require_zone_tokens,
)
from layerkv.core.groups import Group, is_plain, longest_fitting, most_blocks_held, zone_block_tokens
from layerkv.core.segments import SegmentPlan
from layerkv.device.mechanism import ALIGNMENT_BYTES
from layerkv.errors import ConfigError
from layerkv.scheduler.decision_log import require_writable
from layerkv.units import format_bytes
from layerkv.vllm_plugin.drafts import drafting_blocks
from layerkv.vllm_plugin.elastic_setup import ElasticSizes, HostSizes, elastic_sizes, host_sizes, require_elastic
from layerkv.vllm_plugin.host_memory import WorkerMemory, host_blocks_per_worker
from layerkv.vllm_plugin.kv_groups import our_groups, require_one_page_size
from layerkv.vllm_plugin.spec import OUR_SPECS, LayerKVSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, KVCacheGroupSpec

DEFAULT_LANES = 2
"""One lane is written while the other is copied: enough to overlap wherever copying is faster than computing. Derived;
borne out on an AMD EPYC (2 cores, CPU build, 2026-11-21, benchmarks/results/2026-11-21-transfer.json): of a 2,048-token
chunk's copies one lane hides none, two 70 %, three 69 %."""


def engine_config(vllm_config: VllmConfig) -> EngineConfig:
    """Our part of ``--kv-transfer-config``.

    Raises:
        ConfigError: something in it is wrong.
    """
    assert vllm_config.kv_transfer_config is not None
    return EngineConfig.from_extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config)


def require_usable(vllm_config: VllmConfig, config: EngineConfig) -> None:
    """Check what engine core and workers would find out once they have started, as far as it is known before.

    Raises:
        ConfigError: a file that cannot be read or written, or a size that no engine of this model can have.
    """
    if config.cost_profile is not None:
        load_profile(config.cost_profile)
    if config.decision_log is not None:
        require_writable(config.decision_log)
    num_layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    require_retained_layers(config.retained_layers, num_layers)
    require_elastic(vllm_config, config)
    if config.zone_tokens is not None and vllm_config.cache_config.user_specified_block_size:  # else not known yet
        require_zone_tokens(config.zone_tokens, vllm_config.cache_config.block_size)


def geometry_request(
    vllm_config: VllmConfig,
    config: EngineConfig,
    spec: AttentionSpec,
    num_layers: int,
    groups: tuple[Group, ...] = (),
) -> GeometryRequest:
    """What the division into pool and zone depends on."""
    return GeometryRequest(
        num_layers=max([num_layers, *(group.num_layers for group in groups)]),
        page_bytes=spec.page_size_bytes,
        block_tokens=zone_block_tokens(groups) if groups else spec.block_size,
        lanes=config.lanes or DEFAULT_LANES,
        retained_layers=config.retained_layers,
        step_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        zone_tokens=0 if config.mode == "resident" else config.zone_tokens,
        alignment_bytes=ALIGNMENT_BYTES[vllm_config.device_config.device_type],
        longest_tokens=vllm_config.model_config.max_model_len,
        may_outgrow_pool=config.long_contexts,
        groups=groups,
    )


def request_for_groups(
    vllm_config: VllmConfig, config: EngineConfig, groups: Sequence[KVCacheGroupSpec], own: tuple[Group, ...]
) -> GeometryRequest:
    """What the division depends on, with these KV-cache groups, which are ``own`` as ours.

    Raises:
        ConfigError: no engine can have these groups, or not with what is set besides.
    """
    require_one_page_size(groups)
    spec: Any = next(g.kv_cache_spec for g in groups if isinstance(g.kv_cache_spec, OUR_SPECS))
    if is_plain(own):
        return geometry_request(vllm_config, config, spec, own[0].num_layers)
    if (problem := unsupported_with_groups(vllm_config, config)) is not None:
        raise ConfigError(problem)
    return geometry_request(vllm_config, config, spec, 0, own)


def unsupported_with_groups(vllm_config: VllmConfig, config: EngineConfig) -> str | None:
    """What is set that needs one KV-cache group which keeps all its blocks, and why; None if nothing is."""
    for name, is_set, why in (
        ("kv_connector_extra_config.long_contexts", config.long_contexts, "its needs are"),
        ("kv_connector_extra_config.kv_floor, kv_ceiling or broker", config.is_elastic, "its needs are"),
        ("--speculative-config", vllm_config.speculative_config is not None, "room for drafts is"),
    ):
        if is_set:
            return (
                f"{name}: not supported by layerkv yet with a model that has several KV-cache groups, sliding windows "
                f"or states, because {why} counted for one group that keeps all blocks; leave it out"
            )
    return None


@dataclass(frozen=True, slots=True)
class Setup:
    """What scheduler and workers agree on.

    Attributes:
        geometry: The division of KV memory; of a pool that grows, at its largest.
        host_blocks: Of each worker.
        elastic: How the pool grows and shrinks; None: it does not.
        host: How host memory does, if a broker divides it; None: it does not.
    """

    geometry: KVGeometry
    host_blocks: int
    elastic: ElasticSizes | None = None
    host: HostSizes | None = None

    @property
    def segments(self) -> SegmentPlan | None:
        """What workers must know of that."""
        return None if self.elastic is None else self.elastic.plan


def setup_of(vllm_config: VllmConfig, config: EngineConfig, kv_cache_config: KVCacheConfig) -> Setup | None:
    """What follows from the number of blocks that vLLM settled on; None if vLLM runs without our spec.

    Raises:
        ConfigError: pool and ``max_model_len`` do not go together, or host memory is too much or too little.
    """
    groups = kv_cache_config.kv_cache_groups
    own = our_groups(vllm_config, groups)
    if own is None:
        return None
    spec: Any = next(g.kv_cache_spec for g in groups if isinstance(g.kv_cache_spec, OUR_SPECS))
    assert spec.memory is not None
    request = request_for_groups(vllm_config, config, groups, own)
    if isinstance(spec, LayerKVSpec) and spec.segments is not None:
        elastic = elastic_sizes(vllm_config, config, request)
        assert elastic.plan == spec.segments, "scheduler and workers divide the pool alike"
        assert elastic.geometry.total_blocks == kv_cache_config.num_blocks, "vLLM was given the ceiling"
        host_blocks = host_blocks_per_worker(vllm_config, config, elastic.geometry_to_fit, spec.memory)
        if elastic.is_alone or vllm_config.device_config.device_type != "cpu":  # what is pinned stays
            return Setup(elastic.geometry, host_blocks, elastic)
        host = host_sizes(elastic.geometry, host_blocks, request.longest_tokens)
        return Setup(elastic.geometry, host.num_blocks, elastic, host)
    geometry = geometry_for_blocks(request, kv_cache_config.num_blocks)
    require_room_for_one(vllm_config, config, geometry, spec.memory)
    return Setup(geometry, host_blocks_per_worker(vllm_config, config, geometry, spec.memory))


def require_room_for_one(
    vllm_config: VllmConfig, config: EngineConfig, geometry: KVGeometry, memory: WorkerMemory
) -> None:
    """vLLM's own start-up check counts zone blocks as memory; this one does not.

    Raises:
        ConfigError: a request of ``max_model_len`` tokens fits neither into the pool nor, with ``long_contexts``, into
            lane zone and host memory, or would not run there.
    """
    num_others = 1 + drafting_blocks(vllm_config, geometry.block_tokens)  # vLLM keeps one block as its null block
    pool_tokens = (geometry.pool_blocks - num_others) * geometry.block_tokens
    zone_tokens = geometry.zone_blocks * geometry.block_tokens
    max_model_len = vllm_config.model_config.max_model_len
    if not geometry.is_plain:
        require_room_in_groups(geometry, max_model_len)
        return
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
    host_tokens = host_blocks_per_worker(vllm_config, config, geometry, memory) * geometry.block_tokens
    if host_tokens < max_model_len:
        raise ConfigError(
            f"{found}, and host memory {host_tokens} tokens, which must hold a request that is longer than the pool; "
            f"set host_memory to {format_bytes(-(-max_model_len // geometry.block_tokens) * geometry.block_bytes)} "
            "for each worker or more"
        )


def require_room_in_groups(geometry: KVGeometry, max_model_len: int) -> None:
    """As :func:`require_room_for_one`, with several KV-cache groups, windows or states.

    Raises:
        ConfigError: the pool does not hold a request of ``max_model_len`` tokens.
    """
    needed, pool_blocks = most_blocks_held(geometry.groups, max_model_len), geometry.pool_blocks - 1
    if needed > pool_blocks:
        longest = longest_fitting(geometry.groups, pool_blocks, max_model_len)
        raise ConfigError(
            f"max_model_len: found {max_model_len}, which takes {needed} blocks in {len(geometry.groups)} KV-cache "
            f"group(s), but the KV pool holds {pool_blocks} beside a lane zone of "
            f"{geometry.zone_blocks * geometry.block_tokens} tokens; set max_model_len to {longest} or less, or give "
            "more KV memory (--kv-cache-memory-bytes or --gpu-memory-utilization), or set a smaller zone_tokens"
        )
