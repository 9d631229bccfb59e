"""In which order copies and compute touch the lanes, on any device: the ordering rules of docs/architecture.md.

One :class:`LaneSchedule` per worker. The model's thread calls :meth:`begin_step` before the forward pass,
:meth:`layer_done` after each layer's attention, :meth:`poll_fetches` after the pass. The layers of
one lane (with ``n`` lanes ``l, l + n, l + 2n, ...``) write the same memory one after another. Rules, by the number
they have in the docs:

1. ``store(l)`` begins after the compute of layer ``l``'s attention.
2. ``load(l + n)`` begins after ``store(l)`` has ended: they share a lane.
3. compute waits for ``load(m)`` before layer ``m``'s KV-cache *update*, which runs before its attention hook: so
   the wait is enqueued after layer ``m - 1``'s attention, or at the start of the step for layer 0.
4. with nothing to load, compute waits for ``store(m - n)`` in its place: a lane is not rewritten before it is saved.
   The first layers of a step wait likewise for the last stores of the step before.
5. blocks that a park frees are stored before this step's compute may overwrite them.
6. a fetch begins after every store submitted so far, among them the request's own last one.
7. stores ahead of a park and of prefixes run in the background; a step that settles waits for all of them first,
   before it reads what they wrote, writes where they write, or computes over what they read.
8. a cached prefix is loaded after every store submitted so far, and before this step's compute reads it. Of a layered
   prompt it is loaded layer by layer: by rules 2 and 3, and after the last store into each host block that it reads.

A copy that fails changes nothing of that: whoever waits for it goes on when it has ended, and what it should have
written is reported. Only a copy that is lost, and may still write, ends the step with an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from layerkv.core.transfer import BlockRun, FetchPlan, StepPlan, cut
from layerkv.device.base import Direction, Event, TransferEngine
from layerkv.device.rows import Rows
from layerkv.device.store_watch import FailedStores, StoreWatch
from layerkv.errors import LostCopyError, TransferError

SHARED_LINK_UNIT_BYTES = 8 << 20
"""Most bytes of one background copy where the link is shared. Derived: a third of a millisecond at 25 GB/s; not
measured on such a link."""

MOST_GROUPS = 8
"""Into so many groups of layers parks and prefixes are divided: what compute waits for at first is an eighth. Not
measured: chosen by judgement."""


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


def shared_link_unit(page_bytes: int) -> int:
    """Blocks of a layer that a background copy takes at a time where the link is shared."""
    return max(SHARED_LINK_UNIT_BYTES // page_bytes, 1)


@dataclass(frozen=True, slots=True)
class FailedLoads:
    """What the compute of a step should have found in its blocks and did not.

    Attributes:
        error: Why a load failed.
        runs: All that the step wanted to load.
    """

    error: TransferError
    runs: tuple[BlockRun, ...]


class LaneSchedule:
    """Submits a step's copies to a transfer engine so that no lane and no block is touched out of order."""

    def __init__(
        self,
        engine: TransferEngine,
        lane_layers: Sequence[Sequence[int]],
        unit_blocks: int | None = None,
        *,
        hooks_always_run: bool = True,
        rows: Rows | None = None,
        num_drafting: int = 0,
    ) -> None:
        """Begin with empty lanes.

        Args:
            engine: Makes the copies.
            lane_layers: The layers of each lane, in the order in which they run; every layer has one lane.
            unit_blocks: Most blocks of one background copy, or None for a whole layer's: where tensor-parallel ranks
                exchange activations over the same link, those wait for one unit at most (LayerKV, section 4).
            hooks_always_run: Whether :meth:`layer_done` may be counted on in every step, and not only in those that
                cannot do without (``StepPlan.needs_layer_hooks``): not where other steps replay CUDA graphs.
            rows: Of which KV-cache group each layer is, and which slot it uses; None: of one group, each its own.
            num_drafting: So many layers, the last, are of what drafts: they run after the model's, several times in a
                step or not at all. What they lack or find too much only makes drafts wrong, which are verified.
        """
        self._engine = engine
        self._lane_layers = lane_layers
        self._unit_blocks = unit_blocks
        self._lane_of = {layer: lane for lane, layers in enumerate(lane_layers) for layer in layers}
        self._following = {layer: after for layers in lane_layers for layer, after in pairwise(layers)}
        self._num_layers = len(self._lane_of)
        self._num_model_layers = self._num_layers - num_drafting
        self._rows = rows or Rows.of_one_group(self._num_layers)
        self._all_slots = range(self._rows.num_slots)
        self._hooks_always_run = hooks_always_run
        self._slot_groups = self._rows.slot_groups(MOST_GROUPS)
        self._held: dict[int, list[Event]] = {}  # by layer: what compute waits for before its KV-cache update
        self._hits: Sequence[BlockRun] = ()
        self._hits_loading: list[Event] = []
        self._lane_stored: list[Event | None] = [None] * len(lane_layers)  # last store out of each, across steps
        self._lane_ready: list[Event | None] = [None] * len(lane_layers)  # what the lane's next layer must wait for
        self._lane_loads = [False] * len(lane_layers)  # whether that is a load
        self._last_store: Event | None = None
        self._last_ahead: Event | None = None
        self._fetches: list[tuple[FetchPlan, Event]] = []
        self._failed_hits: FailedLoads | None = None
        self._failed_loads: FailedLoads | None = None
        self._watch = StoreWatch()
        self._loads: Sequence[BlockRun] = ()
        self._is_layered = False
        self._stores_of: Sequence[Sequence[BlockRun]] = ()  # by group, of the step under way
        self._loads_of: Sequence[Sequence[BlockRun]] = ()
        self._next_layer = self._num_layers

    def begin_step(self, plan: StepPlan) -> None:
        """Submit what this step's compute depends on, and its fetches; make compute wait for layer 0's lane.

        Raises:
            LostCopyError: a copy that compute must not overtake has not ended, or a store of an earlier step has not.
        """
        engine = self._engine
        self._watch.look()
        if (lost := self._watch.lost) is not None:  # who was to wait for it may have been enqueued long ago
            raise LostCopyError(f"a store of an earlier step is lost: {lost}") from lost
        self._is_layered = plan.is_layered
        self._loads = (*plan.loads, *plan.zone_hits) if plan.zone_hits else plan.loads
        hooks_run = plan.needs_layer_hooks or (self._hooks_always_run and plan.num_tokens > 0)
        self._next_layer = 0 if hooks_run and (plan.is_layered or plan.hits or plan.parks) else self._num_layers
        if plan.settle and self._last_ahead is not None:
            self._wait_for(self._last_ahead)  # rule 7
            self._last_ahead = None
        compute = engine.record_compute()
        if plan.ahead:
            self._last_ahead = self._submit_by_layer(Direction.STORE, plan.ahead, [compute])
        self._submit_parks_and_hits(plan, compute, self._slot_groups if hooks_run else [(0, self._all_slots)])
        self._hold_compute(0)  # rules 5 and 8
        if plan.is_layered:
            self._stores_of, self._loads_of = self._rows.divide(plan.stores), self._rows.divide(self._loads)
            zone_hits_of = self._rows.divide(plan.zone_hits)
            for lane, layers in enumerate(self._lane_layers):
                ready = self._lane_stored[lane]  # rule 4, across steps
                # a layer that has its lane for itself finds there what it left, but no prefix of a prompt that starts
                group = self._rows.group_of(layers[0])
                if loads := (self._loads_of if len(layers) > 1 else zone_hits_of)[group]:
                    self._submit_load(lane, layers[0], loads, [compute, *_unless_failed(ready)])
                else:
                    self._lane_ready[lane], self._lane_loads[lane] = ready, False
            self._wait_for_lane_of(0)
        for fetch in plan.fetches:
            self._fetches.append((fetch, self._submit_fetch(fetch, compute)))

    def layer_done(self, layer: int) -> None:
        """Layer ``layer``'s attention has been enqueued: store it, refill its lane, hold back the next layer.

        Raises:
            LostCopyError: a copy that the next layer depends on has not ended.
        """
        if layer >= self._num_model_layers and layer != self._next_layer:
            return  # drafting again
        assert layer == self._next_layer, f"layer {layer} ran where {self._next_layer} was expected"
        self._next_layer = layer + 1
        if self._is_layered:
            self._store_layer(layer)
        if layer + 1 == self._num_model_layers < self._num_layers:
            self._hold_drafts()
        else:
            self._hold_compute(layer + 1)  # rules 5 and 8

    def _hold_drafts(self) -> None:
        """Whether what drafts says anything or not, it writes nothing before that is saved or loaded."""
        for layer in list(self._held):
            self._hold_compute(layer)
        if self._is_layered:
            for layers in self._lane_layers:
                self._wait_for_lane_of(layers[-1])

    def _store_layer(self, layer: int) -> None:
        lane = self._lane_of[layer]
        row = self._rows[layer]
        stored = self._submit_store([row.slot], self._stores_of[row.group], [self._engine.record_compute()])  # rule 1
        self._last_store = self._lane_stored[lane] = self._lane_ready[lane] = stored
        self._lane_loads[lane] = False
        following = self._following.get(layer)
        if following is not None and (loads := self._loads_of[self._rows.group_of(following)]):
            self._submit_load(lane, following, loads, [stored])  # rule 2
        if layer + 1 < self._num_layers:
            self._wait_for_lane_of(layer + 1)  # rules 3 and 4

    def end_step(self) -> None:
        """The forward pass of a step that was begun is over (or enqueued); what drafts may follow.

        Raises:
            TransferError: not every layer of the model said so: KV in the lanes is lost.
        """
        if self._next_layer < self._num_model_layers:
            ran, self._next_layer = self._next_layer, self._num_layers
            raise TransferError(
                f"the layer hooks of {ran} of {self._num_model_layers} layers ran in a step that copies layer by "
                "layer: vLLM replayed a full CUDA graph, or the model's attention does not call them"
            )

    def abandon_step(self) -> None:
        """An exception has ended the forward pass of the step that was begun: no further layer will say anything."""
        self._next_layer = self._num_layers

    @property
    def has_layer_work(self) -> bool:
        """Whether :meth:`layer_done` is to be called for the layers of the step that was begun."""
        return self._next_layer < self._num_layers

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is under way of which :meth:`poll_fetches` or :meth:`take_failed_stores` will tell."""
        return not self._fetches and self._watch.is_at_rest

    @property
    def has_fetches(self) -> bool:
        """Whether a fetch is under way or not yet polled."""
        return bool(self._fetches)

    def poll_fetches(self, wait_s: float = 0.0) -> list[FinishedFetch]:
        """Fetches that have ended since the last call.

        Args:
            wait_s: Block that long for the oldest one: for steps without compute, which would only spin.

        Raises:
            LostCopyError: one has failed because of a copy that has not ended.
        """
        if not self._fetches:
            return []
        if wait_s > 0:
            self._engine.wait_host(self._fetches[0][1], wait_s)
        finished: list[FinishedFetch] = []
        under_way: list[tuple[FetchPlan, Event]] = []
        for fetch, event in self._fetches:
            if event.is_done():
                if event.error is not None:  # it may still write: what is computed in its place comes after that
                    self._wait_for(event)
                finished.append(FinishedFetch(fetch.request_id, event.error, device_blocks(fetch.runs)))
            else:
                under_way.append((fetch, event))
        self._fetches = under_way
        return finished

    def take_failed_hits(self) -> FailedLoads | None:
        """The prefixes of the step just run that could not be loaded; None if there are none."""
        failed, self._failed_hits = self._failed_hits, None
        return failed

    def take_failed_loads(self) -> FailedLoads | None:
        """The layered requests' KV of the step just run that some layer could not load; None if all could."""
        failed, self._failed_loads = self._failed_loads, None
        return failed

    def take_failed_stores(self) -> FailedStores | None:
        """Host blocks into which a store has failed, known since the last call; None if there are none."""
        self._watch.look()
        return self._watch.take_failed()

    def before_unmap(self) -> list[Event]:
        """What uses memory that no step uses from now on: all compute so far, and every store.

        A store that has failed too: on a device, what it had enqueued before that may not have ended. Loads need no
        word: compute waits for those into blocks that it reads, and a fetch's blocks are its own until it is reported.
        """
        stores = (self._last_store, self._last_ahead, *self._lane_stored)
        return [self._engine.record_compute(), *(store for store in stores if store is not None)]

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

    def _submit_store(
        self, layers: Sequence[int], runs: Sequence[BlockRun], after: Sequence[Event], *, background: bool = False
    ) -> Event:
        stored = self._engine.submit(Direction.STORE, layers, runs, after=after, background=background)
        self._watch.add(stored, layers, runs)
        return stored

    def _submit_load(self, lane: int, layer: int, runs: Sequence[BlockRun], after: Sequence[Event]) -> None:
        slots = [self._rows[layer].slot]
        after = [*after, *self._watch.before_load(slots, runs)]  # rule 8 too, where a prefix is among them
        self._lane_ready[lane] = self._engine.submit(Direction.LOAD, slots, runs, after=after)
        self._lane_loads[lane] = True

    def _submit_parks_and_hits(
        self, plan: StepPlan, compute: Event, slot_groups: Sequence[tuple[int, Sequence[int]]]
    ) -> None:
        """Compute waits for some slots at a time before the first layer that uses any: copies of others overlap it."""
        before = self._stores_so_far()
        self._held.clear()
        self._hits, self._hits_loading = plan.hits, []
        for first_layer, slots in slot_groups if plan.parks or plan.hits else ():
            held: list[Event] = []
            if plan.parks:
                self._last_store = self._submit_store(slots, plan.parks, [compute])
                held.append(self._last_store)  # rule 5
            if plan.hits:
                held.append(self._submit_hits(plan.hits, slots, [compute, *before, *held]))  # rule 8
                self._hits_loading.append(held[-1])
            self._held[first_layer] = held

    def _submit_hits(self, runs: Sequence[BlockRun], layers: Sequence[int], after: Sequence[Event]) -> Event:
        after = [*after, *self._watch.before_load(layers, runs)]
        return self._engine.submit(Direction.LOAD, layers, runs, after=after)

    def _hold_compute(self, layer: int) -> None:
        """Before ``layer``'s KV-cache update, compute waits for what frees and fills its blocks."""
        for event in self._held.pop(layer, ()):
            error = self._wait_for(event)
            if error is not None and event in self._hits_loading:
                self._failed_hits = FailedLoads(error, tuple(self._hits))

    def _stores_so_far(self) -> list[Event]:
        """The last store, and each lane's: all others end before one of them does.

        Not those known to have failed: they have ended, and fail only who reads what they should have stored.
        """
        stores = (self._last_store, *self._lane_stored)
        return [store for store in stores if store is not None and not _has_failed(store)]

    def _submit_by_layer(self, direction: Direction, runs: Sequence[BlockRun], after: Sequence[Event]) -> Event:
        """Background copies of one layer each, or less, so that what a step waits for never waits for a whole request.

        Returns:
            An event that ends when all have. That of loads fails if any of them did; stores are watched one by one.
        """
        event: Event | None = None
        units = [runs] if self._unit_blocks is None or not runs else cut(runs, self._unit_blocks)
        for slot in self._all_slots:
            # One load comes after the other, so the first is told what they all come after.
            before = self._watch.before_load([slot], runs) if direction is Direction.LOAD else []
            for unit in units:
                if direction is Direction.STORE:
                    event = self._submit_store([slot], unit, after, background=True)
                    continue
                before = [*after, *before, *([event] if event is not None else ())]
                event = self._engine.submit(direction, [slot], unit, after=before, background=True)
                before = []
        assert event is not None
        return event

    def _wait_for_lane_of(self, layer: int) -> None:
        lane = self._lane_of[layer]
        ready = self._lane_ready[lane]
        if ready is None:
            return
        error = self._wait_for(ready)  # a store's is for the watch to tell: what is computed here is right
        if error is not None and self._lane_loads[lane]:
            self._failed_loads = FailedLoads(error, tuple(self._loads))

    def _wait_for(self, event: Event) -> TransferError | None:
        """Compute waits for its end; why it failed, if that is known."""
        try:
            self._engine.wait_compute(event)
        except LostCopyError:
            raise
        except TransferError as error:
            return error
        return None


def _unless_failed(store: Event | None) -> list[Event]:
    return [] if store is None or _has_failed(store) else [store]


def _has_failed(store: Event) -> bool:
    """Whether it is known to have ended with an error: one that is lost has not ended."""
    return store.error is not None and not isinstance(store.error, LostCopyError)


def device_blocks(runs: Sequence[BlockRun]) -> tuple[int, ...]:
    """The device blocks of these runs."""
    return tuple(block for run in runs for block in range(run.device_block, run.device_block + run.num_blocks))
