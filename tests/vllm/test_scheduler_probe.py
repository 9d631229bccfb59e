"""The scheduler probe counts and times, and changes nothing else: real engines with and without it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from layerkv.bench.suite.scheduler_probe import (
    TIMES_VARIABLE,
    SchedulerTimes,
    TimedSchedule,
    probe_options,
    read_scheduler_times,
)
from layerkv.errors import ConfigError
from tests.vllm.engines_in_turn import flag, prompt
from tests.vllm.forked import Forks

if TYPE_CHECKING:
    from vllm.config import VllmConfig

pytestmark = pytest.mark.vllm

STEP_S = 0.01


class SlowScheduler:
    """A scheduler that sleeps: its time passes without CPU time."""

    def __init__(self, rank: int = 0) -> None:
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_index=rank))

    def schedule(self, throttle_prefills: bool = False) -> str:
        import time

        time.sleep(STEP_S)
        return "throttled" if throttle_prefills else "scheduled"


class TimedSlowScheduler(TimedSchedule, SlowScheduler):
    pass


def scheduler_path(options: list[str]) -> str:
    name, path = options
    assert name == "--scheduler-cls"
    return path


PROBES = {is_layerkv: scheduler_path(probe_options(engine_is_layerkv=is_layerkv)) for is_layerkv in (False, True)}


# The file ----------------------------------------------------------------------------------------------------------


def test_totals_are_those_of_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "times"
    monkeypatch.setenv(TIMES_VARIABLE, str(file))
    assert read_scheduler_times(file) is None
    scheduler = TimedSlowScheduler()
    assert read_scheduler_times(file) == SchedulerTimes(num_calls=0, seconds=0.0, cpu_seconds=0.0)
    assert [scheduler.schedule(), scheduler.schedule(True)] == ["scheduled", "throttled"]
    times = read_scheduler_times(file)
    assert times is not None
    assert times.num_calls == 2
    assert times.seconds >= 2 * STEP_S
    assert 0 < times.cpu_seconds < times.seconds


def test_a_new_engine_begins_at_zero_and_an_old_one_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "times"
    monkeypatch.setenv(TIMES_VARIABLE, str(file))
    old, new = TimedSlowScheduler(), TimedSlowScheduler()
    old.schedule()
    assert read_scheduler_times(file) == SchedulerTimes(num_calls=0, seconds=0.0, cpu_seconds=0.0)
    new.schedule()
    times = read_scheduler_times(file)
    assert times is not None
    assert times.num_calls == 1


def test_further_data_parallel_engines_write_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TIMES_VARIABLE, str(tmp_path / "times"))
    TimedSlowScheduler(rank=2)
    assert [file.name for file in tmp_path.iterdir()] == ["times.rank2"]


def test_without_a_place_for_the_times_the_engine_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TIMES_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=TIMES_VARIABLE):
        TimedSlowScheduler()


# Which class is probed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_layerkv", [False, True])
@pytest.mark.parametrize("device", ["cpu", "one that leaves asynchronous scheduling on"])
@pytest.mark.parametrize("asked", [None, False, True])
def test_the_flag_does_not_change_what_async_scheduling_resolves_to(
    small_engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, asked: bool | None, device: str, is_layerkv: bool
) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    check = type(current_platform).check_and_update_config.__func__

    def check_and_keep(cls: type, config: VllmConfig) -> None:
        resolved = config.scheduler_config.async_scheduling
        check(cls, config)
        config.scheduler_config.async_scheduling = resolved

    if device != "cpu":
        monkeypatch.setattr(type(current_platform), "check_and_update_config", classmethod(check_and_keep))

    def resolve(**more: Any) -> Any:
        return EngineArgs(**small_engine, async_scheduling=asked, **more).create_engine_config().scheduler_config

    layerkv = {"kv_transfer_config": flag()} if is_layerkv else {}
    stock, probed = resolve(), resolve(scheduler_cls=PROBES[is_layerkv], **layerkv)
    assert probed.async_scheduling is stock.async_scheduling
    assert stock.async_scheduling is (device != "cpu" and asked is not False)
    assert probed.scheduler_cls == PROBES[is_layerkv]


@pytest.mark.parametrize("is_layerkv", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
def test_the_probed_class_derives_from_the_one_that_would_run(
    monkeypatch: pytest.MonkeyPatch, is_async: bool, is_layerkv: bool
) -> None:
    from vllm.config import SchedulerConfig
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from layerkv.bench.suite import layerkv_probe, stock_probe
    from layerkv.vllm_plugin.scheduler import LayerKVAsyncScheduler, LayerKVScheduler

    config = SchedulerConfig.default_factory(async_scheduling=is_async)
    would_run = config.get_scheduler_cls()
    if is_layerkv:
        would_run = LayerKVAsyncScheduler if is_async else LayerKVScheduler
    constructed: list[type] = []
    for timed in (stock_probe.TimedScheduler, stock_probe.TimedAsyncScheduler):
        monkeypatch.setattr(timed, "__init__", lambda self, **_: constructed.append(type(self)))
    for timed in (layerkv_probe.TimedLayerKVScheduler, layerkv_probe.TimedLayerKVAsyncScheduler):
        monkeypatch.setattr(timed, "__init__", lambda self, **_: constructed.append(type(self)))
    resolve_obj_by_qualname(PROBES[is_layerkv])(vllm_config=SimpleNamespace(scheduler_config=config), block_size=32)
    (probed,) = constructed
    assert probed.__mro__[:3] == (probed, TimedSchedule, would_run)


# Engines -----------------------------------------------------------------------------------------------------------

RUN = """
import gc, json, os, sys
from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from layerkv.bench.suite.scheduler_probe import TIMES_VARIABLE

def run(name, engine, prompts):
    llm = LLM(**engine, disable_log_stats=True)
    core = llm.llm_engine.engine_core.engine_core
    params = SamplingParams(max_tokens=16, min_tokens=16, ignore_eos=True, temperature=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    config = llm.llm_engine.vllm_config.scheduler_config
    result = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "scheduler": type(core.scheduler).__name__,
        "async_scheduling": config.async_scheduling,
    }
    core.shutdown()
    return result

results = {}
for name, engine in json.loads(sys.argv[1]).items():
    os.environ[TIMES_VARIABLE] = f"{sys.argv[3]}/{name}"
    results[name] = run(name, engine, json.loads(sys.argv[2]))
    gc.collect()
    ensure_kv_transfer_shutdown()
    cleanup_dist_env_and_memory()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each engine's times are, by its name."""
    return tmp_path_factory.mktemp("times")


@pytest.fixture(scope="module")
def engines(forks: Forks, small_engine: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Stock and layerkv, without and with the probe, one after the other in one process."""
    layerkv = {**small_engine, "kv_transfer_config": flag()}
    cases = {
        "stock": small_engine,
        "stock probed": {**small_engine, "scheduler_cls": PROBES[False]},
        "layerkv": layerkv,
        "layerkv probed": {**layerkv, "scheduler_cls": PROBES[True]},
    }
    prompts = [prompt(300, seed=seed) for seed in range(8)]
    given = (json.dumps(cases), json.dumps(prompts), str(folder))
    ended = forks.run(RUN, *given, limit_s=300, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]
    results: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return results


PAIRS = [("stock", "TimedScheduler"), ("layerkv", "TimedLayerKVScheduler")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheduler"), PAIRS)
def test_a_probed_engine_counts_and_times_its_steps(
    engines: dict[str, Any], folder: Path, name: str, scheduler: str
) -> None:
    assert engines[f"{name} probed"]["scheduler"] == scheduler
    times = read_scheduler_times(folder / f"{name} probed")
    assert times is not None
    assert times.num_calls >= 16  # a step for each token
    assert 0 < times.cpu_seconds <= times.seconds < 60
    assert not (folder / name).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in PAIRS])
def test_a_probed_engine_gives_the_same_tokens_under_the_same_kind_of_scheduling(
    engines: dict[str, Any], name: str
) -> None:
    probed, unprobed = engines[f"{name} probed"], engines[name]
    assert probed["tokens"] == unprobed["tokens"] == engines["stock"]["tokens"]
    assert probed["async_scheduling"] is unprobed["async_scheduling"] is engines["stock"]["async_scheduling"] is False
