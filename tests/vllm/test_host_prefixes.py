"""Prefixes of finished requests in host memory, on real engines: found, right, forgotten when they must be."""

from __future__ import annotations

import json
from concurrent.futures import Future
from typing import Any

import pytest

from tests.vllm.engines_in_turn import flag, prompt
from tests.vllm.forked import Ended, Forks

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

RUN = """
import json, sys
from vllm import LLM, SamplingParams

spec = json.loads(sys.argv[1])
llm = LLM(**spec["engine"], disable_log_stats=False)
core = llm.llm_engine.engine_core.engine_core
params = SamplingParams(max_tokens=20, min_tokens=20, ignore_eos=True, temperature=0)
answers, cached_tokens = [], []
learned = []

def listen(controller):
    step_done = controller.step_done
    def listening(work, seconds, **kwargs):
        before = controller.cost.view
        step_done(work, seconds, **kwargs)
        copies = work.parked_bytes + work.hit_bytes > 0
        learned.append((work.prefill_tokens, copies, seconds, kwargs["waited_s"], controller.cost.view != before))
    controller.step_done = listening

if spec["engine"].get("kv_transfer_config"):
    listen(core.scheduler._controller)

def generate(prompts):
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    cached_tokens.extend(output.num_cached_tokens for output in outputs)
    answers.append([list(output.outputs[0].token_ids) for output in outputs])

def metrics():
    of_vllm = ("engine", "model_name")
    read = {
        ",".join([metric.name, *(v for k, v in metric.labels.items() if k not in of_vllm)]): metric.value
        for metric in llm.get_metrics() if hasattr(metric, "value")
    }
    by_source, hits = "vllm:prompt_tokens_cached_by_source,host", "vllm:external_prefix_cache_hits"
    read.setdefault(by_source, read.get(hits, 0))  # since vLLM 0.32
    if spec["engine"].get("kv_transfer_config"):
        ledger = core.scheduler.connector.scheduler_side.ledger
        counters = ledger.counters
        read |= {"hits": counters.prefix_hit_blocks, "stored": counters.prefix_stored_blocks}
        read["cached"] = ledger.host.num_cached
    return read

readings = []
for call in spec["calls"]:
    if call in ("reset", "reset all"):
        assert llm.reset_prefix_cache(reset_connector=call == "reset all")
        continue
    # "again": the conversations go on: everything said so far, and something new
    if isinstance(call, dict):
        said = [a + b + call["again"] for a, b in zip(prompts, answers[-1])]
        call = said[: call.get("most", len(said))]
    prompts = call
    generate(prompts)
    readings.append(metrics())
scheduler = core.scheduler
result = {"answers": answers, "cached_tokens": cached_tokens, "readings": readings}
result["usage"] = scheduler.kv_cache_manager.usage
if spec["engine"].get("kv_transfer_config"):
    ledger = scheduler.connector.scheduler_side.ledger
    ledger.check()
    result["held"] = ledger.num_host_blocks_used
    result["learned"] = learned
if spec["engine"].get("kv_events_config"):
    from tests.vllm.kv_event_replay import heard
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
    on_host = {maybe_convert_block_hash(block_hash) for block_hash in ledger.host._block_of}
    result["events"] = heard(spec["engine"]["kv_events_config"]["replay_endpoint"], expected=on_host)
core.shutdown()
print(json.dumps(result))
"""

FIRST = [prompt(300, seed=seed) for seed in range(8)]
OTHERS = [prompt(330, seed=100 + seed) for seed in range(14)]
"""More than the device holds: what was said before is gone from there."""
CALLS: list[Any] = [FIRST, OTHERS, FIRST, {"again": [7, 8, 9]}, {"again": [5] * 40}]


def with_layerkv(engine: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {**engine, "kv_transfer_config": flag(**{"host_memory": "64MiB", **extra})}


@pytest.fixture(scope="module")
def engines(
    forks: Forks, small_engine: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[Ended]]:
    """All engines of this file, each in a process of its own."""
    folder = tmp_path_factory.mktemp("sockets")
    sockets = {name: f"ipc://{folder}/{name}" for name in ("endpoint", "replay_endpoint")}
    told = {**small_engine, "kv_events_config": {"enable_kv_cache_events": True, "publisher": "zmq", **sockets}}
    specs: dict[str, tuple[dict[str, Any], list[Any]]] = {
        "stock": (small_engine, CALLS),
        "ours": (with_layerkv(small_engine), CALLS),
        "small host": (with_layerkv(small_engine, host_memory="6MiB"), CALLS),
        # The last ones have only just ended.
        "reset": (with_layerkv(small_engine), [OTHERS, FIRST, "reset all", FIRST]),
        "off": (with_layerkv(small_engine, host_prefix_cache=False), CALLS[:3]),
        "told": (with_layerkv(told, host_memory="16MiB"), [FIRST, "reset", OTHERS, FIRST, "reset", FIRST]),
    }
    return {
        name: forks.start(RUN, json.dumps({"engine": engine, "calls": calls}), VLLM_ENABLE_V1_MULTIPROCESSING="0")
        for name, (engine, calls) in specs.items()
    }


def outcome_of(engines: dict[str, Future[Ended]], name: str) -> dict[str, Any]:
    ended = engines[name].result()
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]
    result: dict[str, Any] = json.loads([line for line in ended.stdout.splitlines() if line.startswith("{")][-1])
    return result


@pytest.fixture(scope="module")
def stock(engines: dict[str, Future[Ended]]) -> dict[str, Any]:
    return outcome_of(engines, "stock")


@pytest.fixture(scope="module")
def ours(engines: dict[str, Future[Ended]]) -> dict[str, Any]:
    return outcome_of(engines, "ours")


def test_prefixes_that_left_the_device_are_loaded_and_tokens_are_stocks(
    ours: dict[str, Any], stock: dict[str, Any]
) -> None:
    assert ours["answers"] == stock["answers"]
    hits = [reading["vllm:prompt_tokens_cached_by_source,host"] for reading in ours["readings"]]
    assert hits[1] == 0
    assert hits[2] > 0
    assert hits[-1] > hits[2]
    assert ours["readings"][-1]["hits"] * 32 == hits[-1]
    assert stock["readings"][-1]["vllm:prompt_tokens_cached_by_source,host"] == 0


def test_only_what_is_new_is_stored(ours: dict[str, Any]) -> None:
    """The third call repeats the first: all its whole blocks but those of the last token are known."""
    stored = [reading["stored"] for reading in ours["readings"]]
    assert ours["readings"][0]["cached"] > 0  # stored at an end, or written through before it
    assert stored[2] == stored[1]


def test_cached_prefixes_are_nobodys_and_every_block_is_given_back(ours: dict[str, Any]) -> None:
    assert ours["held"] == 0
    assert ours["usage"] == 0
    assert ours["readings"][-1]["cached"] > 0


def test_steps_that_store_a_finished_prefix_teach_what_prompts_cost(ours: dict[str, Any]) -> None:
    """In steady load that is every step with a prompt."""
    beside_copies = [entry for entry in ours["learned"] if entry[0] and entry[1]]
    assert len(beside_copies) >= 3
    assert all(0 <= waited_s < seconds for _, _, seconds, waited_s, _ in ours["learned"])
    assert any(waited_s > 0 for _, _, _, waited_s, _ in beside_copies), "the worker tells what it waited for"
    assert any(has_taught for *_, has_taught in beside_copies)


def test_a_small_host_memory_serves_requests_first_and_tokens_are_stocks(
    engines: dict[str, Future[Ended]], stock: dict[str, Any]
) -> None:
    outcome = outcome_of(engines, "small host")
    assert outcome["answers"] == stock["answers"]
    assert outcome["held"] == 0


def test_a_reset_of_the_connector_forgets_prefixes_and_the_switch_turns_them_off(
    engines: dict[str, Future[Ended]], stock: dict[str, Any]
) -> None:
    after_reset = outcome_of(engines, "reset")
    assert after_reset["answers"][2] == stock["answers"][2]
    assert after_reset["readings"][-1]["hits"] == 0
    off = outcome_of(engines, "off")
    assert off["answers"] == stock["answers"][:3]
    assert off["readings"][-1]["vllm:prompt_tokens_cached_by_source,host"] == 0
    assert off["readings"][-1]["stored"] == 0


def test_subscribers_know_what_host_memory_caches_and_prompts_say_what_was_cached(
    engines: dict[str, Future[Ended]], stock: dict[str, Any]
) -> None:
    """Over vLLM's own publisher, encoded as routers get it; a plain reset on the way keeps the host's prefixes."""
    outcome = outcome_of(engines, "told")
    assert outcome["answers"][2:] == [stock["answers"][2]] * 2
    assert outcome["readings"][0]["hits"] == 0
    assert outcome["readings"][-1]["hits"] > outcome["readings"][-2]["hits"], "a plain reset kept what was there"
    events = outcome["events"]
    assert events["is_right"], "what a subscriber knows of host memory is what is cached there"
    assert events["num_on_host"] > 0
    assert events["num_removed"] > 0
    assert events["num_like_on_device"] == events["num_told"] > 0, "by the hashes of the same tokens on the device"
    last = outcome["readings"][-1]
    assert last["vllm:external_prefix_cache_hits"] == last["vllm:prompt_tokens_cached_by_source,host"] > 0
    cached = outcome["cached_tokens"]
    assert sum(cached) == last["vllm:prompt_tokens_cached"], "usage of a request counts what came from host memory"
