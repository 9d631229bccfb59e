"""A worker without torch: a made-up model over KV that can be checked, and the copies of layerkv's step plans.

A token's KV is one number, a digest over the KV of all tokens before it *as read through the block table* and over
the token itself; the next token is drawn from a digest over all KV. A single wrong number anywhere makes everything
wrong that is computed after it, and what is right is known without running anything (:func:`truth`, :func:`answer`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentLayout, SegmentPlan
from layerkv.core.transfer import BlockRun, StepPlan
from layerkv.device.store_watch import host_blocks

VOCABULARY = 500
POISON = -1


def truth(tokens: Sequence[int]) -> np.ndarray:
    """The KV of each token, if nothing goes wrong."""
    kv = np.zeros(len(tokens), np.int64)
    for position, token in enumerate(tokens):
        kv[position] = _kv_of(kv[:position], token)
    return kv


def answer(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The tokens that follow a prompt, if nothing goes wrong."""
    tokens, kv = list(prompt), [*truth(prompt)]
    while len(tokens) < len(prompt) + num_tokens:
        tokens.append(_sample(np.array(kv, np.int64)))
        kv.append(_kv_of(np.array(kv, np.int64), tokens[-1]))
    return tokens[len(prompt) :]


def _kv_of(before: np.ndarray, token: int) -> int:
    return _digest(before, token)


def _sample(kv: np.ndarray) -> int:
    return _digest(kv, -1) % VOCABULARY


def _digest(kv: np.ndarray, end: int) -> int:
    # No CRC: that of a message with its own CRC at the end is the same for all messages.
    return int.from_bytes(
        hashlib.blake2b(kv.tobytes() + end.to_bytes(8, "little", signed=True), digest_size=7).digest()
    )


@dataclass
class _Known:
    """What the worker knows of a request: of which tokens KV is there to stay, and what it drafted last, besides."""

    num_prompt: int
    tokens: list[int]
    block_ids: list[int]
    num_valid: int = 0
    drafts: list[int] = field(default_factory=list)


class CheckedWorker:
    """See the module. All copies of a step are made in it, those of a fetch ``fetch_steps`` steps after it began; those
    in the background as late as they may be: when a step settles, or something that they write is loaded.

    Lane-zone blocks are overwritten after each step, as other layers would; memory nobody wrote is poisoned.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        num_host_blocks: int,
        *,
        fetch_steps: int,
        gets_all_tokens: bool,
        segments: SegmentPlan | None = None,
        host_layout: SegmentLayout | None = None,
    ) -> None:
        """``gets_all_tokens``: a request that was not in the last step has its tokens from the scheduler, as in vLLM's
        worker under asynchronous scheduling.

        Set ``num_drafts`` for speculative decoding: it drafts so many tokens, of which some at the beginning are right,
        and under asynchronous scheduling it alone knows which. Set ``num_places`` for vLLM's V2 model runner: it keeps
        the state of so many requests, and none of one that was preempted.
        """
        self.num_places: int | None = None
        self.num_drafts = 0
        self.num_wrong = self.num_right = 0  # drafts that were computed
        self._draw = random.Random(0)
        self.device = np.full((geometry.total_blocks, geometry.block_tokens), POISON, np.int64)
        self.host = np.full((num_host_blocks, geometry.block_tokens), POISON, np.int64)
        self._block_tokens, self._first_zone_block = geometry.block_tokens, geometry.pool_blocks
        self._fetch_steps, self._gets_all_tokens = fetch_steps, gets_all_tokens
        self._known: dict[str, _Known] = {}
        self._fetching: list[tuple[int, str, tuple[BlockRun, ...], bool]] = []  # (steps left, ...)
        self._background: list[BlockRun] = []
        self._segments = segments
        self.mapped = np.ones(geometry.total_blocks, bool)
        self._answers: list[tuple[int, int, bool]] = []  # (steps left, segment, could not be mapped)
        self._host_layout = host_layout
        self.host_put = np.ones(num_host_blocks, bool)
        """Host blocks that may be used: of segments that this worker was told are in service."""
        if host_layout is not None:
            self.host_put[host_layout.segment_blocks :] = False
        self._host_answers: list[tuple[int, int]] = []  # (steps left, segment)
        self.answer_steps = 1
        self.fail_maps = False  # where they are mapped
        self._is_touched = segments is not None and segments.by_touch
        if segments is not None:
            self.mapped[segments.num_mapped * segments.layout.segment_blocks : geometry.pool_blocks] = False

    def run(
        self, scheduled: Any, *, fail_hits: bool = False, fail_zone_hits: bool = False, fail_fetches: bool = False
    ) -> Any:
        """One step; what vLLM's workers would answer."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        from layerkv.vllm_plugin.failed_copies import FailedCopies

        plan: StepPlan = scheduled.kv_connector_metadata.plan
        invalid: set[int] = set()
        for segment in plan.moves.maps:
            if self._is_touched or not self.fail_maps:
                self._set_mapped(segment, is_mapped=True)
        for segment in plan.host_moves.maps:
            self._set_host_put(segment, is_put=True)
        if plan.settle:
            self.end_background_stores()
        self._background += plan.ahead
        self._store(plan.parks)
        self._load(plan.hits, invalid if fail_hits else None)
        assert plan.is_layered or not (plan.loads or plan.zone_hits), "no other step loads layer by layer"
        self._load(plan.loads, None)
        self._load(plan.zone_hits, set() if fail_zone_hits else None)
        for fetch in plan.fetches:
            self._fetching.append((self._fetch_steps, fetch.request_id, fetch.runs, fail_fetches))
        sampled = self._compute(scheduled)
        self._store(plan.stores)
        for segment in plan.moves.unmaps:
            self.end_background_stores()
            self._set_mapped(segment, is_mapped=False)
        for segment in plan.host_moves.unmaps:
            self.end_background_stores()
            self._set_host_put(segment, is_put=False)
        self.device[self._first_zone_block :] = POISON  # the lanes have held other layers since
        self._fetching = [(left - 1, *rest) for left, *rest in self._fetching]
        arrived = [fetch for fetch in self._fetching if fetch[0] <= 0]
        self._fetching = [fetch for fetch in self._fetching if fetch[0] > 0]
        for _, _, runs, fails in arrived:
            self._load(runs, invalid if fails else None)
        received = KVConnectorOutput(
            finished_recving={fetch[1] for fetch in arrived} or None, invalid_block_ids=invalid
        )
        if fail_zone_hits and plan.zone_hits:  # a worker tells of all that its layers wanted to load
            unloaded = frozenset(host_blocks((*plan.loads, *plan.zone_hits)))
            received.kv_connector_worker_meta = FailedCopies(unloaded=unloaded)
        if plan.moves or self._answers or plan.host_moves or self._host_answers:
            answers = self._take_answers(plan)
            assert answers is None or received.kv_connector_worker_meta is None
            received.kv_connector_worker_meta = answers or received.kv_connector_worker_meta
        names = list(sampled)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=list(sampled.values()),
            kv_connector_output=None if received.is_empty() else received,
        )

    def _set_mapped(self, segment: int, *, is_mapped: bool) -> None:
        assert self._segments is not None
        blocks = self._segments.layout.blocks(segment)
        assert not is_mapped or not self.mapped[blocks].any(), "mapped twice"
        self.mapped[blocks] = is_mapped
        self.device[blocks] = POISON

    def _set_host_put(self, segment: int, *, is_put: bool) -> None:
        assert self._host_layout is not None
        blocks = self._host_layout.blocks(segment)
        assert not is_put or not self.host_put[blocks].any(), "put twice"
        self.host_put[blocks] = is_put
        self.host[blocks] = POISON

    def _take_answers(self, plan: StepPlan) -> Any:
        from layerkv.vllm_plugin.segment_answers import SegmentAnswer, SegmentAnswers

        if not self._is_touched:
            self._answers += [(self.answer_steps, segment, self.fail_maps) for segment in plan.moves.maps]
        self._answers += [(self.answer_steps, segment, False) for segment in plan.moves.unmaps]
        self._answers = [(left - 1, segment, has_failed) for left, segment, has_failed in self._answers]
        ended = [SegmentAnswer(segment, 0, has_failed) for left, segment, has_failed in self._answers if left <= 0]
        self._answers = [entry for entry in self._answers if entry[0] > 0]
        self._host_answers += [(self.answer_steps, segment) for segment in plan.host_moves.unmaps]
        self._host_answers = [(left - 1, segment) for left, segment in self._host_answers]
        of_host = [SegmentAnswer(segment, 0) for left, segment in self._host_answers if left <= 0]
        self._host_answers = [entry for entry in self._host_answers if entry[0] > 0]
        return SegmentAnswers(tuple(ended), tuple(of_host)) if ended or of_host else None

    def end_background_stores(self) -> None:
        """Those that were planned so far."""
        self._store(self._background)
        self._background = []

    def _compute(self, scheduled: Any) -> dict[str, list[int]]:
        is_v2 = self.num_places is not None
        gone = (
            scheduled.finished_req_ids | (scheduled.preempted_req_ids or set()) if is_v2 else scheduled.finished_req_ids
        )
        for name in gone:
            self._known.pop(name, None)
        starts: dict[str, int] = {}
        for new in scheduled.scheduled_new_reqs:
            tokens = new.prefill_token_ids if is_v2 else new.prompt_token_ids
            self._known[new.req_id] = _Known(len(new.prompt_token_ids), list(tokens), list(new.block_ids[0]))
            starts[new.req_id] = self._known[new.req_id].num_valid = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for index, name in enumerate(cached.req_ids):
            known, blocks = self._known[name], cached.new_block_ids[index]
            starts[name], num_output = cached.num_computed_tokens[index], cached.num_output_tokens[index]
            del known.tokens[known.num_prompt + num_output :]  # were discarded
            if name in cached.resumed_req_ids:
                known.block_ids = []
                known.num_valid = starts[name]
            if self._gets_all_tokens and num_output and name in cached.all_token_ids:
                known.tokens = list(cached.all_token_ids[name])
            known.block_ids += blocks[0] if blocks is not None else ()
        assert self.num_places is None or len(self._known) <= self.num_places
        sampled: dict[str, list[int]] = {}
        for name, num_tokens in scheduled.num_scheduled_tokens.items():
            known = self._known[name]
            # Of drafts in flight, the scheduler does not know yet which were right.
            start = min(starts[name], known.num_valid) if self.num_drafts else starts[name]
            drafts = self._drafts_of(known, scheduled.scheduled_spec_decode_tokens.get(name, ()))
            num_sure = start + num_tokens - len(drafts)
            tokens = [*known.tokens[:num_sure], *drafts]
            assert self.mapped[known.block_ids].all(), f"{name} computes in memory that is not there"
            kv = self.device[known.block_ids].reshape(-1)[: start + num_tokens].copy()
            for position in range(start, start + num_tokens):
                kv[position] = _kv_of(kv[:position], tokens[position])
                block, offset = divmod(position, self._block_tokens)
                self.device[known.block_ids[block], offset] = kv[position]
            sampled[name] = []
            known.num_valid = num_sure
            if num_sure == len(known.tokens):
                sampled[name] = [_sample(kv[:num_sure])]
                while (num_right := len(sampled[name]) - 1) < len(drafts) and drafts[num_right] == sampled[name][-1]:
                    sampled[name].append(_sample(kv[: num_sure + num_right + 1]))
                known.tokens += sampled[name]
                known.num_valid += num_right
                self.num_right, self.num_wrong = self.num_right + num_right, self.num_wrong + len(drafts) - num_right
                known.drafts = self._draft(known.tokens)
        return sampled

    def _drafts_of(self, known: _Known, scheduled: Sequence[int]) -> list[int]:
        """The scheduler says how many; which, only if no step was in flight when it did."""
        return known.drafts[: len(scheduled)] if self._gets_all_tokens and known.drafts else list(scheduled)

    def _draft(self, tokens: Sequence[int]) -> list[int]:
        if not self.num_drafts:
            return []
        right = answer(tokens, self.num_drafts)
        num_right = self._draw.randint(0, self.num_drafts)
        return [*right[:num_right], *((token + 1) % VOCABULARY for token in right[num_right:])]

    def drafts(self, names: Iterable[str]) -> Any:
        """What it drafted last, as the engine core tells the scheduler where no step is in flight."""
        from vllm.v1.outputs import DraftTokenIds

        known = {name: self._known[name].drafts for name in names if name in self._known}
        return DraftTokenIds(list(known), list(known.values()))

    def _store(self, runs: Iterable[BlockRun]) -> None:
        for device, host, length in runs:
            assert self.mapped[device : device + length].all(), "memory is stored that is not there"
            assert self.host_put[host : host + length].all(), "stored into host memory that is not there"
            self.host[host : host + length] = self.device[device : device + length]

    def _load(self, runs: Sequence[BlockRun], failed: set[int] | None) -> None:
        if not host_blocks(runs).isdisjoint(host_blocks(self._background)):
            self.end_background_stores()
        for device, host, length in runs:
            assert self.mapped[device : device + length].all(), "loaded into memory that is not there"
            assert self.host_put[host : host + length].all(), "host memory is loaded that is not there"
            self.device[device : device + length] = POISON if failed is not None else self.host[host : host + length]
            if failed is not None:
                failed.update(range(device, device + length))
