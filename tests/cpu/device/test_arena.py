"""The arena and host memory: which addresses share memory, and that all of it goes back to the kernel."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable

import pytest
import torch

from layerkv.core.geometry import KVGeometry
from layerkv.device import libc, mmap_arena
from layerkv.device.allocation import ArenaAllocation
from layerkv.device.host_memory import MmapHostMemory
from layerkv.device.mmap_arena import MmapArena
from layerkv.errors import IncompatibleVLLMError

BIG = 1 << 27
SHAPES = [(1, 1), (4, 1), (5, 2), (7, 3), (3, 3)]


def geometry(
    num_layers: int, lanes: int, *, page_bytes: int = 1536, pool_blocks: int = 8, zone_blocks: int = 16
) -> KVGeometry:
    return KVGeometry(
        num_layers=num_layers,
        page_bytes=page_bytes,
        block_tokens=16,
        pool_blocks=pool_blocks,
        zone_blocks=zone_blocks,
        lanes=lanes,
    )


def mapped_ranges(name: str = "") -> list[tuple[int, int]]:
    """Address ranges of this process, or those whose name has `name` in it."""
    with open("/proc/self/maps") as maps:
        lines = [line for line in maps if name in line]
    return [(int(start, 16), int(end, 16)) for start, end in (line.split()[0].split("-") for line in lines)]


def is_mapped(address: int, size: int) -> bool:
    """Whether all of the range is mapped."""
    for start, end in sorted(mapped_ranges()):
        if start <= address < end:
            size -= end - address
            address = end
    return size <= 0


def pages(arena: MmapArena) -> torch.Tensor:
    """`[num_layers, total_blocks, page_bytes]`"""
    g = arena.geometry
    return arena.tensor().view(g.num_layers, g.total_blocks, g.page_bytes)


@pytest.mark.parametrize(("num_layers", "lanes"), SHAPES)
def test_the_range_is_flat_bytes_and_zero_at_first(num_layers: int, lanes: int) -> None:
    arena = MmapArena(geometry(num_layers, lanes))
    tensor = arena.tensor()
    assert tensor.dtype == torch.int8
    assert tensor.shape == (arena.geometry.virtual_bytes,)
    assert not tensor.any()


@pytest.mark.parametrize(("num_layers", "lanes"), SHAPES)
def test_layers_of_one_lane_share_zone_memory_and_no_others_do(num_layers: int, lanes: int) -> None:
    arena = MmapArena(geometry(num_layers, lanes))
    g, kv = arena.geometry, pages(arena)
    for layer in range(num_layers):
        kv[:, g.pool_blocks :] = -1
        kv[layer, g.pool_blocks :] = torch.arange(g.zone_blocks, dtype=torch.int8)[:, None]
        for other in range(num_layers):
            if other % lanes == layer % lanes:
                assert torch.equal(kv[other, g.pool_blocks :], kv[layer, g.pool_blocks :]), (layer, other)
            else:
                assert (kv[other, g.pool_blocks :] == -1).all(), (layer, other)


@pytest.mark.parametrize(("num_layers", "lanes"), SHAPES)
def test_the_pool_of_every_layer_has_memory_of_its_own(num_layers: int, lanes: int) -> None:
    arena = MmapArena(geometry(num_layers, lanes))
    g, kv = arena.geometry, pages(arena)
    for layer in range(num_layers):
        kv[layer, : g.pool_blocks] = layer + 1
    kv[:, g.pool_blocks :] = -1
    for layer in range(num_layers):
        assert (kv[layer, : g.pool_blocks] == layer + 1).all()


def test_without_a_zone_nothing_is_shared() -> None:
    before = mapped_ranges("layerkv-lanes")
    arena = MmapArena(geometry(3, 2, zone_blocks=0))
    assert mapped_ranges("layerkv-lanes") == before
    kv = pages(arena)
    for layer in range(3):
        kv[layer] = layer
    assert [int(kv[layer].max()) for layer in range(3)] == [0, 1, 2]


def test_memory_goes_back_with_the_last_tensor() -> None:
    gc.collect()
    before = len(mapped_ranges("layerkv-lanes"))
    descriptors = len(os.listdir("/proc/self/fd"))
    arena = MmapArena(geometry(4, 2, page_bytes=4096, pool_blocks=BIG // 4096 // 2))
    address, size = arena.tensor().data_ptr(), arena.geometry.virtual_bytes
    assert len(mapped_ranges("layerkv-lanes")) == before + 4
    assert len(os.listdir("/proc/self/fd")) == descriptors, "the memfd is closed once it is mapped"
    part = arena.tensor()[-4096:].view(torch.float32)
    del arena
    gc.collect()
    assert is_mapped(address, size), "a tensor still uses the memory"
    part.fill_(2.0)
    assert part.sum() == 2.0 * 1024
    del part
    gc.collect()
    assert len(mapped_ranges("layerkv-lanes")) == before
    assert not is_mapped(address, size)


def test_a_refused_mapping_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    before = len(mapped_ranges("layerkv-lanes"))
    descriptors = len(os.listdir("/proc/self/fd"))
    reserved: list[tuple[int, int]] = []
    monkeypatch.setattr(libc, "reserve", note_results(libc.reserve, reserved))
    map_shared_at, calls = libc.map_shared_at, []

    def refuse_the_third(*args: int) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no")
        map_shared_at(*args)

    monkeypatch.setattr(mmap_arena.libc, "map_shared_at", refuse_the_third)
    with pytest.raises(MemoryError):
        MmapArena(geometry(4, 2, page_bytes=4096, pool_blocks=BIG // 4096 // 2))
    assert len(mapped_ranges("layerkv-lanes")) == before
    assert len(os.listdir("/proc/self/fd")) == descriptors
    [(address, size)] = reserved
    assert not is_mapped(address, size)


def note_results(reserve: Callable[[int], int], results: list[tuple[int, int]]) -> Callable[[int], int]:
    def noting(num_bytes: int) -> int:
        address = reserve(num_bytes)
        results.append((address, num_bytes))
        return address

    return noting


def test_more_address_space_than_there_is_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="cannot map"):
        libc.reserve(1 << 62)


def test_a_lane_that_is_no_multiple_of_the_mapping_unit_is_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError):
        MmapArena(geometry(2, 1, zone_blocks=1))


def test_host_memory_keeps_a_place_for_each_block_of_each_layer() -> None:
    g = geometry(3, 1)
    host = MmapHostMemory(g, 5)
    assert host.num_blocks == 5
    places = [(host.address(layer, block), 16 * layer + block) for layer in range(3) for block in range(5)]
    for address, value in places:
        assert ctypes.string_at(address, g.page_bytes) == bytes(g.page_bytes), "zero at first"
        ctypes.memset(address, value + 1, g.page_bytes)
    for address, value in places:
        assert ctypes.string_at(address, g.page_bytes) == bytes([value + 1]) * g.page_bytes
    for layer in range(3):
        assert host.address(layer, 4) - host.address(layer, 0) == 4 * g.page_bytes, "blocks of a layer are one stretch"


def test_host_memory_goes_back_with_its_object() -> None:
    g = geometry(2, 1, page_bytes=4096)
    host = MmapHostMemory(g, BIG // 4096 // 2)
    address = host.address(0, 0)
    assert is_mapped(address, BIG)
    del host
    gc.collect()
    assert not is_mapped(address, BIG)


# vLLM's allocation ------------------------------------------------------------------------------------------------


def test_the_one_allocation_of_the_right_size_gets_the_arena() -> None:
    arena = MmapArena(geometry(3, 1))
    size = arena.geometry.virtual_bytes
    with ArenaAllocation(arena):
        others = [torch.zeros(size, dtype=torch.uint8), torch.zeros(size - 1, dtype=torch.int8), torch.zeros(3, 4)]
        ours = torch.zeros(size, dtype=torch.int8, device="cpu")
        views = torch.ones(size, dtype=torch.int8)
    assert ours.data_ptr() == arena.tensor().data_ptr()
    assert all(tensor.data_ptr() != ours.data_ptr() for tensor in [*others, views])
    assert [tensor.shape for tensor in others] == [(size,), (size - 1,), (3, 4)]
    assert torch.zeros(size, dtype=torch.int8).data_ptr() != ours.data_ptr(), "only while entered"


def test_an_allocation_that_never_comes_is_an_error() -> None:
    arena = MmapArena(geometry(3, 1))
    with pytest.raises(IncompatibleVLLMError, match=str(arena.geometry.virtual_bytes)), ArenaAllocation(arena):
        torch.zeros(5, dtype=torch.int8)


def test_an_error_of_vllm_is_not_hidden_behind_ours() -> None:
    with pytest.raises(KeyError), ArenaAllocation(MmapArena(geometry(3, 1))):
        raise KeyError("vLLM's own")
