"""The thread in which memory of segments comes and goes, so that no step waits for the kernel or the driver.

One per elastic arena, and it ends with it: an order keeps alive what it needs, and the thread keeps no arena.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from layerkv.device.base import COPY_TIMEOUT_S, Event
from layerkv.device.copy_event import CopyEvent
from layerkv.device.patience import Patience
from layerkv.errors import LostCopyError

_POLL_S = 1e-3
"""Between two looks at an event of the device. Not measured: chosen by judgement: no step waits for this thread."""


@dataclass(slots=True)
class _Order:
    act: Callable[[], None]
    segments: Sequence[int]
    after: Sequence[Event]
    gives_back: bool
    event: CopyEvent = field(default_factory=CopyEvent)


class SegmentThread(threading.Thread):
    """Carries out one order after the other: what was ordered before has been done, or has failed.

    Args:
        enter: What the thread does before the first order; if that fails, so does the order, and the next one tries.
    """

    def __init__(self, enter: Callable[[], None] | None = None) -> None:
        super().__init__(name="layerkv-segments", daemon=True)
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._enter = enter
        self._spoilt: dict[int, LostCopyError | MemoryError] = {}  # may still be written, or has old bytes
        self.start()

    def prepare(self, act: Callable[[], None], segments: Sequence[int]) -> CopyEvent:
        """Do ``act``, which gets memory for these.

        Returns:
            An event that ends with it, or with its error, or with why memory of one of them was not given back before.
        """
        return self._submit(_Order(act, segments, (), gives_back=False))

    def give_back(self, act: Callable[[], None], segments: Sequence[int], after: Sequence[Event] = ()) -> CopyEvent:
        """Do ``act``, which gives the memory of these back, once all of ``after`` have ended.

        Returns:
            An event that ends with it, or with its error, or with that of what is lost. After ``MemoryError`` it can be
            tried again; what a lost copy may still write stays.
        """
        return self._submit(_Order(act, segments, after, gives_back=True))

    def _submit(self, order: _Order) -> CopyEvent:
        self._orders.put(order)
        return order.event

    def end(self) -> None:
        """End the thread when it has carried out what was submitted so far."""
        self._orders.put(None)

    def run(self) -> None:
        enter, self._enter = self._enter, None
        while (order := self._orders.get()) is not None:
            try:
                if enter is not None:
                    enter()
                    enter = None
                self._carry_out(order)
            except BaseException as error:  # the edge of this thread: whoever waits must hear of it
                order.event.end(error)
            else:
                order.event.end()
            del order

    def _carry_out(self, order: _Order) -> None:
        for segment in order.segments:
            spoilt = self._spoilt.get(segment)
            if isinstance(spoilt, LostCopyError) or (spoilt is not None and not order.gives_back):
                raise spoilt
        if not order.gives_back:
            order.act()
            return
        try:
            _await(order.after)
            order.act()
        except (LostCopyError, MemoryError) as error:
            self._spoilt.update(dict.fromkeys(order.segments, error))
            raise
        for segment in order.segments:
            self._spoilt.pop(segment, None)


def _await(events: Sequence[Event]) -> None:
    for event in events:
        if not _has_ended(event):
            raise LostCopyError(f"a copy of a segment that leaves did not end in {COPY_TIMEOUT_S:.0f} s")
        if isinstance(event.error, LostCopyError | MemoryError):  # it may still write, or old bytes are still there
            raise event.error


def _has_ended(event: Event) -> bool:
    if isinstance(event, CopyEvent):
        return event.wait(COPY_TIMEOUT_S)
    patience = Patience(COPY_TIMEOUT_S)
    while not event.is_done():
        if patience.is_over():
            return event.is_done()
        time.sleep(_POLL_S)
    return True
