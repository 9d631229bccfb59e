"""Which host blocks hold what was stored there, and which do not because the store failed.

Owned by a worker's lane schedule and used by the thread that runs the model. A store ends long after it was submitted,
and whoever reads its host blocks may have been planned before anybody knew how it ended. So every load comes after the
stores into the blocks that it reads, and fails with them, however late that is; the scheduler hears of it meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from layerkv.core.transfer import BlockRun
from layerkv.device.base import Event


class FailedStores(NamedTuple):
    """Stores that have failed, and the host blocks whose KV is lost."""

    error: BaseException
    host_blocks: frozenset[int]


class _Store(NamedTuple):
    event: Event
    runs: Sequence[BlockRun]


class StoreWatch:
    """Follows each store to its end, layer by layer."""

    def __init__(self) -> None:
        self._under_way: dict[int, list[_Store]] = {}  # by layer, in the order in which they were submitted
        self._failed: dict[tuple[int, int], Event] = {}  # by layer and host block; until it is stored again
        self._unreported: FailedStores | None = None

    def add(self, event: Event, layers: Sequence[int], runs: Sequence[BlockRun]) -> None:
        """A store has been submitted."""
        store = _Store(event, runs)
        for layer in layers:
            self._under_way.setdefault(layer, []).append(store)

    def before_load(self, layers: Sequence[int], runs: Sequence[BlockRun]) -> list[Event]:
        """The stores, failed or under way, into what a load of these layers reads: it comes after them."""
        if not (self._under_way or self._failed):
            return []
        found: list[Event] = []
        blocks = host_blocks(runs)
        for layer in layers:
            lost = {block for block in blocks if (layer, block) in self._failed} if self._failed else set()
            for store in self._under_way.get(layer, ()):
                stored = host_blocks(store.runs)
                if not blocks.isdisjoint(stored):
                    found.append(store.event)
                    lost -= stored  # it came after the one that failed
            found += [self._failed[layer, block] for block in lost]
        return list(dict.fromkeys(found))

    def look(self) -> None:
        """Note which stores have ended since the last look."""
        for layer, stores in list(self._under_way.items()):
            if rest := [store for store in stores if not self._has_ended(layer, store)]:
                self._under_way[layer] = rest
            else:
                del self._under_way[layer]

    def take_failed(self) -> FailedStores | None:
        """What has failed since the last call, as far as anybody has looked; None if nothing has."""
        failed, self._unreported = self._unreported, None
        return failed

    def _has_ended(self, layer: int, store: _Store) -> bool:
        if not store.event.is_done():
            return False
        if (error := store.event.error) is not None:
            blocks = host_blocks(store.runs)
            self._failed.update({(layer, block): store.event for block in blocks})
            before = self._unreported or FailedStores(error, frozenset())
            self._unreported = FailedStores(before.error, before.host_blocks | blocks)
        elif self._failed:
            for block in host_blocks(store.runs):
                self._failed.pop((layer, block), None)
        return True


def host_blocks(runs: Sequence[BlockRun]) -> set[int]:
    """The host blocks of these runs."""
    return {block for run in runs for block in range(run.host_block, run.host_block + run.num_blocks)}
