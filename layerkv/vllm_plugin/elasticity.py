"""The pool grows and shrinks: what :mod:`layerkv.scheduler.elastic` chooses before each step is carried out here.

Four books agree at every step: which segments have memory (:class:`~layerkv.core.segments.SegmentTable`), which blocks
are in service (:class:`~.segment_queue.SegmentQueue`), what the workers are told to do (the step's plan), and what is
held (:mod:`.memory_share`). Memory is held before workers are told to map it, and until all of them have unmapped it.
Where it comes by the first touch, a step may use it that is scheduled then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState

from layerkv.core.segments import SegmentMoves, SegmentState, SegmentTable
from layerkv.core.sharing import TokenRate
from layerkv.scheduler.elastic import GROWTH_TOKENS, LOOK_EVERY_S, PoolView, Resize, resize
from layerkv.vllm_plugin.host_elasticity import HostElasticity
from layerkv.vllm_plugin.memory_share import Share
from layerkv.vllm_plugin.scheduler_view import SchedulerView
from layerkv.vllm_plugin.segment_answers import SegmentAnswer
from layerkv.vllm_plugin.segment_queue import SegmentQueue

if TYPE_CHECKING:
    from layerkv.scheduler.controller import Controller
    from layerkv.vllm_plugin.block_managers import BlockManagers
    from layerkv.vllm_plugin.connector_scheduler import SchedulerSide

logger = init_logger(f"vllm.{__name__}")

IDLE_WAIT_SHARE = 0.05
"""Of the time since the last request, how long a step waits that has nothing to do while the engine waits to be idle: a
request that comes waits as long at most. Not measured: chosen by judgement. (Such a step takes 0.8 ms on an AMD EPYC of
family 25, 2026-11-30: of 5 ms each, a sixth of a core went into them, which other engines lack.)"""

LONGEST_IDLE_WAIT_S = 0.025
"""And no longer than this. Not measured: chosen by judgement."""

RETRY_S = 1.0
"""Seconds without growth after memory that may be held was not there. Not measured: chosen by judgement."""


class Elasticity:
    """See the module. One per scheduler whose pool has segments."""

    def __init__(
        self,
        scheduler: SchedulerView,
        side: SchedulerSide,
        managers: BlockManagers,
        controller: Controller,
        share: Share,
        *,
        num_ranks: int,
        idle_after_s: float,
        waits: bool = False,
        host: HostElasticity | None = None,
    ) -> None:
        assert side.sizes is not None
        assert managers.segments is not None
        plan = side.sizes.plan
        self._scheduler = scheduler
        self._ledger = side.ledger
        self._metrics = side.metrics
        self._managers = managers
        self._controller = controller
        self._share = share
        self.host = host
        """What makes host memory grow and shrink; None where it does neither."""
        self._queue: SegmentQueue = managers.segments
        self._layout = plan.layout
        self._by_touch = plan.by_touch
        self._ahead = -(-scheduler.max_model_len // (controller.shape.block_tokens * self._layout.segment_blocks))
        self._table = SegmentTable(self._layout.num_segments, num_ranks=num_ranks, num_mapped=plan.num_mapped)
        self.choose: Callable[[PoolView], Resize] = resize
        """What comes and goes before a step; measurements put something else in its place."""
        self._idle_after_s = idle_after_s
        self._waits = waits  # who is in the way goes on there: nothing to decide about it
        self._limit = -1
        self._busy_s = self._looked_s = self._asked_s = time.monotonic()
        # The version of residencies then, how many ran (who was fetched may be in the way), and who came last.
        self._looked_at: tuple[int, int, str | None] = -1, 0, None
        self._asked: tuple[int, int, int] | None = None
        self._is_told_idle = False
        self._is_told_resting = False
        # Idle engines that step together do not wait: others would wait for them.
        self._may_wait = scheduler.vllm_config.parallel_config.data_parallel_size == 1
        self._grows_from_s = -math.inf
        self._num_tokens = 0
        self._rate = TokenRate()
        self.vacating: Mapping[str, int] = {}
        """Running requests with blocks in segments that leave, and how many."""
        self.owed_blocks = 0
        """Free blocks that are given back as soon as prompts under way have ended."""

    @property
    def pool_blocks(self) -> int:
        """Pool blocks in service, those in use in segments that leave included, the null block left out."""
        num_blocks: int = self._scheduler.kv_cache_manager.block_pool.num_gpu_blocks
        return num_blocks - 1

    @property
    def num_held(self) -> int:
        """Segments whose memory nobody else can have."""
        return self._table.num_held

    @property
    def amounts(self) -> Mapping[str, int]:
        """Segments by what they are said to be: held, needed, and the limit of what may be held."""
        need = 0 if self._asked is None else self._asked[0]
        return {"held": self._table.num_held, "need": need, "limit": max(self._limit, 0)}

    @property
    def is_moving(self) -> bool:
        """Whether workers map or unmap segments, or will with the next plan."""
        return self._table.is_moving or (self.host is not None and self.host.is_moving)

    @property
    def is_under_way(self) -> bool:
        """Whether segments come or go, or somebody is in the way: nothing that was decided stands."""
        return self._table.is_moving or (bool(self.vacating) and not self._waits)

    # Each step -----------------------------------------------------------------------------------------------

    def before_step(self, now_s: float) -> None:
        """Before anything is decided: what the pool is in this step. Nothing waits for the broker."""
        has_requests = self._scheduler.get_num_unfinished_requests() > 0  # but for sessions between two turns
        is_busy = has_requests or self._is_paused()  # a paused engine is not idle
        self._rate.note(self._num_tokens, now_s, is_busy=has_requests)
        self._num_tokens = 0
        if is_busy:
            self._busy_s = now_s
        is_resting = self._is_paused() and not has_requests
        if self.host is not None:  # first: who is to be parked needs room there
            is_idle = now_s - self._busy_s >= self._idle_after_s
            self.host.before_step(now_s, is_idle=is_idle, is_resting=is_resting)
        s, limit = self._scheduler, self._share.limit()
        moves = self._ledger.residency.version, len(s.running), next(reversed(s.requests), None)
        # Who has just come may need more than may be held: the broker hears of it now, not at the next look.
        is_fresh = (limit, moves[-1]) == (self._limit, self._looked_at[-1]) and now_s - self._looked_s < LOOK_EVERY_S
        self._is_told_resting = self._is_told_resting and is_resting
        is_fresh &= self._is_told_resting or not is_resting
        if is_fresh and not (self._table.is_moving or self._can_release()):
            is_settled = not (self._table.is_leaving or self._lacks_blocks(limit))
            if is_busy and (moves == self._looked_at or is_settled):
                return
            if not is_busy and (idle_s := now_s - self._busy_s) < self._idle_after_s:
                time.sleep(min(idle_s * IDLE_WAIT_SHARE, LONGEST_IDLE_WAIT_S) if self._may_wait else 0.0)
                return
        self._looked_s, self._looked_at, self._limit = now_s, moves, limit
        view = self._view(limit, now_s)
        decided = self.choose(view)
        if is_resting:
            decided = decided.at_rest(view.num_held)
        self._carry_out(decided, now_s, is_last_word=view.is_idle or is_resting)
        self._is_told_resting = is_resting and not self._table.is_moving

    def note_tokens(self, num_tokens: int) -> None:
        """A step has been scheduled that computes so many."""
        self._num_tokens += num_tokens

    def take_moves(self) -> tuple[SegmentMoves, SegmentMoves]:
        """What the workers do with the step that is planned now, to the pool and to host memory."""
        return self._table.take_moves(), SegmentMoves() if self.host is None else self.host.take_moves()

    def answered(self, answers: Iterable[SegmentAnswer], host_answers: Iterable[SegmentAnswer] = ()) -> None:
        """Ranks have mapped or unmapped segments; what all of them have is in service, or not held any more."""
        if self.host is not None:
            self.host.answered(host_answers)
        for segment, rank, has_failed in answers:
            before = self._table.state(segment)
            state = self._table.answer(segment, rank, has_failed=has_failed)
            if (before, state) == (SegmentState.ARRIVING, SegmentState.RELEASING):  # all have answered, and one in vain
                if time.monotonic() >= self._grows_from_s:
                    logger.warning("memory for a segment of the KV pool was not there; trying again in a while")
                self._grows_from_s = time.monotonic() + RETRY_S
                self._share.could_not_get(1)
            if state is SegmentState.MAPPED:
                self._queue.restore(segment)
            elif state is SegmentState.UNMAPPED:
                may_hold = self._share.try_hold(self._table.num_held)
                assert may_hold, "less may always be held"

    def has_work(self) -> bool:
        """Whether the engine must go on stepping without requests: until it holds no more than one segment, and those
        that sessions between two turns have blocks in, and has said so. A paused one gives back what it holds above its
        limit and nobody uses, and says that it keeps the rest: it cannot be woken, and whoever waits for it to be still
        would wait for ever for blocks that nobody gives up."""
        if self.is_moving or self._can_release() or (self.host is not None and self.host.can_release):
            return True
        if self._is_paused():
            return not self._is_told_resting
        if self.host is not None and self.host.has_work:
            return True
        return len(self._table.all_in(SegmentState.MAPPED)) > 1 or not self._is_told_idle

    def all_ended(self) -> None:
        """All requests were ended at once, as the engine's end begins: it gives back at once what it can do without."""
        self._busy_s = -math.inf

    def close(self) -> None:
        """The engine ends."""
        self._share.close()

    def check(self) -> None:
        """Assert that the books agree (tests call it after every step)."""
        self._table.check()
        self._queue.check()
        if self.host is not None:
            self.host.check()
        out_of_service = {
            segment
            for segment in range(self._layout.num_segments)
            if self._table.state(segment) is not SegmentState.MAPPED
        }
        assert out_of_service == self._queue.blocks._withheld.keys()
        for state in (SegmentState.UNMAPPED, SegmentState.ARRIVING, SegmentState.RELEASING):
            assert all(self._queue.is_empty(segment) for segment in self._table.all_in(state))

    # What is there -------------------------------------------------------------------------------------------

    def _is_paused(self) -> bool:
        return self._scheduler.pause_state is not PauseState.UNPAUSED

    def _can_release(self) -> bool:
        """Whether a segment that leaves has become empty."""
        return any(map(self._queue.is_empty, self._table.all_in(SegmentState.LEAVING)))

    def _lacks_blocks(self, limit: int) -> bool:
        """Whether more blocks would be of use, and may be had."""
        s, controller = self._scheduler, self._controller
        waits = controller.waiting or controller.num_parked or s._inflight_prefills
        if not waits and self._queue.num_free_blocks >= 2 * len(s.running):
            return False
        need = limit if self._asked is None else self._asked[0]  # as of the last look, which who comes brings about
        return self._table.num_held < min(limit, need, self._layout.num_segments)

    def _view(self, limit: int, now_s: float) -> PoolView:
        s, queue, table = self._scheduler, self._queue, self._table
        num_used = queue.blocks.num_used
        free, layered_ids = queue.num_free_blocks, self._ledger.layered_ids  # those take no blocks of the pool
        # Who was fetched grows before it can be parked.
        kept = sum(request.request_id not in layered_ids for request in s._inflight_prefills)
        if kept:
            kept += s._inflight_prefill_reserved_blocks()
        return PoolView(
            segment_blocks=self._layout.segment_blocks,
            ceiling=self._layout.num_segments,
            limit=limit,
            in_service=[(each, num_used(each)) for each in table.all_in(SegmentState.MAPPED) if each],
            leaving=[(each, num_used(each)) for each in table.all_in(SegmentState.LEAVING)],
            num_arriving=len(table.all_in(SegmentState.ARRIVING)),
            num_releasing=len(table.all_in(SegmentState.RELEASING)),
            used_blocks=self.pool_blocks + 1 - free,
            free_blocks=free,
            kept_blocks=kept,
            wanted_blocks=self._wanted_blocks(),
            parkable_blocks=self._parkable_blocks(),
            ahead=self._ahead,
            idle_s=now_s - self._busy_s,
            idle_after_s=self._idle_after_s,
        )

    def _wanted_blocks(self) -> int:
        """Blocks that requests will need beside those they have; no more are counted than there can be."""
        controller, most = self._controller, self._layout.num_segments * self._layout.segment_blocks
        tokens = controller.shape.block_tokens
        wanted = -(-len(self._scheduler.running) * GROWTH_TOKENS // tokens)
        for line in (controller.waiting, controller.parked):
            for view in line.views:
                if wanted >= most:
                    return most
                wanted += view.num_blocks
        for request_id in self._ledger.layered_ids:
            wanted += -(-self._scheduler.requests[request_id].num_tokens // tokens)
        return min(wanted, most)

    def _parkable_blocks(self) -> int:
        """Blocks of running requests that could be parked: no more than host memory has room for."""
        tracked, blocks_of = self._controller.tracked, self._managers.only.req_to_blocks
        layered_ids = self._ledger.layered_ids
        num_blocks = sum(
            len(blocks_of[request.request_id])
            for request in self._scheduler.running
            if not request.is_prefill_chunk
            and (its := tracked.get(request.request_id)) is not None
            and its.can_layer
            and request.request_id not in layered_ids
        )
        return min(num_blocks, self._ledger.host.num_free)

    # What is done --------------------------------------------------------------------------------------------

    def _carry_out(self, decided: Resize, now_s: float, *, is_last_word: bool) -> None:
        table, queue = self._table, self._queue
        table.leave(decided.leave)
        for segment in decided.leave:
            queue.withhold(segment)
        table.stay(decided.stay)
        for segment in decided.stay:
            queue.restore(segment)
        empty = [segment for segment in table.all_in(SegmentState.LEAVING) if queue.is_empty(segment)]
        for segment in set(empty).difference(decided.leave):  # those that were withheld now have been forgotten
            queue.forget(segment)
        table.release(empty)
        if decided.arrive and now_s >= self._grows_from_s:
            self._grow(decided.arrive)
        self.vacating = self._blocks_in(set(decided.vacate)) if decided.vacate else {}
        self.owed_blocks = decided.owed_blocks
        self._ask(decided, now_s, at_once=is_last_word)

    def _grow(self, num_segments: int) -> None:
        held = self._table.num_held
        num_new = min(num_segments, self._layout.num_segments - held)
        if num_new > 0 and self._share.try_hold(held + num_new):
            self._table.limit = held + num_new
            if not self._by_touch:
                self._table.arrive(num_new)
                return
            for segment in self._table.put(num_new):
                self._queue.restore(segment)

    def _blocks_in(self, segments: set[int]) -> Mapping[str, int]:
        """How many blocks running requests have there."""
        found: dict[str, int] = {}
        size, blocks_of = self._layout.segment_blocks, self._managers.only.req_to_blocks
        for request in self._scheduler.running:
            num_blocks = sum(block.block_id // size in segments for block in blocks_of[request.request_id])
            if num_blocks:
                found[request.request_id] = num_blocks
        return found

    def _ask(self, decided: Resize, now_s: float, *, at_once: bool) -> None:
        """Tell the broker: of more at once, of less at intervals, and before the engine falls silent."""
        asks = decided.need, decided.like, decided.can_leave
        is_more = self._asked is None or decided.need > self._asked[0]
        if not (is_more or at_once or now_s - self._asked_s >= LOOK_EVERY_S):
            return
        self._is_told_idle = at_once or (self._is_told_idle and asks == self._asked)
        self._asked_s, self._asked = now_s, asks
        slo = self._controller.policy.classes[self._controller.policy.default_class]
        self._share.ask(
            need=decided.need,
            like=decided.like,
            can_leave=decided.can_leave,
            token_rate=self._rate.per_s,
            tpot_s=slo.tpot_s if slo.tpot_s < math.inf else 1.0,
            has_requests=now_s == self._busy_s,
        )
