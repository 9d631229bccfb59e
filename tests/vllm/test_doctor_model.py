"""`layerkv doctor --model` on configurations of real architectures: what it says is what an engine has."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines_in_turn import flag
from tests.vllm.forked import Ended, Forks, run_module

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

DOCTOR = "import sys; from layerkv.cli import main; sys.exit(main(sys.argv[1:]))"
BROKEN_DRAFTER = """
import sys
from layerkv import doctor_model
from layerkv.cli import main

bytes_of = doctor_model._bytes_of


def without_drafters(model_config, make):
    made_bytes = bytes_of(model_config, make)
    if model_config.runner_type == "draft":
        raise RuntimeError("it needs them")
    return made_bytes


doctor_model._bytes_of = without_drafters
sys.exit(main(sys.argv[1:]))
"""
TINY = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True,
}


def llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=6, **TINY)


def drafter() -> Any:
    """What drafts for it, as a draft model or an EAGLE head."""
    from transformers import LlamaConfig

    return LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=2, **TINY)


def mixtral() -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(
        architectures=["MixtralForCausalLM"], num_hidden_layers=4, num_local_experts=4, sliding_window=None, **TINY
    )


def deepseek_v2() -> Any:
    from transformers import DeepseekV2Config

    ranks = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    return DeepseekV2Config(
        architectures=["DeepseekV2ForCausalLM"], num_hidden_layers=2, first_k_dense_replace=2, **TINY, **ranks
    )


def gemma_3() -> Any:
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    return Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        num_hidden_layers=6,
        layer_types=kinds,
        sliding_window=64,
        head_dim=32,
        **TINY,
    )


def gpt_oss() -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(
        architectures=["GptOssForCausalLM"],
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=64,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        **TINY,
    )


def granite_4_h() -> Any:
    from transformers import GraniteMoeHybridConfig

    return GraniteMoeHybridConfig(
        architectures=["GraniteMoeHybridForCausalLM"],
        num_hidden_layers=4,
        layer_types=["mamba", "mamba", "mamba", "attention"],
        num_local_experts=0,
        shared_intermediate_size=64,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_expand=2,
        position_embedding_type="nope",
        **TINY,
    )


# What each of the model's groups keeps, and how many layers it has.
FAMILIES: dict[str, tuple[Callable[[], Any], list[tuple[str, int]]]] = {
    "llama": (llama, [("full", 6)]),
    "llama-eagle": (llama, [("full", 8)]),
    "llama-draft_model": (llama, [("full", 8)]),
    "mixtral": (mixtral, [("full", 4)]),
    "deepseek-v2": (deepseek_v2, [("full, latent (MLA)", 2)]),
    "gemma-3": (gemma_3, [("full", 2), ("window of 64", 2), ("window of 64", 2)]),
    "gpt-oss": (gpt_oss, [("full", 2), ("window of 64", 2)]),
    "granite-4-h": (granite_4_h, [("full", 1), *[("state (mamba2)", 1)] * 3]),
}
DENSE = ("llama", "mixtral")
DRAFTING = {"llama-eagle": "eagle", "llama-draft_model": "draft_model"}
CERTAINLY_SERVED = {"llama", "mixtral", *DRAFTING}


def write_config(make: Callable[[], Any], folder: Path) -> Path:
    """A checkpoint's folder with nothing but its configuration."""
    make().save_pretrained(folder)
    return folder


def speculation(method: str, make: Callable[[], Any], folder: Path) -> dict[str, Any]:
    """For an engine: what drafts, of which the folder has the configuration."""
    model = str(write_config(make, folder / "drafter"))
    return {"method": method, "model": model, "num_speculative_tokens": 3}


@pytest.fixture(scope="module")
def pairs(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What the doctor tells of a family, and what an engine has; all run side by side, two at a time."""
    running: dict[str, tuple[Future[Ended], Path]] = {}
    for name, (make, _) in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        args: dict[str, Any] = {**ENGINE, "model": str(write_config(make, folder / "model"))}
        if name == "deepseek-v2":
            args["attention_backend"] = "CPU_MLA"  # where there is AMX vLLM prefers a backend that takes no float32
        if name in DRAFTING:
            args["speculative_config"] = speculation(DRAFTING[name], drafter, folder)
        if name in CERTAINLY_SERVED:
            args["kv_transfer_config"] = flag(host_memory="256MiB")
        given, taken = folder / "engine.json", folder / "out.json"
        given.write_text(json.dumps(args))
        program = run_module("tests.vllm.doctor_beside_engine")
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
        ended = forks.start(program, str(given), str(taken), log_path=folder / "log", limit_s=300, **environment)
        running[name] = ended, taken

    def pair(name: str) -> dict[str, Any]:
        ended, taken = running[name]
        run = ended.result()
        assert run.returncode == 0, run.stdout[-6000:]
        document: dict[str, Any] = json.loads(taken.read_text())
        return document

    return pair


@pytest.mark.parametrize("name", FAMILIES)
def test_the_groups_told_are_those_of_an_engine(pairs: Callable[[str], dict[str, Any]], name: str) -> None:
    told, has = pairs(name)["told"]["model"], pairs(name)["has"]
    assert not told["by_config"]
    pages = [(group["num_layers"], group["block_tokens"], group["page_bytes"]) for group in told["groups"]]
    assert pages == [(group["layers"], group["block_tokens"], [group["page_bytes"]]) for group in has["groups"]]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_group_is_told_by_what_it_keeps(pairs: Callable[[str], dict[str, Any]], name: str) -> None:
    told = pairs(name)["told"]["model"]
    assert sorted((group["kind"], group["num_layers"]) for group in told["groups"]) == sorted(FAMILIES[name][1])
    assert told["kv_dtype"] == "float32"
    assert told["drafter"] == (f"{DRAFTING[name]}, its layers counted with the model's" if name in DRAFTING else "")
    if name == "llama":
        assert told["groups"][0]["token_bytes"] == 6 * 2 * 2 * 32 * 4
        of_layers = 6 * (4 * 64 * 64 + 3 * 64 * 64 + 2 * 64)
        assert told["weight_bytes"] == (of_layers + 2 * 512 * 64 + 64) * 4
    if name == "deepseek-v2":
        assert told["groups"][0]["token_bytes"] == 2 * (32 + 16) * 4


@pytest.mark.parametrize("name", sorted(CERTAINLY_SERVED))
def test_the_division_told_is_that_of_an_engine(pairs: Callable[[str], dict[str, Any]], name: str) -> None:
    told, has = pairs(name)["told"], pairs(name)["has"]
    assert told["status"] == 0
    assert told["model"]["supported"]
    assert {key: told["model"]["sizes"][key] for key in has["sizes"]} == has["sizes"]
    assert has["sizes"]["zone_blocks"]


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - CERTAINLY_SERVED))
def test_what_is_not_served_is_refused_with_the_reason_and_what_to_set(
    pairs: Callable[[str], dict[str, Any]], name: str
) -> None:
    told = pairs(name)["told"]
    refused = told["model"]["refused"]
    assert told["model"]["supported"] == (not refused)
    assert told["status"] == (1 if refused else 0)
    if refused:
        assert "layerkv" in refused
        assert 'set "on_unsupported": "passthrough"' in refused


# Bad input ------------------------------------------------------------------------------------------------------------


def doctor(forks: Forks, folder: Path, *flags: str) -> Ended:
    environment = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return forks.run(DOCTOR, "doctor", "--model", str(folder), *flags, limit_s=300, **environment)


def problem_of(run: Ended) -> str:
    """The line that says what is wrong with the model."""
    assert run.returncode == 1, run.stdout + run.stderr
    [line] = [line for line in run.stdout.splitlines() if line.startswith("model: ")]
    return line


def test_an_unknown_architecture_is_told_by_its_name(forks: Forks, tmp_path: Path) -> None:
    folder = write_config(llama, tmp_path / "model")
    path = folder / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "OracleForCausalLM"))
    line = problem_of(doctor(forks, folder))
    assert f"model: {path}: found what vLLM " in line
    assert "OracleForCausalLM" in line
    assert "set --model to another checkpoint" in line


def test_an_unknown_engine_argument_is_told_by_its_name(forks: Forks, tmp_path: Path) -> None:
    folder = write_config(llama, tmp_path / "model")
    line = problem_of(doctor(forks, folder, "--engine-args", '{"block_sizes": 16}'))
    assert "model: --engine-args: found an argument that vLLM does not have" in line
    assert "block_sizes" in line


def test_an_encoder_decoder_is_refused_by_name(forks: Forks, tmp_path: Path) -> None:
    from transformers import WhisperConfig

    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1}
    config = WhisperConfig(architectures=["WhisperForConditionalGeneration"], max_target_positions=1024, **sizes)
    folder = tmp_path / "model"
    config.save_pretrained(folder)
    line = problem_of(doctor(forks, folder))
    assert "encoder-decoder" in line
    assert "use a decoder-only model" in line


@pytest.mark.parametrize(
    ("make", "flags", "parts"),
    [
        # A request of 1,024 tokens takes 3 MiB.
        (llama, ["--kv-memory", "3MiB"], ["max_model_len: found 1024", "set max_model_len to"]),
        (llama, ["--kv-memory", "64KiB"], ["zone", "set a smaller zone_tokens, fewer lanes, or more KV memory"]),
        (granite_4_h, ["--kv-memory", "64KiB"], ["KV memory", "; set "]),
    ],
    ids=["no-room-for-one", "no-pool", "no-pool-beside-states"],
)
def test_too_little_memory_is_told_with_what_to_set(
    forks: Forks, tmp_path: Path, make: Callable[[], Any], flags: list[str], parts: list[str]
) -> None:
    folder = write_config(make, tmp_path / "model")
    args = json.dumps({key: value for key, value in ENGINE.items() if key != "kv_cache_memory_bytes"})
    line = problem_of(doctor(forks, folder, *flags, "--engine-args", args))
    for part in parts:
        assert part in line


def test_a_table_tells_it_to_people(forks: Forks, tmp_path: Path) -> None:
    run = doctor(forks, write_config(llama, tmp_path / "model"), "--kv-memory", "64MiB", "--max-model-len", "1024")
    assert run.returncode == 0, run.stdout + run.stderr
    for part in ("LlamaForCausalLM", "KV-cache groups", "lane zone", "Everything is all right."):
        assert part in run.stdout


def test_nothing_is_held_against_a_drafter_that_could_not_be_made(forks: Forks, tmp_path: Path) -> None:
    """Its layers are not there by name, for which one that was made would be refused."""
    args = {**ENGINE, "speculative_config": speculation("draft_model", drafter, tmp_path)}
    folder = write_config(llama, tmp_path / "model")
    flags = ["--engine-args", json.dumps(args), "--json"]
    run = forks.run(BROKEN_DRAFTER, "doctor", "--model", str(folder), *flags, limit_s=300, HF_HUB_OFFLINE="1")
    told = json.loads(run.stdout)["model"]
    why = "vLLM could not make it without weights (it needs them)"
    assert told["drafter"] == f"draft_model, whose layers and KV are not counted here: {why}"
    assert [(group["kind"], group["num_layers"]) for group in told["groups"]] == [("full", 6)]
    assert told["refused"] == ""
    assert told["supported"]
    assert told["sizes"]["pool_blocks"]


def test_a_drafter_of_another_kv_shape_is_refused_before_a_start(forks: Forks, tmp_path: Path) -> None:
    def narrower() -> Any:
        config = drafter()
        config.num_key_value_heads = 1
        return config

    folder = write_config(llama, tmp_path / "model")
    args = {**ENGINE, "speculative_config": speculation("draft_model", narrower, tmp_path)}
    run = doctor(forks, folder, "--engine-args", json.dumps(args), "--json")
    told = json.loads(run.stdout)["model"]
    assert "differ in KV shape" in told["refused"]
    assert "draft_model." in told["refused"]
