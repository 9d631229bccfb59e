"""As `test_exact.py`, while the pool grows and shrinks at random under real engines, with guards: an engine that reads
or writes a segment without memory is killed."""

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
    elastic("elastic-compiled", engine={"enforce_eager": False}, env={"VLLM_CPU_CI_ENV": "1"}, alone=True),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_tokens_are_stock_vllms_whatever_the_pool_does(setting: Setting, results: Results) -> None:
    require_exact(setting, results)
