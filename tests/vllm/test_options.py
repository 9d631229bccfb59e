"""Every option of vLLM has been decided about, and what the table calls refused is refused by name."""

from __future__ import annotations

import dataclasses
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from layerkv.errors import ConfigError
from layerkv.vllm_plugin.options import DECISIONS, NOT_IN_ALL, Verdict
from tests.vllm.engines_in_turn import Case, Turns, flag, prompt, run_in_turn
from tests.vllm.forked import Forks
from tests.vllm.hand_engine import BLOCK_TOKENS, configs

if TYPE_CHECKING:
    from vllm.config import VllmConfig

pytestmark = pytest.mark.vllm


def vllm_options() -> set[str]:
    """All that vLLM can be told: by arguments of an engine, by `vllm serve`, and inside of our flag."""
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # since 0.33
        from vllm.entrypoints.common.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    of_engine = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    of_server = {action.dest for action in make_arg_parser(FlexibleArgumentParser())._actions}
    of_flag = {f"kv_transfer_config.{field.name}" for field in dataclasses.fields(KVTransferConfig)}
    return of_engine | of_server | of_flag


def test_every_option_of_vllm_has_been_decided_about() -> None:
    decided = {option for decision in DECISIONS for option in decision.options}
    assert vllm_options() - decided == set(), "decide what becomes of these, in layerkv/vllm_plugin/options.py"
    assert decided - vllm_options() - NOT_IN_ALL == set(), "vLLM no longer has these"
    assert decided >= NOT_IN_ALL


def test_no_option_is_decided_about_twice() -> None:
    counts = Counter(option for decision in DECISIONS for option in decision.options)
    assert [option for option, count in counts.items() if count > 1] == []


# What refuses: arguments, or a change to the configuration where vLLM itself would refuse the arguments on a CPU.
REJECTING = "configs/slo/overload.yaml"
MULTI = {
    "kv_connector": "MultiConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"connectors": [flag(), {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}]},
}
BY_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "kv_transfer_config.kv_role": ({"kv_transfer_config": {**flag(), "kv_role": "kv_producer"}}, "kv_role"),
    "kv_transfer_config.kv_connector": ({"kv_transfer_config": MULTI}, "LayerKVConnector inside MultiConnector"),
    "worker_cls": ({"worker_cls": "vllm.v1.worker.gpu_worker.Worker"}, "worker class"),
    "scheduler_cls": ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler class"),
    "kv_offloading_size": ({"kv_offloading_size": 1}, "--kv-offloading-size"),
    "kv_cache_dtype_skip_layers": (
        {"kv_cache_dtype_skip_layers": ["0"], "kv_cache_dtype": "fp8"},
        "--kv-cache-dtype-skip-layers",
    ),
    "max_model_len": ({"max_model_len": -1}, "max_model_len -1"),
    "watermark": ({"watermark": 0.02}, "--watermark 0.02"),
    "prefill_schedule_interval": ({"prefill_schedule_interval": 2}, "--prefill-schedule-interval 2"),
    "disable_log_stats": (
        {"disable_log_stats": True, "kv_transfer_config": flag(policy=REJECTING)},
        "overload: reject",
    ),
    "runner": ({"runner": "pooling"}, "runner type 'pooling'"),
    "pipeline_parallel_size": ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
    "distributed_executor_backend": (
        {"distributed_executor_backend": "external_launcher"},
        "the executor backend external_launcher",
    ),
    "data_parallel_backend": (
        {"data_parallel_backend": "ray", "distributed_executor_backend": "mp"},
        "the data-parallel backend 'ray'",
    ),
    "nnodes": ({"nnodes": 2, "tensor_parallel_size": 2}, "an engine on several nodes"),
}


def by_change(config: VllmConfig, option: str) -> str:
    """Make the configuration one with that option; what the refusal names."""
    model, parallel = config.model_config, config.parallel_config
    if option == "enable_sleep_mode":
        model.enable_sleep_mode = True
        return "sleep mode"
    if option in ("speculative_config", "spec_method", "spec_model"):
        config.speculative_config = SimpleNamespace(method="medusa", parallel_drafting=False)  # type: ignore[assignment]
        return "speculative decoding by medusa"
    if option == "ec_transfer_config":
        config.ec_transfer_config = object()  # type: ignore[assignment]
        return "--ec-transfer-config"
    if option == "mm_encoder_only":
        model.multimodal_config = SimpleNamespace(mm_encoder_only=True)  # type: ignore[assignment]
        return "--mm-encoder-only"
    if option == "diffusion_config":
        config.diffusion_config = object()  # type: ignore[assignment]
        return "a diffusion model"
    if option == "enable_return_routed_experts":
        config.aux_output_config.enable_return_routed_experts = True
        return "returning routed experts"
    if option in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        setattr(parallel, option, 2)
        return "context parallelism"
    if option in ("enable_elastic_ep", "enable_fault_tolerance"):
        setattr(parallel, option, True)
        return "elastic expert parallelism" if option == "enable_elastic_ep" else "fault tolerance"
    assert option in ("enable_dbo", "ubatch_size"), option
    config.device_config.device_type = "cuda"
    parallel.worker_cls = "auto"
    setattr(parallel, option, 2 if option == "ubatch_size" else True)
    return "microbatching"


REFUSED = {option for decision in DECISIONS if decision.verdict is Verdict.REFUSED for option in decision.options}
ELSEWHERE = {"model"}  # test_unsupported.py: a model of each refused kind


def args_of(engine: dict[str, Any], more: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**{**engine, "kv_transfer_config": flag(), **more})


@pytest.mark.parametrize("option", sorted((REFUSED | BY_ARGUMENTS.keys()) - ELSEWHERE))
def test_what_the_table_calls_refused_is_refused_by_its_name(
    small_engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    from layerkv.vllm_plugin.support import require_supported

    if option in BY_ARGUMENTS:
        more, named = BY_ARGUMENTS[option]
        args = args_of(small_engine, more)
        with pytest.raises(ConfigError) as refused:
            args.create_engine_config()
    else:
        config = args_of(small_engine, {}).create_engine_config()
        require_supported(config)
        monkeypatch.setattr("layerkv.vllm_plugin.support.find_spec", lambda name: name)  # as with cuda-bindings
        named = by_change(config, option)
        with pytest.raises(ConfigError) as refused:
            require_supported(config)
    sentence = str(refused.value)
    assert sentence.startswith(named)
    assert " is not supported by layerkv yet: " in sentence
    assert '"on_unsupported": "passthrough"' in sentence


# What vLLM is told instead, where layerkv passes through -------------------------------------------------------------


def passing(**more: Any) -> dict[str, Any]:
    return flag(on_unsupported="passthrough", **more)


def test_without_layerkv_the_other_connectors_of_a_multi_connector_stay(small_engine: dict[str, Any]) -> None:
    other = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    nested = {**MULTI, "kv_connector_extra_config": {"connectors": [passing()]}}
    children = [passing(), other, nested]
    transfer = {**MULTI, "kv_connector_extra_config": {"connectors": children, "another": 1}}
    config = args_of(small_engine, {"kv_transfer_config": transfer}).create_engine_config()
    assert config.kv_transfer_config.kv_connector == "MultiConnector"
    assert config.kv_transfer_config.kv_connector_extra_config == {"connectors": [other], "another": 1}
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"


def test_a_multi_connector_of_layerkv_alone_leaves_no_connector(small_engine: dict[str, Any]) -> None:
    transfer = {**MULTI, "kv_connector_extra_config": {"connectors": [passing()]}}
    config = args_of(small_engine, {"kv_transfer_config": transfer}).create_engine_config()
    assert config.kv_transfer_config is None


def test_a_mistake_in_our_settings_inside_a_multi_connector_is_found(small_engine: dict[str, Any]) -> None:
    transfer = {**MULTI, "kv_connector_extra_config": {"connectors": [passing(lane=2)]}}
    with pytest.raises(ConfigError, match="did you mean lanes"):
        args_of(small_engine, {"kv_transfer_config": transfer}).create_engine_config()


def test_another_multi_connector_is_left_alone(small_engine: dict[str, Any]) -> None:
    other = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    transfer = {**MULTI, "kv_connector_extra_config": {"connectors": [other, other]}}
    config = args_of(small_engine, {"kv_transfer_config": transfer}).create_engine_config()
    assert config.kv_transfer_config.kv_connector_extra_config == {"connectors": [other, other]}


def test_without_layerkv_vllms_own_offloading_is_as_it_was_asked_for(small_engine: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    transfer = passing(host_memory="64MiB")
    config = args_of(small_engine, {"kv_transfer_config": transfer, "kv_offloading_size": 1}).create_engine_config()
    stock = EngineArgs(**small_engine, kv_offloading_size=1).create_engine_config()
    found, expected = vars(config.kv_transfer_config), vars(stock.kv_transfer_config)
    assert {**found, "engine_id": None} == {**expected, "engine_id": None}
    assert config.parallel_config.worker_cls == stock.parallel_config.worker_cls


def test_without_metrics_a_policy_that_rejects_passes_through_to_stock(small_engine: dict[str, Any]) -> None:
    more = {"kv_transfer_config": passing(policy=REJECTING), "disable_log_stats": True}
    assert args_of(small_engine, more).create_engine_config().kv_transfer_config is None


def test_without_metrics_a_policy_that_only_queues_is_served(small_engine: dict[str, Any]) -> None:
    config = args_of(small_engine, {"disable_log_stats": True}).create_engine_config()
    assert config.kv_transfer_config is not None


def test_offline_all_prompts_are_there_at_once_so_a_policy_that_rejects_is_served(small_engine: dict[str, Any]) -> None:
    from vllm.usage.usage_lib import UsageContext

    args = args_of(small_engine, {"kv_transfer_config": flag(policy=REJECTING), "disable_log_stats": True})
    assert args.create_engine_config(UsageContext.LLM_CLASS).kv_transfer_config is not None
    with pytest.raises(ConfigError, match="overload: reject"):
        args.create_engine_config(UsageContext.OPENAI_API_SERVER)


# Without the wrapper, where vLLM does not load the plugin ------------------------------------------------------------


def kv_cache_config(spec: Any) -> Any:
    """What vLLM tells a connector about the KV cache, for two layers of that spec."""
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    return KVCacheConfig(64, [], [KVCacheGroupSpec(["layer.0", "layer.1"], spec)])


def full_attention() -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)


def connector_of(config: VllmConfig, spec: Any) -> Any:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from layerkv.vllm_plugin.connector import LayerKVConnector

    return LayerKVConnector(config, KVConnectorRole.SCHEDULER, kv_cache_config(spec))


def ours(spec: Any) -> Any:
    from layerkv.vllm_plugin.host_memory import WorkerMemory
    from layerkv.vllm_plugin.spec import ours

    return ours(spec, WorkerMemory.here())


@pytest.fixture
def small_pool(small_engine: dict[str, Any]) -> dict[str, Any]:
    return {**small_engine, "max_model_len": 512}


def test_a_connector_beside_vllms_own_worker_is_not_off_without_a_word(small_pool: dict[str, Any]) -> None:
    config = args_of(small_pool, {}).create_engine_config()
    config.parallel_config.worker_cls = "vllm.v1.worker.cpu_worker.CPUWorker"
    with pytest.raises(ConfigError, match=r"worker_cls: found 'vllm\.v1.*CPUWorker'.*see VLLM_PLUGINS.*--worker-cls"):
        connector_of(config, full_attention())


@pytest.mark.parametrize("on_unsupported", ["error", "passthrough"])
def test_a_connector_and_our_worker_beside_another_scheduler_do_not_give_zone_blocks_to_anybody(
    small_pool: dict[str, Any], on_unsupported: str
) -> None:
    more = {"kv_transfer_config": flag(on_unsupported=on_unsupported)}
    config = args_of(small_pool, more).create_engine_config()
    config.scheduler_config.scheduler_cls = None
    with pytest.raises(ConfigError, match="scheduler_cls: found None, but LayerKVConnector works with layerkv's"):
        connector_of(config, ours(full_attention()))


def test_a_lost_copy_leads_to_recomputing_without_the_wrapper_too(small_pool: dict[str, Any]) -> None:
    config = args_of(small_pool, {}).create_engine_config()
    config.kv_transfer_config.kv_load_failure_policy = "fail"  # as it is where no wrapper has set it
    assert connector_of(config, ours(full_attention())).scheduler_side is not None
    assert config.kv_transfer_config.kv_load_failure_policy == "recompute"


def test_a_policy_that_rejects_needs_the_gate(tiny_model: Path) -> None:
    from vllm.v1.structured_output import StructuredOutputManager

    from layerkv.vllm_plugin.scheduler import LayerKVScheduler
    from layerkv.vllm_plugin.slo_gate import without_gates

    config, caches = configs(tiny_model, 40, 200, {"policy": REJECTING}, {})
    gates = config.model_config.logits_processors
    for processors in (gates, without_gates(gates)):  # a worker in this process takes them out
        config.model_config.logits_processors = processors
        LayerKVScheduler(config, caches, StructuredOutputManager(config), BLOCK_TOKENS, log_stats=True)
    config.model_config.logits_processors = None  # as it is where no wrapper has added the gate
    with pytest.raises(ConfigError, match=r"overload: reject \(class .*found no gate in the front end.*VLLM_PLUGINS"):
        LayerKVScheduler(config, caches, StructuredOutputManager(config), BLOCK_TOKENS, log_stats=True)


def test_a_policy_that_rejects_is_not_reloaded_where_no_gate_is(tiny_model: Path) -> None:
    from vllm.v1.structured_output import StructuredOutputManager

    from layerkv.config import default_policy, load_policy
    from layerkv.vllm_plugin.scheduler import LayerKVScheduler

    config, caches = configs(tiny_model, 40, 200, {}, {})
    config.model_config.logits_processors = None  # explicit class flags, without the plugin: nothing is refused yet
    scheduler = LayerKVScheduler(config, caches, StructuredOutputManager(config), BLOCK_TOKENS, log_stats=True)
    scheduler._policy_source.require(default_policy())
    with pytest.raises(ConfigError, match="found no gate in the front end"):
        scheduler._policy_source.require(load_policy(REJECTING))


def test_a_policy_that_rejects_is_not_reloaded_where_metrics_are_off(
    small_engine: dict[str, Any], tmp_path: Path
) -> None:
    from layerkv.vllm_plugin.reload import follow_policy

    policy = tmp_path / "slo.yaml"
    policy.write_text("version: 1\ndefault_class: chat\nclasses: {chat: {ttft: 1s, tpot: 50ms}}\n")
    more = {"kv_transfer_config": flag(policy=str(policy)), "disable_log_stats": True}
    config = args_of(small_engine, more).create_engine_config()
    assert config.kv_transfer_config is not None
    source = follow_policy(str(policy), None)  # type: ignore[arg-type]
    before = source.policy
    policy.write_text("version: 1\ndefault_class: chat\nclasses: {chat: {ttft: 2s, tpot: 50ms, overload: reject}}\n")
    signal.raise_signal(signal.SIGHUP)
    assert source.policy is before
    policy.write_text("version: 1\ndefault_class: chat\nclasses: {chat: {ttft: 3s, tpot: 50ms}}\n")
    signal.raise_signal(signal.SIGHUP)
    assert source.policy.classes["chat"].ttft_s == 3


# Engines with options that work --------------------------------------------------------------------------------------

WORKING: dict[str, dict[str, Any]] = {
    "bounds": {
        "scheduler_reserve_full_isl": False,
        "max_num_active_seqs": 5,
        "max_num_scheduled_tokens": 384,
        "long_prefill_token_threshold": 96,
        "long_prefill_token_threshold_adaptive": True,
    },
    "caches": {
        "disable_hybrid_kv_cache_manager": True,
        "prefix_caching_hash_algo": "sha256_cbor",
        "prefix_match_unit": 32,
        "kv_cache_metrics": True,
        "stream_interval": 4,
    },
    "whole prompts": {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 1024,
        "enable_prefix_caching": False,
        "scheduling_policy": "priority",
    },
    "few blocks": {"num_gpu_blocks_override": 56, "disable_cascade_attn": True, "max_num_seqs": 16},
    "quantized": {"kv_cache_dtype": "fp8"},
}


@pytest.fixture(scope="module")
def turns(forks: Forks, small_engine: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Turns:
    """Stock and layerkv with the same options."""
    calls: list[tuple[list[list[int]], dict[str, Any]]] = [([prompt(300, seed=seed) for seed in range(10)], {})] * 2
    cases = []
    for name, options in WORKING.items():
        engine = {**small_engine, **options}
        cases.append(Case(f"{name} stock", engine, calls, max_tokens=24))
        layerkv = {
            **engine,
            "kv_transfer_config": flag(host_memory="64MiB", compare={"mode": "layered"}, zone_tokens=640),
        }
        cases.append(Case(f"{name} layerkv", layerkv, calls, max_tokens=24))
    return run_in_turn(forks, cases, tmp_path_factory.mktemp("options"))


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKING)
def test_an_engine_with_options_that_work_parks_and_gives_stocks_tokens(turns: Turns, name: str) -> None:
    stock, layerkv = turns[f"{name} stock"], turns[f"{name} layerkv"]
    if name == "quantized" and "avx512f" not in Path("/proc/cpuinfo").read_text():
        assert stock.failure is not None
        pytest.skip("stock vLLM's CPU build has FP8 KV with AVX-512 only")
    assert (stock.failure, layerkv.failure) == (None, None)
    assert layerkv.connector_active
    assert layerkv.parks > 0
    assert layerkv.calls == stock.calls
