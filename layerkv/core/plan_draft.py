"""The copies of one step while its plan is being made: everything that the ledger does until then adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from layerkv.core.prefix_stores import PrefixStores
from layerkv.core.transfer import BlockRun, FetchPlan, StepPlan


@dataclass(slots=True)
class PlanDraft:
    """See :class:`StepPlan`; stores ahead by request, because one may be parked before its store has begun.

    ``prefixes`` is what requests that ended left in the pool: stored in the background too, unless this very step
    writes over it.
    """

    parks: list[BlockRun] = field(default_factory=list)
    stores: list[BlockRun] = field(default_factory=list)
    loads: list[BlockRun] = field(default_factory=list)
    hits: list[BlockRun] = field(default_factory=list)
    zone_hits: list[BlockRun] = field(default_factory=list)
    ahead: dict[str, tuple[BlockRun, ...]] = field(default_factory=dict)
    prefixes: list[BlockRun] = field(default_factory=list)
    settle: bool = False
    fetches: list[FetchPlan] = field(default_factory=list)
    uses_lanes: bool = False

    @property
    def has_copies(self) -> bool:
        """Whether anything is planned besides what layered requests copy layer by layer."""
        return bool(self.parks or self.hits or self.ahead or self.prefixes or self.settle or self.fetches)

    def parks_now(self, request_id: str) -> None:
        """What was stored ahead of a request that leaves the pool must be there: the step waits for that."""
        self.settle = True
        self.parks += self.ahead.pop(request_id, ())  # not begun yet

    def gave_out(self, pool_blocks: Sequence[int], under_way: PrefixStores) -> None:
        """This step writes these pool blocks: what stores of prefixes still read there, they read before."""
        self.settle |= under_way.read(pool_blocks)
        if self.prefixes and PrefixStores(self.prefixes).read(pool_blocks):
            self._store_prefixes_first()

    def plan(self, num_tokens: int, under_way: PrefixStores) -> StepPlan:
        """The plan of the step that computes ``num_tokens``; its stores of prefixes are under way from now on."""
        if PrefixStores(self.prefixes).write(self.stores):  # host memory is short, and they have given way already
            self._store_prefixes_first()
        self.settle |= under_way.write((*self.parks, *self.stores))
        if self.settle:
            under_way.clear()
        under_way.add(self.prefixes)
        return StepPlan(
            parks=tuple(self.parks),
            stores=tuple(self.stores),
            loads=tuple(self.loads),
            hits=tuple(self.hits),
            zone_hits=tuple(self.zone_hits),
            ahead=(*(run for runs in self.ahead.values() for run in runs), *self.prefixes),
            settle=self.settle,
            fetches=tuple(self.fetches),
            num_tokens=num_tokens,
            uses_lanes=self.uses_lanes,
        )

    def _store_prefixes_first(self) -> None:
        self.parks += self.prefixes
        self.prefixes.clear()
