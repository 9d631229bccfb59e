"""Processes of engines, known by descriptor so that a number which is used again is nobody else."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable, Sequence

from layerkv.runtime import start_ticks


class Processes:
    """The processes of one engine. Close it when it is not needed any more."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.identities: list[tuple[int, int]] = []
        """Each process that was there, as its number and when it started, on the kernel's clock."""
        self._descriptors: list[int] = []
        for pid in pids:
            try:
                self._descriptors.append(os.pidfd_open(pid))
            except ProcessLookupError:
                continue
            self.identities.append((pid, start_ticks(pid)))

    @classmethod
    def still_running(cls, identities: Sequence[tuple[int, int]]) -> Processes:
        """Those of them that have not ended."""
        return cls(pid for pid, started in identities if start_ticks(pid) == started)

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
        poll = select.poll()
        for descriptor in self._descriptors:
            poll.register(descriptor, select.POLLIN)
        return len(poll.poll(0)) == len(self._descriptors)

    def close(self) -> None:
        """Give the descriptors back. Idempotent."""
        while self._descriptors:
            os.close(self._descriptors.pop())
