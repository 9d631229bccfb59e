"""One desk for two books: what happens to a request is entered in the ledger (blocks) and the controller (requests).

Whoever runs the engine, vLLM's adapter or the simulator, carries a decision out through it, so that the two never
disagree. First come the ledger's books: if they refuse (:class:`CapacityError`), nothing has changed in either.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from layerkv.core.groups import Tables
from layerkv.core.ledger import KVLedger
from layerkv.core.residency import Residency
from layerkv.scheduler.controller import Controller
from layerkv.scheduler.reasons import End, Reason
from layerkv.scheduler.snapshot import Admission, StoreAhead


class Desk:
    """See the module.

    Order of a step: refuse, drop, store ahead, park, recompute, pause, resume, fetch, reserve; then, when the engine
    has started whom it could, :meth:`admitted` or :meth:`declined` for each reservation.
    """

    def __init__(self, controller: Controller, ledger: KVLedger) -> None:
        self._controller = controller
        self._ledger = ledger
        self._step = 0
        self._now_s = 0.0

    def begin_step(self, step: int, now_s: float) -> None:
        """What is stored ahead, parked, fetched or admitted from now on is of this step, and of this time."""
        self._step, self._now_s = step, now_s
        self._ledger.keeps_copies = self._controller.policy.policy == "fluid"

    def store_ahead(self, ahead: StoreAhead, tables: Tables, num_computed: int) -> None:
        """Whole blocks of a resident request are copied in the background.

        Raises:
            CapacityError: no room in host memory; nothing changed.
        """
        self._ledger.store_ahead(ahead.request_id, tables, num_computed, ahead.num_blocks)
        self._controller.stored_ahead(ahead.request_id, self._now_s)

    def drop_ahead(self, request_id: str) -> None:
        """What was stored ahead of a resident request is of no use."""
        self._ledger.drop_ahead(request_id)

    def park(
        self,
        request_id: str,
        tables: Tables,
        *,
        num_computed: int,
        num_tokens: int,
        num_output: int,
        reason: Reason,
    ) -> None:
        """A request leaves its device blocks, which the engine frees next; its KV goes to, or is in, host memory.

        Raises:
            CapacityError: no room in host memory for a resident request; nothing changed.
        """
        self._ledger.park(request_id, tables, num_computed, keeps_room=self._controller.outgrows_pool(request_id))
        self._controller.park(
            request_id,
            num_computed=num_computed,
            num_tokens=num_tokens,
            num_output=num_output,
            reason=reason,
            now_s=self._now_s,
        )

    def recomputes(self, request_id: str, *, num_tokens: int, num_output: int, reason: Reason, now_s: float) -> None:
        """A request's KV, wherever it is, is given up, and it waits to be computed again. Never while it is loaded."""
        self._ledger.drop(request_id)
        self._controller.recomputes(request_id, num_tokens, num_output, reason, now_s)

    def pause(self, request_id: str, num_computed: int, reason: Reason) -> None:
        """A resident request is left out of the steps to come. Its blocks stay as they are: the ledger has no say."""
        self._controller.pause(request_id, num_computed, reason, step=self._step, now_s=self._now_s)

    def resume(self, request_id: str) -> None:
        """A paused request is in the batch again."""
        self._controller.resume(request_id, step=self._step, now_s=self._now_s)

    def fetch(self, request_id: str, tables: Tables, num_local_tokens: int = 0) -> None:
        """A parked request is loaded into its new pool blocks; the first ``num_local_tokens`` are there already."""
        self._ledger.fetch(request_id, tables, num_local_tokens)
        self._controller.fetched(request_id, step=self._step, now_s=self._now_s)

    def resume_without_fetch(self, request_id: str) -> None:
        """A parked request goes on: the device's prefix cache had all its KV."""
        self._ledger.resume_without_fetch(request_id)
        self._controller.fetched(request_id, step=self._step, now_s=self._now_s)

    def back_in_zone(self, request_id: str) -> None:
        """The engine has given a parked request zone blocks again, which were reserved: it goes on there."""
        self._ledger.started(request_id)
        self._controller.fetched(request_id, step=self._step, now_s=self._now_s, in_zone=True)

    def reserve(self, admission: Admission, hashes: Sequence[Hashable] = ()) -> None:
        """Take what a request is promised that is to start, or go on, in the zone, before the engine starts it.

        ``hashes`` of its blocks, up to the one of its last token, find what of it host memory caches.

        Raises:
            CapacityError: zone or host memory has no room; nothing changed.
        """
        if self._ledger.residency.get(admission.request_id) is Residency.PARKED:
            self._ledger.readmit_layered(admission.request_id, admission.zone_blocks)
        elif admission.layered:
            self._ledger.admit_layered(
                admission.request_id,
                table_blocks=admission.host_blocks,
                zone_blocks=admission.zone_blocks,
                hashes=hashes,
            )

    def admitted(self, request_id: str, reason: Reason) -> float | None:
        """The engine has started a waiting request; returns how long it waited if that was the first time."""
        layered = self._ledger.is_layered(request_id)
        return self._controller.admitted(request_id, layered=layered, reason=reason, step=self._step, now_s=self._now_s)

    def declined(self, request_id: str) -> None:
        """The engine has not started a request: it goes on waiting, and what was reserved for it is free again."""
        if self._ledger.is_layered(request_id):
            self._ledger.cancel_layered(request_id)

    def leave(
        self,
        request_id: str,
        *,
        num_output: int,
        end: End,
        now_s: float,
        hashes: Sequence[Hashable] = (),
        tables: Tables = (),
        num_computed: int = 0,
    ) -> None:
        """A request is gone for good, from any state, after ``num_output`` tokens; the engine frees its blocks next.

        Args:
            request_id: The request.
            num_output: Tokens that it made.
            end: How it ended.
            now_s: Current time.
            hashes: Of its whole blocks, if they are to be kept as a cached prefix.
            tables: Its block tables.
            num_computed: Tokens whose KV its blocks hold.
        """
        made_tokens = self._ledger.residency.get(request_id) in (Residency.RESIDENT, Residency.LAYERED)
        self._ledger.finish(request_id, hashes=hashes, tables=tables, num_computed=num_computed)
        self._controller.leave(request_id, num_output=num_output, end=end, now_s=now_s, made_tokens=made_tokens)
