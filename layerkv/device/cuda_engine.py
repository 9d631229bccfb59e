"""The transfer engine for CUDA workers: streams of their own for stores and loads, ordered by events.

Nothing here waits for the device but :meth:`CudaTransferEngine.wait_host` and :meth:`CudaTransferEngine.close`, which
are asked to.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from layerkv.core.geometry import KVGeometry
from layerkv.core.transfer import BlockRun
from layerkv.device.base import COPY_TIMEOUT_S, Arena, Direction, Event, of_same_kind
from layerkv.device.cuda_driver import Addresses, CudaDriver
from layerkv.device.patience import Patience
from layerkv.device.pinned_memory import PinnedHostMemory
from layerkv.device.run_table import DEVICE_COLUMN, HOST_COLUMN, RunCache, RunTable, block_pairs
from layerkv.errors import LostCopyError, TransferError
from layerkv.kernels.block_copy import copy_blocks
from layerkv.kernels.layout import BlockLayout

KERNEL_BELOW_BYTES = 28 << 10
"""Fragments smaller than this are copied by a kernel, larger ones by the copy engines. Not measured: chosen by what
vLLM's authors measured on an H100 (vLLM 0.32, ``v1/kv_offload/cpu/swap_blocks_triton.py``), where one overtakes the
other; `benchmarks/gpu/run_book.py` is there to measure it."""

_POLL_S = 50e-6
"""Between two looks at an event that has not happened, a thread that waits sleeps so long. Not measured: chosen by
judgement."""


class CudaEvent:
    """See :class:`layerkv.device.base.Event`. Recorded when it is made.

    A copy's is given up when the copy takes too long once the compute that it waits for has ended (another rank may
    hold that up for as long as it likes). A point in the compute stream never is.
    """

    __slots__ = ("_compute", "_is_done", "_patience", "error", "event")

    def __init__(self, event: Any, stream: Any, *, copies_after: Sequence[Event] | None = None) -> None:
        self.event = event
        self.error: BaseException | None = None
        self._is_done = False
        self._patience: Patience | None = None if copies_after is None else Patience(COPY_TIMEOUT_S)
        self._compute = [e for e in copies_after or () if isinstance(e, CudaEvent) and e._patience is None]
        event.record(stream)

    def is_done(self) -> bool:
        if not self._is_done:
            try:
                self._is_done = self.event.query()
            except RuntimeError as error:  # sticky: nothing on this device will ever end again
                self.fail(TransferError(f"the CUDA device failed: {error}"))
            if not self._is_done and self._takes_too_long():
                self.fail(LostCopyError(f"a copy did not end in {COPY_TIMEOUT_S:.0f} s"))
        return self._is_done

    def _takes_too_long(self) -> bool:
        if self._patience is None:
            return False
        if self._compute:
            self._compute = [event for event in self._compute if not event.is_done()]
            self._patience = Patience(COPY_TIMEOUT_S)
            return False
        return self._patience.is_over()

    def fail(self, error: BaseException) -> None:
        """Give it up: it counts as ended, with this error."""
        self.error, self._is_done = error, True


class _UnderWay(NamedTuple):
    direction: Direction
    begun: CudaEvent
    ended: CudaEvent


class CudaTransferEngine:
    """See :class:`layerkv.device.base.TransferEngine`.

    Background copies have streams of their own, so that what a step waits for never stands behind a whole request.
    All have the lowest priority: the model's stream has that or a higher one.

    Args:
        arena: KV memory.
        host: Host blocks.
        driver: Of the device.
        kernel_below_bytes: In place of :data:`KERNEL_BELOW_BYTES`.
        cuda: In place of ``torch.cuda``: its streams and events (tests).
    """

    def __init__(
        self,
        arena: Arena,
        host: PinnedHostMemory,
        driver: CudaDriver,
        *,
        kernel_below_bytes: int | None = None,
        cuda: Any = torch.cuda,
    ) -> None:
        self._geometry, self._host, self._driver, self._cuda = arena.geometry, host, driver, cuda
        self._tensor = arena.tensor()
        self._base = self._tensor.data_ptr()
        self._tables = {d: RunCache(arena.geometry, host.num_blocks, lambda table: table) for d in Direction}
        self._kernels = _KernelCopies(self._tensor, arena.geometry, host)
        self._kernel_below_bytes = KERNEL_BELOW_BYTES if kernel_below_bytes is None else kernel_below_bytes
        self._streams = {(direction, background): cuda.Stream() for direction in Direction for background in (0, 1)}
        self._under_way: deque[_UnderWay] = deque()
        self._seconds = dict.fromkeys(Direction, 0.0)
        self._is_closed = False

    def record_compute(self) -> Event:
        return CudaEvent(self._cuda.Event(), self._cuda.current_stream())

    def submit(
        self,
        direction: Direction,
        layers: Sequence[int],
        runs: Sequence[BlockRun],
        *,
        after: Sequence[Event] = (),
        background: bool = False,
    ) -> Event:
        if self._is_closed:
            raise TransferError(f"{direction} submitted after the transfer engine was closed")
        self._count_ended()
        stream = self._streams[direction, background]
        for event in after:
            assert isinstance(event, CudaEvent)
            stream.wait_event(event.event)
        begun = CudaEvent(self._cuda.Event(enable_timing=True), stream)
        failed: TransferError | None = None
        try:
            _require_success(after, direction)
            if len(table := self._tables[direction].of(runs)):
                self._enqueue(direction, layers, table, stream)
        except (TransferError, RuntimeError) as error:  # torch's and Triton's: no memory, no launch
            failed = error if isinstance(error, TransferError) else TransferError(f"{direction}: {error}")
        ended = CudaEvent(self._cuda.Event(enable_timing=True), stream, copies_after=after)
        if failed is not None:
            ended.fail(failed)
        else:
            self._under_way.append(_UnderWay(direction, begun, ended))
        return ended

    def wait_compute(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._cuda.current_stream().wait_event(event.event)  # even if given up: compute never passes what still writes
        if event.error is not None:
            raise of_same_kind(event.error)(f"a copy failed: {event.error}") from event.error

    def wait_host(self, event: Event, timeout_s: float) -> bool:
        patience = Patience(timeout_s)
        while not event.is_done():
            if patience.is_over():
                return event.is_done()
            time.sleep(_POLL_S)
        return True

    def take_seconds(self) -> dict[Direction, float]:
        self._count_ended()
        seconds, self._seconds = self._seconds, dict.fromkeys(Direction, 0.0)
        return seconds

    def take_waited_s(self) -> float | None:
        return None  # a stream waits, and no thread here

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            try:
                for stream in self._streams.values():
                    stream.synchronize()
            finally:
                self._host.close()

    def _enqueue(self, direction: Direction, layers: Sequence[int], table: RunTable, stream: Any) -> None:
        is_pinned = self._host.is_layer_pinned(max(layers))
        fragment_bytes = int(table[:, 2].mean() * self._geometry.page_bytes)
        if is_pinned and fragment_bytes < self._kernel_below_bytes:
            with self._cuda.stream(stream):
                self._kernels.copy(direction, layers, table)
            return
        on_device, on_host, sizes = self._addresses(layers, table)
        to, source = (on_host, on_device) if direction is Direction.STORE else (on_device, on_host)
        copy = self._driver.copy_batch if is_pinned else self._driver.copy_each
        copy(to, source, sizes, stream.cuda_stream)

    def _addresses(self, layers: Sequence[int], table: RunTable) -> tuple[Addresses, Addresses, Addresses]:
        """Device address, host address and size of every fragment."""
        offsets = (table * self._geometry.page_bytes).astype(np.uint64)
        device = np.array([self._base + self._geometry.offset(layer, 0) for layer in layers], dtype=np.uint64)
        host = np.array([self._host.address(layer, 0) for layer in layers], dtype=np.uint64)
        on_device = (device[:, None] + offsets[None, :, DEVICE_COLUMN]).ravel()
        on_host = (host[:, None] + offsets[None, :, HOST_COLUMN]).ravel()
        return on_device, on_host, np.tile(offsets[:, 2], len(layers))

    def _count_ended(self) -> None:
        while self._under_way and self._under_way[0].ended.is_done():
            direction, begun, ended = self._under_way.popleft()
            if ended.error is None:
                self._seconds[direction] += begun.event.elapsed_time(ended.event) / 1e3


class _KernelCopies:
    """Copies of small fragments, enqueued on the current stream."""

    def __init__(self, tensor: torch.Tensor, geometry: KVGeometry, host: PinnedHostMemory) -> None:
        self._device_layers = tensor.view(geometry.num_layers, geometry.layer_bytes)
        self._host_layers = host.tensor()
        self._layout = BlockLayout.contiguous(geometry.page_bytes)

    def copy(self, direction: Direction, layers: Sequence[int], table: RunTable) -> None:
        """Enqueue the copies. torch keeps the lists of blocks until this stream has passed them."""
        device_blocks, host_blocks = (
            torch.from_numpy(ids).to(self._device_layers.device, non_blocking=True) for ids in block_pairs(table)
        )
        for layer in layers:
            device, host = self._device_layers[layer], self._host_layers[layer]
            if direction is Direction.STORE:
                copy_blocks(device, self._layout, device_blocks, host, self._layout, host_blocks)
            else:
                copy_blocks(host, self._layout, host_blocks, device, self._layout, device_blocks)


def _require_success(events: Sequence[Event], direction: Direction) -> None:
    for event in events:
        if event.error is not None:
            raise of_same_kind(event.error)(
                f"{direction}: the copy it depends on failed: {event.error}"
            ) from event.error
