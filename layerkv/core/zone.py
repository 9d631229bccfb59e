"""Who holds which block ids of the lane zone (scheduler process).

A layered prompt reserves room for all of its blocks when it is admitted, and takes ids chunk by chunk: so its
next chunk never finds the zone full. Each KV-cache group that passes through lanes has ids of its own, and all have
room for as many tokens: so room is one number, and a request is promised as much of it in each group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from layerkv.core.runs import RunAllocator
from layerkv.errors import CapacityError


class _GroupZone:
    """Ids and promises of one group. ``share``: its blocks in one of the zone's."""

    def __init__(self, first_block: int, num_blocks: int, share: int) -> None:
        self.share = share
        self.end = first_block + num_blocks * share
        self.ids = RunAllocator(first_block, num_blocks * share)
        self.reserved: dict[str, int] = {}  # request -> blocks promised and not yet taken

    @property
    def num_available(self) -> int:
        return self.ids.num_free - sum(self.reserved.values())


class ZoneLedger:
    """Ids and reservations of the lane zone.

    Invariant: ids taken and room reserved never exceed the zone, in any group.

    Args:
        first_block: Its first block id.
        num_blocks: Its size.
        shares: For each group, how many of its blocks one of the zone's is: more than one for groups whose blocks have
            fewer tokens than others', 0 for those that pass through no lane. The groups' ids follow one another.
    """

    def __init__(self, first_block: int, num_blocks: int, shares: Sequence[int] = (1,)) -> None:
        self.first_block = first_block
        self.num_blocks = num_blocks
        self._groups: list[_GroupZone] = []
        for share in shares:
            zone = _GroupZone(first_block, num_blocks, share)
            first_block = zone.end
            self._groups.append(zone)
        self._with_lanes = [zone for zone in self._groups if zone.share]
        self._only = self._with_lanes[0] if len(self._with_lanes) == 1 and self._with_lanes[0].share == 1 else None

    @property
    def num_available(self) -> int:
        """Blocks neither taken nor promised, in any group."""
        if self._only is not None:
            return self._only.num_available
        return min(zone.num_available // zone.share for zone in self._with_lanes)

    @property
    def num_taken(self) -> int:
        """Blocks that requests hold, of the group that has the fewest left."""
        if self._only is not None:
            return self.num_blocks - self._only.ids.num_free
        return self.num_blocks - min(zone.ids.num_free // zone.share for zone in self._with_lanes)

    def reserve(self, request_id: str, num_blocks: int) -> None:
        """Promise ``num_blocks`` to a request, in every group.

        Raises:
            CapacityError: the zone has not that much room; nothing changed.
        """
        if num_blocks > self.num_available:
            raise CapacityError(f"lane zone: {num_blocks} blocks wanted, {self.num_available} available")
        if num_blocks:
            for zone in self._with_lanes:
                zone.reserved[request_id] = zone.reserved.get(request_id, 0) + num_blocks * zone.share

    def raise_reservation(self, request_id: str, num_blocks: int) -> None:
        """Promise a request ``num_blocks`` in all, if it has been promised less and there is room for that."""
        for zone in self._groups:
            missing = num_blocks * zone.share - zone.reserved.get(request_id, 0)
            if 0 < missing <= zone.num_available:
                zone.reserved[request_id] = num_blocks * zone.share

    def can_take(self, request_id: str, num_blocks: int, group: int = 0) -> bool:
        """Whether :meth:`take` would succeed."""
        zone = self._groups[group]
        return num_blocks <= zone.reserved.get(request_id, 0) + zone.num_available

    def take(self, request_id: str, num_blocks: int, group: int = 0) -> list[int]:
        """Take ids of a group, out of the request's reservation first.

        Raises:
            CapacityError: reservation and free room together do not hold them; nothing changed.
        """
        zone = self._groups[group]
        if not self.can_take(request_id, num_blocks, group):
            raise CapacityError(f"lane zone: {num_blocks} blocks wanted by {request_id}, zone full")
        left = zone.reserved.get(request_id, 0) - num_blocks
        if left > 0:
            zone.reserved[request_id] = left
        else:
            zone.reserved.pop(request_id, None)
        return zone.ids.take(num_blocks)

    def end_reservation(self, request_id: str) -> None:
        """Forget what is promised to the request and not taken."""
        for zone in self._groups:
            zone.reserved.pop(request_id, None)

    def give_back(self, block_ids: Iterable[int]) -> None:
        """Return ids, of any group. When is vLLM's affair: it may defer frees past the step in flight."""
        if self._only is not None:
            self._only.ids.give_back(block_ids)
            return
        left = sorted(block_ids)
        for zone in self._groups:
            num_own = next((i for i, block in enumerate(left) if block >= zone.end), len(left))
            zone.ids.give_back(left[:num_own])
            left = left[num_own:]
        if left:
            raise ValueError(f"block {left[0]} is no zone block")

    def check(self) -> None:
        """Assert the class invariant."""
        assert self.num_available >= 0
        for zone in self._groups:
            zone.ids.check()
            assert all(count > 0 for count in zone.reserved.values())
