"""Reads vLLM's scheduler into a :class:`~layerkv.scheduler.snapshot.Snapshot`. Changes nothing."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from layerkv.scheduler.snapshot import (
    LayeredRequest,
    ParkedRequest,
    PrefixHit,
    ResidentRequest,
    Snapshot,
    WaitingRequest,
)

if TYPE_CHECKING:
    from layerkv.vllm_plugin.connector_scheduler import SchedulerSide
    from layerkv.vllm_plugin.scheduler import LayerKVSchedulerMixin
    from layerkv.vllm_plugin.spec import LayerKVManager

QUEUE_HEAD = 64
"""Waiting and parked requests that the policy sees: more than one step could start."""

HIT_LOOKUPS = 4
"""Waiting prompts whose prefix-cache hits are looked up per step: a lookup costs time for every block it finds."""


class SnapshotTaker:
    """Takes snapshots of one scheduler. Cost per step: one pass over running requests, none over waiting ones."""

    def __init__(self, scheduler: LayerKVSchedulerMixin, side: SchedulerSide, manager: LayerKVManager) -> None:
        self._scheduler = scheduler
        self._config = side.config
        self._ledger = side.ledger
        self._geometry = side.geometry
        self._manager = manager

    def is_quiet(self) -> bool:
        """Nobody waits, nobody is parked or layered, and the pool has room for whatever runs: nothing to decide."""
        s = self._scheduler
        if s._waiting_views or s._parked_views or s._inflight_prefills or self._ledger.layered_ids:
            return False
        free = s.kv_cache_manager.block_pool.get_num_free_blocks()
        return free >= len(s.running) * (1 + _steps_ahead(s))

    def __call__(self, now_s: float) -> Snapshot:
        """Take a snapshot."""
        s, ledger, tokens = self._scheduler, self._ledger, self._geometry.block_tokens
        layered_ids = ledger.layered_ids
        layered: list[LayeredRequest] = []
        growth_blocks = decode_tokens = prefilling_tokens = num_resident = 0
        first_late_s = math.inf
        budget_tokens = s.max_num_scheduled_tokens
        steps_ahead = _steps_ahead(s)
        req_to_blocks = self._manager.req_to_blocks
        for request in s.running:
            remaining = request.num_tokens + request.num_output_placeholders - request.num_computed_tokens
            prefilling = request.is_prefill_chunk
            if prefilling:
                prefilling_tokens += remaining
            else:
                decode_tokens += 1
                tracked = s._tracked.get(request.request_id)
                if tracked is not None:
                    due_s = tracked.next_token_deadline_s(request.num_output_tokens, now_s)
                    if due_s >= now_s:  # who is late already holds nobody back
                        first_late_s = min(first_late_s, due_s)
            new_tokens = min(remaining, budget_tokens) if prefilling else 1 + steps_ahead
            last_block = -(-(request.num_computed_tokens + new_tokens) // tokens)
            held = req_to_blocks[request.request_id]
            missing = max(last_block - len(held), 0)
            if request.request_id in layered_ids:
                layered.append(
                    LayeredRequest(
                        request_id=request.request_id,
                        prefill_done=not prefilling,
                        num_blocks=-(-max(request.num_computed_tokens + 1, request.num_tokens) // tokens),
                        num_zone_blocks=sum(block.block_id >= self._geometry.pool_blocks for block in held),
                        needs_zone_block=missing > 0 and not prefilling,  # a prompt's room is reserved
                        needs_host_block=last_block > ledger.num_host_blocks_of(request.request_id),
                    )
                )
            else:
                num_resident += 1
                growth_blocks += missing
        free_blocks = s.kv_cache_manager.block_pool.get_num_free_blocks()
        active_loras = self._active_loras()
        startable = (view for view in s._waiting_views.views if self._is_startable(view, active_loras))
        fetchable = (view for view in s._parked_views.views if self._is_fetchable(view, active_loras))
        is_paused = s._pause_state is not PauseState.UNPAUSED
        waiting = [] if is_paused else list(islice(startable, QUEUE_HEAD))
        return Snapshot(
            now_s=now_s,
            mode=self._config.mode,
            streamed_decode=self._config.policy.streamed_decode,
            frees_are_deferred=s.defer_block_free,
            block_tokens=tokens,
            pool_blocks=self._geometry.pool_blocks - 1,
            free_blocks=free_blocks,
            growth_blocks=growth_blocks,
            reserved_blocks=s._inflight_prefill_reserved_blocks() if s._inflight_prefills else 0,
            zone_blocks=self._geometry.zone_blocks,
            free_zone_blocks=ledger.zone.num_available,
            host_blocks=ledger.host.count,
            free_host_blocks=ledger.host.num_free,
            free_slots=s.max_num_active_reqs - len(s.running) - len(s.kv_holding_waiting),
            budget_tokens=budget_tokens,
            decode_tokens=decode_tokens + len(s.finished_recving_kv_req_ids),
            prefilling_tokens=prefilling_tokens,
            decode_slack_s=first_late_s - now_s - s._timer.decode_step_s,
            # without chunked prefill a prompt needs the whole budget or does not start
            prefill_s_per_token=s._timer.prefill_s_per_token if s.scheduler_config.enable_chunked_prefill else 0.0,
            num_resident=num_resident,
            waiting=waiting,
            parked=list(islice(fetchable, QUEUE_HEAD)),
            resident=self._residents(layered_ids, now_s) if growth_blocks > free_blocks else (),
            layered=layered,
            hits=self._hits(waiting),
            overtaken=s._overtaken,
        )

    def _residents(self, layered_ids: frozenset[str], now_s: float) -> list[ResidentRequest]:
        s = self._scheduler
        residents: list[ResidentRequest] = []
        for request in s.running:
            tracked = s._tracked.get(request.request_id)
            if tracked is None or request.request_id in layered_ids:
                continue
            residents.append(
                ResidentRequest(
                    request_id=request.request_id,
                    deadline_s=tracked.next_token_deadline_s(request.num_output_tokens, now_s) + tracked.rank_shift_s,
                    num_blocks=len(self._manager.req_to_blocks[request.request_id]),
                    steps_resident=s.current_step - tracked.resident_since_step,
                    can_park=tracked.can_layer and request.num_computed_tokens > 0,
                    weight=tracked.slo.weight,
                )
            )
        return residents

    def _active_loras(self) -> set[int] | None:
        """Adapters in use when no further one may start; None when any may."""
        lora_config = self._scheduler.lora_config
        if lora_config is None:
            return None
        active = {r.lora_request.lora_int_id for r in self._scheduler.running if r.lora_request is not None}
        return active if len(active) >= lora_config.max_loras else None

    def _is_startable(self, view: WaitingRequest, active_loras: set[int] | None) -> bool:
        """vLLM would try to start it now: its grammar, if it has one, is compiled, and its adapter has a place."""
        request = self._scheduler.requests[view.request_id]
        if request.num_stale_output_tokens or _lacks_lora(request, active_loras):
            return False
        if request.status is not RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
            return True
        structured = request.structured_output_request
        return structured is not None and structured.grammar is not None

    def _is_fetchable(self, view: ParkedRequest, active_loras: set[int] | None) -> bool:
        """Its last token has been delivered; before that vLLM would not resume it."""
        request: Request = self._scheduler.requests[view.request_id]
        return request.num_stale_output_tokens == 0 and not _lacks_lora(request, active_loras)

    def _hits(self, waiting: list[WaitingRequest]) -> dict[str, PrefixHit]:
        s = self._scheduler
        if not s.kv_cache_manager.enable_caching or s.enable_kv_cache_events:
            return {}  # a look-up may publish events
        hits: dict[str, PrefixHit] = {}
        for view in waiting[:HIT_LOOKUPS]:
            blocks, num_tokens, _ = s.kv_cache_manager.get_computed_blocks(s.requests[view.request_id])
            if num_tokens:
                found = blocks.blocks[0]
                num_evictable = sum(block.ref_cnt == 0 for block in found)
                hits[view.request_id] = PrefixHit(len(found), num_evictable)
        return hits


def _lacks_lora(request: Request, active_loras: set[int] | None) -> bool:
    if active_loras is None or request.lora_request is None:
        return False
    return request.lora_request.lora_int_id not in active_loras


def _steps_ahead(scheduler: LayerKVSchedulerMixin) -> int:
    """Steps in flight when a step is scheduled; vLLM defers frees exactly when there are any."""
    return 1 if scheduler.defer_block_free else 0
