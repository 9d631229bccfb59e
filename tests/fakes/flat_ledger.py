"""A ledger for tests of one KV-cache group, which say of a request's block tables only the one that there is."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from layerkv.core.groups import Tables
from layerkv.core.ledger import KVLedger


class FlatLedger(KVLedger):
    """See the module."""

    def step_layered(  # type: ignore[override]
        self, request_id: str, block_ids: Sequence[int], *, num_computed: int, num_scheduled: int
    ) -> None:
        super().step_layered(request_id, (block_ids,), num_computed=num_computed, num_scheduled=num_scheduled)

    def store_ahead(  # type: ignore[override]
        self, request_id: str, block_ids: Sequence[int], num_computed: int, most_blocks: int | None = None
    ) -> int:
        return super().store_ahead(request_id, (block_ids,), num_computed, most_blocks)

    def park(  # type: ignore[override]
        self, request_id: str, block_ids: Sequence[int], num_computed: int, *, keeps_room: bool = False
    ) -> None:
        super().park(request_id, (block_ids,), num_computed, keeps_room=keeps_room)

    def fetch(self, request_id: str, block_ids: Sequence[int], num_local_tokens: int) -> None:  # type: ignore[override]
        super().fetch(request_id, (block_ids,), num_local_tokens)

    def load_prefix(  # type: ignore[override]
        self, request_id: str, block_ids: Sequence[int], hashes: Sequence[Hashable], blocks: range
    ) -> None:
        super().load_prefix(request_id, (block_ids,), hashes, blocks)

    def finish(  # type: ignore[override]
        self,
        request_id: str,
        *,
        hashes: Sequence[Hashable] = (),
        block_ids: Sequence[int] = (),
        tables: Tables = (),
        num_computed: int = 0,
    ) -> None:
        tables = tables or ((block_ids,) if block_ids else ())
        super().finish(request_id, hashes=hashes, tables=tables, num_computed=num_computed)
