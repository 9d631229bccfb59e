"""Host blocks of one CUDA worker: memory that is pinned layer by layer in the background.

Pinning runs at a few GB/s, so a large host memory takes minutes. Nobody waits for it: until a layer is pinned, copies
from and to it go one by one through the driver's staging memory, at a fraction of the speed of the link.

Each layer is a registration of its own: the driver refuses batched copies that touch two of them, and no copy crosses
from one layer into the next.
"""

from __future__ import annotations

import logging
import threading

from layerkv.core.geometry import KVGeometry
from layerkv.device.cuda_driver import CudaDriver
from layerkv.device.host_memory import MmapHostMemory
from layerkv.units import format_bytes

MOST_PIECE_BYTES = 64 << 30
"""Most bytes that are pinned in one call. A layer's host blocks are more only where host memory is terabytes. Not
measured: chosen by judgement."""

logger = logging.getLogger(f"vllm.{__name__}")


class PinnedHostMemory(MmapHostMemory):
    """Bytes ``[num_layers, num_host_blocks, page_bytes]``, zero at first, pinned from the first layer on.

    Raises:
        MemoryError: the kernel refused address space. That it cannot be pinned is no error: see :attr:`problem`.
    """

    def __init__(self, geometry: KVGeometry, num_blocks: int, driver: CudaDriver) -> None:
        super().__init__(geometry, num_blocks)
        self.problem: str | None = None
        """Why not all of it is pinned, and what to set; None while all goes well."""
        self.num_pinned_layers = 0
        """Layers pinned so far, the first ones."""
        self._num_layers = geometry.num_layers
        self._driver = driver
        self._closing = threading.Event()
        pinned: list[int] = []
        self.before_unmap(_unpin, driver, pinned)
        self._pinned = pinned
        self._thread = threading.Thread(target=self._pin, name="layerkv-pin", daemon=True)
        self._thread.start()

    @property
    def is_pinned(self) -> bool:
        """Whether all of it is."""
        return self.num_pinned_layers == self._num_layers

    def is_layer_pinned(self, layer: int) -> bool:
        """Whether copies of that layer may go in batches and be made by kernels."""
        return layer < self.num_pinned_layers

    def wait_pinned(self, timeout_s: float) -> bool:
        """Block until nothing more will be pinned, or the time is up; whether all is pinned."""
        self._thread.join(timeout_s)
        return self.is_pinned

    def close(self) -> None:
        """Unpin. No copy is under way any more. Idempotent."""
        self._closing.set()
        self._thread.join()
        self.num_pinned_layers = 0
        _unpin(self._driver, self._pinned)

    def _pin(self) -> None:
        for layer in range(self._num_layers):
            if self._closing.is_set():
                return
            try:
                if layer == 0:
                    self._driver.enter_thread()
                if self.layer_bytes > MOST_PIECE_BYTES:
                    raise MemoryError(f"a layer's {format_bytes(self.layer_bytes)} are too much for one call")
                self._driver.pin(self.address(layer, 0), self.layer_bytes)
            except (MemoryError, RuntimeError) as error:  # the latter: a driver without that call
                self.problem = (
                    f"host memory of {self._num_layers - layer} of {self._num_layers} layers could not be pinned "
                    f"({error}): copies from and to it are several times slower; set a smaller host_memory, or raise "
                    "the limit on locked memory (ulimit -l)"
                )
                logger.warning("layerkv: %s", self.problem)
                return
            self._pinned.append(self.address(layer, 0))
            self.num_pinned_layers = layer + 1
        logger.info("layerkv: all %s of host memory are pinned", format_bytes(self._num_layers * self.layer_bytes))


def _unpin(driver: CudaDriver, addresses: list[int]) -> None:
    if addresses:
        driver.enter_thread()
    while addresses:
        driver.unpin(addresses.pop())
