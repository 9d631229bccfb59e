"""Host blocks of one CPU worker whose memory is given back by segment, in place, when a broker gives it to others.

As the pool's in :mod:`layerkv.device.elastic_mmap_arena`: one anonymous range, a thread that gives pages back, memory
by the first touch. Nothing prepares a segment, so whoever is put into service has memory at once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentLayout
from layerkv.device import libc
from layerkv.device.base import Event
from layerkv.device.host_memory import MmapHostMemory
from layerkv.device.libc import HUGE_PAGE_BYTES
from layerkv.device.mmap_arena import PAGE_BYTES
from layerkv.device.segment_thread import SegmentThread


class ElasticMmapHostMemory(MmapHostMemory):
    """See :class:`layerkv.device.base.ElasticHostMemory`. Segment 0 is in service at first, and always.

    Pieces that are no whole number of huge pages make the range one of small pages.

    Args:
        geometry: Of the worker's KV memory.
        layout: How its host blocks are divided.
        guards: Whether a process that reads or writes a segment out of service is killed, to find faults.

    Raises:
        MemoryError: the kernel refused address space.
    """

    def __init__(self, geometry: KVGeometry, layout: SegmentLayout, *, guards: bool = False) -> None:
        self._piece_bytes = layout.segment_blocks * geometry.page_bytes
        assert self._piece_bytes % PAGE_BYTES == 0 or layout.num_segments == 1, "nothing of a page is given back"
        has_huge_pages = self._piece_bytes % HUGE_PAGE_BYTES == 0
        alignment_bytes = HUGE_PAGE_BYTES if has_huge_pages else PAGE_BYTES
        super().__init__(geometry, layout.num_segments * layout.segment_blocks, alignment_bytes)
        if not has_huge_pages:
            libc.use_small_pages(self._address, geometry.num_layers * self.layer_bytes)
        self._num_layers, self._guards = geometry.num_layers, guards
        self._touching = threading.Lock()  # guards what is in service: nobody touches what is being given back
        self._in_service = {0}
        self._thread = SegmentThread()
        weakref.finalize(self, self._thread.end)
        if guards:
            self._protect(range(1, layout.num_segments), may_access=False)

    def put(self, segments: Sequence[int]) -> None:
        if self._guards:
            self._protect(segments, may_access=True)
        with self._touching:
            self._in_service.update(segments)

    def unmap(self, segments: Sequence[int], *, after: Sequence[Event] = ()) -> Event:
        with self._touching:
            self._in_service.difference_update(segments)
        # The order has the view, so that the memory is nobody else's before it is carried out.
        pieces = list(self._pieces(segments))
        return self._thread.give_back(partial(_give_back, self._view, pieces, guards=self._guards), segments, after)

    def touch_ahead(self) -> bool:
        """As of any host memory; nothing that is out of service."""
        with self._touching:
            return super().touch_ahead()

    def _may_touch(self, offset: int, num_bytes: int) -> bool:
        last = (offset + num_bytes - 1) // self._piece_bytes
        return self._in_service.issuperset(range(offset // self._piece_bytes, last + 1))

    def _pieces(self, segments: Iterable[int]) -> Iterable[tuple[int, int]]:
        """Address and bytes of each piece."""
        for segment in segments:
            for layer in range(self._num_layers):
                yield self._address + layer * self.layer_bytes + segment * self._piece_bytes, self._piece_bytes

    def _protect(self, segments: Iterable[int], *, may_access: bool) -> None:
        for address, num_bytes in self._pieces(segments):
            libc.protect(address, num_bytes, may_access=may_access)


def _give_back(view: Any, pieces: Iterable[tuple[int, int]], *, guards: bool) -> None:
    for address, num_bytes in pieces:
        libc.give_back(address, num_bytes)
        if guards:
            libc.protect(address, num_bytes, may_access=False)
