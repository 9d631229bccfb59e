"""Streams and events with the interface of `torch.cuda`, on which nothing runs until somebody asks how far it is.

What runs next is drawn at random among the heads of all streams that may run, so whatever was left unordered comes out
in either order.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Action = Callable[[], None]


@dataclass(frozen=True)
class _Wait:
    """A stream goes no further until then."""

    is_over: Callable[[], bool]


class FakeStream:
    """A queue of actions and waits."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.queue: deque[Action | _Wait] = deque()
        self.cuda_stream = len(cuda.streams)
        cuda.streams.append(self)

    def wait_event(self, event: FakeEvent) -> None:
        recorded = event.num_recorded  # what it stands for now; a later record changes nothing here
        self._cuda.enqueue_wait(self, lambda: event.num_reached >= recorded)

    def synchronize(self) -> None:
        while self.queue:
            assert self._cuda.move(), "a stream waits for what never ends"


class FakeEvent:
    def __init__(self, cuda: FakeCuda, enable_timing: bool = False) -> None:
        self._cuda = cuda
        self._enable_timing = enable_timing
        self.num_recorded = 0
        self.num_reached = 0

    def record(self, stream: FakeStream) -> None:
        self.num_recorded += 1
        if stream.queue:
            stream.queue.append(self._reach)
        else:
            self._reach()

    def query(self) -> bool:
        if self.num_reached < self.num_recorded:
            self._cuda.move_some()
        return self.num_reached >= self.num_recorded

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self._enable_timing
        assert end._enable_timing
        assert end.num_reached >= end.num_recorded
        return 1e-3

    def _reach(self) -> None:
        self.num_reached += 1


class FakeCuda:
    """In place of `torch.cuda`."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self.streams: list[FakeStream] = []
        self.compute_stream = FakeStream(self)
        self._current = self.compute_stream

    def Stream(self) -> FakeStream:
        return FakeStream(self)

    def Event(self, *, enable_timing: bool = False) -> FakeEvent:
        return FakeEvent(self, enable_timing)

    def current_stream(self) -> FakeStream:
        return self._current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    # For tests -----------------------------------------------------------------------------------------------

    def enqueue(self, stream: int, action: Action) -> None:
        """Something that a driver's call puts on a stream, known by its handle."""
        self.streams[stream].queue.append(action)

    def enqueue_wait(self, stream: FakeStream, is_over: Callable[[], bool]) -> None:
        """The stream goes no further until then."""
        stream.queue.append(_Wait(is_over))

    def move(self) -> bool:
        """Let one stream that can do one thing; False if none can."""
        with self._lock:  # an arena's thread looks at events too
            ready = [stream for stream in self.streams if stream.queue and self._may_go_on(stream)]
            if not ready:
                return False
            head = self._random.choice(ready).queue.popleft()
            if not isinstance(head, _Wait):
                head()
            return True

    def move_some(self) -> None:
        """What happens between two looks of the host."""
        for _ in range(self._random.randint(1, 20)):
            if not self.move():
                return

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.synchronize()

    def _may_go_on(self, stream: FakeStream) -> bool:
        head = stream.queue[0]
        return not isinstance(head, _Wait) or head.is_over()
