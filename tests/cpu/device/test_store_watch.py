"""What the store watch makes a load wait for, and what it fails with."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from layerkv.core.transfer import BlockRun, FetchPlan, StepPlan
from layerkv.device import store_watch
from layerkv.device.cpu_engine import CopyEvent
from layerkv.device.lane_schedule import LaneSchedule
from layerkv.device.store_watch import StoreWatch
from tests.fakes.workers import make_worker, small_geometry

RUNS = (BlockRun(16, 0, 3),)


def failed_store(watch: StoreWatch) -> CopyEvent:
    store = CopyEvent()
    watch.add(store, [2], RUNS)
    store.end(OSError("host memory is gone"))
    return store


def test_a_load_fails_with_the_store_that_failed_until_its_blocks_are_stored_again() -> None:
    watch = StoreWatch()
    lost = failed_store(watch)
    watch.look()
    assert watch.before_load([2], RUNS) == [lost]
    assert watch.before_load([1], RUNS) == []
    again = CopyEvent()
    watch.add(again, [2], RUNS)
    again.end()
    watch.look()
    assert watch.before_load([2], RUNS) == []


def test_a_load_comes_after_the_store_under_way_and_does_not_fail_with_an_earlier_one() -> None:
    """Regression: until somebody had looked, KV that was stored again was taken for lost."""
    watch = StoreWatch()
    lost = failed_store(watch)
    watch.look()
    again = CopyEvent()
    watch.add(again, [2], (BlockRun(16, 0, 2),))
    assert watch.before_load([2], (BlockRun(16, 0, 2),)) == [again]
    assert watch.before_load([2], RUNS) == [again, lost], "its third block is not stored again"


def test_a_load_waits_for_the_last_store_into_each_block_and_for_no_earlier_one() -> None:
    """Regression: a store that failed unnoticed, or after the look, failed the load of what was stored there since."""
    watch = StoreWatch()
    first, second, third = CopyEvent(), CopyEvent(), CopyEvent()
    watch.add(first, [2], RUNS)
    watch.add(second, [2], (BlockRun(16, 0, 2),))
    watch.add(third, [2], (BlockRun(16, 1, 1),))
    assert watch.before_load([2], (BlockRun(16, 0, 2),)) == [second, third]
    assert watch.before_load([2], (BlockRun(16, 1, 1),)) == [third]
    assert watch.before_load([2], RUNS) == [first, second, third]


def test_a_store_that_fails_in_turn_fails_the_load_of_its_blocks_again() -> None:
    watch = StoreWatch()
    failed_store(watch)
    watch.look()
    again = failed_store(watch)
    watch.look()
    assert watch.before_load([2], RUNS) == [again]


NUM_LAYERS = 12


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[BlockRun]]:
    """The runs whose sets of blocks were built, once for each time."""
    found: list[Sequence[BlockRun]] = []
    build = store_watch.host_blocks

    def noting(runs: Sequence[BlockRun]) -> set[int]:
        found.append(runs)
        return set(build(runs))

    monkeypatch.setattr(store_watch, "host_blocks", noting)
    return found


def lanes_with(unit_blocks: int | None = None) -> LaneSchedule:
    geometry = small_geometry(NUM_LAYERS, 2)
    worker = make_worker("slow", geometry, 16)
    return LaneSchedule(worker.engine, geometry.lane_layers(), unit_blocks)


def test_a_layered_step_builds_a_set_of_blocks_once_for_all_layers(built: list[Sequence[BlockRun]]) -> None:
    """Regression: each layer's load built those of all stores under way again, in the thread that runs the model."""
    lanes = lanes_with()
    plan = StepPlan(stores=(BlockRun(16, 0, 4),), loads=(BlockRun(16, 0, 4),), num_tokens=4)
    for _ in range(3):
        lanes.begin_step(plan)
        for layer in range(NUM_LAYERS):
            lanes.layer_done(layer)
        lanes.end_step()
    assert 0 < len(built) <= 3 * 2, "of each step's stores and loads"


@pytest.mark.parametrize(("unit_blocks", "most_built"), [(None, 2), (2, 5)])
def test_a_fetch_beside_stores_ahead_builds_each_set_once(
    built: list[Sequence[BlockRun]], unit_blocks: int | None, most_built: int
) -> None:
    """One for each unit that is stored, and one for the whole fetch."""
    lanes = lanes_with(unit_blocks)
    fetch = FetchPlan("a", (BlockRun(8, 4, 6),))
    lanes.begin_step(StepPlan(ahead=(BlockRun(0, 0, 8),), fetches=(fetch,)))
    assert 0 < len(built) <= most_built


@pytest.mark.parametrize("unit_blocks", [None, 2])
def test_a_fetch_asks_once_a_layer_what_it_comes_after(
    monkeypatch: pytest.MonkeyPatch, unit_blocks: int | None
) -> None:
    asked: list[tuple[int, ...]] = []
    before_load = StoreWatch.before_load

    def noting(watch: StoreWatch, layers: Sequence[int], runs: Sequence[BlockRun]) -> object:
        asked.append(tuple(layers))
        return before_load(watch, layers, runs)

    monkeypatch.setattr(StoreWatch, "before_load", noting)
    lanes_with(unit_blocks).begin_step(StepPlan(fetches=(FetchPlan("a", (BlockRun(8, 4, 6),)),)))
    assert asked == [(layer,) for layer in range(NUM_LAYERS)]


@pytest.mark.parametrize("host_block", range(8))
def test_a_fetch_in_units_fails_with_the_store_of_any_of_its_blocks(host_block: int) -> None:
    """Its first unit waits for all of them, and the others for the first."""
    geometry = small_geometry(4, 2)
    worker = make_worker("cpu", geometry, 16)
    lanes = LaneSchedule(worker.engine, geometry.lane_layers(), 2)
    lost = CopyEvent()
    lanes._watch.add(lost, [3], (BlockRun(0, host_block, 1),))
    lanes.begin_step(StepPlan(fetches=(FetchPlan("a", (BlockRun(8, 0, 8),)),)))
    assert lanes.poll_fetches() == []
    lost.end(OSError("host memory is gone"))
    while not (finished := lanes.poll_fetches(wait_s=5.0)):
        pass
    assert "host memory is gone" in str(finished[0].error)
    worker.engine.close()


class EndsWhileLookedAt(CopyEvent):
    """Has not ended when somebody looks, and has, with an error, right afterwards; and so has the next one."""

    def __init__(self, following: CopyEvent) -> None:
        super().__init__()
        self._following: CopyEvent | None = following

    def is_done(self) -> bool:
        was_done = super().is_done()
        if self._following is not None:
            following, self._following = self._following, None
            self.end(OSError("host memory is gone"))
            following.end()
        return was_done


def test_stores_that_end_during_a_look_are_seen_in_their_order() -> None:
    """Regression: the later one was seen to end, the earlier one was not, and its failure then counted as the last."""
    watch = StoreWatch()
    again = CopyEvent()
    watch.add(EndsWhileLookedAt(again), [2], RUNS)
    watch.add(again, [2], RUNS)
    watch.look()
    watch.look()
    assert watch.before_load([2], RUNS) == []
