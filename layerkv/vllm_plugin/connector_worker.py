"""The connector in a worker: owns the arena, host memory and transfer engine, and forwards vLLM's layer hooks."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from layerkv.core.geometry import KVGeometry
from layerkv.core.transfer import StepPlan, num_blocks
from layerkv.device.allocation import ArenaAllocation
from layerkv.device.base import COPY_TIMEOUT_S, Direction
from layerkv.device.lane_schedule import LaneSchedule, device_blocks, shared_link_unit
from layerkv.device.mechanism import Mechanism, make_mechanism
from layerkv.device.rows import Rows
from layerkv.device.segment_mover import Mover, SegmentMover, TouchedSegments
from layerkv.device.store_watch import host_blocks
from layerkv.errors import IncompatibleVLLMError, TransferError
from layerkv.metrics import COPY_WAIT, MetricSamples, Payload
from layerkv.runtime import checks_books
from layerkv.vllm_plugin.drafts import num_drafting_layers
from layerkv.vllm_plugin.failed_copies import FailedCopies
from layerkv.vllm_plugin.layer_places import LayerPlaces
from layerkv.vllm_plugin.segment_answers import SegmentAnswer
from layerkv.vllm_plugin.setup import Setup

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger(f"vllm.{__name__}")

IDLE_WAIT_S = 0.005
"""A step without tokens waits this long for a fetch: without compute to overlap, polling would only spin. Not measured:
chosen by judgement."""


class WorkerSide:
    """One worker's memory and copies. Called by the thread that runs the model."""

    def __init__(
        self,
        geometry: KVGeometry,
        layers: LayerPlaces,
        mechanism: Mechanism,
        *,
        hooks_always_run: bool = True,
        shares_link: bool = False,
        rank: int = 0,
        num_drafting: int = 0,
    ) -> None:
        """Begin with empty lanes.

        Args:
            geometry: The worker's KV memory, which knows the order of layers.
            layers: Where each layer's KV is.
            mechanism: The memory, and what copies it; closed by :meth:`shutdown`.
            hooks_always_run: See :class:`LaneSchedule`.
            shares_link: Whether other ranks exchange activations over the link that copies take.
            rank: Of this worker among those of its engine, for what it tells of segments.
            num_drafting: See :class:`LaneSchedule`.
        """
        self._slots = layers.slots
        self._layer_index = layers.layer_index(geometry)
        self._geometry = geometry
        self._arena, self._engine = mechanism.arena, mechanism.engine
        self._lanes = LaneSchedule(
            self._engine,
            geometry.lane_layers(),
            shared_link_unit(geometry.page_bytes) if shares_link else None,
            hooks_always_run=hooks_always_run,
            rows=Rows.of(geometry),
            num_drafting=num_drafting,
        )
        self.drafts = num_drafting > 0
        """Whether layers say something after the forward pass is over."""
        self._segments: Mover | None = None
        if mechanism.touched_arena is not None:
            self._segments = TouchedSegments(mechanism.touched_arena, self._engine.wait_host)
        elif mechanism.elastic_arena is not None:
            self._segments = SegmentMover(mechanism.elastic_arena, self._engine.wait_host)
        self._host_segments: Mover | None = None
        if mechanism.elastic_host is not None:
            self._host_segments = TouchedSegments(mechanism.elastic_host, self._engine.wait_host)
        self._rank = rank
        self._is_idle_step = False
        self._raised_before: BaseException | None = None
        self._failed_blocks: set[int] = set()
        self._failed_copies: FailedCopies | None = None
        self._is_copying_step = False
        self._is_at_rest = True  # every copy has been seen to its end
        self._metrics = MetricSamples()
        self._has_copied = False

    def allocation(self) -> AbstractContextManager[Any]:
        """A context in which vLLM's allocation of the KV cache gets the arena's tensor."""
        return ArenaAllocation(self._arena)

    def register(self, kv_caches: Mapping[str, torch.Tensor | Sequence[torch.Tensor]]) -> None:
        """Check that vLLM laid the layers out as the arena did.

        Raises:
            IncompatibleVLLMError: a layer lies elsewhere.
        """
        base = self._arena.tensor().data_ptr()
        for name, slot in self._slots.items():
            cache = kv_caches[name]
            first = cache if isinstance(cache, torch.Tensor) else cache[0]  # a state has several parts
            if (found := first.data_ptr() - base) != self._geometry.offset(slot, 0):
                raise IncompatibleVLLMError(
                    f"vLLM placed the KV cache of {name} at byte {found} of its allocation, layerkv expects "
                    f"{self._geometry.offset(slot, 0)}; use the vLLM version that layerkv supports"
                )

    def begin_step(self, plan: StepPlan) -> bool:
        """Begin the copies that this step's forward pass depends on, and its fetches.

        Returns:
            Whether the layer hooks have work in this step.
        """
        self._is_idle_step = plan.num_tokens == 0
        if not plan.has_copies:
            return False
        self._raised_before = sys.exception()
        self._is_copying_step, self._is_at_rest, self._has_copied = True, False, True
        if self._segments is not None:
            self._segments.begin_maps(plan.moves.maps)
        if self._host_segments is not None:
            self._host_segments.begin_maps(plan.host_moves.maps)
        self._lanes.begin_step(plan)
        if self._segments is not None:
            self._segments.begin_unmaps(plan.moves.unmaps, self._lanes.before_unmap)
        if self._host_segments is not None:
            self._host_segments.begin_unmaps(plan.host_moves.unmaps, self._lanes.before_unmap)
        self._count(plan)
        return self._lanes.has_layer_work

    def layer_done(self, layer_name: str) -> None:
        """The layer's attention has run (or is enqueued)."""
        self._lanes.layer_done(self._layer_index[layer_name])

    def end_step(self) -> None:
        """The forward pass is over, or an exception has ended it: then that is what vLLM is to see.

        Raises:
            TransferError: layer hooks did not run.
        """
        if not self._is_copying_step:
            return
        self._is_copying_step = False
        if sys.exception() is not self._raised_before:
            self._lanes.abandon_step()
            return
        self._lanes.end_step()
        if (hits := self._lanes.take_failed_hits()) is not None:
            logger.error("loading a cached prefix failed, its KV is computed again: %s", hits.error)
            self._failed_blocks.update(device_blocks(hits.runs))
        if (loads := self._lanes.take_failed_loads()) is not None:
            logger.error("loading a layer failed, its requests' KV is computed again: %s", loads.error)
            self._note_failed(FailedCopies(unloaded=frozenset(host_blocks(loads.runs))))

    def finished_fetches(self) -> set[str] | None:
        """Requests whose fetch has ended since the last call; None if there are none."""
        if self._is_at_rest:
            return None
        finished = self._lanes.poll_fetches(IDLE_WAIT_S if self._is_idle_step else 0.0)
        for fetch in finished:
            if fetch.error is not None:
                logger.error("fetching %s failed, its KV is computed again: %s", fetch.request_id, fetch.error)
                self._failed_blocks.update(fetch.device_blocks)
        if (stores := self._lanes.take_failed_stores()) is not None:
            logger.error("storing KV failed, it is computed again: %s", stores.error)
            self._note_failed(FailedCopies(unstored=stores.host_blocks))
        self._is_at_rest = self._lanes.is_at_rest
        return {fetch.request_id for fetch in finished} or None

    def take_failed_blocks(self) -> set[int]:
        """Blocks that should have been loaded and were not."""
        if not self._failed_blocks:
            return set()
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_failed_copies(self) -> FailedCopies | None:
        """What else has failed since the last call; None if nothing has."""
        failed, self._failed_copies = self._failed_copies, None
        return failed

    def _note_failed(self, failed: FailedCopies) -> None:
        self._failed_copies = failed if self._failed_copies is None else self._failed_copies.with_those_of(failed)

    def take_answers(self) -> list[SegmentAnswer]:
        """What this rank has done of plans' moves since the last call.

        Raises:
            TransferError: memory is not given back; lost (``LostCopyError``) where a copy that may use it is.
        """
        if self._segments is None:
            return []
        waits = self._is_idle_step and not self._lanes.has_fetches
        answers = []
        for segment, error in self._segments.take_ended(IDLE_WAIT_S if waits else 0.0):
            if error is not None:
                logger.warning("no memory for segment %d of the KV pool, which stays as it is: %s", segment, error)
            answers.append(SegmentAnswer(segment, self._rank, error is not None))
        return answers

    def take_host_answers(self) -> list[SegmentAnswer]:
        """As :meth:`take_answers`, of host memory."""
        if self._host_segments is None:
            return []
        waits = self._is_idle_step and not self._lanes.has_fetches
        ended = self._host_segments.take_ended(IDLE_WAIT_S if waits else 0.0)
        return [SegmentAnswer(segment, self._rank) for segment, _ in ended]

    def take_metrics(self) -> Payload | None:
        """Bytes and seconds since the last call; None if nothing was copied."""
        if not self._has_copied:
            return None
        for direction, seconds in self._engine.take_seconds().items():
            if seconds:
                self._metrics.add("layerkv_copy_seconds", seconds, direction)
        if waited_s := self._engine.take_waited_s():
            self._metrics.add(COPY_WAIT, waited_s)
        self._has_copied = self._lanes.has_fetches
        return self._metrics.take() if self._metrics else None

    def shutdown(self) -> None:
        """Let what is under way end, then stop the copy threads."""
        try:
            self._lanes.drain(COPY_TIMEOUT_S)
        except TransferError as error:
            logger.error("shutting down: %s", error)
        self._engine.close()

    def _count(self, plan: StepPlan) -> None:
        block_bytes = self._geometry.block_bytes
        stored = num_blocks(plan.parks) + num_blocks(plan.stores) + num_blocks(plan.ahead)
        loaded = num_blocks(plan.hits) + num_blocks(plan.zone_hits)
        loaded += sum(num_blocks(fetch.runs) for fetch in plan.fetches)
        loaded_bytes = loaded * block_bytes + num_blocks(plan.loads) * self._geometry.streamed_block_bytes
        if stored:
            self._metrics.add("layerkv_bytes", stored * block_bytes, Direction.STORE)
        if loaded_bytes:
            self._metrics.add("layerkv_bytes", loaded_bytes, Direction.LOAD)


def make_worker_side(vllm_config: VllmConfig, setup: Setup, kv_cache_config: KVCacheConfig) -> WorkerSide:
    """Take this worker's memory and start what copies it.

    Raises:
        IncompatibleVLLMError: vLLM does not keep each layer in one stretch of memory.
        MemoryError: device or host has not that much.
    """
    places = _layers_in_order(vllm_config, kv_cache_config, setup.geometry)
    geometry = places.geometry(setup.geometry)
    place_of = places.layer_index(geometry)
    num_drafting = num_drafting_layers(vllm_config, sorted(place_of, key=place_of.__getitem__))
    assert num_drafting is not None, "our worker refuses what this cannot tell"
    device_type: str = vllm_config.device_config.device_type
    if device_type == "cuda":
        logger.warning("layerkv's CUDA path has not been measured on a GPU yet: run benchmarks/gpu first")
    return WorkerSide(
        geometry,
        places,
        make_mechanism(
            device_type,
            geometry,
            setup.host_blocks,
            setup.segments,
            host_layout=None if setup.host is None else setup.host.layout,
            guards=checks_books(),
        ),
        hooks_always_run=device_type == "cpu",
        shares_link=vllm_config.parallel_config.tensor_parallel_size > 1,
        rank=vllm_config.parallel_config.rank,
        num_drafting=num_drafting,
    )


def _layers_in_order(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, geometry: KVGeometry) -> LayerPlaces:
    """Where each layer's KV is.

    Raises:
        IncompatibleVLLMError: the layer is not the outermost dimension, so that a lane cannot be aliased.
    """
    tensors, groups = kv_cache_config.kv_cache_tensors, kv_cache_config.kv_cache_groups
    if len(tensors) == len(groups):
        expected = (0, geometry.layer_bytes, geometry.page_bytes)
        placed = {(tensor.offset, tensor.layer_stride, tensor.block_stride) for tensor in tensors}
        names = [list(tensor.layers) for tensor in tensors]
        if placed == {expected} and list(map(len, names)) == [group.num_layers for group in geometry.groups]:
            return LayerPlaces(names, list(vllm_config.compilation_config.static_forward_context))
    raise IncompatibleVLLMError(
        f"the KV-cache layout {kv_cache_config.kv_cache_layout} does not keep each layer in one stretch of memory, "
        "which the lane zone needs; set --kv-cache-layout to a layout whose name begins with L"
    )
