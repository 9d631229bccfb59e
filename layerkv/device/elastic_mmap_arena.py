"""The CPU arena whose pool grows and shrinks by segment: one anonymous range, of which pages are given back in place.

Nothing is mapped or unmapped in the kernel's sense, so the number of mappings stays as it is. Memory comes by the first
touch; populating a segment at once stops the whole process for as long as the kernel makes huge pages.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentLayout
from layerkv.device import libc
from layerkv.device.base import COPY_TIMEOUT_S, Event
from layerkv.device.copy_event import CopyEvent
from layerkv.device.mmap_arena import PAGE_BYTES, MmapArena
from layerkv.errors import LostCopyError

HUGE_PAGE_BYTES = 2 << 20
"""What the kernel gives back of a huge page is all of it or nothing."""


class ElasticMmapArena(MmapArena):
    """See :class:`layerkv.device.base.ElasticArena`.

    Segments ``[0, num_mapped)`` have memory at first. Pieces that are no whole number of huge pages, as small models of
    tests have, make the range one of small pages.

    Raises:
        MemoryError: the kernel refused address space or memory; nothing is left behind.
    """

    def __init__(self, geometry: KVGeometry, layout: SegmentLayout, *, num_mapped: int) -> None:
        piece_bytes = layout.segment_blocks * geometry.page_bytes
        assert layout.num_segments * layout.segment_blocks == geometry.pool_blocks
        assert piece_bytes % PAGE_BYTES == 0
        self.layout = layout
        self._num_mapped = num_mapped
        self._has_huge_pages = piece_bytes % HUGE_PAGE_BYTES == 0 and geometry.layer_bytes % HUGE_PAGE_BYTES == 0
        super().__init__(geometry, alignment_bytes=HUGE_PAGE_BYTES)
        self._unprepared: set[int] = set()
        self._thread = _UnmapThread(geometry, layout)
        weakref.finalize(self, self._thread.orders.put, None)

    def prepare_map(self, segments: Sequence[int]) -> Event:
        self._unprepared.difference_update(segments)
        return self._thread.submit(_Order(self._tensor, segments))

    def map(self, segments: Sequence[int]) -> None:
        assert self._unprepared.isdisjoint(segments), "not prepared"

    def unmap(self, segments: Sequence[int], *, after: Sequence[Event] = ()) -> Event:
        self._unprepared.update(segments)
        return self._thread.submit(_Order(self._tensor, segments, after, gives_back=True))

    def _touch(self) -> None:
        if not self._has_huge_pages:
            libc.use_small_pages(self._tensor.data_ptr(), self.geometry.virtual_bytes)
        blocks = self._tensor.view(self.geometry.num_layers, self.geometry.total_blocks, self.geometry.page_bytes)
        blocks[:, : self._num_mapped * self.layout.segment_blocks].zero_()
        blocks[:, self.geometry.pool_blocks :].zero_()


@dataclass(slots=True)
class _Order:
    """``tensor`` keeps the memory from being somebody else's until the order is carried out."""

    tensor: torch.Tensor
    segments: Sequence[int]
    after: Sequence[Event] = ()
    gives_back: bool = False
    event: CopyEvent = field(default_factory=CopyEvent)


class _UnmapThread(threading.Thread):
    """Gives segments back, one order after the other, so what was ordered before has been done. Ends with its arena."""

    def __init__(self, geometry: KVGeometry, layout: SegmentLayout) -> None:
        super().__init__(name="layerkv-segments", daemon=True)
        self.orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._geometry, self._layout = geometry, layout
        self._spoilt: dict[int, LostCopyError | MemoryError] = {}  # what may still be written, or has old bytes
        self.start()

    def submit(self, order: _Order) -> CopyEvent:
        self.orders.put(order)
        return order.event

    def run(self) -> None:
        while (order := self.orders.get()) is not None:
            try:
                self._carry_out(order)
            except BaseException as error:  # the edge of this thread: whoever waits must hear of it
                order.event.end(error)
            else:
                order.event.end()
            del order

    def _carry_out(self, order: _Order) -> None:
        for segment in order.segments:
            spoilt = self._spoilt.get(segment)
            if isinstance(spoilt, LostCopyError) or (spoilt is not None and not order.gives_back):
                raise spoilt
        if not order.gives_back:
            return
        try:
            self._await(order.after)
            self._give_back(order.tensor.data_ptr(), order.segments)
        except (LostCopyError, MemoryError) as error:
            self._spoilt.update(dict.fromkeys(order.segments, error))
            raise
        for segment in order.segments:
            self._spoilt.pop(segment, None)

    def _await(self, events: Sequence[Event]) -> None:
        for event in events:
            assert isinstance(event, CopyEvent)
            if not event.wait(COPY_TIMEOUT_S):
                raise LostCopyError(f"a copy of a segment that leaves did not end in {COPY_TIMEOUT_S:.0f} s")
            if isinstance(event.error, LostCopyError | MemoryError):  # it may still write, or old bytes are still there
                raise event.error

    def _give_back(self, address: int, segments: Sequence[int]) -> None:
        piece_bytes = self._layout.segment_blocks * self._geometry.page_bytes
        for segment in segments:
            first = self._layout.blocks(segment)[0]
            for layer in range(self._geometry.num_layers):
                libc.give_back(address + self._geometry.offset(layer, first), piece_bytes)
