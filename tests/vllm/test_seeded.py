"""Seeded requests on vLLM's CPU build: their prompts are computed in one step, because the engine dies of a cut one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerkv.bench.tiny_model import make_tiny_model
from tests.vllm.mix import make_mix
from tests.vllm.test_exact import MIXES, PLENTIFUL_BYTES, engine_args, run_engine

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

EVERY = 3
SEEDED_MIXES = [mix for mix in MIXES if not mix["aborts"]][:4]
STEP_TOKENS = 416
"""Holds every request of a mix, and a few of them at once not at all."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("test", tmp_path_factory.mktemp("models"))


def run(folder: Path, args: dict[str, Any], mixes: list[dict[str, Any]], **spec: Any) -> list[dict[str, Any]]:
    return run_engine(folder, {"engine_args": args, "mixes": mixes, "seed_every": EVERY, **spec})


def layerkv(model: Path, extra: dict[str, Any], **changes: Any) -> dict[str, Any]:
    connector = {
        "kv_connector": "LayerKVConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"zone_tokens": 320, "host_memory": "64MiB", **extra},
    }
    return {**engine_args(model), "max_num_batched_tokens": STEP_TOKENS, "kv_transfer_config": connector, **changes}


def test_stock_vllm_dies_of_a_seeded_prompt_in_chunks(model: Path, tmp_path: Path) -> None:
    """When it no longer does, `layerkv.vllm_plugin.seeded` and what asks it can go."""
    with pytest.raises(AssertionError, match="Generator does not use offset"):
        run(tmp_path, engine_args(model), MIXES[:1])


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("extra", [{}, {"host_memory": "1MiB"}], ids=["parks", "recomputes"])
def test_seeded_and_other_requests_get_stock_vllms_tokens(
    model: Path, tmp_path: Path, extra: dict[str, Any], ahead: bool
) -> None:
    plentiful = {"kv_cache_memory_bytes": PLENTIFUL_BYTES, "max_num_batched_tokens": 8192, "max_num_seqs": 16}
    folders = [tmp_path / name for name in ("stock", "ours")]
    for folder in folders:
        folder.mkdir()
    expected = run(folders[0], {**engine_args(model), **plentiful}, SEEDED_MIXES)
    args = layerkv(model, extra, kv_cache_memory_bytes=4 << 20, long_prefill_token_threshold=100)
    results = run(folders[1], args, SEEDED_MIXES, ahead=ahead)
    assert [result["tokens"] for result in results] == [result["tokens"] for result in expected]
    assert sum(result["books"]["moves"]["recomputes" if extra else "parks"] for result in results) > 0


def test_a_seeded_prompt_longer_than_a_step_is_refused_and_the_engine_goes_on(model: Path, tmp_path: Path) -> None:
    mix = MIXES[0]
    [result] = run(tmp_path, layerkv(model, {}, max_num_batched_tokens=160), [mix])
    for index, (request, tokens) in enumerate(zip(make_mix(**mix), result["tokens"], strict=True)):
        is_cut_off = index % EVERY == 0 and len(request.prompt) > 160
        assert (len(tokens) == request.max_tokens) or index % EVERY == 0
        if is_cut_off:
            assert tokens == []
    assert "refused" in (tmp_path / "log").read_text()
