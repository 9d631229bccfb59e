"""Processes of engines, known by descriptor so that a number which is used again is nobody else."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable, Mapping, Sequence

from layerkv.errors import BrokerError
from layerkv.runtime import start_ticks


class Processes:
    """The processes of one engine. Close it when it is not needed any more.

    Args:
        pids: Their numbers; those that have ended are left out.
        started: When each started, where that is known: another process that has its number is left out.

    Raises:
        BrokerError: one cannot be watched (it is a thread, or there are no descriptors left). Nothing is kept open.
    """

    def __init__(self, pids: Iterable[int], started: Mapping[int, int] | None = None) -> None:
        self.identities: list[tuple[int, int]] = []
        """Each process that was there, as its number and when it started, on the kernel's clock."""
        self._descriptors: list[int] = []
        try:
            for pid in dict.fromkeys(pids):
                self._open(pid, started)
        except OSError as error:
            self.close()
            raise BrokerError(f"process {pid} cannot be watched: {error.strerror}") from None

    def _open(self, pid: int, started: Mapping[int, int] | None) -> None:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        ticks = start_ticks(pid)  # read after it was opened: whose number it is cannot change unnoticed
        if started is not None and started[pid] != ticks:
            os.close(descriptor)
            return
        self._descriptors.append(descriptor)
        self.identities.append((pid, ticks))

    @classmethod
    def still_running(cls, identities: Sequence[tuple[int, int]]) -> Processes:
        """Those of them that have not ended."""
        return cls((pid for pid, _ in identities), dict(identities))

    def add_living(self, others: Processes) -> None:
        """Watch those of the others too that have not ended, with descriptors of their own."""
        ended = _ended(others.descriptors)
        for identity, descriptor in zip(others.identities, others.descriptors, strict=True):
            if descriptor not in ended and identity[0] not in self.pids:
                self._descriptors.append(os.dup(descriptor))
                self.identities.append(identity)

    @property
    def pids(self) -> set[int]:
        """Their numbers."""
        return {pid for pid, _ in self.identities}

    @property
    def descriptors(self) -> Sequence[int]:
        """One each, which is readable from the end of the process on."""
        return self._descriptors

    def have_ended(self) -> bool:
        """Whether all have. Never blocks."""
        return len(_ended(self._descriptors)) == len(self._descriptors)

    def close(self) -> None:
        """Give the descriptors back. Idempotent."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def _ended(descriptors: Iterable[int]) -> set[int]:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(0)}
