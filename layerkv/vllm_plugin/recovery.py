"""KV that is not to be trusted: loads that failed, and resets. Who has it, wherever it is by now, starts over.

Beside the scheduler; changes vLLM's queues and the ledger between steps only.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.request import Request, RequestStatus

from layerkv.core.groups import NULL_BLOCK
from layerkv.core.residency import Residency
from layerkv.core.suspects import StepsInFlight, Table, follow
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.tracker import MOST_FAILURES
from layerkv.vllm_plugin.failed_copies import FailedCopies
from layerkv.vllm_plugin.scheduler_view import SchedulerView
from layerkv.vllm_plugin.segment_answers import failed_copies_in

if TYPE_CHECKING:
    from vllm.v1.outputs import KVConnectorOutput

    from layerkv.scheduler.controller import Controller
    from layerkv.scheduler.desk import Desk
    from layerkv.vllm_plugin.arrivals import Arrivals
    from layerkv.vllm_plugin.connector_scheduler import SchedulerSide

logger = init_logger(f"vllm.{__name__}")


class Recovery:
    """See the module. One per scheduler. Costs nothing to speak of while no cached prefix is being loaded."""

    def __init__(
        self, scheduler: SchedulerView, side: SchedulerSide, controller: Controller, desk: Desk, arrivals: Arrivals
    ) -> None:
        self._scheduler = scheduler
        self._side = side
        self._ledger = side.ledger
        self._controller = controller
        self._desk = desk
        self._arrivals = arrivals
        self._in_flight = StepsInFlight()

    # What is in flight ---------------------------------------------------------------------------------------

    def scheduled(self) -> None:
        """A step has been scheduled; each will be processed, in order."""
        plan = self._side.last_plan
        self._in_flight.scheduled(loads_prefixes=plan is not None and bool(plan.hits))

    def leaves(self, request: Request) -> None:
        """A request is about to give up its blocks, for whatever reason."""
        if not request.num_in_flight_tokens:
            return
        if self._ledger.is_layered(request.request_id):  # a layer's load may fail in the step under way
            self._in_flight.left_zone(request.request_id, self._ledger.host_blocks_of(request.request_id))
        if self._in_flight.are_loading:
            table = self._table(request)
            self._in_flight.left(table.request_id, table.block_ids)

    def processed(self) -> None:
        """vLLM has processed the oldest step's output."""
        self._in_flight.processed()
        s = self._scheduler
        if s.failed_recving_kv_req_ids and (failed := s.failed_recving_kv_req_ids & s.finished_recving_kv_req_ids):
            with self._arrivals.giving_up_for(Reason.LOAD_FAILED):
                for request_id in failed:
                    self._start_over(s.requests[request_id])  # vLLM would try at once, before everybody who waits

    # Copies that failed --------------------------------------------------------------------------------------

    def copies_failed(self, received: KVConnectorOutput) -> None:
        """Before vLLM processes a step's output: those whose KV copies of it, or of earlier ones, lost start over."""
        s = self._scheduler
        failed = failed_copies_in(received.kv_connector_worker_meta)
        if not received.invalid_block_ids and failed is None:
            return
        with self._arrivals.giving_up_for(Reason.LOAD_FAILED):
            if invalid := received.invalid_block_ids:
                tables = [self._table(request) for request in (*s.running, *s.kv_holding_waiting)]
                # Ranks may tell of one failed fetch in different steps: it counts once.
                told = s.failed_recving_kv_req_ids
                readers = [
                    t.request_id for t in tables if t.request_id not in told and not invalid.isdisjoint(t.block_ids)
                ]
                self._distrust(invalid)
                if not self._side.geometry.is_plain:
                    self._fail_fetches(received)
                self._end_hopeless(readers)
            if failed is not None:
                self._end_hopeless(self._start_holders_over(failed))

    def _fail_fetches(self, received: KVConnectorOutput) -> None:
        """Fetches that failed, in the place of vLLM, which cannot tell the blocks of several groups apart.

        Nothing of them is kept: the tokens before a block that was not loaded may be another group's loss.
        """
        s, invalid = self._scheduler, received.invalid_block_ids
        for request in s.kv_holding_waiting:
            is_loading = request.status is RequestStatus.WAITING_FOR_REMOTE_KVS
            if is_loading and not invalid.isdisjoint(self._table(request).block_ids):
                request.num_computed_tokens = 0
                s.failed_recving_kv_req_ids.add(request.request_id)
        received.invalid_block_ids = set()

    def _start_holders_over(self, failed: FailedCopies) -> list[str]:
        """Start requests over whose copies in host memory are not what they should be; which lost KV by it."""
        s, ledger, now_s = self._scheduler, self._ledger, time.monotonic()
        ledger.forget_prefixes()
        left_zone = self._in_flight.that_left_zone(failed.unloaded)
        computed_wrong = {*ledger.holders(failed.unloaded), *left_zone}
        for request_id in left_zone:  # by the step scheduled ahead of this output, which may have taken its copy too
            if (left := s.requests.get(request_id)) is not None and left.num_stale_output_tokens:
                left.drop_stale_output = True
        lost: list[str] = []
        for request_id in ledger.holders(failed.unstored | failed.unloaded):
            request: Request = s.requests[request_id]
            match ledger.residency[request_id]:
                case Residency.RESIDENT:
                    self._desk.drop_ahead(request_id)
                case Residency.LAYERED:
                    self._take_off(request, now_s)
                    lost.append(request_id)
                case Residency.PARKED:
                    if request_id in computed_wrong:
                        request.drop_stale_output = True
                    self._arrivals.recomputes(request)
                    lost.append(request_id)
                case _:  # its fetch comes after the store and fails with it, or has the KV from the device's own cache
                    pass
        return lost

    def _end_hopeless(self, request_ids: Iterable[str]) -> None:
        """End those that lose their KV again and again and get no further."""
        s = self._scheduler
        for request_id in request_ids:
            request = s.requests.get(request_id)
            if request is not None and self._controller.copy_failed(request_id, request.num_output_tokens):
                self._arrivals.refuse(
                    request_id,
                    f"its KV was lost to a failed copy between device and host memory {MOST_FAILURES} times before it "
                    "made another token; the worker's log says why the copies failed",
                    Reason.COPIES_FAIL,
                )

    def _distrust(self, invalid_block_ids: set[int]) -> None:
        """Start everybody over who holds or held blocks that could not be loaded, or what was computed from them.

        Before vLLM processes the step's output: nothing of it is delivered that was computed from them. vLLM's own
        way out fits a step that nothing overlaps: of the next step, scheduled before it knew, it would deliver tokens,
        and it knows nothing of requests that are parked or gone.
        """
        s, now_s = self._scheduler, time.monotonic()
        self._ledger.forget_prefixes()  # something in host memory cannot be read: trust no prefix there
        tables = [self._table(request) for request in (*s.running, *s.kv_holding_waiting)]
        wrong, affected = follow(invalid_block_ids, [*tables, *self._in_flight.tables_left()])
        for request in [s.requests[request_id] for request_id in affected if request_id in s.requests]:
            if request.status is RequestStatus.RUNNING:
                self._take_off(request, now_s)
            elif not request.is_finished():
                self._give_up(request)
        s.kv_cache_manager.evict_blocks(wrong)
        if affected:
            logger.warning(
                "%d request(s) start over: KV was not loaded that they, or others before them, had read", len(affected)
            )

    def _take_off(self, request: Request, now_s: float) -> None:
        """Preempt a running request between two steps; nothing of it that is under way is delivered."""
        s = self._scheduler
        s.running.remove(request)
        s._preempt_request(request, now_s, drop_stale_output=True)
        # As in vLLM's reset: it may resume in the very next step, and the worker must get its tokens then.
        s.prev_step_scheduled_req_ids.discard(request.request_id)

    def _give_up(self, request: Request) -> None:
        """Distrust the KV of a request that does not run, and what it computed last."""
        request.drop_stale_output = request.num_stale_output_tokens > 0
        s, request_id = self._scheduler, request.request_id
        if self._ledger.residency[request_id] is Residency.PARKED:
            self._arrivals.recomputes(request)
        elif request.status is RequestStatus.WAITING_FOR_REMOTE_KVS:
            s.failed_recving_kv_req_ids.add(request_id)  # `processed` sees it arrive

    def _table(self, request: Request) -> Table:
        """Its blocks, of all groups: those given back are none."""
        first, *others = self._scheduler.kv_cache_manager.get_block_ids(request.request_id)
        if self._side.geometry.is_plain:
            return Table(request.request_id, first)
        held = [block for table in (first, *others) for block in table if block != NULL_BLOCK]
        return Table(request.request_id, held)

    # Resets --------------------------------------------------------------------------------------------------

    def prepare_reset(self, *, reset_running_requests: bool) -> bool:
        """Before vLLM resets its prefix cache; whether it may.

        When running requests start over, so do parked ones, and no prefix is kept: all KV may be of old weights.

        Raises:
            RuntimeError: something is under way that cannot be given up; nothing was changed.
        """
        s, ledger = self._scheduler, self._ledger
        if reset_running_requests:
            arrived = [request for request in s.kv_holding_waiting if self._has_arrived(request)]
            if (num_fetching := ledger.num_fetching) > 0:
                raise RuntimeError(
                    f"cannot reset the prefix cache while {num_fetching} request(s) are being fetched from host "
                    "memory; nothing was changed, try again after the next step"
                )
            if s.defer_block_free and s.sched_step_seq > s.processed_step_seq:
                raise RuntimeError(  # vLLM would raise after everybody's KV is gone: it frees blocks after the step
                    "cannot reset the prefix cache while a step is under way; nothing was changed, pause first"
                )
            if any(r.status is RequestStatus.WAITING_FOR_STREAMING_REQ for r in s.kv_holding_waiting):
                raise RuntimeError(
                    "cannot reset the prefix cache while a session waits for its next input: it keeps its KV; nothing "
                    "was changed, end the session first"
                )
            for request in arrived:
                self._start_over(request)
            for request_id in [r for r in ledger.residency if ledger.residency[r] is Residency.PARKED]:
                self._arrivals.recomputes(s.requests[request_id])
            ledger.forget_prefixes()
        elif num_moved := self._num_with_kv_on_host():
            # vLLM refuses while blocks are in use; KV in host memory is in use just as well
            logger.warning("the prefix cache is not reset: %d request(s) have KV in host memory", num_moved)
            return False
        return True

    def tell_what_is_kept(self) -> None:
        """After a reset of the device's prefix cache, whose event makes routers forget the whole engine."""
        self._ledger.host.tell_again()
        if (num_kept := self._ledger.host.num_cached) > 0:
            logger.info(
                "the prefix cache is reset; host memory keeps %d cached blocks, which reset_connector=True "
                "(reset_external=true over HTTP) forgets as well, as after a change of weights",
                num_kept,
            )

    def _has_arrived(self, request: Request) -> bool:
        """Whether its fetch is over, and it has not gone on yet."""
        is_fetched = request.request_id in self._scheduler.finished_recving_kv_req_ids
        return is_fetched or request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)

    def _start_over(self, request: Request) -> None:
        """Give up the KV of a request that has just been fetched."""
        s = self._scheduler
        s._handle_blocked_waiting_request(request)
        s.kv_holding_waiting.remove_requests((request,))
        s.deferred_waiting.discard(request)
        s._inflight_prefills.discard(request)  # what it reserves would stand in its own way
        s.kv_cache_manager.free(request)
        request.num_computed_tokens = 0
        s.waiting.add_request(request)
        self._arrivals.recomputes(request)

    def _num_with_kv_on_host(self) -> int:
        counts = self._ledger.residency.counts
        return counts[Residency.LAYERED] + counts[Residency.PARKED] + self._ledger.num_fetching
