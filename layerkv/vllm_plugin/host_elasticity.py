"""Host memory comes and goes by segment where a broker divides it: :mod:`layerkv.scheduler.elastic_host` says how much.

The same four books as in :mod:`.elasticity`, but that nothing need be mapped: a segment that is put into service has
memory at once, and is held from then on; one that leaves is held until all workers have given its memory back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from layerkv.core.segments import SegmentMoves, SegmentState, SegmentTable
from layerkv.scheduler.elastic import GROWTH_TOKENS, LOOK_EVERY_S
from layerkv.scheduler.elastic_host import HostResize, HostSegment, HostView, leavers, resize_host
from layerkv.vllm_plugin.memory_share import HostShare
from layerkv.vllm_plugin.scheduler_view import SchedulerView
from layerkv.vllm_plugin.segment_answers import SegmentAnswer

if TYPE_CHECKING:
    from layerkv.scheduler.controller import Controller
    from layerkv.scheduler.desk import Desk
    from layerkv.vllm_plugin.block_managers import BlockManagers
    from layerkv.vllm_plugin.connector_scheduler import SchedulerSide


class HostElasticity:
    """See the module. One per scheduler whose host memory has segments: all but the first are out of service at first,
    and as many as the floor has come in with the first step."""

    def __init__(
        self,
        scheduler: SchedulerView,
        side: SchedulerSide,
        managers: BlockManagers,
        controller: Controller,
        desk: Desk,
        share: HostShare,
        *,
        num_ranks: int,
    ) -> None:
        assert side.host_sizes is not None
        self._sizes, self._layout = side.host_sizes, side.host_sizes.layout
        self._scheduler = scheduler
        self._ledger, self._tier = side.ledger, side.ledger.host
        self._managers = managers
        self._controller = controller
        self._desk = desk
        self._share = share
        self._table = SegmentTable(self._layout.num_segments, num_ranks=num_ranks, num_mapped=1)
        for segment in range(1, self._layout.num_segments):
            self._tier.withhold(segment)
        self._limit: int | None = -1
        self._was_idle = self._was_resting = False
        self._looked_s = -math.inf
        self._looked_at = -1  # the version of residencies then
        self._asked = HostResize(1, 1, 1, 0)
        self._is_done = True  # the last look found nothing that leaves, and nothing to give back

    @property
    def amounts(self) -> Mapping[str, int]:
        """Segments by what they are said to be: held, needed, and the limit of what may be held."""
        limit = self._layout.num_segments if self._limit is None else max(self._limit, 0)
        return {"held": self._table.num_held, "need": self._asked.need, "limit": limit}

    @property
    def is_moving(self) -> bool:
        """Whether workers give segments back, or will with the next plan."""
        return self._table.is_moving

    @property
    def has_work(self) -> bool:
        """Whether an engine that nobody uses must go on stepping: until it has given back and said what it is to."""
        return self._table.is_moving or not (self._was_idle and self._is_done)

    def before_step(self, now_s: float, *, is_idle: bool, is_resting: bool) -> None:
        """Before anything is decided: what host memory is in this step. Nothing waits for the broker."""
        limit, moves = self._share.limit(), self._ledger.residency.version
        state = limit, is_idle, is_resting
        is_fresh = state == (self._limit, self._was_idle, self._was_resting) and now_s - self._looked_s < LOOK_EVERY_S
        if is_fresh and self._is_done and not (self.can_release or (moves != self._looked_at and self._is_short())):
            return
        self._looked_s, self._looked_at = now_s, moves
        self._limit, self._was_idle, self._was_resting = state
        decided = resize_host(self._view(is_idle=is_idle))
        self._is_done = self._shrink(decided.target, parks_stay=is_idle or is_resting)
        if is_resting:
            decided = decided.at_rest(self._table.num_held - len(self._table.all_in(SegmentState.RELEASING)))
        else:
            self._grow(decided.target)
        self._asked = decided
        self._share.ask(need=decided.need, like=decided.like, can_leave=decided.can_leave)

    def take_moves(self) -> SegmentMoves:
        """What the workers do with the step that is planned now."""
        return self._table.take_moves()

    def answered(self, answers: Iterable[SegmentAnswer]) -> None:
        """Ranks have given segments back; what all of them have is not held any more."""
        for segment, rank, _ in answers:
            if self._table.answer(segment, rank) is SegmentState.UNMAPPED:
                may_hold = self._share.try_hold(self._table.num_held)
                assert may_hold, "less may always be held"

    def check(self) -> None:
        """Assert that the books agree (tests call it after every step)."""
        table = self._table
        table.check()
        out_of_service = set(range(self._layout.num_segments)) - set(table.all_in(SegmentState.MAPPED))
        assert out_of_service == self._tier._withheld.keys()
        for state in (SegmentState.UNMAPPED, SegmentState.RELEASING):
            assert all(map(self._tier.is_empty, table.all_in(state)))

    # What is there -------------------------------------------------------------------------------------------

    @property
    def can_release(self) -> bool:
        """Whether a segment that leaves has become empty."""
        return any(map(self._tier.is_empty, self._table.all_in(SegmentState.LEAVING)))

    def _is_short(self) -> bool:
        """Whether more would be of use before long and may be had, or somebody keeps what is to be given back."""
        table = self._table
        if table.all_in(SegmentState.LEAVING):
            return True
        most = self._layout.num_segments if self._limit is None else min(self._limit, self._layout.num_segments)
        return table.num_held < most and 2 * self._tier.num_free < self._tier.num_in_service

    def _view(self, *, is_idle: bool) -> HostView:
        ledger, tier, table = self._ledger, self._tier, self._table
        return HostView(
            segment_blocks=self._layout.segment_blocks,
            ceiling=self._layout.num_segments,
            floor=self._sizes.floor,
            limit=self._limit,
            num_staying=len(table.all_in(SegmentState.MAPPED)),
            num_held=table.num_held,
            kept_blocks=max(tier.num_held - ledger.num_copied_host_blocks, 0),
            cached_blocks=tier.num_free - tier.num_loose,
            wanted_blocks=0 if is_idle else self._wanted_blocks(),
            is_idle=is_idle,
            used_segments=1 + sum(its.is_used for its in self._in_service()) if is_idle else 0,
        )

    def _wanted_blocks(self) -> int:
        """Host blocks that running requests would take if they were parked, and waiting ones if they ran layered; no
        more are counted than there can be."""
        running, blocks_of, layered_ids = (
            self._scheduler.running,
            self._managers.only.req_to_blocks,
            self._ledger.layered_ids,
        )
        wanted = -(-len(running) * GROWTH_TOKENS // self._controller.shape.block_tokens)
        for request in running:
            if request.request_id not in layered_ids:
                wanted += len(blocks_of[request.request_id])
        for view in self._controller.waiting.views:
            if wanted >= self._tier.count:
                break
            wanted += view.num_blocks
        return min(wanted, self._tier.count)

    # What is done --------------------------------------------------------------------------------------------

    def _shrink(self, target: int, *, parks_stay: bool) -> bool:
        """Take what is too much out of service, and give back what has become empty; whether nothing is left to do."""
        table, tier = self._table, self._tier
        excess = len(table.all_in(SegmentState.MAPPED)) - target
        chosen = leavers(self._in_service(), excess, parks_stay=parks_stay) if excess > 0 else ()
        table.leave(chosen)
        for segment in chosen:
            tier.withhold(segment)
        wanted_again = table.all_in(SegmentState.LEAVING)[: max(-excess, 0)]
        table.stay(wanted_again)
        for segment in wanted_again:
            tier.restore(segment)
        if leaving := set(table.all_in(SegmentState.LEAVING)):
            for request_id in self._ledger.copies_in(leaving, self._layout):
                self._desk.drop_ahead(request_id)
        empty = list(filter(tier.is_empty, leaving))
        table.release(empty)
        return not chosen and not empty

    def _in_service(self) -> list[HostSegment]:
        kept, copied = self._ledger.host_blocks_by_segment(self._layout)
        newest = self._tier.newest_in()
        return [
            HostSegment(segment, kept[segment], copied[segment], newest.get(segment, -1))
            for segment in self._table.all_in(SegmentState.MAPPED)
            if segment  # the table keeps the first
        ]

    def _grow(self, target: int) -> None:
        table = self._table
        held = table.num_held
        num_new = min(target - len(table.all_in(SegmentState.MAPPED)), self._layout.num_segments - held)
        if self._limit is not None:
            num_new = min(num_new, self._limit - held)
        if num_new > 0 and self._share.try_hold(held + num_new):
            table.limit = held + num_new
            for segment in table.put(num_new):
                self._tier.restore(segment)
