"""Which host blocks hold what was stored there, and which do not because the store failed.

Owned by a worker's lane schedule and used by the thread that runs the model. A store ends long after it was submitted,
and whoever reads its host blocks may have been planned before anybody knew how it ended. So every load comes after the
stores into the blocks that it reads, and fails with them, however late that is; the scheduler hears of it meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import NamedTuple

from layerkv.core.transfer import BlockRun
from layerkv.device.base import Event
from layerkv.errors import LostCopyError


class FailedStores(NamedTuple):
    """Stores that have failed, and the host blocks whose KV is lost."""

    error: BaseException
    host_blocks: frozenset[int]


class _Extent(NamedTuple):
    """The host blocks of some runs, with bounds that mostly show at once that two extents have nothing in common."""

    runs: Sequence[BlockRun]
    host_blocks: frozenset[int]
    lowest: int
    highest: int

    def overlaps(self, other: _Extent) -> bool:
        if self.highest < other.lowest or other.highest < self.lowest:
            return False
        return not self.host_blocks.isdisjoint(other.host_blocks)


class _Store(NamedTuple):
    event: Event
    extent: _Extent


class StoreWatch:
    """Follows each store to its end, layer by layer.

    Runs that were handed over must not change afterwards: a step hands over the same ones for each layer, and their
    blocks are worked out once.
    """

    def __init__(self) -> None:
        self._under_way: dict[int, list[_Store]] = {}  # by layer, in the order in which they were submitted
        self._failed: dict[int, dict[int, Event]] = {}  # by layer and host block; until it is stored again
        self._unreported: FailedStores | None = None
        self.lost: LostCopyError | None = None
        """The error of a store that was given up without having ended."""
        self._extents: dict[int, _Extent] = {}  # by the runs' id, which is theirs for as long as they are kept here

    def add(self, event: Event, layers: Sequence[int], runs: Sequence[BlockRun]) -> None:
        """A store has been submitted."""
        store = _Store(event, self._extent_of(runs))
        for layer in layers:
            self._under_way.setdefault(layer, []).append(store)

    def before_load(self, layers: Sequence[int], runs: Sequence[BlockRun]) -> list[Event]:
        """The last store, failed or under way, into each block that a load of these layers reads: it comes after them.

        Not those before it: they end earlier, and what they failed to write is written by the last one.
        """
        if not (self._under_way or self._failed):
            return []
        extent = self._extent_of(runs)
        found: list[Event] = []
        for layer in layers:
            stores = [store for store in self._under_way.get(layer, ()) if store.extent.overlaps(extent)]
            failed = self._failed.get(layer, {})
            if len(stores) <= 1 and not failed:
                found += [store.event for store in stores]
            else:
                found += _last_stores(extent.host_blocks, stores, failed)
        return list(dict.fromkeys(found))

    def look(self) -> None:
        """Note which stores have ended since the last look."""
        self._extents.clear()
        for layer, stores in list(self._under_way.items()):
            if len(stores) == 1:  # nearly always
                if stores[0].event.is_done():
                    self._note_end(layer, stores[0])
                    del self._under_way[layer]
                continue
            # The last one first: when it has ended, so have those before it, and they are told in their order.
            ended = [store.event.is_done() for store in reversed(stores)][::-1]
            for store in compress(stores, ended):
                self._note_end(layer, store)
            if not all(ended):
                self._under_way[layer] = [store for store, is_done in zip(stores, ended, strict=True) if not is_done]
            else:
                del self._under_way[layer]

    @property
    def is_at_rest(self) -> bool:
        """Whether no store is under way, as of the last look, and none has failed that is not taken yet."""
        return not self._under_way and self._unreported is None

    def take_failed(self) -> FailedStores | None:
        """What has failed since the last call, as far as anybody has looked; None if nothing has."""
        failed, self._unreported = self._unreported, None
        return failed

    def _note_end(self, layer: int, store: _Store) -> None:
        error = store.event.error
        if error is None and not self._failed:
            return
        blocks = store.extent.host_blocks
        if error is not None:
            if isinstance(error, LostCopyError):
                self.lost = error
            self._failed.setdefault(layer, {}).update(dict.fromkeys(blocks, store.event))
            before = self._unreported or FailedStores(error, frozenset())
            self._unreported = FailedStores(before.error, before.host_blocks | blocks)
        elif failed := self._failed.get(layer):
            for block in blocks & failed.keys():
                del failed[block]
            if not failed:
                del self._failed[layer]

    def _extent_of(self, runs: Sequence[BlockRun]) -> _Extent:
        extent = self._extents.get(id(runs))
        if extent is None:
            lowest = min((run.host_block for run in runs), default=0)
            highest = max((run.host_block + run.num_blocks - 1 for run in runs), default=-1)
            extent = self._extents[id(runs)] = _Extent(runs, frozenset(host_blocks(runs)), lowest, highest)
        return extent


def _last_stores(blocks: frozenset[int], stores: Sequence[_Store], failed: Mapping[int, Event]) -> list[Event]:
    """Of each block the last store: those under way in their order, then those that failed before them."""
    last: list[Event] = []
    left = set(blocks)
    for store in reversed(stores):
        if not left.isdisjoint(store.extent.host_blocks):
            last.append(store.event)
            left.difference_update(store.extent.host_blocks)
    last.reverse()
    return last + [failed[block] for block in failed.keys() & left]


def host_blocks(runs: Sequence[BlockRun]) -> set[int]:
    """The host blocks of these runs."""
    return {block for run in runs for block in range(run.host_block, run.host_block + run.num_blocks)}
