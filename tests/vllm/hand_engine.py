"""vLLM's real scheduler and block manager under layerkv, driven step by step, over a model whose KV is checked.

No engine process, no torch model, no copy threads. :class:`HandEngine` does what the engine core does between
``schedule`` and ``update_from_output``, and what the workers do with the scheduler's output and layerkv's step plan.
A test says when a step is scheduled and when its output is processed, so that it can abort, park, or make a load fail
at any point between; steps of any number may be in flight.

The model and its KV are those of :mod:`tests.vllm.checked_model`. Time stands still but for :data:`STEP_S` a step, so
every run of a test decides alike.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from layerkv.core.residency import Residency
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.snapshot import Admission, StoreAhead
from tests.vllm.checked_model import CheckedWorker, answer, truth

BLOCK_TOKENS = 16
ZONE_BLOCKS = 16
STEP_S = 0.01


@dataclass
class Step:
    """A step that has run and whose output has not been processed."""

    scheduled: Any
    output: Any

    @property
    def request_ids(self) -> set[str]:
        return set(self.scheduled.num_scheduled_tokens)


ALL_BLOCKS = 10**6


class HandEngine:
    """See the module.

    Set ``fail_hits``, ``fail_zone_hits`` or ``fail_fetches`` before :meth:`schedule` to make the loads of that step
    fail: nothing is copied, and the blocks are reported with the step's output (fetches after ``fetch_steps`` steps).
    Requests in ``held`` are neither started nor fetched, those in ``keep_in_zone`` are not parked after their first
    token.
    """

    def __init__(
        self,
        model: Path,
        *,
        ahead: bool = False,
        pool_blocks: int = 40,
        host_blocks: int = 200,
        fetch_steps: int = 1,
        extra_config: dict[str, Any] | None = None,
        **engine_args: Any,
    ) -> None:
        """Build the scheduler; ``ahead`` schedules each step before the last one's output is processed."""
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import (
            get_request_block_hasher,
            init_none_hash,
            resolve_kv_cache_block_sizes,
        )
        from vllm.v1.structured_output import StructuredOutputManager

        from layerkv.vllm_plugin.scheduler import LayerKVAsyncScheduler, LayerKVScheduler

        config, kv_cache_config = self._configs(model, pool_blocks, host_blocks, extra_config or {}, engine_args)
        scheduler_cls = LayerKVAsyncScheduler if ahead else LayerKVScheduler
        self._now_s = 1000.0
        alignment, hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, config)
        with self._at_its_time():  # else how long it has been idle would depend on how long the machine has been up
            self.scheduler: Any = scheduler_cls(
                config,
                kv_cache_config,
                StructuredOutputManager(config),
                alignment,
                hash_block_size=hash_tokens,
                log_stats=False,
            )
        self.scheduler.defer_block_free = ahead  # by hand: the CPU platform turns asynchronous scheduling off
        self.ledger = self.scheduler.connector.scheduler_side.ledger
        sizes = self.scheduler.connector.scheduler_side.sizes
        host_sizes = self.scheduler.connector.scheduler_side.host_sizes
        assert sizes is not None or self.ledger.geometry.pool_blocks == pool_blocks + 1
        hash_fn = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        controller = self.scheduler._controller
        self._policy_decides = controller.decide
        controller.decide = self._decide
        for name in ("is_quiet", "stands"):
            setattr(controller, name, self._unless_forced(getattr(controller, name)))
        self._forced: dict[str, tuple[str, ...]] = {}
        self._forced_tokens: int | None = None
        self.held: set[str] = set()
        self.keep_in_zone: set[str] = set()
        self._hasher = get_request_block_hasher(hash_tokens, hash_fn)
        self._is_ahead = ahead
        self.in_flight: deque[Step] = deque()
        self.fail_hits = self.fail_zone_hits = self.fail_fetches = False
        self.requests: dict[str, Any] = {}
        self.tokens: dict[str, list[int]] = {}
        self.worker = self._worker(
            fetch_steps=fetch_steps,
            gets_all_tokens=ahead,
            segments=None if sizes is None else sizes.plan,
            host_layout=None if host_sizes is None else host_sizes.layout,
        )
        self.worker.num_drafts = self.scheduler.num_spec_tokens

    def _configs(self, *args: Any) -> tuple[Any, Any]:
        return configs(*args)

    def _worker(self, **options: Any) -> CheckedWorker:
        return CheckedWorker(self.ledger.geometry, self.ledger.host.count, **options)

    def _answer(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        return answer(prompt, num_tokens)

    # What clients do -----------------------------------------------------------------------------------------

    def add(
        self, name: str, prompt: Sequence[int], max_tokens: int = 8, *, is_session: bool = False, adapter: int = 0
    ) -> None:
        """A request arrives; a session waits, once answered, for its next input and keeps its KV. 0: no adapter."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        params.update_from_generation_config({}, None)
        self.tokens[name] = []
        with self._at_its_time():
            self.requests[name] = Request(
                name,
                list(prompt),
                params,
                None,
                lora_request=LoRARequest(f"adapter{adapter}", adapter, "nowhere") if adapter else None,
                block_hasher=self._hasher,
                resumable=is_session,
            )
            self.scheduler.add_request(self.requests[name])

    def abort(self, *names: str) -> None:
        """Clients hang up. Between steps and while one runs, as the engine core does."""
        from vllm.v1.request import RequestStatus

        with self._at_its_time():
            self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)

    def reset_prefix_cache(self, *, reset_running_requests: bool = False) -> bool:
        """As ``/reset_prefix_cache`` does, between steps."""
        with self._at_its_time():
            return bool(self.scheduler.reset_prefix_cache(reset_running_requests))

    # What the policy decides ---------------------------------------------------------------------------------

    def force(self, *, prefill_tokens: int | None = None, **changes: Iterable[str]) -> None:
        """The next step is decided as the policy would, but for these requests.

        Args:
            prefill_tokens: So many tokens of prompts are to be computed.
            changes: ``park``, ``recompute``, ``store_ahead``: to do that with besides, if they run by then;
                ``layered``: whoever of these starts does so in the lane zone; ``fetch``: parked ones that come back.
        """
        self._forced = {name: tuple(request_ids) for name, request_ids in changes.items()}
        self._forced_tokens = prefill_tokens

    def _unless_forced(self, says: Callable[..., bool]) -> Callable[..., bool]:
        return lambda *args: not self._forced and self._forced_tokens is None and not self.held and says(*args)

    def _decide(self, *args: Any, **kwargs: Any) -> Any:
        for name in ("is_startable", "is_fetchable"):
            kwargs[name] = self._unless_held(kwargs[name])
        kwargs["stays_fetchable"] &= not self.held
        snapshot, decision = self._policy_decides(*args, **kwargs)
        forced, self._forced = self._forced, {}
        layered, fetched = forced.pop("layered", ()), forced.pop("fetch", ())
        admit = tuple(
            Admission(a.request_id, True, *self._layered_room(a.request_id)) if a.request_id in layered else a
            for a in decision.admit
        )
        fetch = (*(r for r in decision.fetch if r not in fetched), *fetched)
        running = {request.request_id for request in self.scheduler.running}
        forced = {name: tuple(r for r in more if r in running) for name, more in forced.items()}
        taken = {request_id for more in forced.values() for request_id in more}
        moves = {
            name: (
                *(r for r in _ids(getattr(decision, name)) if r not in taken and r not in self.keep_in_zone),
                *forced.get(name, ()),
            )
            for name in ("park", "recompute", "store_ahead")
        }
        decided = {ahead.request_id: ahead for ahead in decision.store_ahead}
        moves["store_ahead"] = tuple(decided.get(r, StoreAhead(r, ALL_BLOCKS)) for r in moves["store_ahead"])
        moves["drop_copy"] = tuple(r for r in decision.drop_copy if r not in taken)
        moves["pause"] = tuple(r for r in decision.pause if r not in taken)
        moves["resume"] = tuple(r for r in decision.resume if r not in taken)
        reasons = {**dict.fromkeys((*taken, *fetched), Reason.MAKES_ROOM), **decision.reasons}
        decision = replace(decision, admit=admit, fetch=fetch, reasons=reasons, **moves)
        if self._forced_tokens is not None:
            decision, self._forced_tokens = replace(decision, prefill_tokens=self._forced_tokens), None
        return snapshot, decision

    def _unless_held(self, may_go_on: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda view: view.request_id not in self.held and may_go_on(view)

    def _layered_room(self, name: str) -> tuple[int, int]:
        """Blocks in the zone and in host memory for a whole prompt."""
        found = self.scheduler.kv_cache_manager.get_computed_blocks(self.requests[name])[0].blocks[0]
        num_blocks = -(-self.requests[name].num_tokens // BLOCK_TOKENS)
        return num_blocks - len(found), num_blocks

    def residency(self, name: str) -> Residency | None:
        """Where layerkv believes a request's KV to be."""
        return self.ledger.residency.get(name)

    # Steps ---------------------------------------------------------------------------------------------------

    def schedule(self) -> Step:
        """Schedule a step and run it."""
        self._now_s += STEP_S
        with self._at_its_time():
            scheduled = self.scheduler.schedule()
        output = self.worker.run(
            scheduled,
            fail_hits=self.fail_hits,
            fail_zone_hits=self.fail_zone_hits,
            fail_fetches=self.fail_fetches,
        )
        step = Step(scheduled, output)
        self.in_flight.append(step)
        self.fail_hits = self.fail_zone_hits = self.fail_fetches = False
        return step

    def process(self) -> dict[str, list[int]]:
        """Process the oldest step's output; what it delivered, all of which must be right."""
        step = self.in_flight.popleft()
        delivered: dict[str, list[int]] = {}
        with self._at_its_time():
            outputs = self.scheduler.update_from_output(step.scheduled, step.output)
        if self.worker.num_drafts and not self._is_ahead:
            self.scheduler.update_draft_token_ids(self.worker.drafts(step.request_ids))
        for of_client in outputs.values():
            for output in of_client.outputs:
                delivered[output.request_id] = output.new_token_ids
                self.tokens[output.request_id] += output.new_token_ids
        self.ledger.check()
        for name in delivered:
            expected = self._answer(self.requests[name].prompt_token_ids, len(self.tokens[name]))
            assert self.tokens[name] == expected, f"{name} was answered wrong tokens"
        return delivered

    def step(self) -> None:
        """As the engine core does: schedule, and process the oldest output once enough steps are in flight."""
        self.schedule()
        if len(self.in_flight) >= (2 if self._is_ahead else 1):
            self.process()

    def drain(self) -> None:
        """Process all that is in flight."""
        while self.in_flight:
            self.process()

    def run(self, most_steps: int = 500) -> None:
        """Step until every request has its answer and every block is given back; check all KV that is kept."""
        for _ in range(most_steps):
            if not self.scheduler.has_requests():
                break
            self.step()
        else:
            raise AssertionError(f"{list(self.scheduler.requests)} do not come to an end")
        self.drain()
        self.schedule()  # stores what the last ones to finish left
        self.drain()
        for name, request in self.requests.items():
            if request.get_finished_reason().name == "LENGTH":
                assert len(self.tokens[name]) == request.max_tokens, f"{name} lacks tokens"
        assert self.ledger.num_host_blocks_used == self.ledger.zone.num_taken == 0
        assert self.scheduler.kv_cache_manager.usage == 0
        self.check_kept_kv()

    def check_kept_kv(self) -> None:
        """Everything that a later request may find is right: both prefix caches, and the copies of parked requests.

        Not while a load that fails is in flight, nor while stores are planned and not scheduled.
        """
        from vllm.v1.core.kv_cache_utils import get_block_hash

        self.worker.end_background_stores()
        expected: dict[Any, np.ndarray] = {}
        for request in self.requests.values():
            kv = truth(request.all_token_ids)
            expected |= {h: kv[i * BLOCK_TOKENS :][:BLOCK_TOKENS] for i, h in enumerate(request.block_hashes)}
        for block in self.scheduler.kv_cache_manager.block_pool.blocks:
            if block.block_hash is not None:
                found, right = self.worker.device[block.block_id], expected[get_block_hash(block.block_hash)]
                assert np.array_equal(found, right), f"vLLM's prefix cache holds wrong KV in block {block.block_id}"
        for block_hash, host_block in self.ledger.host._block_of.items():
            assert np.array_equal(self.worker.host[host_block], expected[block_hash]), "a host prefix holds wrong KV"
        for name in self.ledger.residency:
            if (num_tokens := self.ledger.parked_tokens(name)) > 0:
                kv = self.worker.host[self.ledger._copies[name].blocks].reshape(-1)[:num_tokens]
                right = truth(self.requests[name].all_token_ids[:num_tokens])
                assert np.array_equal(kv, right), f"{name} is parked with wrong KV"

    def forget_on_device(self) -> None:
        """What nobody holds in vLLM's prefix cache has given way; prefixes in host memory have not."""
        pool = self.scheduler.kv_cache_manager.block_pool
        pool.evict_blocks({block.block_id for block in pool.blocks if block.ref_cnt == 0})

    def _at_its_time(self) -> Any:
        return mock.patch.multiple(time, monotonic=lambda: self._now_s, time=lambda: self._now_s)


def configs(
    model: Path, pool_blocks: int, host_blocks: int, extra_config: dict[str, Any], engine_args: dict[str, Any]
) -> tuple[Any, Any]:
    """VllmConfig and KVCacheConfig as an engine core would have them after start-up."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    from layerkv.vllm_plugin.elastic_setup import elastic_sizes
    from layerkv.vllm_plugin.host_memory import WorkerMemory
    from layerkv.vllm_plugin.setup import engine_config, geometry_request
    from layerkv.vllm_plugin.spec import ours
    from tests.vllm.engines_in_turn import flag

    full = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=2, head_size=64, dtype=torch.float32)
    layers = [f"layers.{i}.attn" for i in range(6)]
    host_bytes = host_blocks * len(layers) * full.page_size_bytes
    extra = {"host_memory": f"{host_bytes}B", "zone_tokens": ZONE_BLOCKS * BLOCK_TOKENS, **extra_config}
    defaults = {"max_model_len": 256, "max_num_batched_tokens": 256, "block_size": BLOCK_TOKENS}
    config = EngineArgs(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        kv_transfer_config=flag(**extra),
        **{**defaults, **engine_args},
    ).create_engine_config()
    spec, num_blocks = ours(full, WorkerMemory.here()), pool_blocks + 1 + ZONE_BLOCKS  # with the null block
    if (ours := engine_config(config)).is_elastic:
        sizes = elastic_sizes(config, ours, geometry_request(config, ours, spec, len(layers)))
        spec, num_blocks = replace(spec, segments=sizes.plan), sizes.geometry.total_blocks
    config.cache_config.num_gpu_blocks = num_blocks
    return config, KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(layers, spec)])


def _ids(verdicts: Iterable[Any]) -> Iterable[str]:
    return (verdict if isinstance(verdict, str) else verdict.request_id for verdict in verdicts)
