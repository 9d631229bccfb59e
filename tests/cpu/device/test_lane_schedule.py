"""What the lane schedule reports: ended and failed fetches, draining, and hooks out of order.

That copies come in the right order is `test_ordering.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial

import pytest

from layerkv.core.transfer import BlockRun, FetchPlan, StepPlan
from layerkv.device.base import Direction
from layerkv.device.lane_schedule import LaneSchedule
from layerkv.errors import LostCopyError, TransferError
from tests.fakes.stream_engine import AHEAD, BACKGROUND, STORE
from tests.fakes.workers import Worker, make_worker, small_geometry

NUM_LAYERS, LANES = 4, 2
ZONE = 16  # first zone block


@pytest.fixture
def worker() -> Worker:
    return make_worker("slow", small_geometry(NUM_LAYERS, LANES), 16)


@pytest.fixture
def lanes(worker: Worker) -> LaneSchedule:
    return LaneSchedule(worker.engine, small_geometry(NUM_LAYERS, LANES).lane_layers())


def fetch_of(request_id: str, device_block: int = 2, num_blocks: int = 3) -> FetchPlan:
    return FetchPlan(request_id, (BlockRun(device_block, 0, num_blocks), BlockRun(9, 6, 1)))


def layered_step(lanes: LaneSchedule, plan: StepPlan) -> None:
    lanes.begin_step(plan)
    for layer in range(NUM_LAYERS):
        lanes.layer_done(layer)


def test_a_fetch_is_reported_once_and_only_when_it_has_ended(worker: Worker, lanes: LaneSchedule) -> None:
    assert not lanes.has_fetches
    lanes.begin_step(StepPlan(fetches=(fetch_of("a"), fetch_of("b", 5))))
    assert lanes.poll_fetches() == []
    assert lanes.has_fetches
    first = lanes.poll_fetches(wait_s=5.0)
    assert [(fetch.request_id, fetch.error) for fetch in first] == [("a", None)], "the oldest is waited for"
    worker.engine.synchronize()
    assert [fetch.request_id for fetch in lanes.poll_fetches()] == ["b"]
    assert not lanes.has_fetches
    assert lanes.poll_fetches(wait_s=5.0) == []


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_fetch_that_fails_in_any_layer_is_reported_with_all_its_blocks(
    worker: Worker, lanes: LaneSchedule, layer: int
) -> None:
    worker.engine.failing.add((Direction.LOAD, layer))
    lanes.begin_step(StepPlan(fetches=(fetch_of("a"),)))
    [finished] = lanes.poll_fetches(wait_s=5.0)
    assert finished.request_id == "a"
    assert isinstance(finished.error, TransferError)
    assert finished.device_blocks == (2, 3, 4, 9)


def test_a_failed_fetch_does_not_fail_the_next_one(worker: Worker, lanes: LaneSchedule) -> None:
    worker.engine.failing.add((Direction.LOAD, 1))
    lanes.begin_step(StepPlan(fetches=(fetch_of("a"),)))
    worker.engine.synchronize()
    worker.engine.failing.clear()
    lanes.begin_step(StepPlan(fetches=(fetch_of("b"),)))
    worker.engine.synchronize()
    assert [(f.request_id, f.error is None) for f in lanes.poll_fetches()] == [("a", False), ("b", True)]


class FailingStores:
    """Makes the CPU engine's stores of some layers fail."""

    def __init__(self, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers: set[int] = set()
        thread = worker.engine._threads[Direction.STORE]
        copy = thread._copy

        def copy_or_fail(layers: Sequence[int], runs: Sequence[BlockRun]) -> None:
            if self.layers.intersection(layers):
                raise OSError("host memory is gone")
            copy(layers, runs)

        monkeypatch.setattr(thread, "_copy", copy_or_fail)


@pytest.fixture
def real() -> Iterator[tuple[Worker, LaneSchedule]]:
    """The CPU engine, whose copies fail late: in their threads."""
    worker = make_worker("cpu", small_geometry(NUM_LAYERS, LANES), 16)
    yield worker, LaneSchedule(worker.engine, small_geometry(NUM_LAYERS, LANES).lane_layers())
    worker.engine.close()


def fetched(lanes: LaneSchedule, host_block: int, num_blocks: int = 3) -> BaseException | None:
    """Why a fetch of these host blocks fails; None if it does not."""
    lanes.begin_step(StepPlan(fetches=(FetchPlan("a", (BlockRun(2, host_block, num_blocks),)),)))
    while not (finished := lanes.poll_fetches(wait_s=5.0)):
        pass
    return finished[0].error


OURS = StepPlan(stores=(BlockRun(ZONE, 0, 3),), num_tokens=12)
OTHERS = StepPlan(stores=(BlockRun(ZONE + 4, 8, 3),), num_tokens=12)
AGAIN = StepPlan(stores=(BlockRun(ZONE, 0, 3),), loads=(BlockRun(ZONE, 0, 2),), num_tokens=4)
LAST_OF_CHUNK = StepPlan(loads=(BlockRun(ZONE, 0, 3),), num_tokens=4, uses_lanes=True)
WHOLE_CHUNK = StepPlan(num_tokens=12, uses_lanes=True)


@pytest.mark.parametrize("num_steps_later", [0, 1, 2])
@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_kv_is_never_fetched_whose_store_has_failed_in_some_layer(
    monkeypatch: pytest.MonkeyPatch, real: tuple[Worker, LaneSchedule], layer: int, num_steps_later: int
) -> None:
    """KV that never reached host memory must not be decoded from, whatever was stored from its lane since."""
    worker, lanes = real
    failing = FailingStores(worker, monkeypatch)
    failing.layers = {layer}
    layered_step(lanes, OURS)
    lanes.drain(5.0)
    failing.layers.clear()
    for _ in range(num_steps_later):
        layered_step(lanes, OTHERS)
    assert "host memory is gone" in str(fetched(lanes, 0))
    assert fetched(lanes, 8) is None, "others are served"


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_failed_store_is_reported_once_with_its_host_blocks_and_the_step_goes_on(
    monkeypatch: pytest.MonkeyPatch, real: tuple[Worker, LaneSchedule], layer: int
) -> None:
    worker, lanes = real
    FailingStores(worker, monkeypatch).layers = {layer}
    layered_step(lanes, OURS)
    lanes.end_step()
    lanes.drain(5.0)
    failed = lanes.take_failed_stores()
    assert failed is not None
    assert failed.host_blocks == {0, 1, 2}
    assert lanes.take_failed_stores() is None
    assert lanes.take_failed_loads() is None, "what the step itself computed is right"


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_layer_whose_kv_was_not_stored_is_not_loaded_from_and_the_step_says_so(
    monkeypatch: pytest.MonkeyPatch, real: tuple[Worker, LaneSchedule], layer: int
) -> None:
    worker, lanes = real
    failing = FailingStores(worker, monkeypatch)
    failing.layers = {layer}
    layered_step(lanes, OURS)
    layered_step(lanes, AGAIN)
    failed = lanes.take_failed_loads()
    assert failed is not None
    assert failed.runs == AGAIN.loads
    assert lanes.take_failed_loads() is None
    failing.layers.clear()
    layered_step(lanes, OURS)
    layered_step(lanes, AGAIN)
    assert lanes.take_failed_loads() is None, "stored again from the beginning, it is good"


def test_a_load_that_fails_is_reported_and_the_step_goes_on(
    monkeypatch: pytest.MonkeyPatch, real: tuple[Worker, LaneSchedule]
) -> None:
    worker, lanes = real
    layered_step(lanes, OURS)
    thread = worker.engine._threads[Direction.LOAD]

    def fail(layers: Sequence[int], runs: Sequence[BlockRun]) -> None:
        raise OSError("the link is down")

    monkeypatch.setattr(thread, "_copy", fail)
    layered_step(lanes, AGAIN)
    lanes.end_step()
    failed = lanes.take_failed_loads()
    assert failed is not None
    assert "the link is down" in str(failed.error)
    lanes.drain(5.0)
    assert lanes.take_failed_stores() is None


def test_a_park_whose_store_failed_costs_what_it_should_have_stored_and_not_the_step(
    monkeypatch: pytest.MonkeyPatch, real: tuple[Worker, LaneSchedule]
) -> None:
    worker, lanes = real
    failing = FailingStores(worker, monkeypatch)
    failing.layers = {0}
    layered_step(lanes, OTHERS._replace(parks=(BlockRun(2, 0, 3),)))
    failing.layers.clear()
    failed = lanes.take_failed_stores()
    assert failed is not None
    assert {0, 1, 2} <= failed.host_blocks
    assert fetched(lanes, 0) is not None


def test_a_failed_store_ahead_holds_up_neither_who_settles_nor_later_ones(
    monkeypatch: pytest.MonkeyPatch, real: tuple[Worker, LaneSchedule]
) -> None:
    worker, lanes = real
    failing = FailingStores(worker, monkeypatch)
    failing.layers = {1}
    lanes.begin_step(StepPlan(ahead=(BlockRun(2, 0, 3),)))
    lanes.drain(5.0)
    failing.layers.clear()
    lanes.begin_step(StepPlan(ahead=(BlockRun(6, 4, 3),)))
    lanes.begin_step(StepPlan(settle=True, parks=(BlockRun(5, 3, 1),)))
    failed = lanes.take_failed_stores()
    assert failed is not None
    assert failed.host_blocks == {0, 1, 2}
    assert fetched(lanes, 4) is None
    assert fetched(lanes, 0, 4) is not None


def test_a_cached_prefix_whose_store_failed_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, real: tuple[Worker, LaneSchedule]
) -> None:
    worker, lanes = real
    failing = FailingStores(worker, monkeypatch)
    failing.layers = {2}
    lanes.begin_step(StepPlan(parks=(BlockRun(2, 0, 3),)))
    failing.layers.clear()
    layered_step(lanes, OTHERS)
    layered_step(lanes, StepPlan(hits=(BlockRun(6, 1, 1),), num_tokens=1))
    failed = lanes.take_failed_hits()
    assert failed is not None
    assert failed.runs == (BlockRun(6, 1, 1),)


def test_a_lost_copy_ends_the_step(monkeypatch: pytest.MonkeyPatch, real: tuple[Worker, LaneSchedule]) -> None:
    """It may still read and write the lane: nobody may go on past it."""
    worker, lanes = real
    goes_on = threading.Event()
    monkeypatch.setattr("layerkv.device.cpu_engine.COPY_TIMEOUT_S", 0.01)
    monkeypatch.setattr(worker.engine._threads[Direction.STORE], "_copy", lambda *_: goes_on.wait(30.0))
    with pytest.raises(LostCopyError):
        layered_step(lanes, OURS)
    goes_on.set()


def test_a_fetch_that_failed_because_of_a_lost_copy_ends_the_step(
    monkeypatch: pytest.MonkeyPatch, real: tuple[Worker, LaneSchedule]
) -> None:
    """What is computed in the fetch's place must not be overtaken by a copy that may still write."""
    worker, lanes = real
    goes_on = threading.Event()
    monkeypatch.setattr("layerkv.device.cpu_engine.COPY_TIMEOUT_S", 0.01)
    monkeypatch.setattr(worker.engine._threads[Direction.STORE], "_copy", lambda *_: goes_on.wait(30.0))
    lanes.begin_step(StepPlan(ahead=(BlockRun(2, 0, 3),)))
    lanes.begin_step(StepPlan(fetches=(FetchPlan("a", (BlockRun(6, 0, 3),)),)))
    with pytest.raises(LostCopyError):
        lanes.poll_fetches(wait_s=5.0)
    goes_on.set()


def test_a_layered_step_whose_hooks_did_not_run_is_an_error(lanes: LaneSchedule) -> None:
    lanes.begin_step(StepPlan(stores=(BlockRun(ZONE, 0, 1),), num_tokens=1))
    lanes.layer_done(0)
    with pytest.raises(TransferError, match=r"hooks of 1 of \d+ layers ran .* full CUDA graph"):
        lanes.end_step()
    lanes.end_step()
    lanes.begin_step(StepPlan(parks=(BlockRun(2, 0, 1),)))  # no forward pass
    lanes.end_step()


def test_hooks_out_of_order_are_a_bug_of_ours(lanes: LaneSchedule) -> None:
    lanes.begin_step(StepPlan(stores=(BlockRun(ZONE, 0, 1),), num_tokens=1))
    lanes.layer_done(0)
    with pytest.raises(AssertionError, match="layer 2 ran where 1 was expected"):
        lanes.layer_done(2)


@pytest.mark.parametrize(("unit_blocks", "most_moves"), [(2, 2), (None, 6)])
def test_a_foreground_copy_waits_for_one_unit_of_a_background_one_at_most(
    unit_blocks: int | None, most_moves: int
) -> None:
    worker = make_worker("loads-first", small_geometry(NUM_LAYERS, LANES), 8)
    lanes = LaneSchedule(worker.engine, small_geometry(NUM_LAYERS, LANES).lane_layers(), unit_blocks)
    lanes.begin_step(StepPlan(fetches=(FetchPlan("a", (BlockRun(2, 0, 6),)),)))
    worker.engine.advance(1)  # its first block: what has begun is not overtaken any more
    loaded = worker.engine.submit(Direction.LOAD, [0], [BlockRun(9, 7, 1)])
    moves = 0
    while not loaded.is_done():
        worker.engine.advance(1)
        moves += 1
    assert moves == most_moves
    lanes.drain(5.0)
    assert [fetch.error for fetch in lanes.poll_fetches()] == [None]


def test_draining_waits_for_stores_and_fetches(worker: Worker, lanes: LaneSchedule) -> None:
    fetch = FetchPlan("a", (BlockRun(2, 4, 2),))
    ahead = (BlockRun(6, 6, 2),)
    layered_step(lanes, StepPlan(stores=(BlockRun(ZONE, 0, 3),), fetches=(fetch,), ahead=ahead, num_tokens=12))
    lanes.drain(5.0)
    assert not any(worker.engine._queues[name] for name in (STORE, AHEAD, BACKGROUND))
    assert [fetch.request_id for fetch in lanes.poll_fetches()] == ["a"]


def test_draining_says_when_something_does_not_end(worker: Worker, lanes: LaneSchedule) -> None:
    gate = worker.gate()
    worker.engine.submit(Direction.STORE, [0], [BlockRun(0, 0, 1)], after=[gate])
    layered_step(lanes, StepPlan(stores=(BlockRun(ZONE, 0, 3),), num_tokens=12))
    with pytest.raises(TransferError, match="did not end"):
        lanes.drain(0.0)
    gate.end()
    lanes.drain(0.0)


MANY = 20
"""Layers enough that groups have several."""


@pytest.fixture
def submitted() -> list[tuple[Direction, tuple[int, ...]]]:
    return []


def noted_lanes(submitted: list[tuple[Direction, tuple[int, ...]]], *, hooks_always_run: bool = True) -> LaneSchedule:
    """Lanes that note what they submit."""
    geometry = small_geometry(MANY, LANES)
    worker = make_worker("slow", geometry, 8)
    submit = worker.engine.submit

    def noting(direction: Direction, layers: range, runs: object, **kwargs: object) -> object:
        submitted.append((direction, tuple(layers)))
        return submit(direction, layers, runs, **kwargs)

    worker.engine.submit = noting
    return LaneSchedule(worker.engine, geometry.lane_layers(), hooks_always_run=hooks_always_run)


PARKS = (BlockRun(1, 7, 1), BlockRun(4, 3, 1))


def test_a_layered_steps_copies_are_one_per_layer_and_direction(
    submitted: list[tuple[Direction, tuple[int, ...]]],
) -> None:
    """Batched, never one call per block; parks are a few calls, of some layers each."""
    lanes = noted_lanes(submitted)
    runs = (BlockRun(ZONE, 0, 2), BlockRun(ZONE + 5, 4, 3))
    lanes.begin_step(StepPlan(parks=PARKS, stores=runs, loads=runs, num_tokens=20))
    for layer in range(MANY):
        lanes.layer_done(layer)
    lanes.end_step()
    each = [(layer,) for layer in range(MANY)]
    stores = [layers for direction, layers in submitted if direction is Direction.STORE]
    assert len(stores) == 8 + MANY
    assert [layer for layers in stores[:8] for layer in layers] == list(range(MANY))
    assert stores[8:] == each
    assert [layers for direction, layers in submitted if direction is Direction.LOAD] == each


@pytest.mark.parametrize(("hooks_always_run", "num_tokens"), [(False, 4), (True, 0)])
def test_without_layer_hooks_compute_waits_for_all_of_a_park_at_once(
    submitted: list[tuple[Direction, tuple[int, ...]]], hooks_always_run: bool, num_tokens: int
) -> None:
    lanes = noted_lanes(submitted, hooks_always_run=hooks_always_run)
    lanes.begin_step(StepPlan(parks=PARKS, num_tokens=num_tokens))
    assert not lanes.has_layer_work
    lanes.end_step()
    assert submitted == [(Direction.STORE, tuple(range(MANY)))]


# Layers of what drafts -----------------------------------------------------------------------------------------------

DRAFTING = 2


def drafting_lanes(worker: Worker) -> LaneSchedule:
    """The last two of four layers draft."""
    return LaneSchedule(worker.engine, small_geometry(NUM_LAYERS, LANES).lane_layers(), num_drafting=DRAFTING)


@pytest.mark.parametrize("num_passes", [0, 1, 3])
def test_what_drafts_may_run_its_layers_again_or_not_at_all(worker: Worker, num_passes: int) -> None:
    lanes = drafting_lanes(worker)
    for plan in (OURS, AGAIN, OTHERS):
        lanes.begin_step(plan)
        for layer in range(NUM_LAYERS - DRAFTING):
            lanes.layer_done(layer)
        lanes.end_step()
        for _ in range(num_passes):
            for layer in range(NUM_LAYERS - DRAFTING, NUM_LAYERS):
                lanes.layer_done(layer)
    lanes.drain(5.0)


def test_a_layer_of_the_model_is_missed_all_the_same(worker: Worker) -> None:
    lanes = drafting_lanes(worker)
    lanes.begin_step(OURS)
    lanes.layer_done(0)
    with pytest.raises(TransferError, match="the layer hooks of 1 of 2 layers ran"):
        lanes.end_step()


def test_what_drafts_is_held_back_for_all_that_it_could_overwrite_whether_it_says_anything_or_not(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers are in all lanes, and a graph that is replayed runs no hook between them."""
    submit, wait = worker.engine.submit, worker.engine.wait_compute
    events: dict[int, tuple[Direction, int]] = {}
    kept, waited = [], []

    def noting_submit(direction: Direction, layers: Sequence[int], *args: object, **kwargs: object) -> object:
        event = submit(direction, layers, *args, **kwargs)
        kept.append(event)
        events[id(event)] = (direction, layers[0])
        return event

    def noting_wait(event: object) -> None:
        waited.append(events[id(event)])
        wait(event)

    monkeypatch.setattr(worker.engine, "submit", noting_submit)
    monkeypatch.setattr(worker.engine, "wait_compute", noting_wait)
    lanes = drafting_lanes(worker)
    for plan, direction, layers in ((OURS, Direction.STORE, (0, 1)), (AGAIN, Direction.LOAD, (2, 3))):
        lanes.begin_step(plan)
        for layer in range(NUM_LAYERS - DRAFTING):
            waited.clear()
            lanes.layer_done(layer)
        assert {(direction, layer) for layer in layers} <= set(waited)
        lanes.end_step()


# Steps that use lanes and store nothing: where all layers attend within chunks, and one ends with the step ------------


def zone_bytes(worker: Worker, layer: int) -> memoryview:
    """Three zone blocks of a layer's."""
    geometry = small_geometry(NUM_LAYERS, LANES)
    memory = memoryview(worker.arena.tensor().numpy()).cast("B")
    return memory[geometry.offset(layer, ZONE) :][: 3 * geometry.page_bytes]


def test_a_step_that_stores_nothing_loads_layer_by_layer(real: tuple[Worker, LaneSchedule]) -> None:
    worker, lanes = real
    lanes.begin_step(OURS)
    for layer in range(NUM_LAYERS):
        zone_bytes(worker, layer)[:] = bytes([layer + 1]) * len(zone_bytes(worker, layer))
        lanes.layer_done(layer)
    lanes.end_step()
    lanes.drain(5.0)
    for layer in range(NUM_LAYERS):
        zone_bytes(worker, layer)[:] = bytes(len(zone_bytes(worker, layer)))
    lanes.begin_step(LAST_OF_CHUNK)
    for layer in range(NUM_LAYERS):
        assert set(zone_bytes(worker, layer)) == {layer + 1}, "what this layer left, though others use its lane"
        assert lanes.has_layer_work
        lanes.layer_done(layer)
    lanes.end_step()
    assert not lanes.has_layer_work


def test_a_step_that_copies_nothing_writes_in_lanes_after_they_have_been_stored() -> None:
    """In the step before another request's KV was stored out of them."""
    worker = make_worker("slow", small_geometry(NUM_LAYERS, LANES), 16)
    lanes = LaneSchedule(worker.engine, small_geometry(NUM_LAYERS, LANES).lane_layers())
    for plan, first in ((OURS, 1), (WHOLE_CHUNK, 101)):
        assert plan.has_copies
        lanes.begin_step(plan)
        for layer in range(NUM_LAYERS):
            zone = zone_bytes(worker, layer)
            worker.compute(partial(zone.__setitem__, slice(None), bytes([first + layer]) * len(zone)))
            lanes.layer_done(layer)
        lanes.end_step()
    worker.engine.synchronize()
    lanes.drain(5.0)
    lanes.begin_step(LAST_OF_CHUNK)
    seen: list[set[int]] = []
    for layer in range(NUM_LAYERS):
        worker.compute(partial(lambda zone: seen.append(set(zone)), zone_bytes(worker, layer)))
        lanes.layer_done(layer)
    worker.engine.synchronize()
    assert seen == [{layer + 1} for layer in range(NUM_LAYERS)]
