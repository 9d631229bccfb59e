"""Copies that failed: what a worker tells the scheduler of them.

vLLM's own list of blocks that were not loaded names device blocks, which only says something while the same request
holds them. A store's failure may be known steps later: it is told by host blocks, whose holders the ledger knows,
wherever their requests are by then.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata


@dataclass(frozen=True, slots=True)
class FailedCopies(KVConnectorWorkerMetadata):
    """Host blocks of copies that failed, of one worker or of all.

    Attributes:
        unstored: KV that did not reach them.
        unloaded: KV in them that did not reach the step just run: what it computed from them is wrong.
    """

    unstored: frozenset[int] = frozenset()
    unloaded: frozenset[int] = frozenset()

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Of both; where another rank has more to tell than copies, its report has these too."""
        return self.with_those_of(other) if isinstance(other, FailedCopies) else other.aggregate(self)

    def with_those_of(self, other: FailedCopies) -> FailedCopies:
        """Of both: KV is in one piece on all ranks or of no use."""
        return FailedCopies(self.unstored | other.unstored, self.unloaded | other.unloaded)

    def __bool__(self) -> bool:
        return bool(self.unstored or self.unloaded)
