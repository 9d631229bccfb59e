"""Seeded requests on vLLM's CPU build: their prompts are computed in one step, because the engine dies of a cut one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from layerkv.bench.tiny_model import make_tiny_model
from tests.vllm.forked import Forks
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


def layerkv(model: Path, extra: dict[str, Any], **changes: Any) -> dict[str, Any]:
    connector = {
        "kv_connector": "LayerKVConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"zone_tokens": 320, "host_memory": "64MiB", **extra},
    }
    return {**engine_args(model), "max_num_batched_tokens": STEP_TOKENS, "kv_transfer_config": connector, **changes}


ENGINES = {
    f"{name}{', ahead' if ahead else ''}": (extra, ahead)
    for name, extra in (("parks", {}), ("recomputes", {"host_memory": "1MiB"}))
    for ahead in (False, True)
}


@dataclass(frozen=True)
class Turns:
    """What became of each engine, and all that the processes printed."""

    outcomes: dict[str, Any]
    log: str

    def of(self, name: str) -> list[dict[str, Any]]:
        assert "error" not in self.outcomes[name], self.outcomes[name]["error"]
        return self.outcomes[name]["results"]


@pytest.fixture(scope="module")
def turns(forks: Forks, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Turns:
    """All engines of this file, half of them in one process and half in another; the one that dies comes last."""
    plentiful = {"kv_cache_memory_bytes": PLENTIFUL_BYTES, "max_num_batched_tokens": 8192, "max_num_seqs": 16}
    scarce = {"kv_cache_memory_bytes": 4 << 20, "long_prefill_token_threshold": 100}
    specs = {
        "plentiful": {"engine_args": {**engine_args(model), **plentiful}, "mixes": SEEDED_MIXES},
        **{
            name: {"engine_args": layerkv(model, extra, **scarce), "mixes": SEEDED_MIXES, "ahead": ahead}
            for name, (extra, ahead) in ENGINES.items()
        },
        "short steps": {"engine_args": layerkv(model, {}, max_num_batched_tokens=160), "mixes": MIXES[:1]},
        "stock": {"engine_args": engine_args(model), "mixes": MIXES[:1]},
    }
    specs = {name: {**spec, "seed_every": EVERY} for name, spec in specs.items()}
    halves = [dict(list(specs.items())[start::2]) for start in range(2)]
    folders = [tmp_path_factory.mktemp("seeded") for _ in halves]
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(run_engine, [forks] * 2, folders, halves)
    return Turns(first | second, "".join((folder / "log").read_text() for folder in folders))


def test_stock_vllm_dies_of_a_seeded_prompt_in_chunks(turns: Turns) -> None:
    """When it no longer does, `layerkv.vllm_plugin.seeded` and what asks it can go."""
    assert "Generator does not use offset" in turns.outcomes["stock"]["error"]


@pytest.mark.parametrize("name", ENGINES)
def test_seeded_and_other_requests_get_stock_vllms_tokens(turns: Turns, name: str) -> None:
    expected, results = turns.of("plentiful"), turns.of(name)
    assert [result["tokens"] for result in results] == [result["tokens"] for result in expected]
    move = "parks" if name.startswith("parks") else "recomputes"
    assert sum(result["books"]["moves"][move] for result in results) > 0


def test_a_seeded_prompt_longer_than_a_step_is_refused_and_the_engine_goes_on(turns: Turns) -> None:
    [result] = turns.of("short steps")
    for index, (request, tokens) in enumerate(zip(make_mix(**MIXES[0]), result["tokens"], strict=True)):
        is_cut_off = index % EVERY == 0 and len(request.prompt) > 160
        assert (len(tokens) == request.max_tokens) or index % EVERY == 0
        if is_cut_off:
            assert tokens == []
    assert "refused" in turns.log.partition("engine short steps\n")[2].partition("\nengine ")[0]
