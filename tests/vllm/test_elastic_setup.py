"""From floor and ceiling to segments, and what start-up refuses, without an engine."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from layerkv.config import EngineConfig
from layerkv.core.geometry import GeometryRequest
from layerkv.errors import ConfigError

pytestmark = pytest.mark.vllm

BIG = GeometryRequest(
    num_layers=32,
    page_bytes=64 << 10,
    block_tokens=16,
    lanes=2,
    step_tokens=8192,
    zone_tokens=None,
    alignment_bytes=4 << 10,
    longest_tokens=8192,
)
SMALL = GeometryRequest(
    num_layers=6,
    page_bytes=16 << 10,
    block_tokens=16,
    lanes=2,
    step_tokens=256,
    zone_tokens=256,
    alignment_bytes=4 << 10,
    longest_tokens=256,
)


def vllm_config(device: str = "cpu", ranks: int = 1, **cache: Any) -> Any:
    cache_config = SimpleNamespace(**{"kv_cache_memory_bytes": None, "num_gpu_blocks_override": None, **cache})
    return SimpleNamespace(
        cache_config=cache_config,
        device_config=SimpleNamespace(device_type=device),
        speculative_config=None,
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )


def sizes(request: GeometryRequest, cache: dict[str, Any] | None = None, **extra: Any) -> Any:
    from layerkv.vllm_plugin.elastic_setup import elastic_sizes

    return elastic_sizes(vllm_config(**(cache or {})), EngineConfig.from_extra_config(extra), request)


@pytest.mark.parametrize("floor", [None, "4GiB"])
@pytest.mark.parametrize("request_", [BIG, SMALL], ids=["big", "small"])
def test_floor_and_ceiling_are_kept_to(request_: GeometryRequest, floor: str | None) -> None:
    of = sizes(request_, kv_floor=floor, kv_ceiling="16GiB")
    layout = of.plan.layout
    assert of.geometry.pool_blocks == layout.num_segments * layout.segment_blocks
    assert of.geometry.physical_bytes <= 16 << 30
    assert of.geometry.physical_bytes > (16 << 30) - of.segment_bytes
    assert of.geometry_at_floor.physical_bytes <= (4 << 30) + of.segment_bytes
    assert of.floor_blocks - 1 >= request_.longest_tokens // request_.block_tokens
    assert 1 <= of.floor == of.plan.num_mapped <= layout.num_segments <= 512
    assert layout.segment_blocks * request_.page_bytes % (2 << 20) == 0, "whole huge pages"
    assert of.geometry.layer_bytes % (2 << 20) == 0


def test_a_small_pool_has_segments_of_small_pages() -> None:
    of = sizes(SMALL, kv_floor="4MiB", kv_ceiling="10MiB")
    assert of.plan.layout.num_segments > 16
    assert of.plan.layout.segment_blocks * SMALL.page_bytes % (4 << 10) == 0


def test_with_a_broker_it_begins_with_one_segment_and_has_its_floor_all_the_same() -> None:
    of = sizes(SMALL, kv_floor="4MiB", kv_ceiling="10MiB", broker="broker.sock")
    assert of.plan.num_mapped == 1
    assert of.floor == sizes(SMALL, kv_floor="4MiB", kv_ceiling="10MiB").floor > 1


def test_what_must_fit_the_machine_is_the_ceiling_and_with_a_broker_the_floor() -> None:
    assert sizes(SMALL, kv_floor="4MiB", kv_ceiling="10MiB").geometry_to_fit.physical_bytes > 9 << 20
    shared = sizes(SMALL, kv_floor="4MiB", kv_ceiling="10MiB", broker="broker.sock")
    assert shared.geometry_to_fit.physical_bytes < 5 << 20


def test_vllms_own_size_is_a_ceiling() -> None:
    of = sizes(SMALL, {"kv_cache_memory_bytes": 10 << 20}, kv_floor="4MiB")
    assert of == sizes(SMALL, kv_floor="4MiB", kv_ceiling="10MiB")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"kv_floor": "4MiB"}, r"kv_ceiling: found none .*set it to the most KV memory"),
        ({"kv_floor": "12MiB", "kv_ceiling": "10MiB"}, r"kv_floor: found 12MiB, above the ceiling of 10MiB"),
        (
            {"kv_floor": "2MiB", "kv_ceiling": "10MiB"},
            r"kv_floor: found 2MiB, which holds \d+ tokens .*set kv_floor to",
        ),
        ({"kv_ceiling": "2MiB"}, r"kv_ceiling: found 2MiB, which is \d+ segments .*set kv_ceiling to"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sizes(SMALL, **extra)


def test_the_size_that_an_error_names_is_enough() -> None:
    with pytest.raises(ConfigError) as refused:
        sizes(SMALL, kv_floor="2MiB", kv_ceiling="10MiB")
    named = str(refused.value).split("set kv_floor to ")[1].split(" ")[0]
    assert sizes(SMALL, kv_floor=named, kv_ceiling="10MiB").floor_blocks > SMALL.longest_tokens // SMALL.block_tokens


@pytest.mark.parametrize(
    ("config", "extra", "message"),
    [
        ({}, {"long_contexts": True}, r"long_contexts: found true"),
        (
            {"device": "cuda"},
            {},
            r"kv_ceiling: found on device type 'cuda', .* never run on a GPU; .* allow_untested_elastic_cuda to true",
        ),
        (
            {"device": "xpu"},
            {"allow_untested_elastic_cuda": True},
            r"kv_ceiling: found on device type 'xpu', where KV memory cannot grow",
        ),
        (
            {"device": "cuda", "ranks": 2},
            {"allow_untested_elastic_cuda": True, "broker": "broker.sock"},
            r"broker: found beside a tensor-parallel size of 2 on CUDA",
        ),
        ({"num_gpu_blocks_override": 50}, {}, r"num_gpu_blocks_override: found 50"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(
    config: dict[str, Any], extra: dict[str, Any], message: str
) -> None:
    from layerkv.vllm_plugin.elastic_setup import elastic_sizes, require_elastic

    settings = EngineConfig.from_extra_config({"kv_ceiling": "10MiB", **extra})
    with pytest.raises(ConfigError, match=message):
        require_elastic(vllm_config(**config), settings)
    with pytest.raises(ConfigError, match=message):  # where start-up did not pass there
        elastic_sizes(vllm_config(**config), settings, SMALL)
    without = {key: value for key, value in extra.items() if key != "broker"}
    require_elastic(vllm_config(**config), EngineConfig.from_extra_config(without))


def test_who_asks_for_it_may_try_it_on_cuda() -> None:
    from layerkv.vllm_plugin.elastic_setup import require_elastic

    settings = EngineConfig.from_extra_config({"kv_ceiling": "10MiB", "allow_untested_elastic_cuda": True})
    require_elastic(vllm_config("cuda", ranks=2), settings)


@pytest.mark.parametrize(("device", "num_mapped"), [("cpu", 1), ("cuda", 2)])
def test_where_a_block_fills_a_segment_vllms_warm_up_has_one_beside_the_null_block(
    device: str, num_mapped: int
) -> None:
    from layerkv.vllm_plugin.elastic_setup import elastic_sizes

    large = replace(SMALL, page_bytes=2 << 20, alignment_bytes=2 << 20)
    extra = {"kv_ceiling": "1GiB", "broker": "broker.sock", "allow_untested_elastic_cuda": True}
    of = elastic_sizes(vllm_config(device), EngineConfig.from_extra_config(extra), large)
    assert of.plan.layout.segment_blocks == 1
    assert of.plan.num_mapped == num_mapped


def test_vllm_is_told_another_size_only_while_it_looks() -> None:
    from layerkv.vllm_plugin.elastic_setup import told_kv_bytes

    config = vllm_config(kv_cache_memory_bytes=7)
    with told_kv_bytes(config, 3):
        assert config.cache_config.kv_cache_memory_bytes == 3
    assert config.cache_config.kv_cache_memory_bytes == 7


def host(request: GeometryRequest, host_bytes: int, longest_tokens: int | None = None) -> Any:
    from layerkv.vllm_plugin.elastic_setup import host_sizes

    geometry = sizes(request, kv_ceiling="16GiB", broker="broker.sock").geometry
    return geometry, host_sizes(geometry, host_bytes // geometry.block_bytes, longest_tokens or request.longest_tokens)


def test_host_memory_is_divided_into_segments_of_whole_huge_pages_and_its_floor_holds_the_longest_request() -> None:
    geometry, of = host(BIG, 64 << 30)
    piece_bytes = of.layout.segment_blocks * geometry.page_bytes
    assert piece_bytes % (2 << 20) == 0
    assert 256 < of.layout.num_segments <= 512
    assert of.segment_bytes == piece_bytes * geometry.num_layers
    assert (64 << 30) - of.segment_bytes < of.num_blocks * geometry.block_bytes <= 64 << 30
    assert 0 <= of.floor_blocks - 8192 // 16 < of.layout.segment_blocks


def test_small_host_memory_has_segments_of_small_pages_and_may_be_all_floor() -> None:
    geometry, of = host(SMALL, 8 << 20)
    assert of.layout.num_segments > 16
    assert of.layout.segment_blocks * geometry.page_bytes % (4 << 10) == 0
    assert of.floor < of.layout.num_segments
    _, of = host(SMALL, 8 << 20, longest_tokens=1 << 20)
    assert of.floor == of.layout.num_segments


def test_host_memory_of_less_than_a_page_is_one_segment() -> None:
    from dataclasses import replace

    _, of = host(replace(SMALL, page_bytes=1536), 2 * 6 * 1536)
    assert (of.layout.segment_blocks, of.layout.num_segments, of.floor) == (2, 1, 1)
