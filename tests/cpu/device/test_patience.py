"""A copy is taken for lost by time in which the process ran, and not by the clock on the wall."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from layerkv.core.transfer import BlockRun, FetchPlan, StepPlan
from layerkv.device.base import COPY_TIMEOUT_S, Direction
from layerkv.device.cpu_engine import CopyEvent
from layerkv.device.lane_schedule import LaneSchedule
from layerkv.device.patience import LOOK_S, Patience, wait_patiently
from layerkv.errors import LostCopyError
from tests.fakes.workers import make_worker, small_geometry


class Machine:
    """A clock, and a copy that takes so much time in which its process runs."""

    def __init__(self, copy_s: float, stopped_s: dict[int, float] | None = None) -> None:
        self.now_s = 0.0
        self.left_s = copy_s
        self.stopped_s = stopped_s or {}  # by the number of the wait in which the process is stopped
        self.waits: list[float] = []

    def clock(self) -> float:
        return self.now_s

    def wait(self, timeout_s: float) -> bool:
        stopped_s = self.stopped_s.get(len(self.waits), 0.0)
        self.waits.append(timeout_s)
        ran_s = min(timeout_s, self.left_s)
        if stopped_s:
            ran_s = 0.0  # the wait is over when the process goes on, before the copy's thread could do anything
        self.left_s -= ran_s
        self.now_s += ran_s + stopped_s
        return self.left_s <= 0


@pytest.mark.parametrize("stopped", [{0: 61.0}, {0: 3600.0}, {0: 61.0, 1: 61.0, 5: 90.0}])
def test_a_copy_in_a_process_that_was_stopped_is_not_lost(stopped: dict[int, float]) -> None:
    machine = Machine(copy_s=30.0, stopped_s=stopped)
    assert wait_patiently(machine.wait, COPY_TIMEOUT_S, machine.clock)
    assert machine.now_s > COPY_TIMEOUT_S


def test_a_copy_that_does_not_end_while_the_process_runs_is_lost_after_the_limit() -> None:
    machine = Machine(copy_s=1e9)
    assert not wait_patiently(machine.wait, COPY_TIMEOUT_S, machine.clock)
    assert machine.now_s == pytest.approx(COPY_TIMEOUT_S)
    assert max(machine.waits) <= LOOK_S


def test_a_process_stopped_again_and_again_gives_up_in_the_end() -> None:
    machine = Machine(copy_s=1e9, stopped_s=dict.fromkeys(range(10_000), 100.0))
    assert not wait_patiently(machine.wait, COPY_TIMEOUT_S, machine.clock)
    assert len(machine.waits) <= COPY_TIMEOUT_S / LOOK_S + 1


def test_what_ends_just_when_the_time_is_up_is_looked_at_once_more() -> None:
    answers = iter((False, True))
    now_s = iter((0.0, 1.0))
    assert wait_patiently(lambda _: next(answers), 1.0, lambda: next(now_s))


def test_a_short_wait_is_as_short_as_asked() -> None:
    machine = Machine(copy_s=1e9)
    assert not wait_patiently(machine.wait, 0.005, machine.clock)
    assert machine.waits == [0.005, 0.0]


def test_time_between_looks_counts_as_far_as_somebody_looked() -> None:
    machine = Machine(copy_s=1e9)
    patience = Patience(2.0, machine.clock)
    machine.now_s = 1000.0
    assert not patience.is_over()
    machine.now_s = 2000.0
    assert patience.is_over()


class Clocked:
    """In place of the module `time`, for a process that stands still whenever the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


def test_the_cpu_engines_compute_waits_on_after_its_process_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker("cpu", small_geometry(4, 2), 8)
    clock = Clocked()
    monkeypatch.setattr("layerkv.device.patience.running_s", clock.monotonic)
    waits: list[float] = []

    def wait(timeout_s: float) -> bool:
        waits.append(timeout_s)
        clock.now_s += 1000.0  # stopped while it waited
        if len(waits) == 3:
            event.end()
        return event.is_done()

    class Stopped(CopyEvent):
        def _wait(self, timeout_s: float) -> bool:
            return wait(timeout_s)

    event = Stopped()
    worker.engine.wait_compute(event)
    assert len(waits) == 3
    worker.engine.close()


def test_a_cuda_copy_is_not_given_up_because_nobody_looked_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clocked()
    monkeypatch.setattr("layerkv.device.patience.running_s", clock.monotonic)
    worker = make_worker("cuda-0", small_geometry(4, 2), 8)
    gate = worker.gate()
    copy = worker.engine.submit(Direction.LOAD, [0], [BlockRun(1, 0, 1)], after=[gate])
    clock.now_s += 1000.0
    assert not copy.is_done()
    assert copy.error is None
    gate.end()
    assert worker.engine.wait_host(copy, 10.0)
    assert copy.error is None
    worker.engine.close()


def test_a_cuda_copy_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clocked()
    monkeypatch.setattr("layerkv.device.patience.running_s", clock.monotonic)
    worker = make_worker("cuda-0", small_geometry(4, 2), 8)
    gate = worker.gate()
    copy = worker.engine.submit(Direction.LOAD, [0], [BlockRun(1, 0, 1)], after=[gate])
    for _ in range(int(COPY_TIMEOUT_S / LOOK_S)):
        assert not copy.is_done()
        clock.now_s += LOOK_S
    assert copy.is_done()
    assert "did not end" in str(copy.error)
    gate.end()
    worker.engine.close()


def test_compute_is_no_copy_and_never_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that waits for another rank, say, whose process is stopped."""
    clock = Clocked()
    monkeypatch.setattr("layerkv.device.patience.running_s", clock.monotonic)
    worker = make_worker("cuda-0", small_geometry(4, 2), 8)
    is_going_on: list[bool] = []
    cuda = worker.engine._cuda
    cuda.enqueue_wait(cuda.compute_stream, lambda: bool(is_going_on))
    compute = worker.engine.record_compute()
    copy = worker.engine.submit(Direction.STORE, [0], [BlockRun(1, 0, 1)], after=[compute])
    for _ in range(200):
        assert not compute.is_done()
        assert not copy.is_done(), "it has not begun"
        clock.now_s += LOOK_S
    is_going_on.append(True)
    assert worker.engine.wait_host(copy, 10.0)
    assert (compute.error, copy.error) == (None, None)
    worker.engine.close()


def test_what_waits_for_a_lost_copy_is_lost_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost copy may still write, so whoever goes on past it, or past what depends on it, must know."""
    monkeypatch.setattr("layerkv.device.cpu_engine.COPY_TIMEOUT_S", 0.01)
    worker = make_worker("cpu", small_geometry(4, 2), 8)
    gate = worker.gate()
    with pytest.raises(LostCopyError):
        worker.engine.wait_compute(gate)
    late = worker.engine.submit(Direction.STORE, [0], [BlockRun(1, 0, 1)], after=[gate])
    later = worker.engine.submit(Direction.LOAD, [0], [BlockRun(1, 0, 1)], after=[late])
    assert late.wait(30.0), "its thread has given up"
    assert later.wait(30.0)
    for event in (late, later):
        with pytest.raises(LostCopyError, match="depends on"):
            worker.engine.wait_compute(event)
    gate.end()
    worker.engine.close()


class LostStore:
    """On a CUDA worker's lanes, and in each layer: a store that does not end, which somebody notices at last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        geometry = small_geometry(4, 2)
        self.worker = make_worker("cuda-0", geometry, 16)
        self.lanes = LaneSchedule(self.worker.engine, geometry.lane_layers())
        clock = Clocked()
        monkeypatch.setattr("layerkv.device.patience.running_s", clock.monotonic)
        self._clock, cuda = clock, self.worker.engine._cuda
        self._goes_on: list[bool] = []
        for background in (0, 1):
            stream = self.worker.engine._streams[Direction.STORE, background]
            cuda.enqueue_wait(stream, lambda: bool(self._goes_on))

    def time_passes(self) -> None:
        for _ in range(int(COPY_TIMEOUT_S / LOOK_S) + 2):
            self.lanes.take_failed_stores()
            self._clock.now_s += LOOK_S

    def end(self) -> None:
        self._goes_on.append(True)
        self.worker.engine.close()


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[LostStore]:
    store = LostStore(monkeypatch)
    yield store
    store.end()


def test_what_waits_for_a_lost_cuda_copy_is_lost_too(lost: LostStore) -> None:
    engine = lost.worker.engine
    lost.lanes.begin_step(StepPlan(ahead=(BlockRun(1, 0, 1),)))
    ahead = lost.lanes._last_ahead
    assert ahead is not None
    lost.time_passes()
    assert isinstance(ahead.error, LostCopyError)
    later = engine.submit(Direction.LOAD, [0], [BlockRun(1, 0, 1)], after=[ahead])
    last = engine.submit(Direction.LOAD, [0], [BlockRun(1, 0, 1)], after=[later])
    for event in (later, last):
        assert "depends on" in str(event.error)
        with pytest.raises(LostCopyError):
            engine.wait_compute(event)


@pytest.mark.parametrize("then", [StepPlan(), StepPlan(settle=True), StepPlan(num_tokens=1)])
def test_a_lost_store_ahead_ends_the_next_step_on_cuda(lost: LostStore, then: StepPlan) -> None:
    lost.lanes.begin_step(StepPlan(ahead=(BlockRun(1, 0, 1),)))
    lost.time_passes()
    with pytest.raises(LostCopyError, match="did not end in 60 s"):
        lost.lanes.begin_step(then)


def test_a_lost_store_of_a_layer_ends_the_next_step_though_compute_is_stuck_behind_it(lost: LostStore) -> None:
    """The lane's next store has not begun, so it is not lost itself."""
    lost.lanes.begin_step(StepPlan(stores=(BlockRun(16, 0, 1),), num_tokens=1))
    for layer in range(4):
        lost.lanes.layer_done(layer)
    lost.time_passes()
    with pytest.raises(LostCopyError, match="did not end in 60 s"):
        lost.lanes.begin_step(StepPlan(num_tokens=1))


@pytest.fixture
def lost_meanwhile() -> Iterator[LaneSchedule]:
    """Lanes whose stores were found lost by a copying thread, after the step's look at them."""
    geometry = small_geometry(4, 2)
    worker = make_worker("cpu", geometry, 16)
    lanes = LaneSchedule(worker.engine, geometry.lane_layers())
    store = CopyEvent()
    store.end(LostCopyError("store: the copy it depends on did not end in 60 s"))
    lanes._last_store, lanes._lane_stored = store, [store, store]
    yield lanes
    worker.engine.close()


def test_a_lane_that_a_lost_store_may_still_read_is_not_loaded_into(lost_meanwhile: LaneSchedule) -> None:
    """Regression: it was passed over like one that has ended with an error."""
    plan = StepPlan(stores=(BlockRun(16, 0, 1),), loads=(BlockRun(16, 8, 1),), num_tokens=1)
    with pytest.raises(LostCopyError, match="depends on"):
        lost_meanwhile.begin_step(plan)


def test_a_fetch_does_not_pass_a_lost_store(lost_meanwhile: LaneSchedule) -> None:
    lost_meanwhile.begin_step(StepPlan(fetches=(FetchPlan("a", (BlockRun(2, 4, 1),)),)))
    with pytest.raises(LostCopyError, match="depends on"):
        lost_meanwhile.poll_fetches(wait_s=5.0)
