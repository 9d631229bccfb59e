"""Reads vLLM's scheduler for the controller: its state before a step, and a step's work. Changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from layerkv.core.cost import StepWork, chunk_pairs, generic_profile, load_profile
from layerkv.core.groups import growth_tokens
from layerkv.core.residency import Residency
from layerkv.core.transfer import StepPlan, num_blocks
from layerkv.metrics import COPY_WAIT
from layerkv.scheduler.controller import Controller
from layerkv.scheduler.engine import EngineShape, EngineState, Running
from layerkv.scheduler.snapshot import ParkedRequest, WaitingRequest
from layerkv.vllm_plugin.drafts import num_drafting_slots, tokens_per_decode
from layerkv.vllm_plugin.prefix_hits import PrefixHits
from layerkv.vllm_plugin.scheduler_view import SchedulerView

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput

    from layerkv.config import SloPolicy
    from layerkv.vllm_plugin.block_managers import BlockManagers
    from layerkv.vllm_plugin.connector_scheduler import SchedulerSide


class EngineReader:
    """Reads one scheduler. Cost per step: one pass over running requests, none over waiting ones."""

    def __init__(
        self, scheduler: SchedulerView, side: SchedulerSide, managers: BlockManagers, controller: Controller
    ) -> None:
        self._scheduler = scheduler
        self._side = side
        self._ledger = side.ledger
        self._geometry = side.geometry
        self._managers = managers
        self._only = managers.only if side.geometry.is_plain else None
        self._controller = controller
        self._zone_ids_per_block = sum(side.geometry.zone_shares)
        self._tells_waits = scheduler.vllm_config.device_config.device_type == "cpu"
        self.prefix_hits = PrefixHits(scheduler, side)
        self._active_loras: set[int] | None = None

    def has_nothing_to_decide(self, now_s: float) -> bool:
        """Nobody waits or is due for a turn, nobody is parked or layered, and the pool has room for whatever runs; or
        nothing has happened since a decision by which nobody came in or left. A fetch that ends is a move: until then
        it is nothing that happens."""
        s, controller, residency = self._scheduler, self._controller, self._ledger.residency
        if self._ledger.has_layered:
            return False
        if self._side.elastic is not None and self._side.elastic.is_under_way:
            return False
        for request in s._inflight_prefills:
            if residency.get(request.request_id) is not Residency.FETCHING:
                return False
        if s.kv_holding_waiting and self._held_tokens():
            return False  # a session's next turn, of which nothing has been computed
        free: int = s.kv_cache_manager.block_pool.get_num_free_blocks()
        if not s._inflight_prefills and controller.is_quiet(len(s.running), free, steps_ahead(s), now_s):
            return True
        if len(s.waiting) != len(controller.waiting) + controller.num_parked:
            return False  # vLLM must find those that the policy does not know
        return controller.stands(s.current_step, residency.version, len(s.running), free)

    def state(self) -> EngineState:
        """The engine before the step that is about to be scheduled."""
        s, ledger = self._scheduler, self._ledger
        self._active_loras = self._full_loras()
        freeing: Collection[int] = ()
        if s.deferred_frees:  # null blocks stand for those that came back before
            freeing = [block.block_id for _, blocks in s.deferred_frees for block in blocks if not block.is_null]
        freeing_zone = sum(map(self._geometry.is_zone_block, freeing))
        return EngineState(
            step=s.current_step,
            running=self._running(),
            arriving=self._arriving(),
            free_blocks=s.kv_cache_manager.block_pool.get_num_free_blocks(),
            reserved_blocks=s._inflight_prefill_reserved_blocks() if s._inflight_prefills else 0,
            free_zone_blocks=ledger.zone.num_available,
            free_host_blocks=ledger.host.num_free,
            free_slots=s.max_num_active_reqs
            + len(self._controller.paused)
            - len(s.running)
            - len(s.kv_holding_waiting),
            budget_tokens=s.max_num_scheduled_tokens - num_drafting_slots(s.vllm_config),
            resuming=len(s.finished_recving_kv_req_ids),
            steps_ahead=steps_ahead(s),
            is_paused=s.pause_state is not PauseState.UNPAUSED,
            held_tokens=self._held_tokens(),
            moves=ledger.residency.version,
            freeing_blocks=len(freeing) - freeing_zone,
            freeing_zone_blocks=freeing_zone // self._zone_ids_per_block,
            blocks_in_service=self._side.pool_blocks,
            host_blocks_in_service=ledger.host.num_in_service,
            vacating={} if self._side.elastic is None else self._side.elastic.vacating,
            owed_blocks=0 if self._side.elastic is None else self._side.elastic.owed_blocks,
        )

    def work(self, output: SchedulerOutput, plan: StepPlan | None) -> StepWork:
        """What the step just scheduled will do."""
        requests = self._scheduler.requests
        num_decodes = context = prefill = num_prefills = 0
        pairs = 0.0
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            request = requests[request_id]
            num_after: int = request.num_computed_tokens
            # after scheduling, vLLM counts the step's tokens as computed
            may_draft = num_tokens == 1 or self._scheduler.num_spec_tokens > 0
            if may_draft and num_after - num_tokens >= request.num_prompt_tokens:
                num_decodes += 1
                context += num_after
            else:
                prefill += num_tokens
                num_prefills += 1
                pairs += chunk_pairs(num_tokens, num_after - num_tokens)
        block_bytes = self._geometry.block_bytes
        stored = num_blocks(plan.stores) * block_bytes if plan else 0
        loaded = num_blocks(plan.loads) * self._geometry.streamed_block_bytes if plan else 0
        loaded += num_blocks(plan.zone_hits) * block_bytes if plan else 0
        is_layered = plan is not None and plan.is_layered
        parked = num_blocks(plan.parks) * block_bytes if plan else 0
        hits = num_blocks(plan.hits) * block_bytes if plan else 0
        return StepWork(num_decodes, context, prefill, pairs, num_prefills, stored, loaded, is_layered, parked, hits)

    def waited_s(self, received: KVConnectorOutput | None) -> float | None:
        """Seconds that the step waited for copies, as its workers saw it; None where devices do not tell."""
        if not self._tells_waits:
            return None
        stats = None if received is None else received.kv_connector_stats
        counters = {} if stats is None else stats.data.get("counters", {})
        waited_s: float = counters.get(COPY_WAIT, 0.0)
        return waited_s / self._scheduler.vllm_config.parallel_config.tensor_parallel_size

    def is_startable(self, view: WaitingRequest) -> bool:
        """vLLM would try to start it now: its grammar, if it has one, is compiled, and its adapter has a place."""
        request = self._scheduler.requests[view.request_id]
        if request.num_stale_output_tokens or self._lacks_lora(request):
            return False
        if request.status is not RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
            return True
        structured = request.structured_output_request
        return structured is not None and structured.grammar is not None

    def is_fetchable(self, view: ParkedRequest) -> bool:
        """Its last token has been delivered; before that vLLM would not resume it."""
        request: Request = self._scheduler.requests[view.request_id]
        return request.num_stale_output_tokens == 0 and not self._lacks_lora(request)

    def _running(self) -> Iterator[Running]:
        ledger, managers = self._ledger, self._managers
        only_blocks = None if self._only is None else self._only.req_to_blocks
        paused, layered_ids = self._controller.paused, ledger.layered_ids
        for request in self._scheduler.running:
            request_id = request.request_id
            num_held = managers.num_held(request_id) if only_blocks is None else len(only_blocks[request_id])
            is_layered = request_id in layered_ids
            yield Running(
                request_id,
                request.num_tokens + request.num_output_placeholders,
                request.num_computed_tokens,
                request.num_output_tokens,
                request.is_prefill_chunk,
                num_held,
                managers.num_held_of_zone(request_id) if is_layered else 0,
                is_layered,
                ledger.num_host_blocks_of(request_id),
                ledger.num_shared_host_blocks_of(request_id),
                request_id in paused,
                request.num_in_flight_tokens,
            )

    def _arriving(self) -> list[tuple[str, int, int]]:
        """Requests being fetched, and those whose fetch has just ended."""
        managers = self._managers
        return [
            (request.request_id, managers.num_held(request.request_id), request.num_output_tokens)
            for request in self._scheduler.kv_holding_waiting
            if managers.holds(request.request_id)
        ]

    def _held_tokens(self) -> int:
        s, residency = self._scheduler, self._ledger.residency
        return sum(
            request.num_tokens - request.num_computed_tokens
            for request in s.kv_holding_waiting
            if request.status is not RequestStatus.WAITING_FOR_STREAMING_REQ
            and residency.get(request.request_id) is not Residency.FETCHING
            and request.request_id not in s.finished_recving_kv_req_ids
        )

    def _full_loras(self) -> set[int] | None:
        """Adapters of which more requests may start when no further adapter may; None when any may.

        Who is being fetched has its adapter's place from then on. While those who run leave it none, it waits with its
        blocks in the pool, and nobody else comes in who would keep that place.
        """
        s = self._scheduler
        if s.lora_config is None:
            return None
        running, coming = adapters(s.running), adapters(filter(_wants_to_run, s.kv_holding_waiting))
        taken = running | coming
        if len(taken) > s.lora_config.max_loras:
            return running & coming
        return taken if len(taken) == s.lora_config.max_loras else None

    def _lacks_lora(self, request: Request) -> bool:
        if self._active_loras is None or request.lora_request is None:
            return False
        return request.lora_request.lora_int_id not in self._active_loras


def adapters(requests: Iterable[Request]) -> set[int]:
    """Those that these requests use."""
    return {request.lora_request.lora_int_id for request in requests if request.lora_request is not None}


def _wants_to_run(request: Request) -> bool:
    return request.status is not RequestStatus.WAITING_FOR_STREAMING_REQ


def num_computed_for_good(scheduler: SchedulerView, request: Request) -> int:
    """Tokens whose KV stays as it is, once the steps in flight have ended.

    vLLM counts the drafts of a step in flight as computed, and takes back those that turn out wrong. Between two steps
    none is in flight unless steps are scheduled ahead.
    """
    num_computed: int = request.num_computed_tokens
    if scheduler.num_spec_tokens and (num_coming := request.num_output_placeholders):
        return num_computed - num_coming + 1  # of what the first of those steps computes, one token is no draft
    return num_computed


def steps_ahead(scheduler: SchedulerView) -> int:
    """Steps in flight when a step is scheduled; vLLM defers frees exactly when there are any."""
    return 1 if scheduler.defer_block_free else 0


def controller_for(scheduler: SchedulerView, side: SchedulerSide, policy: SloPolicy) -> Controller:
    """A controller with empty books for this engine."""
    config, geometry = side.config, side.geometry
    block_bytes = geometry.block_bytes  # of one worker: tensor-parallel ranks copy side by side
    tokens = geometry.block_tokens if geometry.is_plain else growth_tokens(geometry.groups)
    shape = EngineShape(
        mode=config.mode,
        block_tokens=tokens,
        block_bytes=block_bytes,
        streamed_block_bytes=geometry.streamed_block_bytes,
        pool_blocks=(geometry.pool_blocks if side.sizes is None else side.sizes.floor_blocks) - 1,
        zone_blocks=geometry.zone_blocks,
        host_blocks=side.ledger.host.count if side.host_sizes is None else side.host_sizes.floor_blocks,
        can_chunk=scheduler.scheduler_config.enable_chunked_prefill,
        longest_tokens=scheduler.max_model_len,
        long_contexts=config.long_contexts,
        slots=scheduler.max_num_active_reqs,
        give=config.give,
        groups=() if geometry.is_plain else geometry.groups,
        zone_block_tokens=geometry.block_tokens,
        tokens_per_decode=tokens_per_decode(scheduler.vllm_config),
        lookahead_tokens=scheduler.num_lookahead_tokens,
    )
    profile = (
        generic_profile(block_bytes // tokens) if config.cost_profile is None else load_profile(config.cost_profile)
    )
    return Controller(
        policy,
        shape,
        profile,
        is_measured=config.cost_profile is not None,
        keep_log=config.decision_log is not None,
        refuses_late=False,  # the gate does, with HTTP 429; who has passed it is served
    )
