"""What a worker tells the scheduler of segments that it has mapped or unmapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata


class SegmentAnswer(NamedTuple):
    """A rank has done its part of a segment's move, or could not map it and has nothing of it mapped."""

    segment: int
    rank: int
    has_failed: bool = False


@dataclass(frozen=True, slots=True)
class SegmentAnswers(KVConnectorWorkerMetadata):
    """Answers of one worker or of all, in the order in which each gave them."""

    answers: tuple[SegmentAnswer, ...] = ()

    def aggregate(self, other: KVConnectorWorkerMetadata) -> SegmentAnswers:
        """Of both."""
        assert isinstance(other, SegmentAnswers)
        return SegmentAnswers(self.answers + other.answers)
