"""As `test_exact.py`, while the pool grows and shrinks at random under real engines, with guards: an engine that reads
or writes a segment without memory is killed. With a broker, host memory grows and shrinks at random too."""

from __future__ import annotations

import pytest

from tests.vllm.test_exact import TIGHT, Results, Setting, model, require_exact, results

__all__ = ["model", "results"]  # fixtures

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SIZES = {"kv_floor": "4MiB", "kv_ceiling": "9MiB", "zone_tokens": 320}
"""In segments of a block each: the smallest pool holds the longest request, and the largest two or three more."""


def elastic(name: str, **how: object) -> Setting:
    extra = {**SIZES, **how.pop("extra", {})}  # type: ignore[dict-item]
    must_move = ("segments_left", *how.pop("must_move", ("parks", "fetches", "layered_admissions")))  # type: ignore[misc]
    env = {"LAYERKV_CHECK": "1", **how.pop("env", {})}  # type: ignore[dict-item]
    return Setting(name, extra, env=env, must_move=must_move, shake_pool=len(name), **how)  # type: ignore[arg-type]


def with_host(name: str, **how: object) -> Setting:
    extra = {"host_memory": "12MiB", **how.pop("extra", {})}  # type: ignore[dict-item]
    must_move = ("host_segments_left", *how.pop("must_move", ("parks", "fetches")))  # type: ignore[misc]
    return elastic(name, extra=extra, must_move=must_move, has_broker=True, **how)


SETTINGS = [
    elastic("elastic"),
    elastic("elastic-no-prefix-cache", engine={"enable_prefix_caching": False}),
    elastic("elastic-ahead", ahead=True),
    elastic("elastic-failing-fetches", fail_every=3),
    elastic("elastic-ahead-failing-fetches", ahead=True, fail_every=3, must_move=("fetches", "recomputes")),
    elastic("elastic-failing-copies", fail_copies_every=61),
    elastic("elastic-tight", engine={"max_num_batched_tokens": 600}, policy=TIGHT),
    elastic("elastic-host-too-small", extra={"host_memory": "3MiB"}, must_move=("parks",)),
    elastic("elastic-3-slots", engine={"max_num_seqs": 3}, must_move=("parks",)),
    elastic(
        "elastic-tensor-parallel-2",
        extra={"kv_floor": "2MiB", "kv_ceiling": "4608KiB"},
        engine={"tensor_parallel_size": 2},
        alone=True,
    ),
    with_host("host-and-pool"),
    with_host("host-and-pool-ahead", ahead=True),
    with_host("host-and-pool-no-prefix-cache", engine={"enable_prefix_caching": False}),
    with_host("host-and-pool-failing-copies", fail_copies_every=61),
    with_host("host-and-pool-ahead-failing-fetches", ahead=True, fail_every=3, must_move=("fetches", "recomputes")),
    with_host(
        "host-and-pool-tensor-parallel-2",
        extra={"kv_floor": "2MiB", "kv_ceiling": "4608KiB"},
        engine={"tensor_parallel_size": 2},
        alone=True,
    ),
    elastic("elastic-compiled", engine={"enforce_eager": False}, env={"VLLM_CPU_CI_ENV": "1"}, alone=True),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_tokens_are_stock_vllms_whatever_the_pool_does(setting: Setting, results: Results) -> None:
    require_exact(setting, results)
