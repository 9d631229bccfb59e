"""The two seams of the device layer: an arena owns KV memory, a transfer engine moves blocks of it.

Implementations: :mod:`layerkv.device.mmap_arena` and :mod:`layerkv.device.cpu_engine` here; CUDA virtual memory and
CUDA streams fit the same interfaces. Tests run one contract suite over every implementation and over the fake.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

import torch

from layerkv.core.geometry import KVGeometry
from layerkv.core.transfer import BlockRun
from layerkv.errors import LostCopyError, TransferError

COPY_TIMEOUT_S = 60.0
"""A copy that takes longer than this, in a process that runs meanwhile, is taken for lost. Not measured: chosen by
judgement: at 1 GB/s, a copy of 60 GB."""


class Direction(StrEnum):
    """Which way a copy goes."""

    STORE = "store"
    """Device to host."""
    LOAD = "load"
    """Host to device."""


class Event(Protocol):
    """The end of one copy, or a point in the compute stream.

    Lifetime: any length; an event that ended stays ended.
    """

    def is_done(self) -> bool:
        """Whether it has ended, with or without an error. Never blocks."""

    @property
    def error(self) -> BaseException | None:
        """Why the copy failed; None while under way or after success."""


def of_same_kind(error: BaseException) -> type[TransferError]:
    """The error of what depends on a copy that failed: behind a copy that is lost, it is lost as well."""
    return LostCopyError if isinstance(error, LostCopyError) else TransferError


class Arena(Protocol):
    """Owner of the memory behind vLLM's KV tensor, with the lane zone aliased between layers.

    The tensor's address range has ``geometry.virtual_bytes`` bytes; its physical memory is
    ``geometry.physical_bytes``. Zero at first. Memory lives until the last tensor over it is gone.
    """

    geometry: KVGeometry

    def tensor(self) -> torch.Tensor:
        """The whole range as a flat int8 tensor ``[virtual_bytes]``."""


class SegmentMemory(Protocol):
    """Memory that is given back to the machine segment by segment; addresses never change.

    Threads: one thread, the one that runs the model, calls these methods, between steps.
    """

    def unmap(self, segments: Sequence[int], *, after: Sequence[Event] = ()) -> Event:
        """Give their memory back to the machine, in the background, once all of ``after`` have ended.

        Nothing may read or write them any more, but for what ``after`` stands for. Of one that could not be mapped,
        what is left is given back, if anything is.

        Returns:
            An event that ends when the memory is free. It fails if something before it is lost, which may still write.
        """


class TouchedMemory(SegmentMemory, Protocol):
    """Memory that comes by the first touch, which cannot fail, and goes segment by segment."""

    def put(self, segments: Sequence[int]) -> None:
        """These are in service from now on, zero at first, and count as held whether they are touched or not.

        Only segments that were never in service, or whose :meth:`unmap` has ended. The first one always is.
        """


class ElasticArena(Arena, SegmentMemory, Protocol):
    """An arena whose pool has memory segment by segment. The zone always has memory."""

    def prepare_map(self, segments: Sequence[int]) -> Event:
        """Get memory for segments that have none, in the background; what is still being unmapped of them comes first.

        Returns:
            An event that ends when :meth:`map` may be called, or with the ``MemoryError`` that says why it may not:
            then none of them has memory.
        """

    def map(self, segments: Sequence[int]) -> None:
        """Segments that were prepared have memory from now on, zero at first: nobody's old KV is ever in it.

        Raises:
            MemoryError: the device refused; none of them has memory, as if they had not been prepared.
        """


class HostMemory(Protocol):
    """Host blocks of one worker: bytes ``[num_layers, num_host_blocks, page_bytes]``."""

    num_blocks: int

    def address(self, layer: int, block: int) -> int:
        """Address of ``block`` of ``layer``; valid while this object lives."""

    def wait_pinned(self, timeout_s: float) -> bool:
        """Block until the device copies from and to it by itself, or the time is up; whether it does."""


class ElasticHostMemory(HostMemory, TouchedMemory, Protocol):
    """Host blocks whose memory goes segment by segment."""


class TransferEngine(Protocol):
    """Copies runs of blocks between the arena and host memory, ordered by events.

    Stores run one after another in the order of submission; so do loads. Foreground copies (those that this step's
    compute waits for) overtake background ones of the same direction that have not begun.

    Threads: one thread, the one that runs the model, calls these methods.
    """

    def record_compute(self) -> Event:
        """An event that ends when all compute enqueued so far has ended."""

    def submit(
        self,
        direction: Direction,
        layers: Sequence[int],
        runs: Sequence[BlockRun],
        *,
        after: Sequence[Event] = (),
        background: bool = False,
    ) -> Event:
        """Copy ``runs`` of each of ``layers``, to begin only after all of ``after`` have ended.

        Returns:
            An event that ends when the copies have. A copy whose ``after`` failed fails too.
        """

    def wait_compute(self, event: Event) -> None:
        """Make all compute enqueued from now on wait for ``event``.

        Raises:
            TransferError: the copy failed and compute must not read what it should have written (where the
                implementation can tell at once; otherwise the event carries the error). It has ended, or what is
                computed from now on comes after its end all the same.
            LostCopyError: it has not ended in the time that any copy takes, or stands behind one that has not.
        """

    def wait_host(self, event: Event, timeout_s: float) -> bool:
        """Block this thread until ``event`` ends or the time is up; whether it ended."""

    def take_seconds(self) -> dict[Direction, float]:
        """Seconds spent copying, by direction, since the last call."""

    def take_waited_s(self) -> float | None:
        """Seconds that compute has waited for copies since the last call; None where the device does not tell."""

    def close(self) -> None:
        """Finish what is under way and stop. Idempotent."""
