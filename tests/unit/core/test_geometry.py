from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.core.geometry import (
    DEFAULT_ZONE_SHARE,
    FEW_LAYERS_ZONE_SHARE,
    ZONE_OF_POOL,
    GeometryRequest,
    KVGeometry,
    geometry_for_blocks,
    geometry_for_memory,
)
from layerkv.errors import ConfigError

KIB, MIB = 1 << 10, 1 << 20

REQUEST = GeometryRequest(
    num_layers=32,
    page_bytes=64 * KIB,
    block_tokens=16,
    lanes=2,
    step_tokens=2048,
    zone_tokens=None,
    alignment_bytes=4 * KIB,
)

ANY_ZONE = st.none() | st.integers(0, 5_000)
Division = tuple[GeometryRequest, int, KVGeometry]


@st.composite
def divisions(draw: st.DrawFn, zone_tokens: st.SearchStrategy[int | None] = ANY_ZONE) -> Division:
    """What was asked for, memory with room for that, and the division of it."""
    request = GeometryRequest(
        num_layers=draw(st.integers(1, 80)),
        page_bytes=draw(st.integers(1, 64)) * 512,
        block_tokens=draw(st.sampled_from((1, 8, 16, 128))),
        lanes=draw(st.integers(1, 5)),
        step_tokens=draw(st.integers(1, 20_000)),
        zone_tokens=draw(zone_tokens),
        alignment_bytes=draw(st.sampled_from((4 * KIB, 2 * MIB))),
    )
    if request.zone_tokens:
        request = replace(request, zone_tokens=max(request.zone_tokens, request.block_tokens))
    unit_bytes = request.unit_blocks * request.num_layers * request.page_bytes
    zone_units = -(-(request.zone_tokens or 0) // request.block_tokens // request.unit_blocks) + 1
    units = zone_units + draw(st.integers(2, 3_000))
    memory_bytes = units * unit_bytes + draw(st.integers(0, unit_bytes - 1))
    return request, memory_bytes, geometry_for_memory(request, memory_bytes)


@given(divisions())
def test_the_division_fits_the_memory_and_is_the_largest_that_does(division: Division) -> None:
    request, memory_bytes, geometry = division
    assert geometry.physical_bytes <= memory_bytes
    larger = geometry_for_blocks(request, geometry.total_blocks + request.unit_blocks)
    assert larger.physical_bytes > memory_bytes


@given(divisions())
def test_scheduler_and_workers_arrive_at_the_same_division(division: Division) -> None:
    """Workers know the memory, the scheduler only the number of block ids that vLLM settled on."""
    request, _, geometry = division
    virtual_blocks = geometry.virtual_bytes // (request.num_layers * request.page_bytes)
    assert virtual_blocks == geometry.total_blocks
    assert geometry_for_blocks(request, virtual_blocks) == geometry


@given(divisions())
def test_every_mapping_is_aligned(division: Division) -> None:
    request, _, geometry = division
    for layer in {0, 1 % request.num_layers, request.num_layers - 1}:
        assert geometry.offset(layer, 0) % request.alignment_bytes == 0
        assert geometry.offset(layer, geometry.pool_blocks) % request.alignment_bytes == 0
    assert geometry.lane_bytes % request.alignment_bytes == 0
    assert geometry.pool_blocks % request.unit_blocks == 0


@given(divisions())
def test_sizes_add_up(division: Division) -> None:
    request, _, geometry = division
    g = geometry
    assert g.total_blocks == g.pool_blocks + g.zone_blocks
    assert g.pool_blocks >= 2, "one block is vLLM's null block"
    assert g.lanes == min(request.lanes, request.num_layers - request.retained_layers)
    assert g.virtual_bytes == g.offset(g.num_layers, 0)
    pool_pages, zone_pages = g.pool_blocks * g.num_layers, g.zone_blocks * (g.lanes + g.retained_layers)
    assert g.physical_bytes == (pool_pages + zone_pages) * g.page_bytes <= g.virtual_bytes
    assert g.block_bytes == g.num_layers * g.page_bytes
    assert sorted(layer for layers in g.lane_layers() for layer in layers) == list(range(g.num_layers))


@given(divisions(st.none()))
def test_a_zone_of_default_size_takes_a_twentieth_or_with_few_layers_more_but_little_of_the_pool(
    division: Division,
) -> None:
    request, _, geometry = division
    share = geometry.num_lanes * geometry.lane_bytes / geometry.physical_bytes
    is_more = share > DEFAULT_ZONE_SHARE + 1e-12 and geometry.zone_blocks > request.unit_blocks
    if is_more:
        assert share <= FEW_LAYERS_ZONE_SHARE + 1e-12
        assert geometry.zone_blocks <= ZONE_OF_POOL * geometry.pool_blocks + 1e-9
    wanted_tokens = 2 * request.step_tokens
    spare = request.unit_blocks * request.block_tokens
    assert geometry.zone_blocks * request.block_tokens < wanted_tokens + spare, "more than the prompts of two steps"


@given(divisions(st.integers(1, 5_000)))
def test_a_zone_asked_for_is_granted_and_at_most_rounded_up(division: Division) -> None:
    request, _, geometry = division
    granted_tokens = geometry.zone_blocks * request.block_tokens
    assert request.zone_tokens <= granted_tokens < request.zone_tokens + request.block_tokens * request.unit_blocks


def test_with_memory_enough_the_default_zone_holds_the_prompts_of_two_steps() -> None:
    geometry = geometry_for_memory(REQUEST, 40 << 30)
    assert geometry.zone_blocks * 16 == 2 * 2048
    assert geometry.lanes == 2


def test_with_little_memory_the_default_zone_takes_a_twentieth() -> None:
    geometry = geometry_for_memory(REQUEST, 256 * MIB)
    assert geometry.zone_blocks * 16 < 2 * 2048
    share = geometry.lanes * geometry.lane_bytes / geometry.physical_bytes
    assert 0.03 < share <= 0.05


@pytest.mark.parametrize(("num_layers", "share"), [(4, 0.12), (6, 0.09), (12, 0.05), (32, 0.05)])
def test_the_fewer_layers_the_larger_the_share_of_the_default_zone(num_layers: int, share: float) -> None:
    request = replace(REQUEST, num_layers=num_layers, alignment_bytes=REQUEST.page_bytes, step_tokens=1 << 30)
    geometry = geometry_for_memory(request, 256 * MIB)
    taken = geometry.num_lanes * geometry.lane_bytes / geometry.physical_bytes
    assert taken == pytest.approx(share, abs=0.004)


def test_a_zone_of_no_tokens_is_no_zone() -> None:
    geometry = geometry_for_memory(replace(REQUEST, zone_tokens=0), 256 * MIB)
    assert geometry.zone_blocks == 0
    assert geometry.pool_blocks == geometry.total_blocks == 128


def test_there_are_never_more_lanes_than_layers() -> None:
    geometry = geometry_for_memory(replace(REQUEST, num_layers=3, lanes=8), 256 * MIB)
    assert geometry.lanes == 3


def test_odd_blocks_are_mapped_in_units_that_align() -> None:
    request = replace(REQUEST, page_bytes=1536)
    assert request.unit_blocks == 8
    assert replace(request, alignment_bytes=2 * MIB).unit_blocks == 4096
    assert REQUEST.unit_blocks == 1


def test_layers_lie_one_after_the_other_and_blocks_inside_them() -> None:
    geometry = KVGeometry(num_layers=3, page_bytes=100, block_tokens=16, pool_blocks=5, zone_blocks=2, lanes=2)
    assert geometry.layer_bytes == 700
    assert geometry.offset(0, 0) == 0
    assert geometry.offset(2, 6) == 2 * 700 + 600
    assert geometry.lane_layers() == [[0, 2], [1]]


@pytest.mark.parametrize("zone_tokens", [4096, 1_000_000])
def test_a_zone_larger_than_the_memory_is_refused_with_what_to_set(zone_tokens: int) -> None:
    request = replace(REQUEST, zone_tokens=zone_tokens)
    for divide in (lambda: geometry_for_memory(request, 32 * MIB), lambda: geometry_for_blocks(request, 256)):
        with pytest.raises(ConfigError) as refusal:
            divide()
        message = str(refusal.value)
        assert message.startswith("kv_connector_extra_config.zone_tokens: ")
        assert f"found {zone_tokens} tokens" in message
        assert "set a smaller zone_tokens" in message


def test_memory_too_small_for_even_the_default_zone_says_so() -> None:
    with pytest.raises(ConfigError, match=r"the default zone leaves no pool in KV memory for \d+ tokens"):
        geometry_for_memory(REQUEST, 2 * 64 * KIB)


@pytest.mark.parametrize("memory_bytes", [0, 1, 4095])
def test_no_memory_is_an_error_and_not_an_empty_pool(memory_bytes: int) -> None:
    with pytest.raises(ConfigError, match="zone_tokens"):
        geometry_for_memory(REQUEST, memory_bytes)


@pytest.mark.parametrize("zone_tokens", [1, 15])
def test_a_zone_smaller_than_one_block_is_refused_with_what_to_set(zone_tokens: int) -> None:
    request = replace(REQUEST, zone_tokens=zone_tokens)
    for divide in (lambda: geometry_for_memory(request, 1 << 30), lambda: geometry_for_blocks(request, 256)):
        with pytest.raises(ConfigError) as refusal:
            divide()
        message = str(refusal.value)
        assert f"zone_tokens: found {zone_tokens}," in message
        assert "set zone_tokens to 16 or more" in message


def test_a_block_count_that_cannot_be_mapped_is_refused_with_what_to_set() -> None:
    request = replace(REQUEST, page_bytes=1536)
    with pytest.raises(ConfigError) as refusal:
        geometry_for_blocks(request, 1001)
    message = str(refusal.value)
    assert message.startswith("num_gpu_blocks_override: found 1001")
    assert "set num_gpu_blocks_override to a multiple of 8" in message
    assert geometry_for_blocks(request, 1000).total_blocks == 1000


def test_retained_layers_are_spread_evenly_and_have_lanes_of_their_own() -> None:
    geometry = KVGeometry(12, page_bytes=100, block_tokens=16, pool_blocks=5, zone_blocks=2, lanes=2, retained_layers=3)
    assert geometry.lane_layers() == [[0, 3, 5, 8, 11], [1, 4, 7, 9], [2], [6], [10]]
    assert geometry.num_lanes == 5
    assert geometry.physical_bytes == 5 * 12 * 100 + 5 * 2 * 100
    assert geometry.streamed_block_bytes == 9 * 100


def test_more_retained_layers_than_the_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"retained_layers: found 32, but the model has 32 layers.*set .* to less"):
        geometry_for_blocks(replace(REQUEST, retained_layers=32), 512)


LONG = replace(REQUEST, longest_tokens=8192, may_outgrow_pool=True)
"""Requests of 1 GiB in all layers."""


@pytest.mark.parametrize("memory_mib", [320, 512, 768, 1024, 1150, 1200, 2048, 4096])
def test_pool_or_zone_holds_the_longest_request_where_that_may_outgrow_the_pool(memory_mib: int) -> None:
    geometry = geometry_for_memory(LONG, memory_mib * MIB)
    assert geometry.physical_bytes <= memory_mib * MIB
    assert geometry_for_blocks(LONG, geometry.total_blocks) == geometry
    holder = max(geometry.pool_blocks - 1, geometry.zone_blocks)
    assert holder * 16 >= 8192
    if geometry.zone_blocks * 16 >= 8192:
        assert geometry.num_lanes * geometry.lane_bytes <= geometry.physical_bytes / 2


def test_a_zone_for_the_longest_request_takes_half_of_the_memory_at_most() -> None:
    geometry = geometry_for_memory(LONG, 96 * MIB)
    assert geometry.zone_blocks * 16 < 8192
    assert geometry.num_lanes * geometry.lane_bytes <= geometry.physical_bytes * 0.05


@given(st.integers(96, 5000), st.integers(1000, 20_000))
def test_memory_is_never_exceeded_whatever_the_longest_request(memory_mib: int, longest_tokens: int) -> None:
    request = replace(LONG, longest_tokens=longest_tokens)
    geometry = geometry_for_memory(request, memory_mib * MIB)
    assert geometry.physical_bytes <= memory_mib * MIB
    assert geometry_for_blocks(request, geometry.total_blocks) == geometry
