"""What workers tell the scheduler of segments that move; failed copies go along, since vLLM has one place for both.

vLLM takes it at the end of every step, those without tokens too, and puts what all ranks say together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata

from layerkv.vllm_plugin.failed_copies import FailedCopies


class SegmentAnswer(NamedTuple):
    """A rank has done its part of a segment's move, or could not map it and has nothing of it mapped."""

    segment: int
    rank: int
    has_failed: bool = False


@dataclass(frozen=True, slots=True)
class SegmentAnswers(KVConnectorWorkerMetadata):
    """Of one worker or of all, each answer once.

    Attributes:
        answers: Of moves that have ended since the last report, in the order in which they ended on each rank.
        host_answers: The same, of segments of host memory.
        failed_copies: What else there is to tell.
    """

    answers: tuple[SegmentAnswer, ...] = ()
    host_answers: tuple[SegmentAnswer, ...] = ()
    failed_copies: FailedCopies = field(default_factory=FailedCopies)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> SegmentAnswers:
        """Of both, whichever kind the other is."""
        if isinstance(other, FailedCopies):
            return replace(self, failed_copies=self.failed_copies.with_those_of(other))
        assert isinstance(other, SegmentAnswers)
        failed = self.failed_copies.with_those_of(other.failed_copies)
        return SegmentAnswers(self.answers + other.answers, self.host_answers + other.host_answers, failed)

    def __bool__(self) -> bool:
        return bool(self.answers or self.host_answers or self.failed_copies)


def worker_report(
    failed: FailedCopies | None, answers: Iterable[SegmentAnswer], host_answers: Iterable[SegmentAnswer] = ()
) -> FailedCopies | SegmentAnswers | None:
    """What a worker says at the end of a step; None if there is nothing to say."""
    told, of_host = tuple(answers), tuple(host_answers)
    if told or of_host:
        return SegmentAnswers(told, of_host, failed or FailedCopies())
    return failed


def failed_copies_in(report: KVConnectorWorkerMetadata | None) -> FailedCopies | None:
    """Those that the workers have told of; None if they have not."""
    if isinstance(report, SegmentAnswers):
        return report.failed_copies or None
    return report if isinstance(report, FailedCopies) else None
