"""Host memory of a CUDA worker: pinned layer by layer and in the background, and usable throughout."""

from __future__ import annotations

import gc
import threading

import pytest

from layerkv.core.geometry import KVGeometry
from layerkv.device import pinned_memory
from layerkv.device.cuda_driver import CudaDriver
from layerkv.device.pinned_memory import PinnedHostMemory
from tests.fakes.cuda_bindings import FakeBindings

GEOMETRY = KVGeometry(num_layers=5, page_bytes=1024, block_tokens=4, pool_blocks=8, zone_blocks=4, lanes=2)
BLOCKS = 9
LAYER_BYTES = 12 << 10
"""Nine blocks of 1 KiB, and the rest of a page."""
LONG_S = 30.0


def pinned(bindings: FakeBindings) -> PinnedHostMemory:
    memory = PinnedHostMemory(GEOMETRY, BLOCKS, CudaDriver(0, bindings))
    memory.wait_pinned(LONG_S)
    return memory


def test_every_layer_is_pinned_by_itself_from_a_page_on() -> None:
    bindings = FakeBindings()
    memory = pinned(bindings)
    assert memory.is_pinned
    assert memory.problem is None
    assert sorted(bindings.pinned.items()) == [(memory.address(layer, 0), LAYER_BYTES) for layer in range(5)]
    assert all(address % 4096 == 0 for address in bindings.pinned)
    memory.close()
    assert bindings.holds_nothing


def test_what_cannot_be_pinned_is_named_and_the_rest_stays_pinned() -> None:
    bindings = FakeBindings(refusals={"cuMemHostRegister": 3})
    memory = pinned(bindings)
    assert not memory.is_pinned
    assert [memory.is_layer_pinned(layer) for layer in range(5)] == [True, True, True, False, False]
    assert memory.problem is not None
    for word in ("2 of 5 layers", "CUDA_ERROR_OUT_OF_MEMORY", "ulimit -l", "host_memory"):
        assert word in memory.problem
    assert (memory.tensor() == 0).all(), "it is memory all the same"
    memory.close()
    assert bindings.holds_nothing


def test_a_layer_too_large_for_one_call_is_left_unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory, "MOST_PIECE_BYTES", LAYER_BYTES - 1)
    memory = pinned(FakeBindings())
    assert memory.num_pinned_layers == 0
    assert memory.problem is not None
    assert "5 of 5 layers" in memory.problem


def test_pinning_goes_on_while_a_cuda_graph_is_captured() -> None:
    bindings = FakeBindings()
    bindings.captures = True
    assert pinned(bindings).is_pinned


def test_closing_may_be_repeated_and_unpins_once_on_any_thread() -> None:
    bindings = FakeBindings()
    memory = pinned(bindings)
    closing = threading.Thread(target=memory.close)
    closing.start()
    closing.join()
    memory.close()
    assert bindings.holds_nothing
    assert not memory.is_layer_pinned(0)


def test_memory_that_nobody_closed_is_unpinned_before_it_goes() -> None:
    bindings = FakeBindings()
    memory = pinned(bindings)
    tensor = memory.tensor()
    del memory
    gc.collect()
    assert len(bindings.pinned) == 5, "a tensor still uses it"
    del tensor
    gc.collect()
    assert bindings.holds_nothing
