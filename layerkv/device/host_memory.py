"""Host blocks of one CPU worker: an anonymous mapping that takes memory as it is first used."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from layerkv.core.geometry import KVGeometry
from layerkv.device import libc
from layerkv.device.mmap_arena import PAGE_BYTES
from layerkv.device.touch_ahead import TouchAhead


class MmapHostMemory:
    """Bytes ``[num_layers, num_host_blocks, page_bytes]``, zero at first; each layer begins at a page of the kernel,
    or at a multiple of ``alignment_bytes``.

    Layer outermost, so that consecutive host blocks of one layer are one stretch of memory.

    Raises:
        MemoryError: the kernel refused address space.
    """

    def __init__(self, geometry: KVGeometry, num_blocks: int, alignment_bytes: int = PAGE_BYTES) -> None:
        self.num_blocks = num_blocks
        self._page_bytes = geometry.page_bytes
        self.layer_bytes = -(-num_blocks * geometry.page_bytes // alignment_bytes) * alignment_bytes
        """Bytes from one layer's block 0 to the next layer's."""
        size = max(geometry.num_layers * self.layer_bytes, 1)
        self._address = libc.reserve(size, alignment_bytes)
        self._view = (ctypes.c_int8 * size).from_address(self._address)
        self._ahead = TouchAhead(geometry.num_layers, self.layer_bytes)
        self._before_unmap: list[Callable[[], Any]] = []
        weakref.finalize(self._view, _release, self._address, size, self._before_unmap).atexit = False

    def tensor(self) -> torch.Tensor:
        """All of it as int8 ``[num_layers, layer_bytes]``, which keeps the memory mapped."""
        return torch.frombuffer(self._view, dtype=torch.int8).view(-1, self.layer_bytes)

    def address(self, layer: int, block: int) -> int:
        """Address of ``block`` of ``layer``; valid while this object lives."""
        return self._address + layer * self.layer_bytes + block * self._page_bytes

    def used(self, num_blocks: int) -> None:
        """The first ``num_blocks`` host blocks have been stored to. From the thread that touches."""
        self._ahead.used(num_blocks * self._page_bytes)

    def touch_ahead(self) -> bool:
        """Touch a little of what is used next; False when there is nothing to touch.

        From the one thread that writes here: it writes what it finds.
        """
        if (stretch := self._ahead.take(self._may_touch)) is None:
            return False
        first = stretch.layer * self.layer_bytes + stretch.offset
        part = np.ctypeslib.as_array(self._view)[first : first + stretch.num_bytes]
        # Not MADV_POPULATE_WRITE: whoever maps memory in this process waits for that, and for no page fault.
        np.bitwise_or(part, 0, out=part)
        return True

    def _may_touch(self, offset: int, num_bytes: int) -> bool:
        """Whether so many bytes of each layer, from there on, may have memory of the kernel."""
        return True

    def wait_pinned(self, timeout_s: float) -> bool:
        """True: on the CPU there is nothing to pin."""
        return True

    def before_unmap(self, action: Callable[..., Any], *args: Any) -> None:
        """Call ``action`` when nobody uses the memory any more, before it goes. It must not know this object."""
        self._before_unmap.append(lambda: action(*args))


def _release(address: int, size: int, before: list[Callable[[], Any]]) -> None:
    for action in before:
        action()
    libc.unmap(address, size)
