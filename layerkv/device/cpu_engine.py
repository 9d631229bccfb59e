"""The transfer engine for CPU workers: one thread that stores and one that loads, beside the thread that computes.

The event contract is that of CUDA streams. Compute here is synchronous, so everything enqueued so far has ended
already: :meth:`CPUTransferEngine.record_compute` returns an event that is done.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from layerkv.core.transfer import BlockRun
from layerkv.device.base import COPY_TIMEOUT_S, Direction, Event, of_same_kind
from layerkv.device.copy_event import CopyEvent
from layerkv.device.host_memory import MmapHostMemory
from layerkv.device.mmap_arena import MmapArena
from layerkv.device.patience import wait_patiently
from layerkv.device.run_table import RunCache, host_stretches
from layerkv.errors import LostCopyError, TransferError

TOUCH_PAUSE_S = 0.005
"""Between two touches of host memory ahead of use: they take a part of a processor only, and a step that is scheduled
in between has its copies begun at once. Not measured: chosen by judgement."""


def _ended() -> CopyEvent:
    event = CopyEvent()
    event.end()
    return event


_COMPUTE_DONE = _ended()


class _Copy(NamedTuple):
    layers: Sequence[int]
    runs: Sequence[BlockRun]
    after: Sequence[Event]
    event: CopyEvent


class _CopyThread(threading.Thread):
    """Works off the copies of one direction, foreground first, each kind in order of submission.

    The one that stores touches host memory ahead of use while it has nothing to copy.
    """

    def __init__(self, direction: Direction, arena: MmapArena, host: MmapHostMemory) -> None:
        super().__init__(name=f"layerkv-{direction}", daemon=True)
        self._direction = direction
        self._host = host
        self._tensor = arena.tensor()  # keeps the memory mapped for as long as this thread copies
        self._stretches = RunCache(arena.geometry, host.num_blocks, host_stretches)
        self._device_layers = _blocks(self._tensor.view(arena.geometry.num_layers, -1), arena.geometry.page_bytes)
        self._host_layers = _blocks(host.tensor(), arena.geometry.page_bytes)
        self._foreground: deque[_Copy] = deque()
        self._background: deque[_Copy] = deque()
        self._calls: SimpleQueue[None] = SimpleQueue()  # one for each copy, and one to close; costs no Python lock
        self._closing = False
        self._seconds = 0.0
        self.start()

    def submit(
        self, layers: Sequence[int], runs: Sequence[BlockRun], after: Sequence[Event], *, background: bool
    ) -> CopyEvent:
        if self._closing:
            raise TransferError(f"{self._direction} submitted after the transfer engine was closed")
        event = CopyEvent()
        (self._background if background else self._foreground).append(_Copy(layers, runs, after, event))
        self._calls.put(None)
        return event

    def run(self) -> None:
        while (copy := self._next()) is not None:
            try:
                self._await(copy.after)
                started = time.perf_counter()
                self._copy(copy.layers, copy.runs)
                self._seconds += time.perf_counter() - started
                copy.event.end()
            except BaseException as error:  # the edge of this thread: whoever waits must hear of it
                copy.event.end(error)

    def _next(self) -> _Copy | None:
        """Wait for a copy; None when there will be no more."""
        has_more = self._direction is Direction.STORE
        while True:
            try:
                self._calls.get(timeout=TOUCH_PAUSE_S if has_more else None)
            except Empty:
                has_more = self._host.touch_ahead()
                continue
            waiting = self._foreground or self._background
            return waiting.popleft() if waiting else None

    def take_seconds(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        self._closing = True
        self._calls.put(None)
        wait_patiently(self._has_ended, COPY_TIMEOUT_S)

    def _has_ended(self, timeout_s: float) -> bool:
        self.join(timeout_s)
        return not self.is_alive()

    def _await(self, events: Sequence[Event]) -> None:
        for event in events:
            assert isinstance(event, CopyEvent)
            if not event.wait(COPY_TIMEOUT_S):
                raise LostCopyError(f"{self._direction}: the copy it depends on did not end in {COPY_TIMEOUT_S:.0f} s")
            if event.error is not None:
                raise of_same_kind(event.error)(
                    f"{self._direction}: the copy it depends on failed: {event.error}"
                ) from event.error

    def _copy(self, layers: Sequence[int], runs: Sequence[BlockRun]) -> None:
        stretches = self._stretches.of(runs)
        for layer in layers:
            device, host = self._device_layers[layer], self._host_layers[layer]
            for first, blocks in stretches:
                host_part = host[first : first + len(blocks)]
                if self._direction is Direction.STORE:
                    np.take(device, blocks, out=host_part, mode="clip")
                    self._host.used(first + len(blocks))
                else:
                    np.put(device, blocks, host_part, mode="clip")


def _blocks(layers: torch.Tensor, page_bytes: int) -> list[npt.NDArray[np.void]]:
    """Each layer's blocks as elements of an array: numpy copies them one by one in C, and without the GIL."""
    in_whole_blocks = layers.shape[1] // page_bytes * page_bytes
    return [layer[:in_whole_blocks].numpy().view(f"V{page_bytes}") for layer in layers]


class CPUTransferEngine:
    """See :class:`layerkv.device.base.TransferEngine`."""

    def __init__(self, arena: MmapArena, host: MmapHostMemory) -> None:
        self._threads = {direction: _CopyThread(direction, arena, host) for direction in Direction}
        self._waited_s = 0.0

    def record_compute(self) -> Event:
        return _COMPUTE_DONE

    def submit(
        self,
        direction: Direction,
        layers: Sequence[int],
        runs: Sequence[BlockRun],
        *,
        after: Sequence[Event] = (),
        background: bool = False,
    ) -> Event:
        if not runs:
            return _COMPUTE_DONE
        return self._threads[direction].submit(layers, runs, after, background=background)

    def wait_compute(self, event: Event) -> None:
        assert isinstance(event, CopyEvent)
        if not event.is_done():
            started = time.perf_counter()
            event.wait(COPY_TIMEOUT_S)
            self._waited_s += time.perf_counter() - started
        if not event.is_done():
            raise LostCopyError(f"a copy did not end in {COPY_TIMEOUT_S:.0f} s")
        if event.error is not None:
            raise of_same_kind(event.error)(f"a copy failed: {event.error}") from event.error

    def wait_host(self, event: Event, timeout_s: float) -> bool:
        assert isinstance(event, CopyEvent)
        return event.wait(timeout_s)

    def take_seconds(self) -> dict[Direction, float]:
        return {direction: thread.take_seconds() for direction, thread in self._threads.items()}

    def take_waited_s(self) -> float | None:
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def close(self) -> None:
        for thread in self._threads.values():
            thread.close()
