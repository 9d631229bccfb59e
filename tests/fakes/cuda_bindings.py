"""What `layerkv.device.cuda_driver` uses of `cuda.bindings.driver`, over memory of this process.

Device memory is a memfd, so that mapping one handle at several addresses really aliases, as it does on a GPU. Like the
driver it refuses what is not aligned, not reserved, mapped twice or more than there is.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import torch

from layerkv.device import libc
from layerkv.device.cuda_arena import CudaMapping
from layerkv.device.cuda_driver import _BATCH_COPY

UNIT = 2 << 20
OLD_BYTES = 0x5A
"""What device memory is full of when somebody gets it: the driver promises nothing."""


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NOT_FOUND = 500


SUCCESS, INVALID, OUT_OF_MEMORY, NO_CONTEXT, NOT_FOUND = CUresult
CONTEXT = object()


def _map_nothing_at(address: int, size: int) -> None:
    """The range stays reserved, and whoever reads or writes it is killed."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | libc._MAP_FIXED | libc._MAP_NORESERVE
    assert libc._libc().mmap(address, size, 0, flags, -1, 0) == address


class FakeBindings:
    """One device. `refusals` maps the name of a call to the number of calls that succeed before one is refused."""

    CUresult = CUresult
    CUmemLocation = SimpleNamespace
    CUmemAllocationProp = SimpleNamespace
    CUmemAccessDesc = SimpleNamespace
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)

    def __init__(
        self,
        *,
        granularity: int = UNIT,
        has_batches: bool = True,
        refusals: dict[str, int] | None = None,
        enqueue: Callable[[int, Callable[[], None]], None] | None = None,
    ) -> None:
        self.refusals = refusals or {}
        self.calls: list[str] = []
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.handles: dict[int, int] = {}
        self.accessible: set[int] = set()
        self.pinned: dict[int, int] = {}
        self.captures = False
        self._thread = threading.local()
        self._thread.context = CONTEXT  # as torch leaves it on the thread that makes this
        self._granularity = granularity
        self._enqueue = enqueue or (lambda stream, action: action())
        self._batch_copy = _BATCH_COPY(self._copy_batch)
        self._has_batches = has_batches

    @property
    def mapped_bytes(self) -> int:
        """Of addresses at which there is memory; less of memory, where one handle is mapped more than once."""
        return sum(self.mapped.values())

    @property
    def holds_nothing(self) -> bool:
        """Whether all that was taken has been given back."""
        return not (self.reserved or self.mapped or self.handles or self.pinned)

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:
        return SUCCESS, getattr(self._thread, "context", None)

    def cuCtxSetCurrent(self, context: object) -> tuple[Any, ...]:
        self._thread.context = context
        return (SUCCESS,)

    def cuThreadExchangeStreamCaptureMode(self, mode: int) -> tuple[Any, ...]:
        self._thread.capture_mode = mode
        return SUCCESS, 0

    def cuMemGetAllocationGranularity(self, properties: Any, flag: int) -> tuple[Any, ...]:
        assert properties.location.type == 1
        return SUCCESS, self._granularity

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> tuple[Any, ...]:
        if self._is_refused("cuMemAddressReserve") or size % UNIT:
            return OUT_OF_MEMORY, None
        address = libc.reserve(size)
        libc.protect(address, size, may_access=False)
        self.reserved[address] = size
        return SUCCESS, address

    def cuMemAddressFree(self, address: int, size: int) -> tuple[Any, ...]:
        if self.reserved.get(address) != size or any(address <= at < address + size for at in self.mapped):
            return (INVALID,)
        del self.reserved[address]
        libc.unmap(address, size)
        return (SUCCESS,)

    def cuMemCreate(self, size: int, properties: Any, flags: int) -> tuple[Any, ...]:
        if self._is_refused("cuMemCreate") or size % UNIT or size == 0:
            return OUT_OF_MEMORY, None
        fd = os.memfd_create("fake-device")
        assert os.pwrite(fd, bytes([OLD_BYTES]) * size, 0) == size
        self.handles[fd] = size
        return SUCCESS, fd

    def cuMemRelease(self, handle: int) -> tuple[Any, ...]:
        del self.handles[handle]
        os.close(handle)
        return (SUCCESS,)

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> tuple[Any, ...]:
        if self._is_refused("cuMemMap") or offset != 0 or self.handles.get(handle) != size:
            return (INVALID,)
        start, length = next(((at, n) for at, n in self.reserved.items() if at <= address < at + n), (0, 0))
        is_taken = any(at < address + size and address < at + n for at, n in self.mapped.items())
        if address + size > start + length or (address - start) % UNIT or is_taken:
            return (INVALID,)
        libc.map_shared_at(address, size, handle, 0)
        self.mapped[address] = size
        return (SUCCESS,)

    def cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> tuple[Any, ...]:
        if self._is_refused("cuMemSetAccess") or self.mapped.get(address) != size:
            return (INVALID,)
        self.accessible.add(address)
        return (SUCCESS,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[Any, ...]:
        if self.mapped.get(address) != size:
            return (INVALID,)
        del self.mapped[address]
        self.accessible.discard(address)
        _map_nothing_at(address, size)
        return (SUCCESS,)

    def cuCtxSynchronize(self) -> tuple[Any, ...]:
        if getattr(self._thread, "context", None) is not CONTEXT or self._is_refused("cuCtxSynchronize"):
            return (NO_CONTEXT,)
        self.calls.append("cuCtxSynchronize")
        return (SUCCESS,)

    def cuMemHostRegister(self, address: int, size: int, flags: int) -> tuple[Any, ...]:
        if self._is_refused("cuMemHostRegister"):
            return (OUT_OF_MEMORY,)
        if getattr(self._thread, "context", None) is not CONTEXT:
            return (NO_CONTEXT,)
        if self.captures and getattr(self._thread, "capture_mode", 0) != 2:
            return (INVALID,)
        if any(at < address + size and address < at + n for at, n in self.pinned.items()):
            return (INVALID,)
        self.pinned[address] = size
        return (SUCCESS,)

    def cuMemHostUnregister(self, address: int) -> tuple[Any, ...]:
        if getattr(self._thread, "context", None) is not CONTEXT:
            return (NO_CONTEXT,)
        return (SUCCESS if self.pinned.pop(address, None) else INVALID,)

    def cuGetProcAddress(self, name: bytes, version: int, flags: int) -> tuple[Any, ...]:
        assert name == b"cuMemcpyBatchAsync"
        if not self._has_batches:
            return NOT_FOUND, 0, 0
        return SUCCESS, ctypes.cast(self._batch_copy, ctypes.c_void_p).value, 0

    def cuMemcpyAsync(self, to: int, source: int, size: int, stream: int) -> tuple[Any, ...]:
        if self._is_refused("cuMemcpyAsync"):
            return (INVALID,)
        self.calls.append("cuMemcpyAsync")
        self._enqueue(stream, lambda: ctypes.memmove(to, source, size))
        return (SUCCESS,)

    def _copy_batch(self, *args: int) -> int:
        to, source, sizes, count, attributes, _first, _num_attributes, failed, stream = args
        if self._is_refused("cuMemcpyBatchAsync"):
            ctypes.c_size_t.from_address(failed).value = 0
            return INVALID
        assert ctypes.c_uint.from_address(attributes).value == 1, "sources are read in stream order"
        arrays = [list((ctypes.c_uint64 * count).from_address(at)) for at in (to, source, sizes)]
        if not all(
            self._is_in_one_registration(a, size) or self._is_in_one_registration(b, size)
            for a, b, size in zip(*arrays, strict=True)
        ):
            return INVALID
        self.calls.append("cuMemcpyBatchAsync")
        for copy in zip(*arrays, strict=True):
            self._enqueue(stream or 0, lambda copy=copy: ctypes.memmove(*copy))
        return SUCCESS

    def _is_in_one_registration(self, address: int, size: int) -> bool:
        return any(at <= address and address + size <= at + length for at, length in self.pinned.items())

    def _is_refused(self, call: str) -> bool:
        left = self.refusals.get(call)
        if left is None:
            return False
        self.refusals[call] = left - 1
        return left == 0


def over_own_memory(mapping: CudaMapping) -> torch.Tensor:
    """What torch makes of `__cuda_array_interface__` on a GPU: a tensor that keeps the mapping alive."""
    view = (ctypes.c_int8 * mapping.num_bytes).from_address(mapping.address)
    view.mapping = mapping  # type: ignore[attr-defined]
    return torch.frombuffer(view, dtype=torch.int8)
