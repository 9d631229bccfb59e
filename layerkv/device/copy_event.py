"""The end of something that a thread of this process does."""

from __future__ import annotations

import threading

from layerkv.device.patience import wait_patiently


class CopyEvent:
    """See :class:`layerkv.device.base.Event`. Set once, by the thread that does it."""

    __slots__ = ("_done", "error")

    def __init__(self) -> None:
        self._done = threading.Event()
        self.error: BaseException | None = None

    def is_done(self) -> bool:
        return self._done.is_set()

    def end(self, error: BaseException | None = None) -> None:
        """Mark it ended and wake whoever waits."""
        self.error = error
        self._done.set()

    def wait(self, timeout_s: float) -> bool:
        """Block until it ends; False if this process has run for so long first."""
        return wait_patiently(self._done.wait, timeout_s)
