"""The end of something that a thread of this process does."""

from __future__ import annotations

import threading

from layerkv.device.patience import wait_patiently


class CopyEvent:
    """See :class:`layerkv.device.base.Event`. Set once, by the thread that does it."""

    __slots__ = ("_is_done", "_under_way", "error")

    def __init__(self) -> None:
        # A step makes one for every layer: a bare lock costs a tenth of a threading.Event.
        self._under_way = threading.Lock()
        self._under_way.acquire()
        self._is_done = False
        self.error: BaseException | None = None

    def is_done(self) -> bool:
        return self._is_done

    def end(self, error: BaseException | None = None) -> None:
        """Mark it ended and wake whoever waits."""
        self.error = error
        self._is_done = True
        self._under_way.release()

    def wait(self, timeout_s: float) -> bool:
        """Block until it ends; False if this process has run for so long first."""
        return self._is_done or wait_patiently(self._wait, timeout_s)

    def _wait(self, timeout_s: float) -> bool:
        if not self._is_done and self._under_way.acquire(timeout=max(timeout_s, 0.0)):
            self._under_way.release()  # for the next one who waits
        return self._is_done
