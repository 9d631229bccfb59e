"""The CUDA arena whose pool grows and shrinks by segment: a handle per piece, mapped and unmapped by the driver.

``cuMemMap`` maps whole handles, so each piece has its own. Making handles is what takes long: they are made in the
background before they are mapped, and the driver has them back as soon as they are unmapped, since somebody else waits
for the memory. A kernel that reads or writes a segment without memory ends the process.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentLayout
from layerkv.device.base import Event
from layerkv.device.cuda_arena import (
    GRANULARITY_BYTES,
    CudaMapping,
    as_cuda_tensor,
    map_zone,
    release,
    require_granularity,
)
from layerkv.device.cuda_driver import CudaDriver
from layerkv.device.cuda_engine import CudaEvent
from layerkv.device.segment_thread import SegmentThread
from layerkv.units import format_bytes


class ElasticCudaArena:
    """See :class:`layerkv.device.base.ElasticArena`.

    Args:
        geometry: All segments of ``layout`` are its pool.
        layout: How the pool is divided.
        driver: Of the device.
        num_mapped: Segments with memory at first, the lowest.
        as_tensor: Makes the tensor over the mapping (tests have no CUDA tensors).
        cuda: In place of ``torch.cuda``: its streams and events (tests).

    Raises:
        MemoryError: the device has not that much memory, or the driver refused; nothing is left behind.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        layout: SegmentLayout,
        driver: CudaDriver,
        *,
        num_mapped: int,
        as_tensor: Callable[[CudaMapping], torch.Tensor] = as_cuda_tensor,
        cuda: Any = torch.cuda,
    ) -> None:
        require_granularity(driver, geometry)
        assert layout.num_segments * layout.segment_blocks == geometry.pool_blocks
        assert layout.segment_blocks * geometry.page_bytes % GRANULARITY_BYTES == 0
        self.geometry, self.layout = geometry, layout
        size = geometry.virtual_bytes
        with ExitStack() as undo:
            address = driver.reserve(size)
            undo.callback(driver.free, address, size)
            self._pieces = _Pieces(address, geometry, layout, driver)
            undo.callback(self._pieces.give_all_back)
            try:
                map_zone(address, geometry, driver, undo)
                for segment in range(num_mapped):
                    self._pieces.prepare(segment)
                    self._pieces.map(segment)
            except MemoryError as error:
                wanted = num_mapped * layout.segment_blocks * geometry.block_bytes
                wanted += geometry.num_lanes * geometry.lane_bytes
                raise MemoryError(
                    f"the lane zone and {num_mapped} segments of the KV pool take {format_bytes(wanted)}, for which "
                    f"the device has no room ({error}); set kv_floor to less, or end what else uses the device"
                ) from error
            mapping = CudaMapping(address, size)
            self._tensor = as_tensor(mapping)
            self._blocks = self._tensor.view(geometry.num_layers, geometry.total_blocks, geometry.page_bytes)
            for layer in self._blocks:
                layer[: num_mapped * layout.segment_blocks].zero_()
                layer[geometry.pool_blocks :].zero_()
            weakref.finalize(mapping, release, driver, undo.pop_all()).atexit = False
        self._cuda, self._stream = cuda, cuda.Stream()
        self._unprepared: set[int] = set()
        self._thread = SegmentThread(driver.enter_thread)
        weakref.finalize(self, self._thread.end)

    def tensor(self) -> torch.Tensor:
        """The whole range as a flat int8 tensor ``[virtual_bytes]``."""
        return self._tensor

    def prepare_map(self, segments: Sequence[int]) -> Event:
        self._unprepared.difference_update(segments)
        pieces, tensor = self._pieces, self._tensor
        return self._thread.prepare(lambda: _prepare(pieces, segments, tensor), segments)

    def map(self, segments: Sequence[int]) -> None:
        """Enqueues the clearing of what comes on the current stream, as all that will use it is enqueued later."""
        assert self._unprepared.isdisjoint(segments), "not prepared"
        done: list[int] = []
        try:
            for segment in segments:
                self._pieces.map(segment)
                done.append(segment)
        except MemoryError:
            for segment in done:
                self._pieces.unmap(segment)
            self._pieces.forget(segments)
            raise
        for segment in segments:
            blocks = self.layout.blocks(segment)
            for layer in self._blocks:  # each piece is one stretch, which the device clears by itself
                layer[blocks.start : blocks.stop].zero_()

    def unmap(self, segments: Sequence[int], *, after: Sequence[Event] = ()) -> Event:
        for event in after:
            assert isinstance(event, CudaEvent)
            self._stream.wait_event(event.event)  # even if given up: what it stands for may be under way
        fence = CudaEvent(self._cuda.Event(), self._stream, copies_after=after)
        # The order has the tensor, so that the range stays mapped until it is carried out.
        pieces, tensor = self._pieces, self._tensor
        self._unprepared.update(segments)
        return self._thread.give_back(lambda: _unmap(pieces, segments, tensor), segments, [fence])


def _prepare(pieces: _Pieces, segments: Sequence[int], keep: torch.Tensor) -> None:
    try:
        for segment in segments:
            pieces.prepare(segment)
    except MemoryError:
        pieces.forget(segments)
        raise


def _unmap(pieces: _Pieces, segments: Sequence[int], keep: torch.Tensor) -> None:
    for segment in segments:
        pieces.unmap(segment)


class _Pieces:
    """Handles that are ready for segments, and segments that are mapped. One thread at a time has to do with one."""

    def __init__(self, address: int, geometry: KVGeometry, layout: SegmentLayout, driver: CudaDriver) -> None:
        self._address, self._geometry, self._layout, self._driver = address, geometry, layout, driver
        self._piece_bytes = layout.segment_blocks * geometry.page_bytes
        self._ready: dict[int, list[Any]] = {}  # by segment, a handle for each layer
        self._mapped: dict[int, list[int]] = {}  # by segment, addresses

    def prepare(self, segment: int) -> None:
        handles = self._ready.setdefault(segment, [])
        while len(handles) < self._geometry.num_layers:
            handles.append(self._driver.create(self._piece_bytes))

    def forget(self, segments: Sequence[int]) -> None:
        """Give the handles back that are ready for these, if any are."""
        for segment in segments:
            for handle in self._ready.pop(segment, ()):
                self._driver.release(handle)

    def map(self, segment: int) -> None:
        first = self._layout.blocks(segment).start
        mapped = self._mapped[segment] = []
        try:
            for layer, handle in enumerate(self._ready[segment]):
                address = self._address + self._geometry.offset(layer, first)
                self._driver.map(address, self._piece_bytes, handle)
                mapped.append(address)
        except MemoryError:
            self.unmap(segment)
            raise
        finally:
            self.forget([segment])  # from now on the mapping keeps the memory

    def unmap(self, segment: int) -> None:
        for address in self._mapped.pop(segment, ()):
            self._driver.unmap(address, self._piece_bytes)

    def give_all_back(self) -> None:
        self.forget(list(self._ready))
        for segment in list(self._mapped):
            self.unmap(segment)
