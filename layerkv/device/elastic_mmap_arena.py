"""The CPU arena whose pool grows and shrinks by segment: one anonymous range, of which pages are given back in place.

Nothing is mapped or unmapped in the kernel's sense, so the number of mappings stays as it is. Memory comes by the first
touch; populating a segment at once stops the whole process for as long as the kernel makes huge pages.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch

from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentLayout
from layerkv.device import libc
from layerkv.device.base import Event
from layerkv.device.libc import HUGE_PAGE_BYTES
from layerkv.device.mmap_arena import PAGE_BYTES, MmapArena
from layerkv.device.segment_thread import SegmentThread


class ElasticMmapArena(MmapArena):
    """See :class:`layerkv.device.base.ElasticArena`.

    Segments ``[0, num_mapped)`` have memory at first. Pieces that are no whole number of huge pages, as small models of
    tests have, make the range one of small pages.

    Args:
        geometry: All segments of ``layout`` are its pool.
        layout: How the pool is divided.
        num_mapped: Segments with memory at first, the lowest.
        guards: Whether a process that reads or writes a segment without memory is killed, to find faults. Each piece
            is a mapping of its own then, of which a process may have some 65,000.

    Raises:
        MemoryError: the kernel refused address space or memory; nothing is left behind.
    """

    def __init__(self, geometry: KVGeometry, layout: SegmentLayout, *, num_mapped: int, guards: bool = False) -> None:
        piece_bytes = layout.segment_blocks * geometry.page_bytes
        assert layout.num_segments * layout.segment_blocks == geometry.pool_blocks
        assert piece_bytes % PAGE_BYTES == 0
        self.layout = layout
        self._guards = guards
        self._num_mapped = num_mapped
        self._has_huge_pages = piece_bytes % HUGE_PAGE_BYTES == 0 and geometry.layer_bytes % HUGE_PAGE_BYTES == 0
        super().__init__(geometry, alignment_bytes=HUGE_PAGE_BYTES)
        self._unprepared: set[int] = set()
        self._thread = SegmentThread()
        weakref.finalize(self, self._thread.end)

    def put(self, segments: Sequence[int]) -> None:
        self._unprepared.difference_update(segments)
        self.map(segments)

    def prepare_map(self, segments: Sequence[int]) -> Event:
        self._unprepared.difference_update(segments)
        return self._thread.prepare(lambda: None, segments)

    def map(self, segments: Sequence[int]) -> None:
        assert self._unprepared.isdisjoint(segments), "not prepared"
        if self._guards:
            _protect(self._tensor, self.geometry, self.layout, segments, may_access=True)

    def unmap(self, segments: Sequence[int], *, after: Sequence[Event] = ()) -> Event:
        # The order has the tensor, so that the memory is nobody else's before it is carried out, and not the arena.
        tensor, geometry, layout, guards = self._tensor, self.geometry, self.layout, self._guards
        self._unprepared.update(segments)
        return self._thread.give_back(
            lambda: _give_back(tensor, geometry, layout, segments, guards=guards), segments, after
        )

    def _touch(self) -> None:
        if not self._has_huge_pages:
            libc.use_small_pages(self._tensor.data_ptr(), self.geometry.virtual_bytes)
        blocks = self._tensor.view(self.geometry.num_layers, self.geometry.total_blocks, self.geometry.page_bytes)
        blocks[:, : self._num_mapped * self.layout.segment_blocks].zero_()
        blocks[:, self.geometry.pool_blocks :].zero_()
        if self._guards:
            unmapped = range(self._num_mapped, self.layout.num_segments)
            _protect(self._tensor, self.geometry, self.layout, unmapped, may_access=False)


def _pieces(
    tensor: torch.Tensor, geometry: KVGeometry, layout: SegmentLayout, segments: Iterable[int]
) -> Iterable[tuple[int, int]]:
    """Address and bytes of each piece."""
    piece_bytes = layout.segment_blocks * geometry.page_bytes
    for segment in segments:
        first = layout.blocks(segment)[0]
        for layer in range(geometry.num_layers):
            yield tensor.data_ptr() + geometry.offset(layer, first), piece_bytes


def _give_back(
    tensor: torch.Tensor, geometry: KVGeometry, layout: SegmentLayout, segments: Iterable[int], *, guards: bool
) -> None:
    for address, num_bytes in _pieces(tensor, geometry, layout, segments):
        libc.give_back(address, num_bytes)
        if guards:
            libc.protect(address, num_bytes, may_access=False)


def _protect(
    tensor: torch.Tensor, geometry: KVGeometry, layout: SegmentLayout, segments: Iterable[int], *, may_access: bool
) -> None:
    for address, num_bytes in _pieces(tensor, geometry, layout, segments):
        libc.protect(address, num_bytes, may_access=may_access)
