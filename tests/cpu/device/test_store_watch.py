"""What the store watch makes a load wait for, and what it fails with."""

from __future__ import annotations

from layerkv.core.transfer import BlockRun
from layerkv.device.cpu_engine import CopyEvent
from layerkv.device.store_watch import StoreWatch

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
