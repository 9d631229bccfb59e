"""The arena for CPU workers: one mmap range in which a memfd is mapped once per layer over its lane's zone.

Nothing outlives the process: the memfd has no name and is closed as soon as it is mapped.
"""

from __future__ import annotations

import ctypes
import os
import weakref

import torch

from layerkv.core.geometry import KVGeometry
from layerkv.device import libc

PAGE_BYTES = 4096
"""Mapping granularity on CPU."""


class MmapArena:
    """See :class:`layerkv.device.base.Arena`.

    Raises:
        MemoryError: the kernel refused address space or memory; nothing is left behind.
    """

    def __init__(self, geometry: KVGeometry, alignment_bytes: int = PAGE_BYTES) -> None:
        assert geometry.lane_bytes % PAGE_BYTES == 0
        assert geometry.layer_bytes % PAGE_BYTES == 0
        self.geometry = geometry
        size = geometry.virtual_bytes
        address = libc.reserve(size, alignment_bytes)
        try:
            _alias_zone(address, geometry)
            view = (ctypes.c_int8 * size).from_address(address)
        except BaseException:
            libc.unmap(address, size)
            raise
        # torch keeps `view` alive for as long as any tensor uses the memory, so the range goes with the last one
        weakref.finalize(view, libc.unmap, address, size).atexit = False
        self._tensor = torch.frombuffer(view, dtype=torch.int8)
        self._touch()

    def tensor(self) -> torch.Tensor:
        """The whole range as a flat int8 tensor ``[virtual_bytes]``."""
        return self._tensor

    def _touch(self) -> None:
        # Every page now, as an ordinary allocation would: the first prompts must not pay for page faults, and memory
        # that is not there must be missed at start-up.
        self._tensor.zero_()


def _alias_zone(address: int, geometry: KVGeometry) -> None:
    if geometry.zone_blocks == 0:
        return
    fd = os.memfd_create("layerkv-lanes", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, geometry.num_lanes * geometry.lane_bytes)
        for lane, ranges in enumerate(geometry.lane_ranges()):
            for offset, size in ranges:
                libc.map_shared_at(address + offset, size, fd, lane * geometry.lane_bytes)
    finally:
        os.close(fd)
