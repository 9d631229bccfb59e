"""What a ledger remembers of its requests, and what can be asked of that. Nothing here changes anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass

from layerkv.core.geometry import KVGeometry
from layerkv.core.host_copy import HostCopy
from layerkv.core.host_prefixes import HostPrefixes
from layerkv.core.host_tier import HostTier
from layerkv.core.plan_draft import PlanDraft
from layerkv.core.prefix_stores import PrefixStores
from layerkv.core.residency import Residency, ResidencyTable
from layerkv.core.segments import SegmentLayout
from layerkv.core.zone import ZoneLedger


@dataclass(slots=True)
class LedgerCounters:
    """Totals since the start, for the metrics."""

    parks: int = 0
    fetches: int = 0
    layered_admissions: int = 0
    recomputes: int = 0
    stored_ahead_blocks: int = 0
    stored_blocks: int = 0
    loaded_blocks: int = 0
    prefix_stored_blocks: int = 0
    prefix_hit_blocks: int = 0


class LedgerBooks:
    """See the module; :class:`layerkv.core.ledger.KVLedger` keeps them."""

    keeps_copies = False
    """Whether a request that was fetched keeps the whole blocks of its copy: its next park stores only new ones."""

    def __init__(self, geometry: KVGeometry, num_host_blocks: int, host_layout: SegmentLayout | None = None) -> None:
        self.geometry = geometry
        self.residency = ResidencyTable()
        self.zone = ZoneLedger(geometry.pool_blocks, geometry.zone_blocks, geometry.zone_shares)
        self.host = HostTier(num_host_blocks, host_layout)
        self._prefixes = HostPrefixes(self.host, geometry.block_tokens)
        self.counters = LedgerCounters()
        self._copies: dict[str, HostCopy] = {}
        self._layered: set[str] = set()
        self._orphans: dict[str, HostCopy] = {}  # left while FETCHING: blocks stay until the load is reported
        self._draft = PlanDraft()
        self._under_way = PrefixStores()

    @property
    def stores_prefixes(self) -> bool:
        """Whether blocks that vLLM gives out may still be read by stores of prefixes."""
        return bool(self._under_way or self._draft.prefixes)

    def is_layered(self, request_id: str) -> bool:
        """Whether the request's new blocks come from the zone."""
        return request_id in self._layered

    @property
    def has_layered(self) -> bool:
        """Whether anybody is in the lane zone, or admitted to it."""
        return bool(self._layered)

    @property
    def layered_ids(self) -> frozenset[str]:
        """Requests in the lane zone, or admitted to it."""
        return frozenset(self._layered)

    def holders(self, host_blocks: Set[int]) -> list[str]:
        """Requests whose copy has any of these host blocks."""
        return [r for r, copy in self._copies.items() if not host_blocks.isdisjoint(copy.blocks)]

    def host_blocks_of(self, request_id: str) -> Sequence[int]:
        """Host blocks that the request holds, by position; a copy, good for as long as anybody keeps it."""
        copy = self._copies.get(request_id)
        return () if copy is None else tuple(copy.blocks)

    def num_host_blocks_of(self, request_id: str) -> int:
        """Host blocks that the request holds."""
        copy = self._copies.get(request_id)
        return 0 if copy is None else copy.num_blocks

    def num_shared_host_blocks_of(self, request_id: str) -> int:
        """Of those of a resident request, how many are not free at once when it gives them up."""
        copy = self._copies.get(request_id)
        return 0 if copy is None else copy.num_shared

    def num_prefix_blocks(self, request_id: str, hashes: Sequence[Hashable], blocks: range) -> int:
        """Blocks of a waiting prompt that it can load instead of computing them, from the first of ``blocks`` on.

        Args:
            request_id: The request. Of one that has been admitted layered, :meth:`settle_prefix` knows.
            hashes: Of its blocks.
            blocks: From its hits in the device's prefix cache on, up to the block of its last token, which is computed.
        """
        if self.residency.get(request_id) is not Residency.WAITING or request_id in self._layered:
            return 0
        return self._prefixes.num_found(hashes, blocks)

    def num_held_prefix_blocks(self, hashes: Sequence[Hashable], blocks: range) -> int:
        """Of those blocks that a prompt can load, how many are no free host blocks: others share them."""
        return self._prefixes.num_held(hashes, blocks)

    def parked_tokens(self, request_id: str) -> int:
        """Tokens of the request that can be fetched from host memory; 0 if it is not parked."""
        if self.residency.get(request_id) is not Residency.PARKED:
            return 0
        return self._copies[request_id].num_tokens

    @property
    def is_idle(self) -> bool:
        """Nothing planned, nobody layered and no fetch under way: this step needs no plan."""
        return not (
            self._layered or self.residency.counts[Residency.FETCHING] or self._orphans or self._draft.has_copies
        )

    @property
    def num_fetching(self) -> int:
        """Fetches under way, those of requests that have left since among them."""
        return self.residency.counts[Residency.FETCHING] + len(self._orphans)

    @property
    def num_host_blocks_used(self) -> int:
        """Host blocks that requests hold; cached prefixes are not among them."""
        return self.host.num_held

    @property
    def num_copied_host_blocks(self) -> int:
        """Of those, copies that residents keep, so that their next park is cheap: they can be given up."""
        return sum(copy.num_blocks - copy.num_shared for copy in self._copies.values() if copy.is_ahead)

    def host_blocks_by_segment(self, layout: SegmentLayout) -> tuple[Counter[int], Counter[int]]:
        """For each segment of host memory, blocks that requests cannot do without, and those of residents' copies."""
        kept, copied = Counter[int](), Counter[int]()
        for copy in (*self._copies.values(), *self._orphans.values()):
            (copied if copy.is_ahead else kept).update(map(layout.segment_of, copy.blocks))
        return kept, copied

    def copies_in(self, segments: Set[int], layout: SegmentLayout) -> list[str]:
        """Residents whose copy has a host block in any of these segments."""
        return [
            request_id
            for request_id, copy in self._copies.items()
            if copy.is_ahead and any(layout.segment_of(block) in segments for block in copy.blocks)
        ]

    def check(self) -> None:
        """Assert that every block is accounted for exactly once.

        Tests call it after every operation, an engine with ``LAYERKV_CHECK=1`` whenever it has nothing to copy.
        """
        self.zone.check()
        self.host.check()
        held = Counter(block for copy in (*self._copies.values(), *self._orphans.values()) for block in copy.blocks)
        used = self.num_host_blocks_used
        assert len(held) == used, f"host memory: {used} blocks are taken; requests hold {len(held)} different ones"
        twice = [block for block, count in held.items() if count != max(self.host.num_sharers(block), 1)]
        assert not twice, f"host memory: requests hold blocks {twice} more or less often than they share them"
        assert not any(self.host.is_free(block) for block in held), "host memory: a request holds a free block"
        for request_id, state in ((r, self.residency[r]) for r in self.residency):
            has_copy = request_id in self._copies
            if state in (Residency.LAYERED, Residency.PARKED, Residency.FETCHING):
                assert has_copy, f"{request_id} is {state} without a host copy"
            elif state is Residency.RESIDENT:
                assert not has_copy or self._copies[request_id].is_ahead, f"{request_id} keeps host blocks for nothing"
        assert set(self._copies) <= set(self.residency)
