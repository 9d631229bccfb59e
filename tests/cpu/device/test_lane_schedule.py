"""What the lane schedule reports: ended and failed fetches, draining, and hooks out of order.

That copies come in the right order is `test_ordering.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import pytest

from layerkv.core.transfer import BlockRun, FetchPlan, StepPlan
from layerkv.device.base import Direction
from layerkv.device.lane_schedule import FinishedFetch, LaneSchedule
from layerkv.errors import TransferError
from tests.fakes.workers import Worker, make_worker, small_geometry

NUM_LAYERS, LANES = 4, 2
ZONE = 16  # first zone block


@pytest.fixture
def worker() -> Worker:
    return make_worker("slow", small_geometry(NUM_LAYERS, LANES), 8)


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


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_kv_is_never_fetched_whose_store_has_failed_in_some_layer(monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    """Rule 8: KV that never reached host memory must not be decoded from, whichever layer's it is."""
    worker = make_worker("cpu", small_geometry(NUM_LAYERS, LANES), 8)
    lanes, failing = (
        LaneSchedule(worker.engine, small_geometry(NUM_LAYERS, LANES).lane_layers()),
        FailingStores(worker, monkeypatch),
    )
    failing.layers = {layer}
    finished: list[FinishedFetch] = []
    with suppress(TransferError):  # as good: the step, and with it the worker, learns of it before anything is read
        layered_step(lanes, StepPlan(stores=(BlockRun(ZONE, 0, 3),), num_tokens=12))
        lanes.begin_step(StepPlan(fetches=(FetchPlan("a", (BlockRun(2, 0, 3),)),)))
        while not finished:
            finished = lanes.poll_fetches(wait_s=5.0)
    worker.engine.close()
    assert all(fetch.error is not None for fetch in finished), f"layer {layer} was fetched though its store failed"


def test_a_park_whose_store_failed_stops_the_step_that_would_overwrite_it(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker("cpu", small_geometry(NUM_LAYERS, LANES), 8)
    lanes, failing = (
        LaneSchedule(worker.engine, small_geometry(NUM_LAYERS, LANES).lane_layers()),
        FailingStores(worker, monkeypatch),
    )
    failing.layers = {0}
    with pytest.raises(TransferError, match="host memory is gone"):
        lanes.begin_step(StepPlan(parks=(BlockRun(2, 0, 3),)))
    worker.engine.close()


def test_a_prefix_that_could_not_be_loaded_is_reported_and_the_step_goes_on() -> None:
    worker = make_worker("cpu", small_geometry(NUM_LAYERS, 1), 8)
    lanes = LaneSchedule(worker.engine, small_geometry(NUM_LAYERS, 1).lane_layers())
    gate = worker.gate()
    gate.end(TransferError("host memory is gone"))
    lanes._last_store = gate  # as if what it reads had never been stored
    lanes.begin_step(StepPlan(hits=(BlockRun(2, 0, 3),), num_tokens=1))
    for layer in range(NUM_LAYERS):
        lanes.layer_done(layer)
    lanes.end_step()
    failed = lanes.take_failed_hits()
    assert failed is not None
    assert failed.device_blocks == (2, 3, 4)
    assert "host memory is gone" in str(failed.error)
    assert lanes.take_failed_hits() is None
    worker.engine.close()


def test_a_load_that_failed_stops_compute_where_the_engine_can_tell_at_once() -> None:
    worker = make_worker("cpu", small_geometry(NUM_LAYERS, 1), 8)
    lanes = LaneSchedule(worker.engine, small_geometry(NUM_LAYERS, 1).lane_layers())
    gate = worker.gate()
    gate.end(TransferError("the link is down"))
    worker.engine.submit(Direction.STORE, [0], [BlockRun(0, 0, 1)])
    lanes._lane_stored[0] = gate  # as if the last step's store had failed
    with pytest.raises(TransferError, match="the link is down"):
        lanes.begin_step(StepPlan(stores=(BlockRun(ZONE, 0, 1),), loads=(BlockRun(ZONE, 0, 1),), num_tokens=1))
    worker.engine.close()


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
    plan = StepPlan(stores=(BlockRun(ZONE, 0, 3),), fetches=(FetchPlan("a", (BlockRun(2, 4, 2),)),), num_tokens=12)
    layered_step(lanes, plan)
    lanes.drain(5.0)
    assert not worker.engine._queues["store"]
    assert not worker.engine._queues["background"]
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
