"""The wrapper of the CUDA driver, over fake bindings: what it passes on, and what an error says."""

from __future__ import annotations

import numpy as np
import pytest

from layerkv.core.geometry import KVGeometry
from layerkv.core.transfer import BlockRun
from layerkv.device.base import Direction
from layerkv.device.cuda_driver import Addresses, CudaDriver
from layerkv.device.run_table import RunCache, block_pairs, host_stretches, run_table
from layerkv.errors import LostCopyError, TransferError
from tests.fakes.cuda_bindings import FakeBindings
from tests.fakes.workers import make_worker, small_geometry


def addresses(*values: int) -> Addresses:
    return np.array(values, dtype=np.uint64)


def words(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64)


@pytest.mark.parametrize("has_batches", [True, False])
def test_a_batch_copies_each_piece_by_one_call_where_the_driver_can(has_batches: bool) -> None:
    bindings = FakeBindings(has_batches=has_batches)
    driver = CudaDriver(0, bindings)
    source, to = words(8), np.full(8, -1)
    at, there = source.ctypes.data, to.ctypes.data
    driver.pin(at, source.nbytes)
    driver.copy_batch(addresses(there + 32, there), addresses(at, at + 40), addresses(16, 8), 0)
    assert to.tolist() == [5, -1, -1, -1, 0, 1, -1, -1]
    assert bindings.calls == (["cuMemcpyBatchAsync"] if has_batches else ["cuMemcpyAsync"] * 2)


@pytest.mark.parametrize(("has_batches", "call"), [(True, "cuMemcpyBatchAsync"), (False, "cuMemcpyAsync")])
def test_a_refused_copy_is_a_transfer_error_that_names_the_call_and_the_cause(has_batches: bool, call: str) -> None:
    driver = CudaDriver(0, FakeBindings(has_batches=has_batches, refusals={call: 0}))
    source, to = words(1), words(1)
    driver.pin(source.ctypes.data, 8)
    with pytest.raises(TransferError, match=rf"{call}.*CUDA_ERROR_INVALID_VALUE"):
        driver.copy_batch(addresses(to.ctypes.data), addresses(source.ctypes.data), addresses(8), 0)


def test_a_copy_that_touches_two_registrations_is_refused_as_the_driver_does() -> None:
    driver = CudaDriver(0, FakeBindings())
    source, to = words(8), words(8)
    driver.pin(source.ctypes.data, 32)
    driver.pin(source.ctypes.data + 32, 32)
    driver.copy_batch(addresses(to.ctypes.data), addresses(source.ctypes.data + 32), addresses(32), 0)
    with pytest.raises(TransferError, match="cuMemcpyBatchAsync"):
        driver.copy_batch(addresses(to.ctypes.data), addresses(source.ctypes.data), addresses(64), 0)


def test_a_refused_copy_fails_its_event_and_the_next_one_goes_on() -> None:
    worker = make_worker("cuda-0", small_geometry(2, 1), 4)
    bindings: FakeBindings = worker.engine._driver._cu
    bindings.refusals["cuMemcpyBatchAsync"] = 0
    failed = worker.engine.submit(Direction.STORE, [0], [BlockRun(0, 0, 1)])
    bindings.refusals.clear()
    stored = worker.engine.submit(Direction.STORE, [0], [BlockRun(1, 1, 1)])
    assert isinstance(failed.error, TransferError)
    assert worker.engine.wait_host(stored, 30.0)
    assert stored.error is None


def test_a_copy_given_up_holds_compute_back_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerkv.device.cuda_engine.COPY_TIMEOUT_S", 0.0)
    worker = make_worker("cuda-0", small_geometry(2, 1), 4)
    gate, seen = worker.gate(), []
    late = worker.engine.submit(Direction.LOAD, [0], [BlockRun(0, 0, 1)], after=[gate])
    while not late.is_done():
        pass
    assert "did not end" in str(late.error)
    with pytest.raises(LostCopyError, match="did not end"):
        worker.engine.wait_compute(late)
    worker.compute(lambda: seen.append(worker.arena.tensor()[0].item()))
    worker.engine.record_compute().is_done()
    assert not seen, "compute passed a copy that may still write"
    gate.end()
    monkeypatch.undo()
    assert worker.engine.wait_host(worker.engine.record_compute(), 30.0)
    assert len(seen) == 1


def test_runs_are_expanded_to_pairs_of_blocks() -> None:
    device, host = block_pairs(run_table([BlockRun(3, 10, 2), BlockRun(8, 0, 1), BlockRun(20, 5, 3)]))
    assert device.tolist() == [3, 4, 8, 20, 21, 22]
    assert host.tolist() == [10, 11, 0, 5, 6, 7]


def test_stretches_are_cut_where_host_blocks_do_not_follow_each_other() -> None:
    table = run_table([BlockRun(3, 11, 2), BlockRun(8, 10, 1), BlockRun(20, 5, 1)])
    found = [(stretch.host_block, stretch.device_blocks.tolist()) for stretch in host_stretches(table)]
    assert found == [(5, [20]), (10, [8, 3, 4])]
    assert host_stretches(run_table(())) == []


@pytest.mark.parametrize("run", [(-1, 0, 1), (0, -1, 1), (11, 0, 2), (0, 4, 2)])
def test_runs_outside_of_memory_are_refused(run: tuple[int, int, int]) -> None:
    geometry = KVGeometry(num_layers=2, page_bytes=8, block_tokens=4, pool_blocks=8, zone_blocks=4, lanes=1)
    with pytest.raises(TransferError, match="outside"):
        RunCache(geometry, 5, run_table).of([BlockRun(0, 0, 1), BlockRun(*run)])
