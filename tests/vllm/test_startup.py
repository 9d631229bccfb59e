"""What the flag does to vLLM's configuration, and how start-up ends when something is wrong."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from layerkv.bench.tiny_model import make_tiny_model
from layerkv.errors import ConfigError, IncompatibleVLLMError

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
FLAG = {"kv_connector": "LayerKVConnector", "kv_role": "kv_both"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("test", tmp_path_factory.mktemp("models"))


def create_config(model: Path, extra: dict[str, Any] | None = None, *, flag: Any = FLAG, **args: Any) -> Any:
    """vLLM's own way from arguments to configuration; starts nothing."""
    from vllm import EngineArgs

    if flag is not None:
        args["kv_transfer_config"] = {**flag, "kv_connector_extra_config": extra or {}}
    base: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 8 << 20}
    return EngineArgs(model=str(model), **{**base, **args}).create_engine_config()


def test_without_the_flag_the_installed_package_changes_nothing(model: Path) -> None:
    config = create_config(model, flag=None)
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.scheduler_config.scheduler_cls is None
    assert config.kv_transfer_config is None
    assert config.model_config.logits_processors is None


def test_the_one_flag_selects_worker_scheduler_and_gate(model: Path) -> None:
    config = create_config(model)
    assert config.parallel_config.worker_cls == "layerkv.vllm_plugin.cpu_worker.LayerKVCPUWorker"
    assert config.scheduler_config.scheduler_cls == "layerkv.vllm_plugin.scheduler.LayerKVScheduler"
    assert len(config.model_config.logits_processors) == 1


def test_registering_again_is_harmless(model: Path) -> None:
    from vllm import EngineArgs

    from layerkv.vllm_plugin import register

    create_config(model)
    wrapped = EngineArgs.create_engine_config
    register()
    assert EngineArgs.create_engine_config is wrapped
    assert len(create_config(model).model_config.logits_processors) == 1


def test_the_gate_travels_to_other_processes_and_refuses_unknown_classes(model: Path, tmp_path: Path) -> None:
    from vllm import SamplingParams

    from layerkv.vllm_plugin.slo_gate import without_gates

    policy = tmp_path / "slo.yaml"
    policy.write_text("version: 1\ndefault_class: chat\nclasses:\n  chat: {ttft: 500ms, tpot: 50ms}\n")
    processors = create_config(model, {"policy": str(policy)}).model_config.logits_processors
    [gate] = pickle.loads(pickle.dumps(processors))
    gate.validate_params(SamplingParams(extra_args={"slo_class": "chat"}))
    gate.validate_params(SamplingParams())
    with pytest.raises(ValueError, match="chat"):
        gate.validate_params(SamplingParams(extra_args={"slo_class": "chatt"}))
    assert without_gates([gate]) == []


UNSUPPORTED = {
    "kv_role": ({"flag": {**FLAG, "kv_role": "kv_producer"}}, "kv_role"),
    "speculative decoding": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        "speculative decoding",
    ),
    "pipeline parallelism": ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
    "fit to memory": ({"max_model_len": -1}, "max_model_len -1"),
    "another scheduler": ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler class"),
}


@pytest.mark.parametrize(("args", "named"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_not_supported_ends_start_up_with_what_why_and_what_to_set(
    model: Path, args: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named) as refused:
        create_config(model, **args)
    message = str(refused.value)
    assert "is not supported by layerkv yet:" in message
    assert "passthrough" in message
    config = create_config(model, {"on_unsupported": "passthrough"}, **args)
    assert config.kv_transfer_config is None
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"


def test_an_unknown_vllm_version_is_refused_by_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerkv.vllm_plugin import compat

    monkeypatch.setattr(compat, "SUPPORTED_VLLM", ("9.9.9",))
    with pytest.raises(IncompatibleVLLMError, match=r"supports 9\.9\.9 only"):
        create_config(model)


def test_a_surface_that_vllm_lost_is_refused_by_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerkv.vllm_plugin import compat

    lost = compat.Surface("vllm.v1.core.sched.scheduler", "Scheduler.schedule", ("no_such_parameter",))
    monkeypatch.setattr(compat, "_SURFACES", (lost,))
    with pytest.raises(IncompatibleVLLMError, match=r"Scheduler\.schedule no longer takes no_such_parameter"):
        create_config(model)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"lane": 2}, r"kv_connector_extra_config\.lane: .*did you mean lanes"),
        ({"policy": "/nowhere/slo.yaml"}, r"/nowhere/slo\.yaml"),
        ({"host_memory": "8GigaByte"}, r"kv_connector_extra_config\.host_memory"),
        ({"mode": "fast"}, r"kv_connector_extra_config\.mode"),
    ],
)
def test_a_mistake_in_the_flag_is_named_by_its_place(model: Path, extra: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        create_config(model, extra)


START = """
import sys
from vllm import LLM, SamplingParams
def start(**kwargs):
    return LLM({model!r}, dtype="float32", enforce_eager=True, block_size=32, max_num_batched_tokens=128,
               **{{"max_model_len": 256, "kv_cache_memory_bytes": 4 << 20, **kwargs}})
def tokens(llm, **params):
    prompts = [{{"prompt_token_ids": [5 + i, 7, 11] * 30}} for i in range(6)]
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, **params)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
def flag(**extra):
    return {{"kv_connector": "LayerKVConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}}
"""


def python(model: Path, body: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run engine code in a process of its own: vLLM keeps one connector per process."""
    return subprocess.run(
        [sys.executable, "-c", START.format(model=str(model)) + body],
        cwd=ROOT,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def stock_tokens(model: Path) -> str:
    done = python(model, "print('TOKENS', tokens(start()))")
    return next(line for line in done.stdout.splitlines() if line.startswith("TOKENS"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "named"),
    [
        ("kv_transfer_config=flag(host_memory='9000GiB')", "but this machine has"),
        ("kv_transfer_config=flag(zone_tokens=100000)", "leaves no pool"),
        ("kv_transfer_config=flag(zone_tokens=16)", "a lane holds at least one block of 32 tokens"),
        ("kv_transfer_config=flag(), max_model_len=640", "the KV pool holds"),
    ],
)
def test_memory_that_does_not_add_up_ends_start_up_with_a_sentence(model: Path, args: str, named: str) -> None:
    done = python(model, f"start({args})")
    assert done.returncode != 0
    assert "ConfigError" in done.stderr
    assert named in done.stderr


@pytest.mark.slow
def test_explicit_class_flags_work_without_the_wrapper_and_an_unknown_class_is_served_as_the_default(
    model: Path, stock_tokens: str
) -> None:
    body = """
from layerkv.vllm_plugin.activate import register_connector
register_connector()
llm = start(kv_transfer_config=flag(host_memory="64MiB"), worker_cls="layerkv.vllm_plugin.cpu_worker.LayerKVCPUWorker",
            scheduler_cls="layerkv.vllm_plugin.scheduler.LayerKVScheduler")
params = SamplingParams(extra_args={"slo_class": "nope"})
output, = llm.generate([{"prompt_token_ids": [3, 4, 5]}], params, use_tqdm=False)
print("REASON", output.outputs[0].finish_reason)
print("TOKENS", tokens(llm))
"""
    done = python(model, body, VLLM_PLUGINS="")
    assert "REASON length" in done.stdout, done.stderr[-3000:]
    assert stock_tokens in done.stdout
    assert "expected one of the classes: default" in done.stderr + done.stdout


@pytest.mark.slow
def test_layers_that_cannot_be_served_run_as_stock_when_passed_through(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, sliding_window=32, initializer_range=0.15,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    common = "skip_tokenizer_init=True"
    stock = python(tmp_path, f"print('TOKENS', tokens(start({common}), detokenize=False))")
    expected = next(line for line in stock.stdout.splitlines() if line.startswith("TOKENS"))
    refused = python(tmp_path, f"start({common}, kv_transfer_config=flag())")
    assert refused.returncode != 0
    assert "supports only full attention in every layer yet" in refused.stderr
    passing = f"{common}, kv_transfer_config=flag(on_unsupported='passthrough')"
    passed = python(tmp_path, f"print('TOKENS', tokens(start({passing}), detokenize=False))")
    assert expected in passed.stdout, passed.stderr[-3000:]
    assert "layerkv is off, vLLM runs as without it" in passed.stdout + passed.stderr
