"""The connector beside the scheduler: vLLM's events become the ledger's, the ledger's plan becomes metadata."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

from layerkv.config import EngineConfig
from layerkv.core.groups import Tables
from layerkv.core.ledger import KVLedger, LedgerCounters
from layerkv.core.residency import Residency
from layerkv.core.segments import SegmentMoves
from layerkv.core.transfer import StepPlan
from layerkv.metrics import DECIDE_TIME, MetricSamples, Payload
from layerkv.runtime import checks_books
from layerkv.scheduler.desk import Desk
from layerkv.scheduler.reasons import End
from layerkv.scheduler.streams import Streams
from layerkv.vllm_plugin.block_managers import BlockManagers
from layerkv.vllm_plugin.kv_events import HostPrefixEvents
from layerkv.vllm_plugin.setup import Setup

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from layerkv.vllm_plugin.elasticity import Elasticity

_SEGMENTED = "layerkv_kv_bytes", "layerkv_host_bytes"
"""The gauges of the pool's segments and of host memory's, in bytes."""

_COUNTED = {
    "parks": "layerkv_parks",
    "fetches": "layerkv_fetches",
    "layered_admissions": "layerkv_layered_prefills",
    "recomputes": "layerkv_recomputes",
    "stored_ahead_blocks": "layerkv_stored_ahead_blocks",
    "prefix_stored_blocks": "layerkv_prefix_stored_blocks",
    "prefix_hit_blocks": "layerkv_prefix_hit_blocks",
}

_LEAVES_KV = (Residency.RESIDENT, Residency.PARKED, Residency.FETCHING)
"""What a request of these leaves behind is kept as a cached prefix."""

_NO_MOVES = (SegmentMoves(), SegmentMoves())


class SchedulerSide:
    """Owns the ledger. The scheduler reads and changes it directly; vLLM's own events come through here."""

    def __init__(self, config: EngineConfig, setup: Setup, *, caches_prefixes: bool = False) -> None:
        self.config = config
        self.geometry = setup.geometry
        self.sizes = setup.elastic
        self.host_sizes = setup.host
        self.elastic: Elasticity | None = None
        """What makes the pool grow and shrink; None where it does neither."""
        self._caches_prefixes = caches_prefixes
        self._num_local_blocks = 0  # of the request that vLLM looked up last
        host_layout = None if setup.host is None else setup.host.layout
        self.ledger = KVLedger(setup.geometry, setup.host_blocks, host_layout)
        self.metrics = MetricSamples()
        self.last_plan: StepPlan | None = None
        self.lookahead_tokens = 0
        """Slots that vLLM gives a request beyond its tokens, for drafts to come."""
        self.events: HostPrefixEvents | None = None
        """Of the host prefix cache, where vLLM publishes KV events."""
        self._requests: Mapping[str, Request] = {}
        self._desk: Desk
        self.managers: BlockManagers
        self._streams = Streams()
        self._end_of: Callable[[Request], End]
        self._leaves: Callable[[Request], None]
        self._checks_books = checks_books()
        self._reported = LedgerCounters()
        self._reported_version: tuple[object, ...] | None = None
        self._reported_gauges: dict[tuple[str, str | None], float] = {}

    def attach(self, kv_cache_manager: KVCacheManager) -> None:
        """Take the zone's blocks out of vLLM's pool, and keep events if vLLM does.

        Raises:
            IncompatibleVLLMError: vLLM did not build our managers for our specs.
        """
        managers = kv_cache_manager.coordinator.single_type_managers
        self.managers = BlockManagers(managers, self.ledger, None if self.sizes is None else self.sizes.plan)
        if self._caches_prefixes and kv_cache_manager.enable_kv_cache_events:
            kind, window = kv_cache_manager.kv_cache_event_metadata[0]
            self.events = HostPrefixEvents(self.ledger.host, self.geometry.block_tokens, kind, window)

    def follow(
        self,
        requests: Mapping[str, Request],
        desk: Desk,
        streams: Streams,
        end_of: Callable[[Request], End],
        leaves: Callable[[Request], None],
    ) -> None:
        """Before the first request: the scheduler's table of requests, its desk, what its readers got, how it sees that
        a request ended, and what it does before one leaves."""
        self._requests, self._desk, self._streams = requests, desk, streams
        self._end_of, self._leaves = end_of, leaves

    def tokens_to_fetch(self, request_id: str, num_local_tokens: int) -> tuple[int, bool]:
        """Tokens in host memory beyond those in the device's prefix cache, and that they arrive asynchronously."""
        if self.ledger.residency.get(request_id) in (Residency.RESIDENT, Residency.LAYERED):
            self.ledger.drop(request_id)  # vLLM starts it from nothing: a failed load, or a preemption of vLLM's own
        if self.ledger.residency.get(request_id) is Residency.PARKED:
            beyond = self.ledger.parked_tokens(request_id) - num_local_tokens
            return (beyond, True) if beyond > 0 else (0, False)
        self._num_local_blocks = num_local_tokens // self.geometry.block_tokens
        if self.ledger.is_layered(request_id):
            hashes = self.hashes_to_find(self._requests[request_id])
            found = self.ledger.settle_prefix(request_id, hashes, self._num_local_blocks)
        else:
            found = self.num_prefix_blocks(request_id, self._num_local_blocks)
        return found * self.geometry.block_tokens, False

    def allocated(self, request_id: str, tables: Tables, num_external_tokens: int) -> None:
        """vLLM gave the request blocks: to load into, or to compute in."""
        is_parked = self.ledger.residency.get(request_id) is Residency.PARKED
        if num_external_tokens > 0 and not is_parked:
            first = self._num_local_blocks
            blocks = range(first, first + num_external_tokens // self.geometry.block_tokens)
            self.ledger.load_prefix(request_id, tables, self._hashes(self._requests[request_id]), blocks)
            self._reserve_all_of(request_id, tables)
        elif num_external_tokens > 0:
            num_local_tokens = self.ledger.parked_tokens(request_id) - num_external_tokens
            self._desk.fetch(request_id, tables, num_local_tokens)
        elif is_parked and self.ledger.is_layered(request_id):
            self._desk.back_in_zone(request_id)
        elif is_parked:
            self._desk.resume_without_fetch(request_id)
        else:
            self.ledger.started(request_id)
            self._reserve_all_of(request_id, tables)

    def _reserve_all_of(self, request_id: str, tables: Tables) -> None:
        """Hits on the device that a layered request was admitted with may be gone: their blocks come from the zone."""
        if self.geometry.is_plain and self.ledger.is_layered(request_id):  # else all of it is reserved
            num_tokens = self._requests[request_id].num_tokens + self.lookahead_tokens
            num_blocks = -(-num_tokens // self.geometry.block_tokens)
            self.ledger.zone.raise_reservation(request_id, num_blocks - len(tables[0]))

    def hashes_to_find(self, request: Request) -> Sequence[Hashable]:
        """Hashes of a waiting request's blocks up to the one of its last token; none if it is not to be looked up."""
        if request.skip_reading_prefix_cache:  # vLLM would ignore what was found
            return ()
        return self._hashes(request)[: (request.num_tokens - 1) // self.geometry.block_tokens]

    def num_prefix_blocks(self, request_id: str, num_local_blocks: int, *, most: int | None = None) -> int:
        """Blocks that a waiting request would load from host memory, after those that the device has.

        With ``most``, no further ones are looked for.
        """
        request = self._requests[request_id]
        if request.skip_reading_prefix_cache:  # vLLM would ignore them
            return 0
        last = (request.num_tokens - 1) // self.geometry.block_tokens  # of one token at least, KV is computed
        if most is not None:
            last = min(last, num_local_blocks + most)
        return self.ledger.num_prefix_blocks(request_id, self._hashes(request), range(num_local_blocks, last))

    def num_held_prefix_blocks(self, request: Request, blocks: range) -> int:
        """Of those that a waiting request would load, how many others share, so that they are no free host blocks."""
        return self.ledger.num_held_prefix_blocks(self._hashes(request), blocks) if blocks else 0

    def fetched(self, request_id: str) -> None:
        """All workers have reported a fetch complete."""
        self.ledger.complete_fetch(request_id, self._hashes_to_keep(self._requests.get(request_id)))

    def finished(self, request: Request, tables: Tables) -> None:
        """The request leaves; vLLM frees its blocks next. It calls this for every way out."""
        self._leaves(request)
        # Of a step still under way, only the token that it computes last is not there yet.
        num_computed = min(request.num_computed_tokens, request.num_tokens - 1)
        self._desk.leave(
            request.request_id,
            num_output=request.num_output_tokens,
            end=self._end_of(request),
            now_s=time.monotonic(),
            hashes=self._hashes_to_keep(request),
            tables=tables,
            num_computed=num_computed,
        )

    def _hashes(self, request: Request | None) -> Sequence[Hashable]:
        return request.block_hashes if self._caches_prefixes and request is not None else ()

    def _hashes_to_keep(self, request: Request | None) -> Sequence[Hashable]:
        """Hashes for what may become a cached prefix now."""
        if self.events is None or request is None:
            return self._hashes(request)
        keeps_kv = self.ledger.residency.get(request.request_id) in _LEAVES_KV
        return self.events.describe(request) if keeps_kv else ()

    def plan(self, output: SchedulerOutput) -> StepPlan | None:
        """This step's copies; None if there are none."""
        self.last_plan = None
        moves, host_moves = _NO_MOVES if self.elastic is None else self.elastic.take_moves()
        if self.ledger.is_idle:
            self.ledger.pass_idle_step()
            if self._checks_books:
                self._check_books()
            # While something moves, too: without a plan, workers take the step for one to wait in.
            if self.elastic is not None and (self.elastic.is_moving or moves or host_moves):
                num_tokens = output.total_num_scheduled_tokens
                self.last_plan = StepPlan(num_tokens=num_tokens, moves=moves, host_moves=host_moves)
            return self.last_plan
        state = output.kv_connector_block_state
        assert state is not None
        for request_id in self.ledger.layered_ids & output.num_scheduled_tokens.keys():
            request = self._requests[request_id]
            self.ledger.step_layered(
                request_id,
                state.resolve_block_ids(request_id),
                num_computed=request.num_computed_tokens,
                num_scheduled=output.num_scheduled_tokens[request_id],
                num_unsure=max(request.num_output_placeholders - 1, 0),
            )
        self.last_plan = self.ledger.take_plan(output.total_num_scheduled_tokens)
        if moves or host_moves:
            self.last_plan = self.last_plan._replace(moves=moves, host_moves=host_moves)
        return self.last_plan

    def _check_books(self) -> None:
        """Assert that every block is accounted for once, and that nobody who has left still holds any."""
        self.ledger.check()
        if self.elastic is not None:
            self.elastic.check()
        gone = [request_id for request_id in self.ledger.residency if request_id not in self._requests]
        assert not gone, f"requests that vLLM no longer has are in the books: {', '.join(gone)}"

    @property
    def pool_blocks(self) -> int:
        """Pool blocks that are there now, in use or free, vLLM's null block left out."""
        return self.geometry.pool_blocks - 1 if self.elastic is None else self.elastic.pool_blocks

    def take_metrics(self) -> Payload | None:
        """What changed since the last call; None if nothing did but that steps were decided, which is told later."""
        self._streams.report(self.metrics)
        ledger, counters = self.ledger, self.ledger.counters
        version = (
            ledger.residency.version,
            ledger.zone.num_taken,
            ledger.host.num_held,
            ledger.host.num_cached,
            ledger.host.num_in_service,
            self.pool_blocks,
            self._amounts(),
        )
        if version == self._reported_version and not self.metrics.has_more_than(DECIDE_TIME):
            return None
        self._reported_version = version
        for field, name in _COUNTED.items():
            value = getattr(counters, field)
            if (new := value - getattr(self._reported, field)) != 0:
                self.metrics.add(name, new)
                setattr(self._reported, field, value)
        for key, gauge in self._gauges().items():
            if self._reported_gauges.get(key) != gauge:
                self._reported_gauges[key] = gauge
                self.metrics.set(key[0], gauge, key[1])
        return self.metrics.take() if self.metrics else None

    def _gauges(self) -> dict[tuple[str, str | None], float]:
        ledger = self.ledger
        gauges: dict[tuple[str, str | None], float] = {
            ("layerkv_requests", residency.value): count for residency, count in ledger.residency.counts.items()
        }
        gauges["layerkv_host_blocks_used", None] = ledger.num_host_blocks_used
        gauges["layerkv_host_blocks_cached", None] = ledger.host.num_cached
        gauges["layerkv_host_blocks", None] = ledger.host.num_in_service
        gauges["layerkv_pool_blocks", None] = self.pool_blocks
        gauges["layerkv_zone_blocks_used", None] = ledger.zone.num_taken
        gauges["layerkv_zone_blocks", None] = self.geometry.zone_blocks
        for name, sizes, amounts in zip(_SEGMENTED, (self.sizes, self.host_sizes), self._amounts(), strict=False):
            assert sizes is not None  # known before a scheduler decides its first step
            gauges.update(((name, amount), num * sizes.segment_bytes) for amount, num in amounts.items())
        return gauges

    def _amounts(self) -> tuple[Mapping[str, int], ...]:
        """Segments of the pool, and of host memory, by what they are said to be; of those that grow and shrink."""
        if self.elastic is None:
            return ()
        host = self.elastic.host
        return (self.elastic.amounts,) if host is None else (self.elastic.amounts, host.amounts)
