"""``LayerKVConnector``: vLLM's KV-connector interface, divided between the two roles it plays.

vLLM makes one instance beside the scheduler and one in each worker; each forwards to its side. Everything here is
translation: books are kept by :class:`~layerkv.core.ledger.KVLedger`, copies are ordered by
:class:`~layerkv.device.lane_schedule.LaneSchedule`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

from layerkv.core.transfer import StepPlan
from layerkv.errors import ConfigError
from layerkv.vllm_plugin.compat import require_compatible
from layerkv.vllm_plugin.connector_scheduler import SchedulerSide
from layerkv.vllm_plugin.connector_worker import WorkerSide, make_worker_side
from layerkv.vllm_plugin.failed_copies import FailedCopies
from layerkv.vllm_plugin.our_classes import is_our_scheduler
from layerkv.vllm_plugin.prom import LayerKVPromMetrics, LayerKVStats
from layerkv.vllm_plugin.segment_answers import SegmentAnswers, worker_report
from layerkv.vllm_plugin.setup import engine_config, setup_of
from layerkv.vllm_plugin.support import require_supported
from layerkv.vllm_plugin.transfer import always_recompute

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


@dataclass(slots=True)
class LayerKVMetadata(KVConnectorMetadata):
    """What the scheduler's side tells the workers' for one step."""

    plan: StepPlan


_NOTHING_TO_DO = LayerKVMetadata(StepPlan())
_NOTHING_ARRIVED = KVConnectorTransferResults()  # vLLM reads it and changes nothing


def _half_on(flag: str, found: object) -> str:
    return (
        f"{flag}: found {found!r}, but LayerKVConnector works with layerkv's worker and scheduler only; let vLLM load "
        "the plugin layerkv, which sets both (see VLLM_PLUGINS), or set --worker-cls and --scheduler-cls to layerkv's"
    )


class LayerKVConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. Without our spec (``on_unsupported: passthrough``) both sides are None and nothing is done."""

    _begun: KVConnectorMetadata | None = None

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config = engine_config(vllm_config)
        require_compatible(allow_untested=config.allow_untested_vllm)
        require_supported(vllm_config)
        setup = setup_of(vllm_config, config, kv_cache_config)
        self.scheduler_side: SchedulerSide | None = None
        self.worker_side: WorkerSide | None = None
        self._has_layer_work = False
        if setup is None:
            if config.on_unsupported == "error":
                raise ConfigError(_half_on("worker_cls", vllm_config.parallel_config.worker_cls))
            return
        if not is_our_scheduler(vllm_config.scheduler_config.scheduler_cls):  # it would give zone blocks to anybody
            raise ConfigError(_half_on("scheduler_cls", vllm_config.scheduler_config.scheduler_cls))
        if role is KVConnectorRole.SCHEDULER:
            always_recompute(vllm_config.kv_transfer_config)  # vLLM's scheduler reads it next
            self.scheduler_side = SchedulerSide(
                config,
                setup,
                caches_prefixes=config.host_prefix_cache
                and vllm_config.cache_config.enable_prefix_caching
                and setup.geometry.is_plain
                and resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)[1] == setup.geometry.block_tokens,
            )
        else:
            self.worker_side = make_worker_side(vllm_config, setup, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a preempted request's in-flight token is delivered; its KV is parked or computed again."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """False: steps that need layer hooks run without graphs (:mod:`layerkv.vllm_plugin.graphs`)."""
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """False: the arena is not part of the memory that sleep gives back.

        Where what cannot be served runs without layerkv, sleep mode does too: then nothing stands in its way.
        """
        return bool(kv_transfer_config.kv_connector_extra_config.get("on_unsupported") == "passthrough")

    # Worker side ---------------------------------------------------------------------------------------------

    def get_mem_pool_context(self) -> AbstractContextManager[Any] | None:
        return None if self.worker_side is None else self.worker_side.allocation()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self.worker_side is not None:
            self.worker_side.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self.worker_side is not None and connector_metadata is not self._begun:
            assert isinstance(connector_metadata, LayerKVMetadata)
            self._has_layer_work = self.worker_side.begin_step(connector_metadata.plan)
        self._begun = None

    def bind_before_zeroing(self, connector_metadata: Any) -> None:
        """Our worker's word of a step before vLLM's model runner zeroes blocks that it gives out: parks come first.

        So loads begin before that too. None fills a block that is zeroed: vLLM leaves those of asynchronous loads out
        (0.31 takes them off its list, later releases put none on it), and zone blocks, which our managers give out,
        never get there. The contract's tests (``tests/contract``) check it, on each release.
        """
        if self.worker_side is not None and connector_metadata is not None:
            assert isinstance(connector_metadata, LayerKVMetadata)
            self._has_layer_work = self.worker_side.begin_step(connector_metadata.plan)
            self._begun = connector_metadata

    def has_connector_metadata(self) -> bool:
        """Whether the layer hooks have work. vLLM skips them otherwise: steps without layered requests pay nothing."""
        return self._has_layer_work

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Nothing: it runs after the forward pass, and what the pass needs was begun before it."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: it runs after the layer's KV-cache update, and the wait was enqueued a layer earlier."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        assert self.worker_side is not None
        self.worker_side.layer_done(layer_name)

    def wait_for_save(self) -> None:
        """Check that the layers did what was planned. Nobody waits: a lane's next user does, and later loads do."""
        if self.worker_side is not None:
            self._has_layer_work = False
            self.worker_side.end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self.worker_side is None:
            return None, None
        self._has_layer_work &= self.worker_side.drafts  # the model's forward pass is over
        self.worker_side.end_step()  # where drafts follow, vLLM ends the save only after them: too late to tell of it
        return None, self.worker_side.finished_fetches()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        arrived = self.get_finished(finished_req_ids)[1]
        return _NOTHING_ARRIVED if arrived is None else KVConnectorTransferResults(finished_recving=arrived)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set() if self.worker_side is None else self.worker_side.take_failed_blocks()

    def build_connector_worker_meta(self) -> FailedCopies | SegmentAnswers | None:
        """Copies that failed and are no loads of vLLM's, and moves of segments that have ended.

        The scheduler looks at it with the step's output.
        """
        if (side := self.worker_side) is None:
            return None
        return worker_report(side.take_failed_copies(), side.take_answers(), side.take_host_answers())

    def shutdown(self) -> None:
        if self.worker_side is not None:
            self.worker_side.shutdown()

    # Scheduler side ------------------------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        if self.scheduler_side is not None:
            self.scheduler_side.attach(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        if self.scheduler_side is not None:
            self.scheduler_side.ledger.add(request.request_id)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self.scheduler_side is None:
            return 0, False
        return self.scheduler_side.tokens_to_fetch(request.request_id, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if self.scheduler_side is not None:
            self.scheduler_side.allocated(request.request_id, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        if self.scheduler_side is None or (plan := self.scheduler_side.plan(scheduler_output)) is None:
            return _NOTHING_TO_DO
        return LayerKVMetadata(plan)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self.scheduler_side is not None:
            for request_id in connector_output.finished_recving or ():
                self.scheduler_side.fetched(request_id)
            told = connector_output.kv_connector_worker_meta
            if self.scheduler_side.elastic is not None and isinstance(told, SegmentAnswers):
                self.scheduler_side.elastic.answered(told.answers, told.host_answers)

    def has_pending_push_work(self) -> bool:
        """Fetches land in the engine's steps: it goes on stepping until they have, though it is paused. So do moves of
        segments, and an engine that nobody uses gives its memory back first."""
        side = self.scheduler_side
        if side is None:
            return False
        return side.ledger.num_fetching > 0 or (side.elastic is not None and side.elastic.has_work())

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Never delays vLLM's free: a later step's copies are ordered behind this request's last ones."""
        if self.scheduler_side is not None:
            self.scheduler_side.finished(request, block_ids)
        return False, None

    def take_events(self) -> Iterable[KVCacheEvent]:
        """What host memory caches since the last call, and what no more; empty unless vLLM publishes KV events."""
        side = self.scheduler_side
        return () if side is None or side.events is None else side.events.take()

    def reset_cache(self) -> bool:
        """Forget the cached prefixes in host memory. What requests have there is theirs."""
        if self.scheduler_side is not None:
            self.scheduler_side.ledger.forget_prefixes()
        return True

    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[CacheHitSource, int]:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource  # 0.31 has neither it nor who asks

        return {CacheHitSource.HOST: num_external_tokens} if num_external_tokens else {}

    # Metrics -------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        side = self.scheduler_side or self.worker_side
        payload = side.take_metrics() if side is not None else None
        return None if payload is None else LayerKVStats(data=payload)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return LayerKVStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return LayerKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
