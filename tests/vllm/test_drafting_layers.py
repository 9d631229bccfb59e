"""Which of the layers with KV are of what drafts, where the model has fewer of them than layers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.vllm.engines_in_turn import flag
from tests.vllm.forked import Forks
from tests.vllm.test_exact import PLENTIFUL_BYTES, Setting, engine_args, require_same
from tests.vllm.tiny_families import make_draft_model, make_eagle_head
from tests.vllm.tiny_gaps import make_with_gaps

pytestmark = pytest.mark.vllm

LAYERS = 6


def config_of(method: str | None) -> Any:
    return SimpleNamespace(
        speculative_config=None if method is None else SimpleNamespace(method=method),
        model_config=SimpleNamespace(get_num_layers=lambda parallel_config: LAYERS),
        parallel_config=None,
    )


def told(names: list[str], method: str | None) -> int | None:
    """What is made of these layers' names beside a model of six layers."""
    from layerkv.vllm_plugin.drafts import num_drafting_layers

    return num_drafting_layers(config_of(method), names)


def named(*numbers: int, of: str = "model.layers") -> list[str]:
    return [f"{of}.{number}.self_attn.attn" for number in numbers]


@pytest.mark.parametrize("of_model", [named(0, 1, 2, 3, 4, 5), named(0, 2, 5), named(1, of="language_model.layers")])
def test_an_eagle_heads_layers_are_numbered_on_from_the_models_last(of_model: list[str]) -> None:
    assert told(of_model + named(6, 7), "eagle") == 2
    assert told(of_model + named(6, of="model.eagle_layers"), "eagle") == 1


def test_a_draft_models_layers_have_a_name_of_their_own_before_them() -> None:
    of_draft = named(0, 1, 2, 3, of="draft_model.model.layers")
    assert told(named(0, 1, 4) + of_draft, "draft_model") == 4
    assert told(named(0, 1, 2, 3, 4, 5) + of_draft, "draft_model") == 4


def test_what_drafts_from_tokens_has_no_layers() -> None:
    assert told(named(0, 1), None) == told(named(0, 1), "ngram") == 0


@pytest.mark.parametrize("method", ["eagle", "draft_model"])
@pytest.mark.parametrize("names", [named(0, 1, 2), named(6, 7), named(6, 0), ["model.layers.attn", "draft.attn"]])
def test_what_their_names_do_not_tell_is_refused(method: str, names: list[str]) -> None:
    """None of what drafts, none of the model, or not one after the other: as where vLLM names them otherwise."""
    from layerkv.vllm_plugin.worker import LayerKVWorkerMixin

    if method == "draft_model":
        names = [name.replace("model.layers.6", "draft_model.layers.0") for name in names]
        names = [name.replace("model.layers.7", "draft_model.layers.1") for name in names]
    assert told(names, method) is None
    worker: Any = object.__new__(LayerKVWorkerMixin)
    worker.vllm_config = config_of(method)
    problem = worker.unsupported_drafter(dict.fromkeys(names))
    assert problem.startswith(f"speculative decoding by {method} is not supported by layerkv with this model")
    assert "leave out --speculative-config" in problem


PROGRAM = """
import sys
from tests.vllm.tiny_gaps import know_gaps
know_gaps()
from tests.vllm.mix_engine import main
main(*sys.argv[1:])
"""
SETTING = Setting("scarce", must_move=("parks", "fetches", "layered_admissions", "accepted_drafts", "rejected_drafts"))
MIXES = [{"seed": 0, "sharing": True}, {"seed": 1}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "make", "scarce_mib"), [("eagle", make_eagle_head, 7), ("draft_model", make_draft_model, 8)]
)
def test_tokens_are_stock_vllms_where_some_layers_of_the_model_have_no_attention(
    forks: Forks, tiny_model: Path, tmp_path: Path, method: str, make: Any, scarce_mib: int
) -> None:
    model = make_with_gaps(tiny_model, tmp_path / "model", without=(1, 4))
    drafter = str(make(tiny_model, tmp_path / "drafter"))
    stock = {
        **engine_args(model),
        "speculative_config": {"method": method, "model": drafter, "num_speculative_tokens": 3},
        "kv_cache_memory_bytes": PLENTIFUL_BYTES,
    }
    ours = {
        **stock,
        "kv_cache_memory_bytes": scarce_mib << 20,
        "kv_transfer_config": flag(zone_tokens=320, host_memory="64MiB"),
    }
    specs = {name: {"engine_args": args, "mixes": MIXES} for name, args in (("stock", stock), ("ours", ours))}
    given, out = tmp_path / "spec.json", tmp_path / "out.json"
    given.write_text(json.dumps(specs))
    ran = forks.run(PROGRAM, str(given), str(out), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert ran.returncode == 0, ran.stderr[-4000:]
    outcomes = json.loads(out.read_text())
    for outcome in outcomes.values():
        assert "error" not in outcome, outcome["error"]
    reference = [result["tokens"] for result in outcomes["stock"]["results"]]
    require_same(SETTING, MIXES, reference, outcomes["ours"]["results"])
