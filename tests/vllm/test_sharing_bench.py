"""The engines of `layerkv bench sharing` that are no servers, with a few requests: what is counted adds up."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerkv.bench import sharing_constant, sharing_resize
from layerkv.bench.overhead import Part
from layerkv.bench.sharing_constant import measure_constant_load
from layerkv.bench.sharing_resize import measure_steps
from layerkv.errors import LayerKVError

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MIB = 1 << 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    pytest.importorskip("vllm")
    small = {"CEILING_BYTES": 208 * MIB, "RUNNING": 4, "OUTPUT_TOKENS": 400, "MAX_MODEL_LEN": 448}
    for name, value in {**small, "NUM_MOVES": 4, "CALM_STEPS": 5}.items():
        monkeypatch.setattr(sharing_resize, name, value)
    return monkeypatch


def test_nearly_all_of_a_pool_goes_and_comes_while_it_decodes(small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    del small
    found = measure_steps(tmp_path)
    assert found.moves == 4
    assert found.moved_bytes > 150 * MIB
    assert found.worst >= found.over_median > 0


def test_requests_that_end_before_the_last_move_are_an_error(small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small.setattr(sharing_resize, "OUTPUT_TOKENS", 30)
    with pytest.raises(LayerKVError, match="requests ended before the last move"):
        measure_steps(tmp_path)


def test_an_elastic_engine_at_its_ceiling_is_run_beside_a_static_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    whole = sharing_constant.constant_part()
    few = whole.bursts[sharing_constant.RUNNING][:3]
    part = Part(3, whole.kv_blocks, {sharing_constant.RUNNING: few}, turn_steps=20)
    monkeypatch.setattr(sharing_constant, "constant_part", lambda: part)
    found = measure_constant_load(1, tmp_path)
    assert len(found.throughput_ratio_by_round) == 1
    assert set(found.step_ms) == {"static", "elastic"}
    assert min(found.host_ms_per_step.values()) > 0
