"""The arena for CUDA workers: one reserved range in which each lane's memory is mapped once per layer.

CUDA allows several mappings of one handle; what is written through one is seen through the others once the kernel or
copy that wrote it has ended (CUDA programming guide, "Virtual Aliasing Support"), which the order of streams gives.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from layerkv.core.geometry import KVGeometry
from layerkv.device.cuda_driver import CudaDriver

GRANULARITY_BYTES = 2 << 20
"""What geometry aligns to. Every device so far maps in units of 2 MiB; another one is refused."""


logger = logging.getLogger(f"vllm.{__name__}")


class CudaMapping:
    """A mapped range, as tensors keep it alive; ``__cuda_array_interface__`` is how torch looks at foreign memory."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.address = address
        self.num_bytes = num_bytes
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|i1",
            "data": (address, False),
            "version": 3,
        }


def as_cuda_tensor(mapping: CudaMapping) -> torch.Tensor:
    """A tensor of the current device over a mapped range, which it keeps mapped."""
    return torch.as_tensor(mapping, device=f"cuda:{torch.cuda.current_device()}")


class CudaArena:
    """See :class:`layerkv.device.base.Arena`.

    Args:
        geometry: How the range is divided; aligned to :data:`GRANULARITY_BYTES`.
        driver: Of the device.
        as_tensor: Makes the tensor over the mapping (tests have no CUDA tensors).

    Raises:
        MemoryError: the device has not that much memory, or the driver refused; nothing is left behind.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        driver: CudaDriver,
        as_tensor: Callable[[CudaMapping], torch.Tensor] = as_cuda_tensor,
    ) -> None:
        require_granularity(driver, geometry)
        self.geometry = geometry
        size = geometry.virtual_bytes
        with ExitStack() as undo:
            address = driver.reserve(size)
            undo.callback(driver.free, address, size)
            _map_pool(address, geometry, driver, undo)
            map_zone(address, geometry, driver, undo)
            mapping = CudaMapping(address, size)
            self._tensor = as_tensor(mapping).zero_()
            # The range goes with the last tensor over it; at the end of the process the driver takes it anyway.
            weakref.finalize(mapping, release, driver, undo.pop_all()).atexit = False

    def tensor(self) -> torch.Tensor:
        """The whole range as a flat int8 tensor ``[virtual_bytes]``."""
        return self._tensor


def require_granularity(driver: CudaDriver, geometry: KVGeometry) -> None:
    """Refuse a device that maps in larger units than the geometry is aligned to.

    Raises:
        MemoryError: with both.
    """
    granularity = driver.granularity()
    if GRANULARITY_BYTES % granularity:
        raise MemoryError(f"this device maps memory in units of {granularity} bytes, not of {GRANULARITY_BYTES}")
    assert geometry.lane_bytes % GRANULARITY_BYTES == 0
    assert geometry.layer_bytes % GRANULARITY_BYTES == 0


def release(driver: CudaDriver, undo: ExitStack) -> None:
    """Take the memory away once nothing uses it; on whatever thread the last tensor went."""
    try:
        driver.enter_thread()
        driver.synchronize()
    except MemoryError as error:
        logger.warning("layerkv: KV memory is not given back, the device does not come to rest: %s", error)
        return
    undo.close()


def _map_pool(address: int, geometry: KVGeometry, driver: CudaDriver, undo: ExitStack) -> None:
    pool_bytes = geometry.pool_blocks * geometry.page_bytes
    for layer in range(geometry.num_layers):
        handle = driver.create(pool_bytes)
        try:
            _map(address + geometry.offset(layer, 0), pool_bytes, handle, driver, undo)
        finally:
            driver.release(handle)  # from now on the mapping keeps the memory


def map_zone(address: int, geometry: KVGeometry, driver: CudaDriver, undo: ExitStack) -> None:
    """Map each lane's memory once for each of its layers; ``undo`` takes it away."""
    if geometry.zone_blocks == 0:
        return
    for ranges in geometry.lane_ranges():
        handle = driver.create(geometry.lane_bytes)
        try:
            for offset, size in ranges:
                _map(address + offset, size, handle, driver, undo)
        finally:
            driver.release(handle)


def _map(address: int, num_bytes: int, handle: Any, driver: CudaDriver, undo: ExitStack) -> None:
    driver.map(address, num_bytes, handle)
    undo.callback(driver.unmap, address, num_bytes)
