"""Transfer engines that run nothing until somebody waits, and then in the order that hurts most.

They keep the contract of `layerkv.device.base.TransferEngine` and promise nothing beyond it. Compute, stores and loads
are queues of operations over real memory, as they are CUDA streams on a GPU: calls only enqueue. What runs next is
chosen among all operations that the contract allows to run next, one block at a time, so whatever the caller has left
unordered comes out in either order.

- `SlowEngine` copies at the latest possible moment: a copy begins when compute, or the host, cannot go on without it.
- `ReorderingEngine` asks a `Chooser`: a fixed preference among the queues, a random one, or whatever a test draws.

Foreground copies may overtake background ones of their direction that have not begun. These engines decide late, so for
them "not begun" is a matter of choice: a background copy runs before or after later foreground ones, never before
earlier ones.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from layerkv.core.transfer import BlockRun
from layerkv.device.base import Arena, Direction
from layerkv.device.host_memory import MmapHostMemory
from layerkv.errors import TransferError

COMPUTE, STORE, AHEAD, LOAD, BACKGROUND = "compute", "store", "store ahead", "load", "background load"
MAP, UNMAP = "map", "unmap"
QUEUES = (COMPUTE, STORE, AHEAD, LOAD, BACKGROUND, MAP, UNMAP)
LINES = ((COMPUTE, COMPUTE), (STORE, AHEAD), (LOAD, BACKGROUND), (MAP, MAP), (UNMAP, UNMAP))
"""What runs one at a time: of each, the queue in the foreground and the one in the background. The last two are an
elastic arena's."""

Chooser = Callable[[Sequence[str]], str]
"""Picks the queue that makes the next move, out of those that can."""


class StreamEvent:
    """See `layerkv.device.base.Event`. One without an operation is a gate: it ends when a test says so."""

    def __init__(self, operation: _Operation | None = None) -> None:
        self.operation = operation
        self.error: BaseException | None = None
        self._done = False

    def is_done(self) -> bool:
        return self._done

    def end(self, error: BaseException | None = None) -> None:
        """Mark it ended."""
        self.error, self._done = error, True


@dataclass(eq=False)
class _Operation:
    queue: str
    sequence: int
    after: tuple[StreamEvent, ...]
    moves: deque[Callable[[], None]]
    begun: bool = False
    event: StreamEvent = field(init=False)

    def __post_init__(self) -> None:
        self.event = StreamEvent(self)


class StreamEngine:
    """The contract; a subclass says in which order things happen."""

    def __init__(self, arena: Arena, host: MmapHostMemory) -> None:
        self._arena, self._host = arena, host
        self._base = arena.tensor().data_ptr()
        self._queues: dict[str, deque[_Operation]] = {name: deque() for name in QUEUES}
        self._sequence = count()
        self._seconds = dict.fromkeys(Direction, 0.0)
        self._is_closed = False
        self._shuffle = random.Random(0).shuffle
        self.failing: set[tuple[Direction, int]] = set()
        """Copies of these layers fail."""

    # The interface -------------------------------------------------------------------------------------------

    def record_compute(self) -> StreamEvent:
        if self._queues[COMPUTE]:
            return self._enqueue(COMPUTE)
        event = StreamEvent()
        event.end()
        return event

    def submit(
        self,
        direction: Direction,
        layers: Sequence[int],
        runs: Sequence[BlockRun],
        *,
        after: Sequence[StreamEvent] = (),
        background: bool = False,
    ) -> StreamEvent:
        if self._is_closed:
            raise TransferError(f"{direction} submitted after the transfer engine was closed")
        moves = [
            self._block_copy(direction, layer, run.device_block + i, run.host_block + i)
            for layer in layers
            for run in runs
            for i in range(run.num_blocks)
        ]
        self._shuffle(moves)  # the contract orders copies, not the blocks of one
        in_front, behind = (STORE, AHEAD) if direction is Direction.STORE else (LOAD, BACKGROUND)
        return self._enqueue(behind if background else in_front, moves, after)

    def wait_compute(self, event: StreamEvent) -> None:
        if event.error is not None:
            raise TransferError(f"a copy failed: {event.error}") from event.error
        self._enqueue(COMPUTE, after=[event])

    def wait_host(self, event: StreamEvent, timeout_s: float) -> bool:
        """Time stands still here: False means that the event cannot end before a gate opens."""
        while not event.is_done() and self._move_towards(event):
            pass
        return event.is_done()

    def take_seconds(self) -> dict[Direction, float]:
        seconds, self._seconds = self._seconds, dict.fromkeys(Direction, 0.0)
        return seconds

    def take_waited_s(self) -> float | None:
        return None

    def close(self) -> None:
        self._is_closed = True
        self.synchronize()

    # For tests -----------------------------------------------------------------------------------------------

    def compute(self, action: Callable[[], None]) -> None:
        """Enqueue one kernel."""
        self._enqueue(COMPUTE, [action])

    def in_background(self, queue: str, action: Callable[[], None], after: Sequence[StreamEvent] = ()) -> StreamEvent:
        """Enqueue what an arena does beside compute and copies."""
        return self._enqueue(queue, [action], after)

    def gate(self) -> StreamEvent:
        """An event that the test ends."""
        return StreamEvent()

    def synchronize(self) -> None:
        """Run all that is enqueued."""
        for name in QUEUES:
            while self._queues[name]:
                assert self.wait_host(self._queues[name][-1].event, 0.0), f"{name} waits for what never ends"

    def advance(self, num_moves: int) -> None:
        """Let that much happen, while the host does something else."""
        for _ in range(num_moves):
            if not self._move_towards(None):
                return

    # What subclasses use -------------------------------------------------------------------------------------

    def _move_towards(self, event: StreamEvent | None) -> bool:
        """Make one move, of anything or of what `event` needs; False if nothing can move."""
        raise NotImplementedError

    def _ready(self) -> list[_Operation]:
        """The operations that may move now, one per queue at most."""
        heads = [head for line in LINES for head in self._heads(*line)]
        return [operation for operation in heads if all(event.is_done() for event in operation.after)]

    def _heads(self, in_front: str, behind: str) -> list[_Operation]:
        """What may be next of one line: of two that have not begun either, if the one in the background came first."""
        heads = [self._queues[name][0] for name in dict.fromkeys((in_front, behind)) if self._queues[name]]
        if begun := [operation for operation in heads if operation.begun]:
            return begun
        return heads[:1] if len(heads) == 2 and heads[0].sequence < heads[1].sequence else heads

    def _move(self, operation: _Operation) -> None:
        operation.begun = True
        failed = next((event.error for event in operation.after if event.error is not None), None)
        if failed is not None and operation.queue != COMPUTE:  # compute goes on, and the event carries the error
            self._end(operation, TransferError(f"the copy it depends on failed: {failed}"))
            return
        try:
            if operation.moves:
                operation.moves.popleft()()
        except (TransferError, MemoryError) as error:
            self._end(operation, error)
            return
        if not operation.moves:
            self._end(operation)

    def _end(self, operation: _Operation, error: BaseException | None = None) -> None:
        popped = self._queues[operation.queue].popleft()
        assert popped is operation
        operation.event.end(error)

    def _enqueue(
        self, queue: str, moves: Sequence[Callable[[], None]] = (), after: Sequence[StreamEvent] = ()
    ) -> StreamEvent:
        operation = _Operation(queue, next(self._sequence), tuple(after), deque(moves))
        self._queues[queue].append(operation)
        return operation.event

    def _block_copy(self, direction: Direction, layer: int, device_block: int, host_block: int) -> Callable[[], None]:
        geometry = self._arena.geometry
        on_device = self._base + geometry.offset(layer, device_block)
        on_host = self._host.address(layer, host_block)
        to, source = (on_host, on_device) if direction is Direction.STORE else (on_device, on_host)

        def copy() -> None:
            if (direction, layer) in self.failing:
                raise TransferError(f"{direction} of layer {layer} was told to fail")
            ctypes.memmove(to, source, geometry.page_bytes)
            self._seconds[direction] += 1e-6

        return copy


class SlowEngine(StreamEngine):
    """Every copy happens as late as it can."""

    def _move_towards(self, event: StreamEvent | None) -> bool:
        if event is None:
            event = next((queue[-1].event for queue in self._queues.values() if queue), None)
            if event is None:
                return False
        operation = event.operation
        while operation is not None:
            held_up_by = self._held_up_by(operation)
            if held_up_by is None:
                self._move(operation)
                return True
            operation = held_up_by.operation
        return False

    def _held_up_by(self, operation: _Operation) -> StreamEvent | None:
        """What must end before the operation can move; None if it can."""
        ready = self._ready()
        if operation in ready:
            return None
        before = [other for other in self._queues[operation.queue] if other.sequence < operation.sequence]
        in_front, behind = next(line for line in LINES if operation.queue in line)
        before += [other for other in self._queues[behind] if other.begun]
        before += [other for other in self._queues[in_front] if other.begun or other.sequence < operation.sequence]
        before = [other for other in before if other is not operation]
        if before:
            return before[0].event
        return next(event for event in operation.after if not event.is_done())


class ReorderingEngine(StreamEngine):
    """Whatever is allowed next may be next: the chooser decides."""

    def __init__(self, arena: Arena, host: MmapHostMemory, choose: Chooser) -> None:
        super().__init__(arena, host)
        self._choose = choose

    def _move_towards(self, event: StreamEvent | None) -> bool:
        ready = {operation.queue: operation for operation in self._ready()}
        if not ready:
            return False
        self._move(ready[self._choose(sorted(ready))])
        return True


def preferring(*queues: str) -> Chooser:
    """Always the first of these queues that can move; any other when none of them can."""
    order = (*queues, *(queue for queue in QUEUES if queue not in queues))
    return lambda ready: min(ready, key=order.index)


def at_random(seed: int) -> Chooser:
    """Any queue, differently for every seed and the same for the same one."""
    return random.Random(seed).choice
