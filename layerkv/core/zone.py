"""Who holds which block ids of the lane zone (scheduler process).

A layered prompt reserves room for all of its blocks when it is admitted, and takes ids chunk by chunk: so its
next chunk never finds the zone full.
"""

from __future__ import annotations

from collections.abc import Iterable

from layerkv.core.runs import RunAllocator
from layerkv.errors import CapacityError


class ZoneLedger:
    """Ids and reservations of the lane zone.

    Invariant: ids taken and room reserved never exceed the zone.
    """

    def __init__(self, first_block: int, num_blocks: int) -> None:
        self.first_block = first_block
        self.num_blocks = num_blocks
        self._ids = RunAllocator(first_block, num_blocks)
        self._reserved: dict[str, int] = {}  # request -> blocks promised and not yet taken

    @property
    def num_available(self) -> int:
        """Blocks neither taken nor promised."""
        return self._ids.num_free - sum(self._reserved.values())

    @property
    def num_taken(self) -> int:
        """Blocks that requests hold."""
        return self.num_blocks - self._ids.num_free

    def reserve(self, request_id: str, num_blocks: int) -> None:
        """Promise ``num_blocks`` to a request.

        Raises:
            CapacityError: the zone has not that much room; nothing changed.
        """
        if num_blocks > self.num_available:
            raise CapacityError(f"lane zone: {num_blocks} blocks wanted, {self.num_available} available")
        if num_blocks:
            self._reserved[request_id] = self._reserved.get(request_id, 0) + num_blocks

    def raise_reservation(self, request_id: str, num_blocks: int) -> None:
        """Promise a request ``num_blocks`` in all, if it has been promised less and there is room for that."""
        missing = num_blocks - self._reserved.get(request_id, 0)
        if 0 < missing <= self.num_available:
            self._reserved[request_id] = num_blocks

    def can_take(self, request_id: str, num_blocks: int) -> bool:
        """Whether :meth:`take` would succeed."""
        return num_blocks <= self._reserved.get(request_id, 0) + self.num_available

    def take(self, request_id: str, num_blocks: int) -> list[int]:
        """Take ids, out of the request's reservation first.

        Raises:
            CapacityError: reservation and free room together do not hold them; nothing changed.
        """
        if not self.can_take(request_id, num_blocks):
            raise CapacityError(f"lane zone: {num_blocks} blocks wanted by {request_id}, zone full")
        left = self._reserved.get(request_id, 0) - num_blocks
        if left > 0:
            self._reserved[request_id] = left
        else:
            self._reserved.pop(request_id, None)
        return self._ids.take(num_blocks)

    def end_reservation(self, request_id: str) -> None:
        """Forget what is promised to the request and not taken."""
        self._reserved.pop(request_id, None)

    def give_back(self, block_ids: Iterable[int]) -> None:
        """Return ids. When they come back is vLLM's affair: it may defer frees past the step in flight."""
        self._ids.give_back(block_ids)

    def check(self) -> None:
        """Assert the class invariant."""
        self._ids.check()
        assert self.num_available >= 0
        assert all(count > 0 for count in self._reserved.values())
