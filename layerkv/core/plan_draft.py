"""The copies of one step while its plan is being made: everything that the ledger does until then adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from layerkv.core.transfer import BlockRun, FetchPlan, StepPlan


@dataclass(slots=True)
class PlanDraft:
    """See :class:`StepPlan`; stores ahead by request, because one may be parked before its store has begun."""

    parks: list[BlockRun] = field(default_factory=list)
    stores: list[BlockRun] = field(default_factory=list)
    loads: list[BlockRun] = field(default_factory=list)
    hits: list[BlockRun] = field(default_factory=list)
    zone_hits: list[BlockRun] = field(default_factory=list)
    ahead: dict[str, tuple[BlockRun, ...]] = field(default_factory=dict)
    settle: bool = False
    fetches: list[FetchPlan] = field(default_factory=list)

    @property
    def has_copies(self) -> bool:
        """Whether anything is planned besides what layered requests copy layer by layer."""
        return bool(self.parks or self.hits or self.ahead or self.settle or self.fetches)

    def parks_now(self, request_id: str) -> None:
        """What was stored ahead of a request that leaves the pool must be there: the step waits for that."""
        self.settle = True
        self.parks += self.ahead.pop(request_id, ())  # not begun yet

    def plan(self, num_tokens: int) -> StepPlan:
        """The plan of the step that computes ``num_tokens``."""
        return StepPlan(
            parks=tuple(self.parks),
            stores=tuple(self.stores),
            loads=tuple(self.loads),
            hits=tuple(self.hits),
            zone_hits=tuple(self.zone_hits),
            ahead=tuple(run for runs in self.ahead.values() for run in runs),
            settle=self.settle,
            fetches=tuple(self.fetches),
            num_tokens=num_tokens,
        )
