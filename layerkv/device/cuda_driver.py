"""The calls of the CUDA driver that torch does not offer: virtual memory, batched copies, pinning memory of ours.

Each method is one call of ``cuda.bindings.driver``, with its status made an exception. A context is current on a
thread, not in a process: :meth:`CudaDriver.enter_thread` makes the device's current on another one.
"""

from __future__ import annotations

import ctypes
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from layerkv.errors import TransferError

Addresses = npt.NDArray[np.uint64]

_BATCH_SINCE = 12080  # the CUDA version whose signature of cuMemcpyBatchAsync is asked for
_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
_PORTABLE_AND_MAPPED = 1 | 2  # CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_uint), ("id", ctypes.c_int))


class _CopyAttributes(ctypes.Structure):
    """``CUmemcpyAttributes`` of cuda.h."""

    _fields_ = (
        ("src_access_order", ctypes.c_uint),
        ("source", _Location),
        ("destination", _Location),
        ("flags", ctypes.c_uint),
    )


_BATCH_COPY = ctypes.CFUNCTYPE(
    ctypes.c_uint,
    ctypes.c_void_p,  # destinations
    ctypes.c_void_p,  # sources
    ctypes.c_void_p,  # sizes
    ctypes.c_size_t,  # how many
    ctypes.c_void_p,  # attributes
    ctypes.c_void_p,  # from which copy on each applies
    ctypes.c_size_t,  # how many attributes
    ctypes.c_void_p,  # out: which copy failed
    ctypes.c_void_p,  # stream
)


class CudaDriver:
    """The driver, as one device's worker uses it.

    Args:
        device: Index of the device in this process.
        bindings: In place of ``cuda.bindings.driver`` (tests).

    The device's context must be current on the thread that makes this.

    Raises:
        ImportError: ``cuda-bindings`` is not installed.
    """

    def __init__(self, device: int, bindings: Any = None) -> None:
        if bindings is None:
            bindings = import_module("cuda.bindings.driver")
        self._cu = bindings
        self._on_device = bindings.CUmemLocation()
        self._on_device.type = bindings.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._on_device.id = device
        self._properties = bindings.CUmemAllocationProp()
        self._properties.type = bindings.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location = self._on_device
        self._access = bindings.CUmemAccessDesc()
        self._access.location = self._on_device
        self._access.flags = bindings.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._context = self._memory("cuCtxGetCurrent")
        self._in_stream_order = _CopyAttributes(src_access_order=_IN_STREAM_ORDER)
        self._from_first_on = ctypes.c_size_t(0)
        self._batch_copy = self._find_batch_copy()

    def enter_thread(self) -> None:
        """Let the calling thread use the device, also while another one captures a CUDA graph.

        Capture forbids calls like :meth:`pin` to every thread that does not say that it has nothing to do with it.
        """
        self._memory("cuCtxSetCurrent", self._context)
        relaxed = self._cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._memory("cuThreadExchangeStreamCaptureMode", relaxed)

    # Virtual memory ------------------------------------------------------------------------------------------

    def granularity(self) -> int:
        """Bytes that sizes and addresses of mappings are multiples of."""
        flag = self._cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(self._memory("cuMemGetAllocationGranularity", self._properties, flag))

    def reserve(self, num_bytes: int) -> int:
        """Address of a range without memory.

        Raises:
            MemoryError: the driver refused.
        """
        return int(self._memory("cuMemAddressReserve", num_bytes, 0, 0, 0))

    def free(self, address: int, num_bytes: int) -> None:
        """Give a reserved range back; nothing is mapped there."""
        self._memory("cuMemAddressFree", address, num_bytes)

    def create(self, num_bytes: int) -> Any:
        """A handle to that much memory of the device. The memory lives while the handle or a mapping of it does.

        Raises:
            MemoryError: the device has not that much.
        """
        return self._memory("cuMemCreate", num_bytes, self._properties, 0)

    def release(self, handle: Any) -> None:
        """Give a handle back."""
        self._memory("cuMemRelease", handle)

    def map(self, address: int, num_bytes: int, handle: Any) -> None:
        """Put the handle's memory at an address, to be read and written by the device. It may have several.

        Raises:
            MemoryError: the driver refused.
        """
        self._memory("cuMemMap", address, num_bytes, 0, handle, 0)
        try:
            self._memory("cuMemSetAccess", address, num_bytes, [self._access], 1)
        except MemoryError:
            self.unmap(address, num_bytes)
            raise

    def unmap(self, address: int, num_bytes: int) -> None:
        """Take away what one :meth:`map` put there."""
        self._memory("cuMemUnmap", address, num_bytes)

    def synchronize(self) -> None:
        """Wait for everything on the device: only before its memory is taken away."""
        self._memory("cuCtxSynchronize")

    # Host memory ---------------------------------------------------------------------------------------------

    def pin(self, address: int, num_bytes: int) -> None:
        """Pin host memory, so that the device copies from and to it by itself.

        Raises:
            MemoryError: the driver, or the limit on locked memory, refused.
        """
        self._memory("cuMemHostRegister", address, num_bytes, _PORTABLE_AND_MAPPED)

    def unpin(self, address: int) -> None:
        """Undo :meth:`pin` of the range that begins at ``address``."""
        self._memory("cuMemHostUnregister", address)

    # Copies --------------------------------------------------------------------------------------------------

    def copy_batch(self, to: Addresses, source: Addresses, sizes: Addresses, stream: int) -> None:
        """Enqueue ``sizes[i]`` bytes from ``source[i]`` to ``to[i]`` for every ``i``; the arrays may go at once.

        Sources are read in stream order: a load's source may be what a store on another stream, waited for by
        an event, has only just written.

        Raises:
            TransferError: the driver refused.
        """
        if self._batch_copy is None:
            self.copy_each(to, source, sizes, stream)
            return
        failed = ctypes.c_size_t(0)
        status = self._batch_copy(
            to.ctypes.data,
            source.ctypes.data,
            sizes.ctypes.data,
            len(to),
            ctypes.addressof(self._in_stream_order),
            ctypes.addressof(self._from_first_on),
            1,
            ctypes.addressof(failed),
            stream,
        )
        if status != 0:
            raise TransferError(f"cuMemcpyBatchAsync: copy {failed.value} of {len(to)}: {self._name_of(status)}")

    def copy_each(self, to: Addresses, source: Addresses, sizes: Addresses, stream: int) -> None:
        """The same by one call each: for host memory that is not pinned (yet), and for old drivers.

        Raises:
            TransferError: the driver refused.
        """
        for one_to, one_source, size in zip(to.tolist(), source.tolist(), sizes.tolist(), strict=True):
            status = self._cu.cuMemcpyAsync(one_to, one_source, size, stream)[0]
            if int(status) != 0:
                raise TransferError(f"cuMemcpyAsync of {size} bytes: {self._name_of(status)}")

    def _find_batch_copy(self) -> Any:
        status, address, *_ = self._cu.cuGetProcAddress(b"cuMemcpyBatchAsync", _BATCH_SINCE, 0)
        return _BATCH_COPY(int(address)) if int(status) == 0 and int(address) else None

    def _memory(self, call: str, *args: Any) -> Any:
        status, *result = getattr(self._cu, call)(*args)
        if int(status) != 0:
            raise MemoryError(f"{call}: {self._name_of(status)}")
        return result[0] if result else None

    def _name_of(self, status: int) -> str:
        try:
            return str(self._cu.CUresult(status).name)
        except ValueError:
            return f"CUDA error {int(status)}"
