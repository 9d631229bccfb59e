"""Host blocks of one CPU worker: an anonymous mapping that takes memory as it is first used."""

from __future__ import annotations

import ctypes
import weakref

from layerkv.core.geometry import KVGeometry
from layerkv.device import libc


class MmapHostMemory:
    """Bytes ``[num_layers, num_host_blocks, page_bytes]``, zero at first.

    Layer outermost, so that consecutive host blocks of one layer are one stretch of memory.

    Raises:
        MemoryError: the kernel refused address space.
    """

    def __init__(self, geometry: KVGeometry, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._page_bytes = geometry.page_bytes
        self._layer_bytes = num_blocks * geometry.page_bytes
        size = max(geometry.num_layers * self._layer_bytes, 1)
        self._address = libc.reserve(size)
        self._view = (ctypes.c_int8 * size).from_address(self._address)
        weakref.finalize(self._view, libc.unmap, self._address, size).atexit = False

    def address(self, layer: int, block: int) -> int:
        """Address of ``block`` of ``layer``; valid while this object lives."""
        return self._address + layer * self._layer_bytes + block * self._page_bytes
