"""In which order copies and compute touch the lanes, on any device: the ordering rules of docs/architecture.md.

One :class:`LaneSchedule` per worker. The model's thread calls :meth:`begin_step` before the forward pass,
:meth:`layer_done` after each layer's attention, :meth:`poll_fetches` after the pass. With ``n`` lanes, layers
``l, l + n, l + 2n, ...`` write the same memory one after another. Rules, by the number they have in the docs:

1. ``store(l)`` begins after the compute of layer ``l``'s attention.
2. ``load(l + n)`` begins after ``store(l)`` has ended: they share a lane.
3. compute waits for ``load(m)`` before layer ``m``'s KV-cache *update*, which runs before its attention hook: so
   the wait is enqueued after layer ``m - 1``'s attention, or at the start of the step for layer 0.
4. with nothing to load, compute waits for ``store(m - n)`` in its place: a lane is not rewritten before it is saved.
   The first layers of a step wait likewise for the last stores of the step before.
5. blocks that a park frees are stored before this step's compute may overwrite them.
6. a fetch begins after every store submitted so far, among them the request's own last one.
7. stores ahead of a park run in the background; a step that settles waits for all of them first, before it reads
   what they wrote or writes where they write.
8. a cached prefix is loaded after every store submitted so far, and before this step's compute reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerkv.core.transfer import BlockRun, FetchPlan, StepPlan
from layerkv.device.base import Direction, Event, TransferEngine
from layerkv.errors import TransferError


@dataclass(frozen=True, slots=True)
class FinishedFetch:
    """A fetch whose copies have ended.

    Attributes:
        request_id: The request.
        error: Why it failed; None if its KV arrived.
        device_blocks: The blocks it should have filled.
    """

    request_id: str
    error: BaseException | None
    device_blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FailedHits:
    """Cached prefixes that could not be loaded, why, and the blocks that they should have filled."""

    error: TransferError
    device_blocks: tuple[int, ...]


class LaneSchedule:
    """Submits a step's copies to a transfer engine so that no lane and no block is touched out of order."""

    def __init__(self, engine: TransferEngine, num_layers: int, lanes: int) -> None:
        self._engine = engine
        self._num_layers = num_layers
        self._lanes = lanes
        self._all_layers = range(num_layers)
        self._lane_stored: list[Event | None] = [None] * lanes  # last store out of each lane, across steps
        self._lane_ready: list[Event | None] = [None] * lanes  # what the lane's next layer must wait for
        self._last_store: Event | None = None
        self._last_ahead: Event | None = None
        self._fetches: list[tuple[FetchPlan, Event]] = []
        self._failed_hits: FailedHits | None = None
        self._stores: Sequence[BlockRun] = ()
        self._loads: Sequence[BlockRun] = ()
        self._next_layer = 0

    def begin_step(self, plan: StepPlan) -> None:
        """Submit what this step's compute depends on, and its fetches; make compute wait for layer 0's lane."""
        engine = self._engine
        self._stores, self._loads = plan.stores, plan.loads
        self._next_layer = 0
        if plan.settle and self._last_ahead is not None:
            engine.wait_compute(self._last_ahead)  # rule 7
            self._last_ahead = None
        compute = engine.record_compute()
        if plan.ahead:
            self._last_ahead = self._submit_by_layer(Direction.STORE, plan.ahead, [compute], self._last_ahead)
        if plan.parks:
            self._last_store = engine.submit(Direction.STORE, self._all_layers, plan.parks, after=[compute])
            engine.wait_compute(self._last_store)  # rule 5
        if plan.hits:
            loaded = self._submit_hits(plan.hits, compute)
            try:
                engine.wait_compute(loaded)  # rule 8
            except TransferError as error:  # unlike a lane's KV it can be computed again
                self._failed_hits = FailedHits(error, _device_blocks(plan.hits))
        if plan.is_layered:
            for lane in range(self._lanes):
                ready = self._lane_stored[lane]  # rule 4, across steps
                if plan.loads:
                    after = [compute] if ready is None else [compute, ready]
                    ready = engine.submit(Direction.LOAD, [lane], plan.loads, after=after)
                self._lane_ready[lane] = ready
            self._wait_for_lane_of(0)
        for fetch in plan.fetches:
            self._fetches.append((fetch, self._submit_fetch(fetch, compute)))

    def layer_done(self, layer: int) -> None:
        """Layer ``layer``'s attention has been enqueued: store it, refill its lane, hold back the next layer.

        Raises:
            TransferError: a copy that the next layer depends on failed.
        """
        assert layer == self._next_layer, f"layer {layer} ran where {self._next_layer} was expected"
        self._next_layer = layer + 1
        engine, lane = self._engine, layer % self._lanes
        stored = engine.submit(Direction.STORE, [layer], self._stores, after=[engine.record_compute()])  # rule 1
        self._last_store = self._lane_stored[lane] = self._lane_ready[lane] = stored
        following = layer + self._lanes
        if self._loads and following < self._num_layers:
            self._lane_ready[lane] = engine.submit(Direction.LOAD, [following], self._loads, after=[stored])  # rule 2
        if layer + 1 < self._num_layers:
            self._wait_for_lane_of(layer + 1)  # rules 3 and 4

    @property
    def has_fetches(self) -> bool:
        """Whether a fetch is under way or not yet polled."""
        return bool(self._fetches)

    def poll_fetches(self, wait_s: float = 0.0) -> list[FinishedFetch]:
        """Fetches that have ended since the last call.

        Args:
            wait_s: Block that long for the oldest one: for steps without compute, which would only spin.
        """
        if not self._fetches:
            return []
        if wait_s > 0:
            self._engine.wait_host(self._fetches[0][1], wait_s)
        finished: list[FinishedFetch] = []
        under_way: list[tuple[FetchPlan, Event]] = []
        for fetch, event in self._fetches:
            if event.is_done():
                finished.append(FinishedFetch(fetch.request_id, event.error, _device_blocks(fetch.runs)))
            else:
                under_way.append((fetch, event))
        self._fetches = under_way
        return finished

    def take_failed_hits(self) -> FailedHits | None:
        """The prefixes of the step just begun that could not be loaded; None if there are none."""
        failed, self._failed_hits = self._failed_hits, None
        return failed

    def drain(self, timeout_s: float) -> None:
        """Wait until nothing is under way (shutdown).

        Raises:
            TransferError: something still is when the time is up.
        """
        stores = (self._last_store, self._last_ahead, *self._lane_stored)
        events = [event for _, event in self._fetches] + [event for event in stores if event is not None]
        for event in events:
            if not self._engine.wait_host(event, timeout_s):
                raise TransferError(f"a copy did not end in {timeout_s:.0f} s")

    def _submit_fetch(self, fetch: FetchPlan, compute: Event) -> Event:
        return self._submit_by_layer(Direction.LOAD, fetch.runs, [compute, *self._stores_so_far()])  # rule 6

    def _submit_hits(self, runs: Sequence[BlockRun], compute: Event) -> Event:
        return self._engine.submit(
            Direction.LOAD,
            self._all_layers,
            runs,
            after=[compute, *self._stores_so_far()],  # rule 8
        )

    def _stores_so_far(self) -> list[Event]:
        """The last store, and each lane's by name too, so that none of them can fail unseen."""
        return [store for store in (self._last_store, *self._lane_stored) if store is not None]

    def _submit_by_layer(
        self, direction: Direction, runs: Sequence[BlockRun], after: Sequence[Event], last: Event | None = None
    ) -> Event:
        """One background copy per layer, so that what a step's compute waits for never waits behind a whole request.

        Returns:
            An event that ends when all have, and ``last`` too; it fails if any of them did.
        """
        event = last
        for layer in self._all_layers:
            event = self._engine.submit(
                direction, [layer], runs, after=[*after, *([event] if event is not None else ())], background=True
            )
        assert event is not None
        return event

    def _wait_for_lane_of(self, layer: int) -> None:
        ready = self._lane_ready[layer % self._lanes]
        if ready is not None:
            self._engine.wait_compute(ready)


def _device_blocks(runs: Sequence[BlockRun]) -> tuple[int, ...]:
    return tuple(block for run in runs for block in range(run.device_block, run.device_block + run.num_blocks))
