"""One flag turns layerkv on; without it the installed package changes nothing."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from layerkv.errors import ConfigError
from tests.vllm.engines_in_turn import ROOT, Case, Turns, flag, prompt, run_in_turn
from tests.vllm.forked import Forks

if TYPE_CHECKING:
    from vllm.config import VllmConfig

pytestmark = pytest.mark.vllm

OUR_WORKER = "layerkv.vllm_plugin.cpu_worker.LayerKVCPUWorker"
OUR_SCHEDULER = "layerkv.vllm_plugin.scheduler.LayerKVScheduler"
OUR_ASYNC_SCHEDULER = "layerkv.vllm_plugin.scheduler.LayerKVAsyncScheduler"
DERIVED_SCHEDULER = "layerkv.bench.suite.layerkv_probe.ProbedLayerKVScheduler"
POLICY = str(ROOT / "configs" / "slo" / "chat-and-batch.yaml")


def config_of(engine: dict[str, Any], **more: Any) -> VllmConfig:
    """The configuration that an engine would get in this process, where vLLM loads layerkv's plugin."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**engine, **more).create_engine_config()


def selection(config: VllmConfig) -> dict[str, Any]:
    """What layerkv would have changed."""
    return {
        "worker_cls": config.parallel_config.worker_cls,
        "scheduler_cls": config.scheduler_config.scheduler_cls,
        "logits_processors": config.model_config.logits_processors,
        "kv_transfer_config": config.kv_transfer_config,
        "hash": config.compute_hash(),
        "text": str(config),
    }


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """The last line that a fresh process prints."""
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout.splitlines()[-1]


def gates_in(config: VllmConfig) -> list[Any]:
    return [each for each in config.model_config.logits_processors or () if getattr(each, "__name__", "") == "SloGate"]


# Without the flag ------------------------------------------------------------------------------------------------

SELECTION_WITHOUT_PLUGINS = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from tests.vllm.test_activation import selection
assert not hasattr(EngineArgs.create_engine_config, "wrapped_by_layerkv")
config = EngineArgs(**json.loads(sys.argv[1])).create_engine_config()
assert not hasattr(EngineArgs.create_engine_config, "wrapped_by_layerkv")
assert not any(name.startswith("layerkv.vllm_plugin") for name in sys.modules)
print(json.dumps(selection(config)))
"""


def test_without_the_flag_the_installed_package_changes_nothing(small_engine: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    stock = json.loads(run_python(SELECTION_WITHOUT_PLUGINS, json.dumps(small_engine), VLLM_PLUGINS=""))
    with_package = selection(config_of(small_engine))
    assert EngineArgs.create_engine_config.wrapped_by_layerkv  # or the comparison would say nothing
    assert with_package == stock


def test_another_connector_is_left_alone(small_engine: dict[str, Any]) -> None:
    other = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    stock, config = config_of(small_engine), config_of(small_engine, kv_transfer_config=other)
    assert config.kv_transfer_config.kv_connector == "ExampleConnector"
    for unchanged in ("worker_cls", "scheduler_cls", "logits_processors"):
        assert selection(config)[unchanged] == selection(stock)[unchanged]


# With the flag -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_async", "scheduler"), [(False, OUR_SCHEDULER), (True, OUR_ASYNC_SCHEDULER)])
def test_the_flag_alone_selects_worker_scheduler_and_one_gate(
    small_engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, is_async: bool, scheduler: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    # The CPU platform turns asynchronous scheduling off by itself; here it must stay as asked for.
    check = type(current_platform).check_and_update_config.__func__

    def check_and_keep(cls: type, config: VllmConfig) -> None:
        check(cls, config)
        config.scheduler_config.async_scheduling = is_async

    monkeypatch.setattr(type(current_platform), "check_and_update_config", classmethod(check_and_keep))
    args = EngineArgs(**small_engine, kv_transfer_config=flag(), async_scheduling=is_async)
    config = args.create_engine_config()
    assert config.scheduler_config.async_scheduling is is_async
    assert config.parallel_config.worker_cls == OUR_WORKER
    assert config.scheduler_config.scheduler_cls == scheduler
    assert len(gates_in(config)) == 1


def test_the_same_classes_by_their_own_flags_change_nothing_more(small_engine: dict[str, Any]) -> None:
    explicit = {"worker_cls": OUR_WORKER, "scheduler_cls": OUR_SCHEDULER}
    config = config_of(small_engine, kv_transfer_config=flag(), **explicit)
    assert {name: selection(config)[name] for name in explicit} == explicit
    assert len(gates_in(config)) == 1


def test_a_scheduler_derived_from_ours_is_kept(small_engine: dict[str, Any]) -> None:
    config = config_of(small_engine, kv_transfer_config=flag(), scheduler_cls=DERIVED_SCHEDULER)
    assert selection(config)["scheduler_cls"] == DERIVED_SCHEDULER
    assert selection(config)["worker_cls"] == OUR_WORKER


def test_a_scheduler_derived_from_ours_goes_with_us_when_layerkv_passes_through(small_engine: dict[str, Any]) -> None:
    drafter = {"method": "draft_model", "model": small_engine["model"], "num_speculative_tokens": 2}
    unsupported = {"speculative_config": {**drafter, "parallel_drafting": True}}
    transfer = flag(on_unsupported="passthrough")
    config = config_of(small_engine, kv_transfer_config=transfer, scheduler_cls=DERIVED_SCHEDULER, **unsupported)
    assert config.kv_transfer_config is None
    assert config.scheduler_config.scheduler_cls is None


def test_a_name_that_somebody_has_registered_is_no_error(small_engine: dict[str, Any]) -> None:
    from layerkv.vllm_plugin.activate import register_connector

    register_connector()
    register_connector.cache_clear()
    register_connector()
    assert selection(config_of(small_engine, kv_transfer_config=flag()))["worker_cls"] == OUR_WORKER


WITH_ANOTHER_VLLM = """
import json, sys
import vllm
engine, extra_config, version, missing = map(json.loads, sys.argv[1:])
vllm.__version__ = version
sys.modules[missing] = None
from vllm.engine.arg_utils import EngineArgs
from tests.vllm.engines_in_turn import flag
try:
    config = EngineArgs(**engine, kv_transfer_config=flag(**extra_config)).create_engine_config()
    print(f"started with {config.kv_transfer_config}, {config.scheduler_config.scheduler_cls}")
except Exception as error:
    print(type(error).__name__, error)
"""
V2_GATES = "vllm.v1.worker.gpu.sample.logits_processor.interface"


@pytest.mark.parametrize(
    ("version", "extra_config", "told"),
    [
        ("0.30.0", {}, "IncompatibleVLLMError vLLM 0.30.0 is installed, which is older"),
        ("9.0.0", {"allow_untested_vllm": True}, f"is missing (import of {V2_GATES} halted"),
        ("0.30.0", {"on_unsupported": "passthrough"}, "started with None, None"),
    ],
)
def test_a_vllm_without_a_module_of_ours_is_refused_and_not_tripped_over(
    small_engine: dict[str, Any], version: str, extra_config: dict[str, Any], told: str
) -> None:
    """Regression: what the adapter imports was imported before it was asked whether it is there."""
    assert told in run_python(WITH_ANOTHER_VLLM, *map(json.dumps, (small_engine, extra_config, version, V2_GATES)))


@pytest.mark.parametrize("path", ["no.such.Scheduler", "layerkv.vllm_plugin.scheduler.Missing", "Scheduler", ""])
def test_a_scheduler_that_cannot_be_found_is_refused_as_a_strange_one(small_engine: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match="scheduler class"):
        config_of(small_engine, kv_transfer_config=flag(), scheduler_cls=path)


def test_a_lost_copy_leads_to_recomputing_and_not_to_an_error(small_engine: dict[str, Any]) -> None:
    config = config_of(small_engine, kv_transfer_config=flag())
    assert config.kv_transfer_config.kv_load_failure_policy == "recompute"


def test_registering_again_changes_nothing(small_engine: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from layerkv.vllm_plugin import register

    config_of(small_engine)  # vLLM has loaded the plugin
    installed = EngineArgs.create_engine_config
    register()
    register()
    assert EngineArgs.create_engine_config is installed
    assert len(gates_in(config_of(small_engine, kv_transfer_config=flag()))) == 1


def test_the_same_arguments_may_make_several_configurations(small_engine: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(**small_engine, kv_transfer_config=flag(policy=POLICY))
    first, second = args.create_engine_config(), args.create_engine_config()
    for config in (first, second):
        assert config.parallel_config.worker_cls == OUR_WORKER
        assert len(gates_in(config)) == 1
    assert args.logits_processors is None


def test_the_users_own_logits_processors_stay_before_the_gate(small_engine: dict[str, Any]) -> None:
    own = "vllm.v1.sample.logits_processor.builtin.MinTokensLogitsProcessor"
    config = config_of(small_engine, kv_transfer_config=flag(), logits_processors=[own])
    assert config.model_config.logits_processors == [own, *gates_in(config)]
    assert len(gates_in(config)) == 1


# The gate on its way to the worker -----------------------------------------------------------------------------------

USE_GATE = """
import pickle, sys
from pathlib import Path
config = pickle.loads(Path(sys.argv[1]).read_bytes())
from vllm import SamplingParams
from layerkv.vllm_plugin.slo_gate import without_gates
own, gate = config.model_config.logits_processors
gate.validate_params(SamplingParams(extra_args={"slo_class": "batch"}))
gate.validate_params(SamplingParams())
assert without_gates([own, gate]) == [own]
assert without_gates([gate]) == []
assert without_gates(None) is None
try:
    gate.validate_params(SamplingParams(extra_args={"slo_class": "bach"}))
except ValueError as error:
    print(error)
"""


def test_the_gate_works_in_the_process_to_which_the_configuration_travels(
    forks: Forks, small_engine: dict[str, Any], tmp_path: Path
) -> None:
    own = "vllm.v1.sample.logits_processor.builtin.MinTokensLogitsProcessor"
    config = config_of(small_engine, kv_transfer_config=flag(policy=POLICY), logits_processors=[own])
    file = tmp_path / "config.pickle"
    file.write_bytes(pickle.dumps(config))
    ended = forks.run(USE_GATE, str(file), limit_s=120)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert (
        ended.stdout.splitlines()[-1]
        == "slo_class: found 'bach'; expected one of the classes: chat, batch; did you mean batch?"
    )


# Engines -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def turns(forks: Forks, small_engine: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Turns:
    """Stock, layerkv by three flags, and layerkv by one, for which alone the plugin is loaded."""
    prompts = [prompt(300, seed=seed) for seed in range(8)]
    calls: list[tuple[list[list[int]], dict[str, Any]]] = [
        (prompts, {}),
        (prompts[:1], {"slo_class": "nope"}),
        (prompts, {"slo_class": "batch"}),
    ]
    by_path = {**flag(policy=POLICY), "kv_connector_module_path": "layerkv.vllm_plugin.connector"}
    explicit = {"kv_transfer_config": by_path, "worker_cls": OUR_WORKER, "scheduler_cls": OUR_SCHEDULER}
    cases = [
        Case("stock", small_engine, calls),
        Case("three flags", {**small_engine, **explicit}, calls),
        Case("one flag", {**small_engine, "kv_transfer_config": flag(policy=POLICY)}, calls, register=True),
    ]
    return run_in_turn(forks, cases, tmp_path_factory.mktemp("activation"), VLLM_PLUGINS="")


LAYERKV_CASES = ["three flags", "one flag"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERKV_CASES)
def test_an_engine_runs_our_classes_and_gives_stocks_tokens(turns: Turns, name: str) -> None:
    assert (turns[name].worker, turns[name].scheduler) == ("LayerKVCPUWorker", "LayerKVScheduler")
    assert turns[name].parks > 0
    assert turns[name].calls[0] == turns["stock"].calls[0]
    assert turns["stock"].worker == "CPUWorker"


@pytest.mark.slow
def test_the_three_flags_need_no_wrapper(turns: Turns) -> None:
    assert not turns["three flags"].is_wrapped
    assert turns["one flag"].is_wrapped


@pytest.mark.slow
def test_the_worker_takes_the_gate_out_before_the_sampler_is_built(turns: Turns) -> None:
    assert turns["one flag"].num_gates == 0


@pytest.mark.slow
def test_without_the_gate_a_request_of_an_unknown_class_is_served_as_of_the_default_one(turns: Turns) -> None:
    assert turns["three flags"].calls == turns["stock"].calls


@pytest.mark.slow
def test_with_the_gate_an_unknown_class_is_refused_before_the_engine_sees_it(turns: Turns) -> None:
    _, refused, after = turns["one flag"].calls
    assert "slo_class: found 'nope'; expected one of the classes: chat, batch" in refused
    assert after == turns["stock"].calls[2]
