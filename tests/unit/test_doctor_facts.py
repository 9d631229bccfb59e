"""What is said of a checkpoint, and what is refused before vLLM is asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from layerkv.doctor_facts import (
    Drafter,
    Group,
    ModelFacts,
    Sizes,
    check_checkpoint,
    groups_table,
    kind_of,
    model_rows,
    one_line,
    read_question,
)
from layerkv.errors import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

FULL = Group(kind="full", num_layers=12, block_tokens=16, page_bytes=(32 * KIB,))
WINDOW = replace(FULL, kind="window of 128", kept_tokens=128)
STATE = replace(FULL, kind="state (mamba2)", kept_tokens=0, state_blocks=2)
FACTS = ModelFacts(
    folder="/models/x",
    architectures=("XForCausalLM",),
    model_class="XForCausalLM",
    features=(),
    dtype="bfloat16",
    kv_dtype="bfloat16",
    max_model_len=8192,
    num_layers=12,
    weight_bytes=3 * GIB,
    block_bytes=12 * 32 * KIB,
    groups=(FULL,),
)
SIZES = Sizes(
    kv_bytes=GIB,
    pool_blocks=2601,
    zone_blocks=512,
    zone_bytes=32 * MIB,
    block_tokens=16,
    host_blocks=10_000,
    host_bytes=4 * GIB,
)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (None, "found nothing there; expected the folder of a checkpoint"),
        ({}, "found an empty folder; expected the folder of a checkpoint, with its config.json; set --model"),
        (
            {"a.bin": "", "b.bin": "", "c.bin": "", "d.bin": ""},
            "found a.bin, b.bin, c.bin and more, but no config.json; expected the folder of a checkpoint",
        ),
        ({"config.json": "{"}, "config.json: found what is not JSON (Expecting property name"),
        ({"config.json": "\xff\xfe"}, "config.json: found what is not JSON"),
        ({"config.json": "[" * 100_000}, "config.json: found what is not JSON"),
        (
            {"config.json": "[]"},
            "config.json: found JSON of another kind (list); expected an object; download it again",
        ),
    ],
    ids=["nothing", "empty", "no-config", "cut-off", "not-text", "nested", "a-list"],
)
def test_what_is_no_checkpoint_is_refused_with_what_was_found(
    tmp_path: Path, files: dict[str, str] | None, found: str
) -> None:
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as refused:
        check_checkpoint(folder)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert sentence.startswith(str(folder))
    assert found in sentence


def test_a_file_is_no_folder_and_a_name_is_not_looked_up(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"found a file; .*a name is not looked up: download the checkpoint first"):
        check_checkpoint(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["config.json", "params.json"])
def test_a_configuration_that_is_an_object_is_left_to_vllm(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    assert check_checkpoint(tmp_path) == tmp_path / name


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"kv_memory": "8"}, None),
        ({"kv_memory": "8 parsec"}, "--kv-memory: found '8 parsec' with the unknown unit"),
        ({"kv_memory": "0GiB"}, "--kv-memory: found '0GiB'; expected more than zero"),
        ({"max_model_len": 0}, "--max-model-len: found 0; expected 1 or more"),
        (
            {"engine_args": {"tensor_parallel_size": 2}},
            "--engine-args: found tensor_parallel_size 2; expected an engine of one worker; leave tensor_parallel_size",
        ),
        ({"engine_args": {"tensor_parallel_size": 1}}, None),
    ],
)
def test_a_wrong_question_is_refused(asked: dict[str, Any], found: str | None) -> None:
    given = {"kv_memory": None, "max_model_len": None, "engine_args": {}, **asked}
    if found is None:
        question = read_question("/models/x", **given)
        assert question.kv_memory_bytes == (8 if given["kv_memory"] else None)
        return
    with pytest.raises(ConfigError) as refused:
        read_question("/models/x", **given)
    assert found in str(refused.value)


def test_an_exception_is_told_on_one_line_without_what_surrounds_it() -> None:
    pydantic = (
        "1 validation error for ModelConfig\n  Value error, Model architectures ['X'] are not supported for now. "
        "Supported architectures: dict_keys(['A', 'B']) [type=value_error, input_value={'a': 1}, input_type=dict]\n"
        "    For further information visit https://errors.pydantic.dev"
    )
    assert one_line(ValueError(pydantic)) == "Model architectures ['X'] are not supported for now."
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(AssertionError()) == "AssertionError"
    assert len(one_line(ValueError("x" * 5000))) == 400


def test_where_nothing_drafts_nothing_is_told_of_it() -> None:
    assert "drafter" not in dict(model_rows(FACTS))
    assert FACTS.as_json()["drafter"] == ""


@pytest.mark.parametrize(
    ("drafter", "told"),
    [
        (Drafter(method="ngram", keeps_kv=False), "ngram, which keeps no KV"),
        (Drafter(method="eagle"), "eagle, its layers counted with the model's"),
        (
            Drafter(method="mtp", not_counted="layerkv does not serve it"),
            "mtp, whose layers and KV are not counted here: layerkv does not serve it",
        ),
    ],
    ids=["without-kv", "counted", "not-counted"],
)
def test_what_drafts_is_told_and_whether_it_is_counted(drafter: Drafter, told: str) -> None:
    facts = replace(FACTS, drafter=drafter)
    assert dict(model_rows(facts))["drafter"] == told
    assert facts.as_json()["drafter"] == told


# What a layer keeps ---------------------------------------------------------------------------------------------------


class FullAttentionSpec(SimpleNamespace):
    pass


class OurSpec(FullAttentionSpec):
    pass


class MLAAttentionSpec(FullAttentionSpec):
    pass


class SlidingWindowSpec(SimpleNamespace):
    pass


class ChunkedLocalAttentionSpec(SimpleNamespace):
    pass


class MambaSpec(SimpleNamespace):
    pass


class NewSpec(SimpleNamespace):
    pass


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (FullAttentionSpec(sliding_window=None), ("full", None)),
        (OurSpec(), ("full", None)),
        (MLAAttentionSpec(), ("full, latent (MLA)", None)),
        (FullAttentionSpec(sliding_window=1024), ("full, computed in a window of 1,024", None)),
        (FullAttentionSpec(attention_chunk_size=64), ("full, computed in chunks of 64", None)),
        (SlidingWindowSpec(sliding_window=128), ("window of 128", 128)),
        (ChunkedLocalAttentionSpec(attention_chunk_size=8192), ("chunks of 8,192", 8192)),
        (MambaSpec(mamba_type=SimpleNamespace(name="MAMBA2")), ("state (mamba2)", 0)),
        (NewSpec(), ("NewSpec", None)),
    ],
)
def test_a_spec_is_told_by_what_it_keeps(spec: Any, kind: tuple[str, int | None]) -> None:
    assert kind_of(spec) == kind


def test_a_request_holds_all_its_blocks_or_those_of_its_window_or_its_state() -> None:
    assert [FULL.num_blocks(tokens) for tokens in (1, 16, 17, 4096)] == [1, 1, 2, 256]
    # A window of 128 tokens may lie over nine blocks of 16.
    assert [WINDOW.num_blocks(tokens) for tokens in (1, 17, 128, 144, 4096)] == [1, 2, 8, 9, 9]
    assert [STATE.num_blocks(tokens) for tokens in (1, 4096)] == [2, 2]
    assert (FULL.token_bytes, WINDOW.token_bytes, STATE.token_bytes) == (24 * KIB, 24 * KIB, 0)
    facts = replace(FACTS, groups=(FULL, WINDOW, STATE))
    assert facts.request_bytes(4096) == (256 + 9 + 2) * 12 * 32 * KIB
    assert facts.num_kv_layers == 36


def test_layers_that_differ_in_size_are_added_up() -> None:
    group = replace(FULL, num_layers=3, page_bytes=(4 * KIB, 8 * KIB, 4 * KIB))
    assert group.layer_bytes == 16 * KIB
    assert groups_table(replace(FACTS, groups=(group,))) == [("0", "full", "3", "16", "4KiB or 8KiB", "1KiB")]


# What is said ---------------------------------------------------------------------------------------------------------


def test_a_model_that_is_served_is_told_with_what_a_request_takes() -> None:
    rows = dict(model_rows(FACTS))
    assert rows["architecture"] == "XForCausalLM, KV in bfloat16, requests of up to 8,192 tokens"
    assert rows["layers"] == "12 decoder layers by the configuration, 12 with a KV cache or state"
    assert rows["KV"] == "24KiB per token"
    assert rows["a request"] == (
        "23.62MiB of KV memory with 1,000 tokens, 192MiB of KV memory with 8,192 tokens, in whole blocks of 384KiB"
    )
    assert rows["pool and zone"] == "give --kv-memory SIZE to see them"
    assert rows["with layerkv"] == "yes"
    assert not FACTS.problems


def test_windows_and_states_are_told_apart_from_what_grows() -> None:
    facts = replace(FACTS, groups=(FULL, WINDOW, WINDOW, STATE))
    kv = dict(model_rows(facts))["KV"]
    assert kv == "24KiB per token, 48KiB for each of the last 128, 768KiB of state per request"


def test_the_division_of_memory_is_told_in_blocks_tokens_and_requests() -> None:
    rows = dict(model_rows(replace(FACTS, sizes=SIZES)))
    assert rows["pool"] == "2,600 blocks, 41,600 tokens: 5.1 requests of 8,192 tokens"
    assert rows["lane zone"] == "512 blocks, 8,192 tokens, in 32MiB (3.1%)"
    assert rows["host memory"] == "10,000 blocks, 4GiB"
    little = dict(model_rows(replace(FACTS, sizes=replace(SIZES, host_blocks=511))))
    assert little["host memory"] == "511 blocks, 4GiB, less than such a request: set host_memory"
    several = dict(model_rows(replace(FACTS, sizes=replace(SIZES, block_tokens=None))))
    assert several["pool"] == "2,600 blocks: 5.1 requests of 8,192 tokens"


@pytest.mark.parametrize(
    ("change", "verdict", "problems"),
    [
        ({"refused": "MLA is not supported; use another"}, "refused", ["MLA is not supported; use another"]),
        ({"too_small": "too small; set more"}, "yes, but not in this KV memory", ["too small; set more"]),
        ({"refused": "no", "too_small": "set more"}, "refused", ["no", "set more"]),
        ({"refused": "no", "by_config": "it broke", "groups": ()}, "refused", ["no"]),
    ],
)
def test_what_stands_in_the_way_is_a_problem(change: dict[str, Any], verdict: str, problems: list[str]) -> None:
    facts = replace(FACTS, **change)
    assert dict(model_rows(facts))["with layerkv"] == verdict
    assert facts.problems == problems


def test_a_model_whose_layers_cannot_be_asked_is_not_called_supported() -> None:
    made = {"groups": (), "weight_bytes": None, "most_token_bytes": 48 * KIB}
    facts = replace(FACTS, by_config="vLLM could not make it without weights: boom", **made)
    rows = dict(model_rows(facts))
    assert rows["with layerkv"] == "not known before a start"
    assert rows["groups"] == "by the configuration only: vLLM could not make it without weights: boom"
    assert rows["KV"] == "48KiB per token by the configuration, if every layer keeps all tokens"
    [problem] = facts.problems
    assert "boom" in problem
    assert "start vLLM" in problem
    assert facts.as_json()["supported"] is False


def test_the_facts_are_json() -> None:
    document = json.loads(json.dumps(replace(FACTS, sizes=SIZES).as_json()))
    assert document["supported"] is True
    assert document["request_bytes"] == {"1000": 63 * 384 * KIB, "8192": 512 * 384 * KIB}
    assert document["groups"][0]["token_bytes"] == 24 * KIB
    assert document["sizes"]["pool_blocks"] == 2601
