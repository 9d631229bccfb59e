"""The arena and host memory: which addresses share memory, and that all of it goes back to the kernel."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable

import pytest
import torch

from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentLayout
from layerkv.device import libc, mmap_arena
from layerkv.device.allocation import ArenaAllocation
from layerkv.device.base import Arena
from layerkv.device.cuda_arena import CudaArena
from layerkv.device.cuda_driver import CudaDriver
from layerkv.device.elastic_mmap_arena import ElasticMmapArena
from layerkv.device.host_memory import MmapHostMemory
from layerkv.device.mmap_arena import MmapArena
from layerkv.errors import IncompatibleVLLMError
from tests.fakes.cuda_bindings import FakeBindings, over_own_memory

BIG = 1 << 27
SHAPES = [  # layers, lanes, retained layers
    (1, 1, 0),
    (4, 1, 0),
    (5, 2, 0),
    (7, 3, 0),
    (3, 3, 0),
    (7, 2, 2),
]


def geometry(
    num_layers: int,
    lanes: int,
    retained_layers: int = 0,
    *,
    page_bytes: int = 1536,
    pool_blocks: int = 8,
    zone_blocks: int = 16,
) -> KVGeometry:
    return KVGeometry(
        num_layers=num_layers,
        page_bytes=page_bytes,
        block_tokens=16,
        pool_blocks=pool_blocks,
        zone_blocks=zone_blocks,
        lanes=lanes,
        retained_layers=retained_layers,
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


KINDS = ("mmap", "elastic", "cuda")
PAGE_BYTES = {"mmap": 1536, "elastic": 1536, "cuda": 1 << 18}
"""Such that pool and lanes are multiples of what each arena maps by."""


def make_arena(kind: str, geometry: KVGeometry, bindings: FakeBindings | None = None) -> Arena:
    """An arena of that kind; the CUDA one over a driver whose device memory is memory of this process."""
    if kind == "mmap":
        return MmapArena(geometry)
    if kind == "elastic":
        return ElasticMmapArena(geometry, SegmentLayout(geometry.pool_blocks, 1), num_mapped=1)
    return CudaArena(geometry, CudaDriver(0, bindings or FakeBindings()), as_tensor=over_own_memory)


def pages(arena: Arena) -> torch.Tensor:
    """`[num_layers, total_blocks, page_bytes]`"""
    g = arena.geometry
    return arena.tensor().view(g.num_layers, g.total_blocks, g.page_bytes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_range_is_flat_bytes_and_zero_at_first(kind: str, shape: tuple[int, int, int]) -> None:
    arena = make_arena(kind, geometry(*shape, page_bytes=PAGE_BYTES[kind]))
    tensor = arena.tensor()
    assert tensor.dtype == torch.int8
    assert tensor.shape == (arena.geometry.virtual_bytes,)
    assert not tensor.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layers_of_one_lane_share_zone_memory_and_no_others_do(kind: str, shape: tuple[int, int, int]) -> None:
    arena = make_arena(kind, geometry(*shape, page_bytes=PAGE_BYTES[kind]))
    g, kv = arena.geometry, pages(arena)
    lane_of = {layer: lane for lane, layers in enumerate(g.lane_layers()) for layer in layers}
    for layer in range(g.num_layers):
        kv[:, g.pool_blocks :] = -1
        kv[layer, g.pool_blocks :] = torch.arange(g.zone_blocks, dtype=torch.int8)[:, None]
        for other in range(g.num_layers):
            if lane_of[other] == lane_of[layer]:
                assert torch.equal(kv[other, g.pool_blocks :], kv[layer, g.pool_blocks :]), (layer, other)
            else:
                assert (kv[other, g.pool_blocks :] == -1).all(), (layer, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_pool_of_every_layer_has_memory_of_its_own(kind: str, shape: tuple[int, int, int]) -> None:
    arena = make_arena(kind, geometry(*shape, page_bytes=PAGE_BYTES[kind]))
    g, kv = arena.geometry, pages(arena)
    for layer in range(g.num_layers):
        kv[layer, : g.pool_blocks] = layer + 1
    kv[:, g.pool_blocks :] = -1
    for layer in range(g.num_layers):
        assert (kv[layer, : g.pool_blocks] == layer + 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_zone_nothing_is_shared(kind: str) -> None:
    before = mapped_ranges("layerkv-lanes")
    arena = make_arena(kind, geometry(3, 2, page_bytes=PAGE_BYTES[kind], zone_blocks=0))
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


def note_results(reserve: Callable[..., int], results: list[tuple[int, int]]) -> Callable[..., int]:
    def noting(num_bytes: int, alignment_bytes: int = 1) -> int:
        address = reserve(num_bytes, alignment_bytes)
        results.append((address, num_bytes))
        return address

    return noting


def test_more_address_space_than_there_is_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="cannot map"):
        libc.reserve(1 << 62)


def test_a_lane_that_is_no_multiple_of_the_mapping_unit_is_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError):
        MmapArena(geometry(2, 1, zone_blocks=1))


# CUDA -------------------------------------------------------------------------------------------------------------


def cuda_geometry(num_layers: int = 4) -> KVGeometry:
    return geometry(num_layers, 2, page_bytes=PAGE_BYTES["cuda"])


def test_device_memory_goes_back_with_the_last_tensor_and_after_everything_that_runs() -> None:
    bindings = FakeBindings()
    arena = make_arena("cuda", cuda_geometry(), bindings)
    assert not bindings.handles, "mappings keep the memory, nobody needs the handles"
    assert len(bindings.mapped) == len(bindings.accessible) == 4 + 4, "a pool and a zone per layer"
    part = arena.tensor()[-4096:]
    del arena
    gc.collect()
    assert not bindings.calls
    assert part.sum() == 0
    del part
    gc.collect()
    assert bindings.calls == ["cuCtxSynchronize"]
    assert bindings.holds_nothing


@pytest.mark.parametrize(
    ("call", "successes"),
    [("cuMemAddressReserve", 0), *((c, n) for c in ("cuMemCreate", "cuMemMap", "cuMemSetAccess") for n in (0, 1, 5))],
)
def test_a_refusal_of_the_driver_leaves_nothing_behind(call: str, successes: int) -> None:
    bindings = FakeBindings(refusals={call: successes})
    with pytest.raises(MemoryError, match=call):
        make_arena("cuda", cuda_geometry(), bindings)
    gc.collect()
    assert bindings.holds_nothing


def test_a_device_with_larger_units_than_we_align_to_is_refused() -> None:
    bindings = FakeBindings(granularity=4 << 20)
    with pytest.raises(MemoryError, match="units of 4194304"):
        make_arena("cuda", cuda_geometry(), bindings)
    assert bindings.holds_nothing


# Host memory ------------------------------------------------------------------------------------------------------


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
