"""What is said of decisions: how often each reason was given, and, if wanted, the decision log's entries.

A request that waits for the same reason as before is neither counted nor written again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from layerkv.scheduler.reasons import Event, LogEntry, Reason
from layerkv.scheduler.snapshot import Decision, Snapshot
from layerkv.scheduler.tracker import TrackedRequest


class Journal:
    """One per controller. Entries pile up until they are taken."""

    def __init__(self, *, keeps_log: bool) -> None:
        self.reasons: dict[Reason, int] = {}
        """How often each was given; whoever reports them clears this."""
        self._keeps_log = keeps_log
        self._log: list[LogEntry] = []
        self._said_waits: Mapping[str, Reason] = {}  # all of them said, and nothing since

    def write(
        self, now_s: float, request_id: str, event: Event, reason: Reason | None = None, **facts: str | float
    ) -> None:
        """An entry of the log, if one is kept."""
        self._said_waits = {}
        if self._keeps_log:
            self._log.append(LogEntry(now_s, request_id, event, reason, facts))

    def say(self, now_s: float, request_id: str, tracked: TrackedRequest, event: Event, reason: Reason | None) -> None:
        """Something happened to a request: if it waits again, that is said anew."""
        tracked.said = event
        self.write(now_s, request_id, event, reason)

    def count(self, reasons: Iterable[Reason]) -> None:
        """These were given."""
        for reason in reasons:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def decided(self, snapshot: Snapshot, decision: Decision, tracked_of: Mapping[str, TrackedRequest]) -> None:
        """Count a decision's reasons, and say who waits for what if that is new."""
        self.count(decision.reasons.values())
        if decision.waits == self._said_waits:
            return
        for request_id, reason in decision.waits.items():
            tracked = tracked_of.get(request_id)
            if tracked is not None and tracked.said is not reason:
                tracked.said = reason
                self.count((reason,))
                self.write(
                    snapshot.now_s,
                    request_id,
                    Event.WAITS,
                    reason,
                    free_blocks=snapshot.engine.free_blocks,
                    free_zone_blocks=snapshot.engine.free_zone_blocks,
                    free_host_blocks=snapshot.engine.free_host_blocks,
                    prefill_tokens=decision.prefill_tokens,
                )
        self._said_waits = decision.waits

    def take(self) -> list[LogEntry]:
        """Entries since the last call."""
        log, self._log = self._log, []
        return log
