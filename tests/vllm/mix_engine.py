"""Runs mixes through one engine in this process: `python -m tests.vllm.mix_engine SPEC.json OUT.json`.

SPEC: engine_args, mixes (keyword arguments of make_mix), ahead (schedule one step before the last one's output is
processed, as under asynchronous scheduling), fail_every (make fetches fail), fail_copies_every (make copies of a
layer fail: stores and loads of layered prefill, parks, stores ahead, fetches and prefixes alike),
reset_while_fetching (as soon as a fetch is under way, once in each mix: pause at once and give all KV up),
seed_every (each n-th request is sampled, with a seed of its own),
sees (the model is one of those that see images), encoder_cache (its encoder cache holds so many tokens),
adapters (folders of LoRA adapters, which requests know by number), embeds_of (the model whose embeddings prompts are),
enough (after so many mixes the others are left out if each of these moves has been made),
pause_step (let what has begun come to its end before that step goes on),
shake_pool (a pool that grows and shrinks may hold another number of segments every third step, drawn by this seed),
has_broker (a broker that has plenty of both memories runs where the engine looks for it; with shake_pool, host memory
is shaken too).

OUT: for each mix the tokens of each request, which gave their KV up and were computed again, of which prompts a step
computed a part, and what the books say after the mix: everything given back or not, and how often each move was made.

A SPEC may be a mapping of several, by name: their engines run one after the other, since most of an engine's start is
imports. OUT then has for each name what it would be alone under `results`, or a traceback under `error`.
"""

from __future__ import annotations

import gc
import itertools
import json
import random
import sys
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.vllm.mix import MixRequest, make_mix
from tests.vllm.tiny_families import IMAGE_TOKENS, can_see, embedding_table, image


def build(spec: dict[str, Any]) -> Any:
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    if spec.get("has_broker"):
        start_broker(Path(spec["engine_args"]["kv_transfer_config"]["kv_connector_extra_config"]["broker"]))
    if spec.get("sees"):
        can_see()
    config = EngineArgs(**spec["engine_args"]).create_engine_config()
    if spec.get("encoder_cache"):
        config.scheduler_config.encoder_cache_size = spec["encoder_cache"]
    if spec.get("ahead"):
        from layerkv.vllm_plugin.our_classes import OUR_ASYNC_SCHEDULER

        config.scheduler_config.scheduler_cls = OUR_ASYNC_SCHEDULER
    engine = LLMEngine(config, Executor.get_class(config), log_stats=False)
    if spec.get("ahead"):
        schedule_ahead(engine.engine_core.engine_core)
    if spec.get("fail_every"):
        fail_fetches(spec["fail_every"])
    if spec.get("fail_copies_every"):
        fail_copies(spec["fail_copies_every"])
    if spec.get("shake_pool") is not None:
        shake_pool(engine.engine_core.engine_core.scheduler, spec["shake_pool"])
    return engine


def start_broker(path: Path) -> None:
    """As long as this process runs."""
    from layerkv.broker.server import Broker

    broker = Broker(path, 1 << 40, 1 << 40)
    threading.Thread(target=broker.run, args=(lambda: False,), daemon=True).start()


class ShakenShare:
    """What an engine may hold: at least its floor, and often less than it holds."""

    def __init__(self, seed: int, floor: int, ceiling: int, held: int) -> None:
        self._random = random.Random(seed)
        self._floor, self._ceiling = floor, ceiling
        self._held = self._allowed = held
        self._num_looks = 0
        self.num_left = 0

    def limit(self) -> int:
        self._num_looks += 1
        if self._num_looks % 3 == 0:
            self._allowed = self._random.randint(self._floor, self._ceiling)
        return self._allowed

    def try_hold(self, num_segments: int) -> bool:
        if num_segments > max(self._held, self._allowed):
            return False
        self.num_left += max(self._held - num_segments, 0)
        self._held = num_segments
        return True

    def ask(self, **asked: Any) -> None:
        """Nobody listens."""

    def could_not_get(self, num_segments: int) -> None:
        raise AssertionError("there is memory for all")

    def close(self) -> None:
        """Nothing to do."""


def shake_pool(scheduler: Any, seed: int) -> None:
    side = scheduler.connector.scheduler_side
    sizes, held = side.sizes, scheduler._elastic.num_held
    scheduler._elastic._share = ShakenShare(seed, sizes.floor, sizes.plan.layout.num_segments, held)
    if scheduler._elastic.host is not None:
        host = side.host_sizes
        scheduler._elastic.host._share = ShakenShare(seed, 1, host.layout.num_segments, 1)


def fail_copies(every: int) -> None:
    """Every n-th copy that a copy thread makes, of each direction, ends with an error and has copied only a part."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    def or_fail(copy: Any) -> Any:
        count = itertools.count(1)

        def copy_or_fail(layers: Any, runs: Any) -> None:
            if next(count) % every == 0:
                copy(layers, runs[:-1])
                raise OSError("made to fail by the test")
            copy(layers, runs)

        return copy_or_fail

    for thread in get_kv_transfer_group().worker_side._engine._threads.values():
        thread._copy = or_fail(thread._copy)


def fail_fetches(every: int) -> None:
    """Every n-th fetch or load of a prefix ends with an error and without having copied anything."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from layerkv.device.cpu_engine import CopyEvent

    lanes = get_kv_transfer_group().worker_side._lanes  # the worker runs in this process
    count = 0

    def or_fail(submit: Any) -> Any:
        def submit_or_fail(*copies: Any) -> Any:
            nonlocal count
            count += 1
            if count % every:
                return submit(*copies)
            event = CopyEvent()
            event.end(RuntimeError("made to fail by the test"))
            return event

        return submit_or_fail

    lanes._submit_fetch = or_fail(lanes._submit_fetch)
    lanes._submit_hits = or_fail(lanes._submit_hits)


def schedule_ahead(core: Any) -> None:
    """Two steps in flight: the CPU platform turns asynchronous scheduling off, so do by hand what it would do."""
    core.batch_queue_size = 2
    core.batch_queue = deque(maxlen=2)
    core.step_fn = core.step_with_batch_queue
    core.scheduler.defer_block_free = True


def drain_paused(engine: Any) -> list[Any]:
    """Pause new requests until those that have begun are done; returns what the steps put out."""
    from vllm.v1.core.sched.interface import PauseState

    scheduler, outputs = engine.engine_core.engine_core.scheduler, []
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    for _ in range(5_000):
        if not scheduler.get_num_unfinished_requests():
            break
        outputs += engine.step()
    assert not scheduler.running
    assert not scheduler._controller.parked
    scheduler.set_pause_state(PauseState.UNPAUSED)
    return outputs


def reset_while_fetching(engine: Any) -> list[Any]:
    """What `pause(mode="keep")` with new weights does; returns what the steps put out."""
    from vllm.v1.core.sched.interface import PauseState

    core, outputs = engine.engine_core.engine_core, []
    core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(5_000):
        if not core.scheduler.has_requests() and not core.batch_queue:
            break
        outputs += engine.step()
    assert core.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert core.scheduler.kv_cache_manager.usage == 0
    core.scheduler.set_pause_state(PauseState.UNPAUSED)
    return outputs


def is_fetching(engine: Any) -> bool:
    """Whether a fetch is under way, or over and its request not scheduled yet."""
    return bool(engine.engine_core.engine_core.scheduler.kv_holding_waiting)


def prompt_of(request: MixRequest, spec: dict[str, Any]) -> Any:
    """As vLLM takes it."""
    from vllm.inputs.engine import embeds_input, tokens_input

    if request.is_embedded:
        return embeds_input(embedding_table(spec["embeds_of"])[list(request.prompt)])
    if not request.images:
        return tokens_input(prompt_token_ids=list(request.prompt))
    token_ids = list(request.prompt)
    for place, _ in reversed(request.images):
        token_ids[place + 1 : place + 1] = IMAGE_TOKENS
    return {"prompt_token_ids": token_ids, "multi_modal_data": {"image": [image(seed) for _, seed in request.images]}}


def adapter_of(request: MixRequest, spec: dict[str, Any]) -> Any:
    """As vLLM takes it; None for the model as it is."""
    from vllm.lora.request import LoRARequest

    number = request.adapter
    return LoRARequest(f"adapter-{number}", number, spec["adapters"][number - 1]) if number else None


def run_mix(engine: Any, requests: list[MixRequest], spec: dict[str, Any]) -> dict[str, Any]:
    """Add and abort by step count; returns each request's tokens, up to its abort, which were computed again, and of
    which prompts a step computed a part."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(requests))}
    internal: dict[str, str] = {}
    todo = sorted(enumerate(requests), key=lambda pair: pair[1].arrive_step)
    will_reset = spec.get("reset_while_fetching")
    seed_every = spec.get("seed_every")
    step = 0
    while todo or engine.has_unfinished_requests():
        while todo and todo[0][1].arrive_step <= step:
            index, request = todo.pop(0)
            seed = index if seed_every and index % seed_every == 0 else None
            params = SamplingParams(
                max_tokens=request.max_tokens,
                temperature=1.0 if seed is not None else 0.0,
                seed=seed,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            internal[str(index)] = engine.add_request(
                str(index), prompt_of(request, spec), params, lora_request=adapter_of(request, spec)
            )
        for index, request in enumerate(requests):
            if request.abort_step == step and str(index) in internal:
                engine.abort_request([str(index)])
        if will_reset and is_fetching(engine):
            will_reset = False
            outputs = reset_while_fetching(engine)
        else:
            outputs = drain_paused(engine) if step == spec.get("pause_step") else engine.step()
        for output in outputs:
            tokens[output.request_id].extend(output.outputs[0].token_ids)
        step += 1
        assert step < 20_000, "the engine does not come to an end"
    for _ in range(3):  # let frees that vLLM defers, and fetches of aborted requests, come in
        engine.engine_core.engine_core.step_fn()
    scheduler = engine.engine_core.engine_core.scheduler
    return {
        "tokens": [tokens[str(i)] for i in range(len(requests))],
        "recomputed": [int(name) for name, request_id in internal.items() if request_id in scheduler.recomputed],
        "cut": [int(name) for name, request_id in internal.items() if request_id in scheduler.cut],
    }


def books(engine: Any, scheduler: Any) -> dict[str, Any]:
    pool = scheduler.kv_cache_manager.block_pool
    found: dict[str, Any] = {
        "pool_all_free": pool.get_num_free_blocks() == pool.num_gpu_blocks - 1,
        "no_requests": not scheduler.requests,
        "usage": scheduler.get_kv_cache_usage(),
    }
    ledger = getattr(scheduler, "_ledger", None)
    if ledger is not None:
        ledger.check()
        found |= {
            "host_all_free": ledger.num_host_blocks_used == 0,
            "zone_all_free": ledger.zone.num_available == ledger.geometry.zone_blocks,
            "tracked": len(scheduler._controller.tracked),
            "moves": {
                name: getattr(ledger.counters, name)
                for name in (
                    "parks",
                    "fetches",
                    "layered_admissions",
                    "recomputes",
                    "stored_ahead_blocks",
                    "prefix_hit_blocks",
                )
            }
            | {"pauses": scheduler.num_pauses, **scheduler.drafts},
        }
    if isinstance(share := getattr(getattr(scheduler, "_elastic", None), "_share", None), ShakenShare):
        scheduler._elastic.check()
        found["moves"]["segments_left"] = share.num_left
        if scheduler._elastic.host is not None:
            found["moves"]["host_segments_left"] = scheduler._elastic.host._share.num_left
    return found


def count_pauses(scheduler: Any) -> None:
    """``scheduler.num_pauses`` from now on, if it is ours."""
    scheduler.num_pauses = 0
    if (pausing := getattr(scheduler, "_pausing", None)) is None:
        return
    carry_out = pausing.pause

    def count(decision: Any) -> None:
        scheduler.num_pauses += len(decision.pause)
        carry_out(decision)

    pausing.pause = count


def note_recomputed(scheduler: Any) -> None:
    """``scheduler.recomputed`` from now on: requests that gave their KV up, if it is ours."""
    scheduler.recomputed = set()
    if (arrivals := getattr(scheduler, "_arrivals", None)) is None:
        return
    recomputes = arrivals.recomputes

    def note(request: Any) -> None:
        scheduler.recomputed.add(request.request_id)
        recomputes(request)

    arrivals.recomputes = note


def note_cut(scheduler: Any) -> None:
    """``scheduler.cut`` from now on: requests of whose prompt a step has computed a part."""
    scheduler.cut = set()
    schedule = scheduler.schedule

    def note(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        for request_id in output.num_scheduled_tokens:
            request = scheduler.requests[request_id]
            if request.num_computed_tokens < request.num_prompt_tokens:  # the step's tokens are counted already
                scheduler.cut.add(request_id)
        return output

    scheduler.schedule = note


def count_drafts(scheduler: Any) -> None:
    """``scheduler.drafts`` from now on: how many were right, and how many were not."""
    scheduler.drafts = {"accepted_drafts": 0, "rejected_drafts": 0}
    note = scheduler.make_spec_decoding_stats

    def count(*args: Any, num_draft_tokens: int, num_accepted_tokens: int, **more: Any) -> Any:
        scheduler.drafts["accepted_drafts"] += num_accepted_tokens
        scheduler.drafts["rejected_drafts"] += num_draft_tokens - num_accepted_tokens
        return note(*args, num_draft_tokens=num_draft_tokens, num_accepted_tokens=num_accepted_tokens, **more)

    scheduler.make_spec_decoding_stats = count


def is_enough(results: list[dict[str, Any]], mixes: int | None = None, moves: Sequence[str] = ()) -> bool:
    """Whether the mixes so far have shown what the engine is there for."""
    return mixes is not None and len(results) >= mixes and all(results[-1]["books"]["moves"][move] for move in moves)


def run(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Start the engine, run the mixes, and end it."""
    engine = build(spec)
    try:
        scheduler = engine.engine_core.engine_core.scheduler
        count_pauses(scheduler)
        count_drafts(scheduler)
        note_recomputed(scheduler)
        note_cut(scheduler)
        results = []
        for mix in spec["mixes"]:
            ran = run_mix(engine, make_mix(**mix), spec)
            results.append({**ran, "books": books(engine, scheduler)})
            engine.reset_prefix_cache(reset_connector=True)
            if is_enough(results, **spec.get("enough", {})):
                break
        return results
    finally:
        engine.engine_core.shutdown()


def run_in_turn(specs: dict[str, Any], out_path: Path) -> None:
    """Run engines one after the other; what is known is written after each."""
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    outcomes = {}
    for name, spec in specs.items():
        print(f"engine {name}", flush=True)
        try:
            outcomes[name] = {"results": run(spec)}
        except Exception:  # for the test that asks for this one; the others go on
            outcomes[name] = {"error": traceback.format_exc()}
        out_path.write_text(json.dumps(outcomes))
        gc.collect()
        ensure_kv_transfer_shutdown()
        cleanup_dist_env_and_memory()


def main(spec_path: str, out_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text())
    if "engine_args" in spec:
        Path(out_path).write_text(json.dumps(run(spec)))
    else:
        run_in_turn(spec, Path(out_path))


if __name__ == "__main__":
    main(*sys.argv[1:])
