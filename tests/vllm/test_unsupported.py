"""What layerkv cannot serve, and what is configured wrongly, ends start-up with one sentence, or runs without it."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from layerkv.errors import ConfigError, IncompatibleVLLMError
from layerkv.vllm_plugin.our_classes import OUR_WORKERS
from tests.vllm.engines_in_turn import Case, Turns, flag, prompt, run_in_turn
from tests.vllm.forked import Forks
from tests.vllm.server.served import START_LIMIT_S, free_port, vllm_serve
from tests.vllm.tiny_groups import make_tiny

if TYPE_CHECKING:
    from vllm.config import VllmConfig

pytestmark = pytest.mark.vllm

WORKER, SCHEDULER = "vllm.v1.worker.gpu_worker.Worker", "vllm.v1.core.sched.scheduler.Scheduler"
PASSTHROUGH = 'or set "on_unsupported": "passthrough" in kv_connector_extra_config to run without layerkv'
OFF = "layerkv is off, vLLM runs as without it: "


def config_of(engine: dict[str, Any], *, on_unsupported: str = "error", **more: Any) -> VllmConfig:
    from vllm.engine.arg_utils import EngineArgs

    role = more.pop("kv_role", "kv_both")
    transfer = {**flag(on_unsupported=on_unsupported), "kv_role": role}
    return EngineArgs(**{**engine, "kv_transfer_config": transfer, **more}).create_engine_config()


def check_sentence(sentence: str, what: str, instead: str) -> None:
    """One line that says what was found, why that is a problem, and what to set."""
    found = re.fullmatch(
        r"(?P<what>.+) is not supported by layerkv yet: (?P<why>.+); (?P<set>.+), (?P<or>.+)", sentence
    )
    assert found is not None, sentence
    assert what in found["what"]
    assert found["why"]
    assert instead in found["set"]
    assert found["or"] == PASSTHROUGH


# In the configuration ------------------------------------------------------------------------------------------------

UNSUPPORTED = [
    pytest.param({"kv_role": "kv_producer"}, "kv_role 'kv_producer'", "kv_both", id="a-producer"),
    pytest.param({"kv_role": "kv_consumer"}, "kv_role 'kv_consumer'", "kv_both", id="a-consumer"),
    pytest.param({"pipeline_parallel_size": 2}, "pipeline", "--pipeline-parallel-size 1", id="pipeline"),
    pytest.param({"max_model_len": -1}, "max_model_len -1", "--max-model-len", id="fitted-length"),
    pytest.param({"worker_cls": WORKER}, WORKER, "--worker-cls", id="another-worker"),
    pytest.param({"scheduler_cls": SCHEDULER}, SCHEDULER, "--scheduler-cls", id="another-scheduler"),
    pytest.param({"runner": "pooling"}, "'pooling'", "generating model", id="pooling"),
]


@pytest.mark.parametrize(("more", "what", "instead"), UNSUPPORTED)
def test_what_is_not_supported_ends_start_up_with_what_why_and_what_to_set(
    small_engine: dict[str, Any], more: dict[str, Any], what: str, instead: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of(small_engine, **more)
    check_sentence(str(refused.value), what, instead)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """The warnings of layerkv's activation during the test; vLLM keeps its loggers from pytest's."""
    logger = logging.getLogger("vllm.layerkv.vllm_plugin.activate")
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


@pytest.mark.parametrize(("more", "what", "instead"), UNSUPPORTED)
def test_passthrough_configures_vllm_as_without_the_flag(
    small_engine: dict[str, Any],
    warnings: list[str],
    more: dict[str, Any],
    what: str,
    instead: str,
) -> None:
    config = config_of(small_engine, on_unsupported="passthrough", **more)
    stock = config_of(small_engine, kv_transfer_config=None, **{k: v for k, v in more.items() if k != "kv_role"})
    assert config.kv_transfer_config is None
    assert config.compute_hash() == stock.compute_hash()
    assert config.parallel_config.worker_cls == stock.parallel_config.worker_cls
    assert config.scheduler_config.scheduler_cls == stock.scheduler_config.scheduler_cls
    assert config.model_config.logits_processors is None
    (warning,) = warnings
    assert warning.startswith(OFF)
    check_sentence(warning.removeprefix(OFF), what, instead)


def sleep_mode(config: VllmConfig) -> None:
    config.model_config.enable_sleep_mode = True


def context_parallel(config: VllmConfig) -> None:
    config.parallel_config.decode_context_parallel_size = 2


def another_device(config: VllmConfig) -> None:
    config.device_config.device_type = "xpu"


def images_in_both_directions(config: VllmConfig) -> None:
    """As vLLM says it of Gemma 3 with images."""
    config.model_config.multimodal_config = SimpleNamespace(mm_encoder_only=False)
    vars(config.model_config)["is_mm_prefix_lm"] = True  # a cached property


@pytest.mark.parametrize(
    ("change", "what", "instead"),
    [
        (sleep_mode, "sleep mode", "--enable-sleep-mode"),
        (context_parallel, "context parallel", "context parallel"),
        (another_device, "'xpu'", "cpu"),
        (images_in_both_directions, "both directions", "--language-model-only"),
    ],
)
def test_what_vllm_itself_refuses_on_a_cpu_layerkv_refuses_elsewhere(
    small_engine: dict[str, Any], change: Callable[[VllmConfig], None], what: str, instead: str
) -> None:
    from layerkv.vllm_plugin.support import require_supported

    config = config_of(small_engine)
    require_supported(config)
    change(config)
    with pytest.raises(ConfigError) as refused:
        require_supported(config)
    check_sentence(str(refused.value), what, instead)


def encoder_decoder() -> Any:
    from transformers import WhisperConfig

    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1}
    return WhisperConfig(architectures=["WhisperForConditionalGeneration"], max_target_positions=1024, **sizes)


TINY = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "what"),
    [(encoder_decoder, "encoder-decoder")],
)
def test_a_model_of_another_kind_is_refused_before_its_weights_are_read(
    small_engine: dict[str, Any], tmp_path: Path, make: Callable[[], Any], what: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_engine["model"], folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    make().save_pretrained(folder)
    with pytest.raises(ConfigError) as refused:
        config_of(small_engine, model=str(folder), max_model_len=256)
    check_sentence(str(refused.value), what, "use a")


def problem_of_layers(specs: dict[str, Any], layers: dict[str, Any] | None = None) -> str | None:
    """What a worker says of a model with these layers; on either model runner, since it asks neither."""
    from layerkv.vllm_plugin.worker import LayerKVWorkerMixin

    worker = object.__new__(LayerKVWorkerMixin)
    worker.vllm_config = SimpleNamespace(  # type: ignore[assignment]
        cache_config=SimpleNamespace(mamba_cache_mode="none"),
        compilation_config=SimpleNamespace(static_forward_context=layers or {}),
    )
    return worker._unsupported_layers(specs)


def layer_spec(name: str = "FullAttentionSpec", **more: Any) -> Any:
    """One of vLLM's, small."""
    import torch
    from vllm.v1 import kv_cache_interface

    sizes = {"block_size": 32, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    return getattr(kv_cache_interface, name)(**{**sizes, **more})


def test_layers_that_share_kv_are_refused_by_what_the_layers_say() -> None:
    own, shares = SimpleNamespace(kv_sharing_target_layer_name=None), SimpleNamespace(kv_sharing_target_layer_name="a")
    assert problem_of_layers({"a": layer_spec()}, {"a": own, "moe": object()}) is None
    problem = problem_of_layers({"a": layer_spec()}, {"a": own, "b": shares})
    assert problem is not None
    assert "share another layer's KV" in problem
    assert "use another model" in problem


def test_layers_that_differ_in_kv_shape_are_refused_by_naming_two() -> None:
    """As where an indexer has a cache beside the model's."""
    latent = {"cache_dtype_str": "auto", "head_size": 576}
    assert (
        problem_of_layers({"a": layer_spec(), "b": layer_spec(sliding_window=64)}) is None
    )  # what lies where is alike
    for other in (
        layer_spec(num_kv_heads=2),
        layer_spec("MLAAttentionSpec", **latent),
    ):
        problem = problem_of_layers({"a": layer_spec(), "b": other})
        assert problem is not None
        assert "differ in KV shape (a from b)" in problem
    assert problem_of_layers({"a": layer_spec("MLAAttentionSpec", **latent)}) is None


@pytest.mark.parametrize("has_states", [False, True], ids=["attention-alone", "beside-states"])
def test_attention_layers_that_differ_in_number_format_are_refused(has_states: bool) -> None:
    """In a lane one would find what the other has left; vLLM zeroes blocks of the pool between them, and none there."""
    import torch
    from vllm.v1.kv_cache_interface import MambaSpec

    state = MambaSpec(block_size=32, shapes=((4,),), dtypes=(torch.float32,))
    besides = {"c": state} if has_states else {}
    window = {"name": "SlidingWindowSpec", "sliding_window": 64}
    assert problem_of_layers({"a": layer_spec(), "b": layer_spec(**window), **besides}) is None
    problem = problem_of_layers(
        {"a": layer_spec(), "b": layer_spec(**window, dtype=torch.bfloat16, head_size=16), **besides}
    )
    assert problem is not None
    assert "different number formats" in problem


def test_layers_with_windows_are_served_and_those_of_another_kind_named() -> None:
    window = layer_spec("SlidingWindowSpec", sliding_window=64)
    assert problem_of_layers({"a": layer_spec(), "b": window}) is None
    assert problem_of_layers({"a": window}) is None
    problem = problem_of_layers({"a": layer_spec(), "b": layer_spec("CrossAttentionSpec")})
    assert problem is not None
    assert "layer b has a CrossAttentionSpec" in problem
    assert "use a model without compressed or cross attention" in problem


def worker_with(specs: dict[str, Any], *, drafts: bool = False, **extra_config: Any) -> Any:
    """A worker that has loaded a model with these layers."""
    from layerkv.config import EngineConfig
    from layerkv.vllm_plugin.worker import LayerKVWorkerMixin

    class Stock:
        def get_kv_cache_spec(self) -> dict[str, Any]:
            return dict(specs)

    class Worker(LayerKVWorkerMixin, Stock):
        def __init__(self) -> None:
            self._layerkv = EngineConfig.from_extra_config(extra_config)
            self._layerkv_specs = None
            speculation = SimpleNamespace(method="ngram") if drafts else None
            self.vllm_config = SimpleNamespace(  # type: ignore[assignment]
                scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
                compilation_config=SimpleNamespace(static_forward_context={}),
                speculative_config=speculation,
            )

    return Worker()


@pytest.mark.parametrize(
    ("set_besides", "what"),
    [
        ({"long_contexts": True}, "kv_connector_extra_config.long_contexts"),
        ({"kv_floor": "4MiB", "kv_ceiling": "8MiB"}, "kv_floor, kv_ceiling or broker"),
        ({"drafts": True}, "--speculative-config"),
    ],
    ids=["long-contexts", "elastic", "drafts"],
)
def test_what_needs_one_group_is_refused_or_left_to_vllm_before_there_is_a_kv_cache(
    set_besides: dict[str, Any], what: str
) -> None:
    """Before vLLM divides the layers into groups, by what they are."""
    for specs in (
        {"a": layer_spec(), "b": layer_spec("SlidingWindowSpec", sliding_window=64)},
        {"a": layer_spec("SlidingWindowSpec", sliding_window=64)},
    ):
        with pytest.raises(ConfigError) as refused:
            worker_with(specs, **set_besides).get_kv_cache_spec()
        assert what in str(refused.value)
        assert "several KV-cache groups, sliding windows or states" in str(refused.value)
        assert str(refused.value).endswith(PASSTHROUGH)
        worker = worker_with(specs, on_unsupported="passthrough", **set_besides)
        assert worker.get_kv_cache_spec() == specs
        assert worker._layerkv_specs is None


def test_layers_that_read_ahead_are_refused() -> None:
    problem = problem_of_layers({"a": layer_spec(non_causal=True)})
    assert problem is not None
    assert "use a model with causal attention" in problem


def test_a_spec_of_ours_has_all_that_vllms_has_and_its_page() -> None:
    """The more so where a kind of attention adds to it, merged as vLLM merges the layers of a group."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from layerkv.vllm_plugin.host_memory import WorkerMemory
    from layerkv.vllm_plugin.spec import LayerKVManager, ours

    latent = layer_spec("MLAAttentionSpec", head_size=576, max_tp_shards=1, cache_dtype_str="auto", alignment=576)
    memory = WorkerMemory.here()
    for spec in (layer_spec(sliding_window=64), latent):
        own: Any = ours(spec, memory)
        merged = own.merge([own, own])
        for each in (own, merged):
            assert isinstance(each, type(spec))
            assert each.page_size_bytes == spec.page_size_bytes
            assert each.memory is memory
            assert KVCacheSpecRegistry.get_manager_class(each) is LayerKVManager
            theirs = KVCacheSpecRegistry.get_uniform_type_base_spec(spec)
            assert KVCacheSpecRegistry.get_uniform_type_base_spec(each) is theirs
        assert {name: getattr(own, name) for name in spec.__dataclass_fields__} == vars(spec)


def test_a_way_of_drafting_that_is_untested_is_refused_by_its_name(small_engine: dict[str, Any]) -> None:
    drafter = {"method": "draft_model", "model": small_engine["model"], "num_speculative_tokens": 2}
    assert config_of(small_engine, speculative_config=drafter).kv_transfer_config is not None
    drafter["parallel_drafting"] = True
    with pytest.raises(ConfigError) as refused:
        config_of(small_engine, speculative_config=drafter)
    check_sentence(str(refused.value), "parallel drafting", "parallel_drafting")
    assert config_of(small_engine, on_unsupported="passthrough", speculative_config=drafter).kv_transfer_config is None


def test_suffix_drafting_is_let_through_and_without_its_package_refused_by_vllm(
    small_engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = {"method": "suffix", "num_speculative_tokens": 2}
    monkeypatch.setattr("vllm.config.speculative.has_arctic_inference", lambda: False)
    with pytest.raises(ImportError, match="Arctic Inference is required"):
        config_of(small_engine, speculative_config=drafter)
    monkeypatch.setattr("vllm.config.speculative.has_arctic_inference", lambda: True)
    assert config_of(small_engine, speculative_config=drafter).kv_transfer_config is not None


# Another vLLM --------------------------------------------------------------------------------------------------------


def test_an_older_vllm_is_refused_by_its_version(small_engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.30.1")
    with pytest.raises(IncompatibleVLLMError) as refused:
        config_of(small_engine)
    sentence = str(refused.value)
    assert "\n" not in sentence
    for part in ("0.30.1", "0.31 to 0.33", "install vllm>=0.31,<0.34", '"on_unsupported": "passthrough"'):
        assert part in sentence


def test_a_newer_vllm_is_refused_unless_it_is_allowed_and_then_warned_of_once(
    small_engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.34.0rc1")
    with pytest.raises(IncompatibleVLLMError, match='set "allow_untested_vllm": true'):
        config_of(small_engine)
    warnings: list[str] = []
    monkeypatch.setattr("layerkv.vllm_plugin.activate.logger.warning", lambda text, *args: warnings.append(text % args))
    config = config_of(small_engine, kv_transfer_config=flag(allow_untested_vllm=True))
    assert config.parallel_config.worker_cls == OUR_WORKERS["cpu"]
    [warning] = warnings
    assert warning.startswith("vLLM 0.34.0rc1 was not tested with this layerkv")


def test_a_newer_vllm_that_lost_something_is_refused_though_it_is_allowed(
    small_engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    monkeypatch.setattr("vllm.__version__", "0.34.0")
    monkeypatch.delattr(KVCacheManager, "get_block_ids")
    with pytest.raises(IncompatibleVLLMError, match=r"KVCacheManager\.get_block_ids is missing"):
        config_of(small_engine, kv_transfer_config=flag(allow_untested_vllm=True))


def test_a_vllm_that_lost_what_layerkv_stands_on_is_refused_by_naming_it(
    small_engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    monkeypatch.delattr(KVCacheManager, "get_block_ids")
    with pytest.raises(IncompatibleVLLMError) as refused:
        config_of(small_engine)
    assert "vllm.v1.core.kv_cache_manager.KVCacheManager.get_block_ids is missing" in str(refused.value)
    assert "install vllm>=0.31,<0.34" in str(refused.value)


def test_passthrough_runs_an_unsupported_vllm_without_layerkv(
    small_engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.30.1")
    config = config_of(small_engine, on_unsupported="passthrough")
    assert config.kv_transfer_config is None
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"


# Wrong values --------------------------------------------------------------------------------------------------------

WRONG = [
    ({"zone_token": 64}, "kv_connector_extra_config.zone_token: found an unknown key", "did you mean zone_tokens?"),
    ({"policy": "/no/slo.yaml"}, "/no/slo.yaml: found no readable file", "set policy to its path"),
    ({"host_memory": "9999TiB"}, "host_memory: found 9999TiB beside 13MiB of KV memory", "set host_memory to less"),
    ({"host_memory": 8}, "host_memory: found 8, which is 8B, less than any block", 'set host_memory to "8GiB"'),
    ({"retained_layers": 99}, "retained_layers: found 99, but the model has", "set retained_layers to less"),
    ({"zone_tokens": 31}, "zone_tokens: found 31, but a lane holds at least one block of 32", "to 32 or more"),
    ({"cost_profile": "/no/profile.json"}, "/no/profile.json", "layerkv profile"),
    ({"cost_profile": "README.md"}, "README.md: found what is not JSON", "layerkv profile"),
    ({"decision_log": "/no/log.jsonl"}, "decision_log: found '/no/log.jsonl'", "one in a folder that exists"),
    ({"decision_log": "README.md"}, "cannot be written (another file is there)", "leave it out"),
    ({"decision_log": "docs"}, "decision_log: found 'docs', which cannot be written (Is a directory)", "leave it out"),
    ({"on_unsupported": "pass"}, "on_unsupported: found 'pass'", 'set on_unsupported to "error"'),
]


@pytest.mark.parametrize(("extra_config", "found", "fix"), WRONG, ids=lambda value: next(iter(value), ""))
@pytest.mark.parametrize("on_unsupported", ["error", "passthrough"])
def test_a_wrong_value_ends_start_up_even_where_unsupported_things_pass(
    small_engine: dict[str, Any], extra_config: dict[str, Any], found: str, fix: str, on_unsupported: str
) -> None:
    transfer = flag(**{"on_unsupported": on_unsupported, **extra_config})
    with pytest.raises(ConfigError) as refused:
        config_of(small_engine, kv_transfer_config=transfer)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert found in sentence
    assert fix in sentence


# Engines -------------------------------------------------------------------------------------------------------------


def with_tokenizer(family: str, folder: Path, tiny_model: Path) -> str:
    made = make_tiny(family, folder)
    weights = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(tiny_model, made, ignore=weights, dirs_exist_ok=True)
    return str(made)


@pytest.fixture(scope="module")
def sharing_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Gemma whose last layers have no KV of their own."""
    return with_tokenizer("gemma4_shared", tmp_path_factory.mktemp("sharing"), tiny_model)


@pytest.fixture(scope="module")
def grouped_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random gpt-oss: two KV-cache groups."""
    return with_tokenizer("gpt_oss", tmp_path_factory.mktemp("grouped"), tiny_model)


FITTING_LEN = 1984
TOO_LONG = {"max_model_len": 2200}


@pytest.fixture(scope="module")
def turns(
    forks: Forks,
    small_engine: dict[str, Any],
    sharing_model: str,
    grouped_model: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Turns:
    """Engines that cannot be served by layerkv, or start with wrong sizes."""
    stock = small_engine
    sharing = {**stock, "model": sharing_model}
    grouped = {**stock, "model": grouped_model}
    scheduled = {**stock, "scheduler_cls": SCHEDULER}

    def passing(**extra_config: Any) -> dict[str, Any]:
        return {"kv_transfer_config": flag(on_unsupported="passthrough", **extra_config)}

    def sized(**extra_config: Any) -> dict[str, Any]:
        return {**stock, "kv_transfer_config": flag(**extra_config)}

    calls: list[tuple[list[list[int]], dict[str, Any]]] = [([prompt(200, seed=seed) for seed in range(4)], {})]
    cases = [
        Case("sharing stock", sharing, calls),
        Case("sharing refused", {**sharing, "kv_transfer_config": flag()}),
        Case("sharing off", {**sharing, **passing()}, calls),
        Case("groups stock", grouped, calls),
        Case("groups long contexts off", {**grouped, **passing(long_contexts=True)}, calls),
        Case("groups elastic off", {**grouped, **passing(kv_floor="4MiB", kv_ceiling="8MiB")}, calls),
        Case("another scheduler stock", scheduled, calls),
        Case("another scheduler off", {**scheduled, **passing()}, calls),
        Case("zone too large", sized(zone_tokens=100_000)),
        Case("zone too small", sized(zone_tokens=31)),
        Case("zone just large enough", sized(zone_tokens=32), calls),
        Case("model length beyond the pool", {**sized(), **TOO_LONG}),
        Case("model length as advised", {**sized(), "max_model_len": FITTING_LEN}, calls),
        Case("host memory below a block", sized(host_memory="100KiB")),
    ]
    return run_in_turn(forks, cases, tmp_path_factory.mktemp("unsupported"))


@pytest.mark.slow
def test_a_model_whose_layers_share_kv_is_refused(turns: Turns) -> None:
    failure = turns["sharing refused"].failure
    assert failure is not None
    assert failure.startswith("layerkv.errors.ConfigError: layers that share another layer's KV are not supported")
    assert "use another model" in failure
    assert failure.endswith(PASSTHROUGH)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "set_besides"),
    [("sharing", ""), ("groups", "long contexts "), ("groups", "elastic "), ("another scheduler", "")],
)
def test_passthrough_gives_stocks_tokens(turns: Turns, model: str, set_besides: str) -> None:
    stock, off = turns[f"{model} stock"], turns[f"{model} {set_besides}off"]
    assert stock.failure is None
    assert off.failure is None
    assert off.calls == stock.calls
    assert all(len(set(tokens)) > 4 for tokens, *_ in off.calls[0])  # not one token over and over
    assert not off.connector_active


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sharing", "share another layer's KV"),
        ("groups long contexts", "long_contexts: not supported"),
        ("groups elastic", "kv_floor, kv_ceiling or broker: not supported"),
        ("another scheduler", "scheduler class"),
    ],
)
def test_passthrough_warns_once_that_layerkv_is_off(turns: Turns, name: str, reason: str) -> None:
    of_case = turns.log.partition(f"case {name} off\n")[2].partition("\ncase ")[0]
    warnings = [line for line in of_case.splitlines() if OFF in line]
    assert len(warnings) == 1
    assert " WARNING " in warnings[0]
    assert reason in warnings[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "found", "fix"),
    [
        ("zone too large", "zone_tokens: found 100000 tokens, which leaves no pool", "set a smaller zone_tokens"),
        ("zone too small", "zone_tokens: found 31, but a lane holds at least one block of 32", "to 32 or more"),
        ("model length beyond the pool", "max_model_len: found 2200, but the KV pool", f"to {FITTING_LEN} or less"),
        ("host memory below a block", "host_memory: found 100KiB", "set host_memory to more"),
    ],
)
def test_a_size_that_cannot_be_ends_start_up_with_found_expected_and_what_to_set(
    turns: Turns, name: str, found: str, fix: str
) -> None:
    failure = turns[name].failure
    assert failure is not None
    assert failure.startswith("layerkv.errors.ConfigError: ")
    assert "\n" not in failure
    assert found in failure
    assert fix in failure


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zone just large enough", "model length as advised"])
def test_an_engine_set_as_the_sentence_advises_starts_and_serves(turns: Turns, name: str) -> None:
    assert turns[name].failure is None
    assert turns[name].connector_active
    assert [len(tokens) for tokens, *_ in turns[name].calls[0]] == [16] * 4


# The command line ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failing(tiny_model: Path) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Servers that end with an error, started together."""
    extra_configs: dict[str, dict[str, Any]] = {
        "mistyped key": {"polcy": "slo.yaml"},
        "too large a zone": {"zone_tokens": 100_000},
    }
    running = {
        name: subprocess.Popen(
            vllm_serve(tiny_model, "--port", str(free_port()), "--kv-transfer-config", json.dumps(flag(**extra))),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for name, extra in extra_configs.items()
    }
    yield running
    for server in running.values():
        server.kill()
        server.wait()


def printed_by(server: subprocess.Popen[str]) -> list[str]:
    """What a server prints before it ends with an error."""
    printed, _ = server.communicate(timeout=START_LIMIT_S)
    assert server.returncode not in (0, None)
    return [line for line in printed.splitlines() if line.strip()]


@pytest.mark.slow
def test_vllm_serve_ends_with_the_sentence_about_a_mistyped_key(failing: dict[str, subprocess.Popen[str]]) -> None:
    lines = printed_by(failing["mistyped key"])
    errors = [line for line in lines if "Error: " in line]
    assert errors[-1].startswith("layerkv.errors.ConfigError: kv_connector_extra_config.polcy: found an unknown key; ")
    assert errors[-1].endswith("did you mean policy?")
    assert lines.index(errors[-1]) == len(lines) - 1


@pytest.mark.slow
def test_vllm_serve_points_at_the_sentence_of_a_worker_that_cannot_start(
    failing: dict[str, subprocess.Popen[str]],
) -> None:
    lines = printed_by(failing["too large a zone"])
    # vLLM's own last word; the sentence ends the traceback above it, in the log of the process that found out.
    assert any("Engine core initialization failed. See root cause above." in line for line in lines)
    sentence = "layerkv.errors.ConfigError: kv_connector_extra_config.zone_tokens: found 100000 tokens"
    assert any(sentence in line and " ERROR " in line for line in lines)
