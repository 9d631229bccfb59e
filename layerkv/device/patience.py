"""How long a copy is waited for: only time in which this process ran counts.

The wall clock goes on while a process stands still (``docker pause``, SIGSTOP, a debugger), and so do the clocks that
waits are timed by. What would have ended meanwhile has then had no chance to, and is not lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable

LOOK_S = 1.0
"""Between two looks that much time counts at most: whoever runs looks that often, or does something else. Not measured:
chosen by judgement."""

Clock = Callable[[], float]


def running_s() -> float:
    """The clock that goes on while a process stands still."""
    return time.monotonic()


class Patience:
    """A limit on the time that this process spends running, from now on."""

    __slots__ = ("_clock", "_last_s", "_left_s")

    def __init__(self, limit_s: float, clock: Clock | None = None) -> None:
        self._clock = clock or running_s
        self._left_s, self._last_s = limit_s, self._clock()

    @property
    def next_look_s(self) -> float:
        """Wait no longer than that before the next look."""
        return min(self._left_s, LOOK_S)

    def is_over(self) -> bool:
        """Whether the limit has been reached by this look."""
        now_s = self._clock()
        self._left_s -= min(now_s - self._last_s, LOOK_S)
        self._last_s = now_s
        return self._left_s <= 0


def wait_patiently(wait: Callable[[float], bool], limit_s: float, clock: Clock | None = None) -> bool:
    """Wait until ``wait`` (for so many seconds at most) says that it has ended; False if the limit is reached first."""
    patience = Patience(limit_s, clock)
    while not wait(patience.next_look_s):
        if patience.is_over():
            return wait(0.0)
    return True
