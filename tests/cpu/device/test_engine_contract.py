"""The contract of a transfer engine, over the CPU engine and over the fakes that other tests rely on."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from layerkv.core.geometry import KVGeometry
from layerkv.core.transfer import BlockRun
from layerkv.device.base import Direction, TransferEngine
from layerkv.device.cpu_engine import CopyEvent
from layerkv.errors import TransferError
from tests.fakes.workers import Worker, make_worker, small_geometry

STORE, LOAD = Direction
HOST_BLOCKS = 9
POISON = -77
LONG_S = 30.0
"""Far more than any of these copies takes; a test that reaches it has failed."""
SHORT_S = 0.05
"""For an event that cannot have ended, because what it waits for has not."""


class Memory:
    """Arena and host memory as arrays of words, all different and none of them poison."""

    def __init__(self, worker: Worker, num_host_blocks: int) -> None:
        geometry = worker.arena.geometry
        words = geometry.page_bytes // 8
        device_shape = (geometry.num_layers, geometry.total_blocks, words)
        self.device = worker.arena.tensor().numpy().view(np.int64).reshape(device_shape)
        at_host = worker.host.tensor().numpy()[:, : num_host_blocks * geometry.page_bytes]
        self.host = at_host.view(np.int64).reshape(geometry.num_layers, num_host_blocks, words, copy=False)
        self.pool = self.device[:, : geometry.pool_blocks]
        self.pool[:] = np.arange(self.pool.size).reshape(self.pool.shape)
        self.host[:] = -1_000 - np.arange(self.host.size).reshape(self.host.shape)


FAKES = ("slow", "compute-first", "compute-last", "random-0", "random-1")
CUDA = ("cuda-0", "cuda-1", "cuda-unpinned")
ENGINES = ("cpu", *FAKES, *CUDA)
FAILING_LATE = pytest.mark.parametrize("worker", ["cpu", *FAKES], indirect=True)
"""On CUDA a copy cannot fail by itself once it is submitted: an error of the device is one of all that follows."""


@pytest.fixture(params=ENGINES)
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    worker = make_worker(request.param, small_geometry(5, 2), HOST_BLOCKS)
    yield worker
    worker.engine.close()


@pytest.fixture
def memory(worker: Worker) -> Memory:
    return Memory(worker, HOST_BLOCKS)


def finish(engine: TransferEngine, *events: CopyEvent) -> None:
    for event in events:
        assert engine.wait_host(event, LONG_S)
        assert event.is_done()


@pytest.mark.parametrize("layers", [range(5), [0], [4], [3, 1]], ids=str)
@pytest.mark.parametrize(
    "runs",
    [
        [BlockRun(3, 5, 1)],
        [BlockRun(0, 0, 9)],
        [BlockRun(13, 2, 3), BlockRun(1, 6, 2), BlockRun(7, 0, 1)],
    ],
    ids=["one-block", "all-host-blocks", "scattered"],
)
def test_a_round_trip_brings_every_byte_back_and_touches_no_other(
    worker: Worker, memory: Memory, layers: list[int], runs: list[BlockRun]
) -> None:
    wanted, host_before = memory.pool.copy(), memory.host.copy()
    finish(worker.engine, worker.engine.submit(STORE, layers, runs))
    for layer in range(5):
        for block in range(HOST_BLOCKS):
            pair = [r.device_block + block - r.host_block for r in runs if 0 <= block - r.host_block < r.num_blocks]
            expected = wanted[layer, pair[0]] if pair and layer in layers else host_before[layer, block]
            assert (memory.host[layer, block] == expected).all(), (layer, block)
    memory.pool[:] = POISON
    finish(worker.engine, worker.engine.submit(LOAD, layers, runs))
    for layer in range(5):
        for block in range(16):
            is_named = any(r.device_block <= block < r.device_block + r.num_blocks for r in runs)
            expected = wanted[layer, block] if is_named and layer in layers else POISON
            assert (memory.pool[layer, block] == expected).all(), (layer, block)


@pytest.mark.parametrize("page_bytes", [512, 1536, 4096, 4608], ids=lambda size: f"page-{size}")
@pytest.mark.parametrize("name", ENGINES)
def test_odd_page_sizes_come_through_zone_and_pool_alike(name: str, page_bytes: int) -> None:
    geometry = KVGeometry(num_layers=3, page_bytes=page_bytes, block_tokens=4, pool_blocks=8, zone_blocks=8, lanes=2)
    worker = make_worker(name, geometry, 5)
    memory = Memory(worker, 5)
    runs = [BlockRun(6, 1, 4)]  # across the border
    memory.device[2, 6:10] = wanted = np.arange(4 * page_bytes // 8).reshape(4, -1)
    finish(worker.engine, worker.engine.submit(STORE, [2], runs))
    assert (memory.host[2, 1:5] == wanted).all()
    memory.device[2, 6:10] = POISON
    finish(worker.engine, worker.engine.submit(LOAD, [2], runs))
    assert (memory.device[2, 6:10] == wanted).all()
    assert (memory.device[0, 8:10] == wanted[2:]).all(), "layers 0 and 2 share their lane"
    worker.engine.close()


def test_a_copy_begins_after_every_event_it_waits_for(worker: Worker, memory: Memory) -> None:
    engine, first, second = worker.engine, worker.gate(), worker.gate()
    stored = engine.submit(STORE, [0], [BlockRun(1, 0, 1)], after=[first, second])
    first.end()
    assert not engine.wait_host(stored, SHORT_S)
    assert not stored.is_done()
    memory.pool[0, 1] = 5  # still allowed, and what the copy must see
    second.end()
    finish(engine, stored)
    assert (memory.host[0, 0] == 5).all()


def test_a_load_after_a_store_sees_what_was_stored(worker: Worker, memory: Memory) -> None:
    engine, gate = worker.engine, worker.gate()
    stored = engine.submit(STORE, range(5), [BlockRun(2, 3, 2)], after=[gate])
    loaded = engine.submit(LOAD, range(5), [BlockRun(8, 3, 2)], after=[stored])
    assert not engine.wait_host(loaded, SHORT_S)
    gate.end()
    finish(engine, loaded)
    assert stored.is_done()
    assert (memory.pool[:, 8:10] == memory.pool[:, 2:4]).all()


def test_a_copy_after_recorded_compute_sees_what_was_computed(worker: Worker, memory: Memory) -> None:
    engine = worker.engine
    worker.compute(lambda: memory.pool[1, 4].fill(11))
    stored = engine.submit(STORE, [1], [BlockRun(4, 4, 1)], after=[engine.record_compute()])
    worker.compute(lambda: memory.pool[1, 5].fill(12))
    finish(engine, stored)
    assert (memory.host[1, 4] == 11).all()


def test_compute_behind_a_wait_sees_what_was_loaded(worker: Worker, memory: Memory) -> None:
    engine, seen = worker.engine, []
    memory.host[2, 1] = 21
    engine.wait_compute(engine.submit(LOAD, [2], [BlockRun(9, 1, 1)]))
    worker.compute(lambda: seen.append(set(memory.pool[2, 9].tolist())))
    finish(engine, engine.record_compute())
    assert seen == [{21}]


def test_with_no_compute_under_way_the_recorded_event_has_ended(worker: Worker) -> None:
    event = worker.engine.record_compute()
    assert event.is_done()
    assert event.error is None


@pytest.mark.parametrize(("direction", "background"), [(STORE, False), (LOAD, False), (LOAD, True)])
def test_copies_of_one_direction_run_in_the_order_of_submission(
    worker: Worker, memory: Memory, direction: Direction, background: bool
) -> None:
    engine, gate = worker.engine, worker.gate()
    sources = [BlockRun(block, 0, 1) for block in (1, 2, 3)]
    if direction is LOAD:
        sources = [BlockRun(0, block, 1) for block in (1, 2, 3)]
    wanted = (memory.pool if direction is STORE else memory.host)[0, 3].copy()
    events = [
        engine.submit(direction, [0], [run], after=[gate] if i == 0 else [], background=background)
        for i, run in enumerate(sources)
    ]
    assert not engine.wait_host(events[2], SHORT_S), "it overtook one that was submitted before"
    gate.end()
    finish(engine, *events)
    destination = (memory.host if direction is STORE else memory.pool)[0, 0]
    assert (destination == wanted).all(), "the last one submitted was not the last one to run"


def test_a_gated_store_does_not_hold_up_loads(worker: Worker, memory: Memory) -> None:
    engine, gate = worker.engine, worker.gate()
    stored = engine.submit(STORE, [0], [BlockRun(0, 0, 1)], after=[gate])
    finish(engine, engine.submit(LOAD, [0], [BlockRun(6, 7, 1)]))
    assert (memory.pool[0, 6] == memory.host[0, 7]).all()
    assert not stored.is_done()
    gate.end()


@pytest.mark.parametrize("worker", ["cpu", "slow"], indirect=True)
def test_a_foreground_load_overtakes_background_ones_that_have_not_begun(worker: Worker, memory: Memory) -> None:
    engine, gate = worker.engine, worker.gate()
    engine.submit(LOAD, [0], [BlockRun(0, 0, 1)], after=[gate])
    behind = [engine.submit(LOAD, [0], [BlockRun(1, block, 1)], background=True) for block in (1, 2)]
    ahead = engine.submit(LOAD, [0], [BlockRun(1, 3, 1)])
    gate.end()
    finish(engine, ahead, *behind)
    assert (memory.pool[0, 1] == memory.host[0, 2]).all(), "background loads, which end last, did not"


@FAILING_LATE
def test_whoever_depends_on_a_failed_copy_fails_too(worker: Worker, memory: Memory) -> None:
    engine, gate = worker.engine, worker.gate()
    before = memory.host.copy(), memory.pool.copy()
    stored = engine.submit(STORE, [0], [BlockRun(0, 0, 1)], after=[gate])
    loaded = engine.submit(LOAD, [0], [BlockRun(9, 0, 1)], after=[stored])
    fetched = engine.submit(LOAD, [1], [BlockRun(9, 0, 1)], after=[loaded], background=True)
    gate.end(TransferError("the link is down"))
    finish(engine, fetched)
    for event in (stored, loaded, fetched):
        assert isinstance(event.error, TransferError)
        assert "the link is down" in str(event.error)
    assert (memory.host == before[0]).all()
    assert (memory.pool == before[1]).all()


@FAILING_LATE
def test_compute_refuses_to_wait_for_a_copy_known_to_have_failed(worker: Worker) -> None:
    engine, gate = worker.engine, worker.gate()
    loaded = engine.submit(LOAD, [0], [BlockRun(0, 0, 1)], after=[gate])
    gate.end(TransferError("the link is down"))
    finish(engine, loaded)
    with pytest.raises(TransferError, match="the link is down"):
        engine.wait_compute(loaded)


def test_copies_go_on_after_one_has_failed(worker: Worker, memory: Memory) -> None:
    engine, gate = worker.engine, worker.gate()
    gate.end(TransferError("the link was down"))
    failed = engine.submit(STORE, [0], [BlockRun(0, 0, 1)], after=[gate])
    stored = engine.submit(STORE, [0], [BlockRun(1, 1, 1)])
    finish(engine, failed, stored)
    assert failed.error is not None
    assert stored.error is None
    assert (memory.host[0, 1] == memory.pool[0, 1]).all()


def test_closing_finishes_what_is_under_way_and_may_be_repeated(worker: Worker, memory: Memory) -> None:
    engine = worker.engine
    stored = engine.submit(STORE, range(5), [BlockRun(0, 0, 9)])
    loaded = engine.submit(LOAD, range(5), [BlockRun(7, 0, 9)], after=[stored], background=True)
    engine.close()
    assert stored.is_done()
    assert loaded.is_done()
    assert (memory.pool[:, 7:16] == memory.host).all()
    engine.close()


def test_nothing_can_be_submitted_after_closing(worker: Worker) -> None:
    worker.engine.close()
    for direction in Direction:
        with pytest.raises(TransferError, match="closed"):
            worker.engine.submit(direction, [0], [BlockRun(0, 0, 1)])


def test_what_compute_waited_for_is_told_once_where_it_is_told(worker: Worker) -> None:
    engine = worker.engine
    if engine.take_waited_s() is None:
        return  # a stream waits there, and no thread
    engine.wait_compute(engine.submit(STORE, range(5), [BlockRun(0, 0, 9)]))
    waited_s = engine.take_waited_s()
    assert waited_s is not None
    assert waited_s >= 0.0
    assert engine.take_waited_s() == 0.0


def test_copying_seconds_are_counted_by_direction_and_taken_once(worker: Worker) -> None:
    engine = worker.engine
    assert engine.take_seconds() == {STORE: 0.0, LOAD: 0.0}
    finish(engine, engine.submit(STORE, range(5), [BlockRun(0, 0, 9)]))
    taken = engine.take_seconds()
    assert taken[STORE] > 0.0
    assert taken[LOAD] == 0.0
    assert engine.take_seconds() == {STORE: 0.0, LOAD: 0.0}


# The CPU engine's threads -----------------------------------------------------------------------------------------


def test_closing_the_cpu_engine_ends_its_threads() -> None:
    worker = make_worker("cpu", small_geometry(2, 1), 2)
    mine = list(worker.engine._threads.values())
    assert all(thread.is_alive() for thread in mine)
    worker.engine.close()
    assert not any(thread.is_alive() for thread in mine)


def test_no_copy_is_lost_when_many_small_ones_race_with_their_waiter() -> None:
    worker = make_worker("cpu", small_geometry(2, 1), 8)
    memory = Memory(worker, 8)
    engine = worker.engine
    for i in range(400):
        memory.pool[:, 0] = i
        stored = engine.submit(STORE, [0, 1], [BlockRun(0, i % 8, 1)])
        loaded = engine.submit(LOAD, [0, 1], [BlockRun(1, i % 8, 1)], after=[stored], background=bool(i % 3))
        engine.wait_compute(loaded)
        assert (memory.pool[:, 1] == i).all()
    engine.close()


def test_an_event_can_be_waited_for_by_several_threads() -> None:
    worker = make_worker("cpu", small_geometry(2, 1), 2)
    gate = worker.gate()
    stored = worker.engine.submit(STORE, [0], [BlockRun(0, 0, 1)], after=[gate])
    ended: list[bool] = []
    waiters = [threading.Thread(target=lambda: ended.append(worker.engine.wait_host(stored, LONG_S))) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    gate.end()
    for waiter in waiters:
        waiter.join()
    assert ended == [True] * 3
    worker.engine.close()


# CUDA's own errors ------------------------------------------------------------------------------------------------


def test_what_torch_or_triton_raises_fails_the_copy_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker("cuda-0", small_geometry(2, 1), 2)

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(worker.engine, "_enqueue", no_memory)
        failed = worker.engine.submit(STORE, [0], [BlockRun(0, 0, 1)])
    assert isinstance(failed.error, TransferError)
    assert "out of memory" in str(failed.error)
    stored = worker.engine.submit(STORE, [0], [BlockRun(0, 0, 1)])
    finish(worker.engine, stored)
    assert stored.error is None
    worker.engine.close()
