"""Copies that failed: what a worker tells the scheduler of them, and who is computed again.

vLLM's own list of blocks that were not loaded names device blocks, which only says something while the same request
holds them. A store's failure may be known steps later: it is told by host blocks, whose holders the ledger knows,
wherever their requests are by then.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata

from layerkv.core.residency import Residency
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.tracker import MOST_FAILURES

if TYPE_CHECKING:
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


@dataclass(frozen=True, slots=True)
class FailedCopies(KVConnectorWorkerMetadata):
    """Host blocks of copies that failed, of one worker or of all.

    Attributes:
        unstored: KV that did not reach them.
        unloaded: KV in them that did not reach the step just run: what it computed from them is wrong.
    """

    unstored: frozenset[int] = frozenset()
    unloaded: frozenset[int] = frozenset()

    def aggregate(self, other: KVConnectorWorkerMetadata) -> FailedCopies:
        """Of both: KV is in one piece on all ranks or of no use."""
        assert isinstance(other, FailedCopies)
        return FailedCopies(self.unstored | other.unstored, self.unloaded | other.unloaded)

    def __bool__(self) -> bool:
        return bool(self.unstored or self.unloaded)


class FailedCopiesMixin:
    """The scheduler's part: before a step's output is looked at, whoever's KV is lost starts over."""

    _ledger: Any
    _controller: Any
    running: list[Request]
    requests: dict[str, Request]

    def _copies_failed(self: Any, received: KVConnectorOutput) -> None:
        """Copies of the step whose output is about to be processed, or of earlier ones, have failed."""
        if received.invalid_block_ids:
            held = {request: self.kv_cache_manager.get_block_ids(request.request_id)[0] for request in self._with_kv()}
            self._distrust(received.invalid_block_ids)
            self._end_hopeless(r for r, blocks in held.items() if not received.invalid_block_ids.isdisjoint(blocks))
        failed = received.kv_connector_worker_meta
        if isinstance(failed, FailedCopies):
            self._start_holders_over(failed)

    def _with_kv(self: Any) -> list[Request]:
        return [*self.running, *self.kv_holding_waiting]

    def _start_holders_over(self: Any, failed: FailedCopies) -> None:
        ledger, now_s = self._ledger, time.monotonic()
        ledger.forget_prefixes()
        lost: list[Request] = []
        for request_id in ledger.holders(failed.unstored | failed.unloaded):
            request: Request = self.requests[request_id]
            match ledger.residency[request_id]:
                case Residency.RESIDENT:
                    ledger.drop_ahead(request_id)
                    self._controller.dropped_ahead(request_id)
                case Residency.LAYERED:
                    self.running.remove(request)
                    self._preempt_request(request, now_s, drop_stale_output=True)
                    lost.append(request)
                case Residency.PARKED:
                    if request_id in ledger.holders(failed.unloaded):  # by the step scheduled ahead of this output
                        request.drop_stale_output = True
                    ledger.drop(request_id)
                    self._recomputes(request)
                    lost.append(request)
                case _:  # its fetch comes after the store and fails with it, or has the KV from the device's own cache
                    pass
        self._end_hopeless(lost)

    def _end_hopeless(self: Any, lost: Iterable[Request]) -> None:
        for request in lost:
            if self._controller.copy_failed(request.request_id, request.num_output_tokens):
                self._refuse(
                    request.request_id,
                    f"its KV was lost to a failed copy between device and host memory {MOST_FAILURES} times before it "
                    "made another token; the worker's log says why the copies failed",
                    Reason.COPIES_FAIL,
                )
