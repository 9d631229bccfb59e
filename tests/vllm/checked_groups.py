"""The checked worker and the hand-driven engine of models with several KV-cache groups.

As :mod:`tests.vllm.checked_model`: a token has one number of KV in each group, a digest over all that it reads in *all*
groups, through their block tables, and over itself. A state is such a number of the last token alone. Whoever reads a
block that was given back, or one that holds another's KV, computes wrong tokens from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerkv.core.groups import NULL_BLOCK, Group, host_blocks
from layerkv.device.lane_schedule import device_blocks
from tests.vllm.checked_model import VOCABULARY, CheckedWorker, _digest
from tests.vllm.hand_engine import BLOCK_TOKENS, ZONE_BLOCKS, HandEngine

WINDOW, CHUNK = 40, 48
WIDE_BLOCK_TOKENS = 2 * BLOCK_TOKENS
MAX_TOKENS = 256


class GroupsModel:
    """What each token's KV is, and which tokens follow, if nothing goes wrong."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups
        self._answers: dict[tuple[int, ...], tuple[list[int], np.ndarray]] = {}

    def reads(self, group: Group, position: int) -> range:
        """Positions whose KV the token at this one reads: of a state, the last one."""
        if group.is_state:
            return range(max(position - 1, 0), position)
        if group.window:
            return range(max(position - group.window + 1, 0), position)
        if group.chunk:
            return range(position // group.chunk * group.chunk, position)
        return range(position)

    def kv(self, read: Sequence[np.ndarray], token: int) -> list[int]:
        """A token's KV in each group, by what it reads in each."""
        seen = np.array([_digest(np.concatenate(list(read)), token)], np.int64)
        return [_digest(seen, index) for index in range(len(self.groups))]

    def sample(self, read: Sequence[np.ndarray]) -> int:
        return _digest(np.concatenate(list(read)), -1) % VOCABULARY

    def truth(self, tokens: Sequence[int]) -> np.ndarray:
        """KV of each group and token."""
        kv = np.zeros((len(self.groups), len(tokens)), np.int64)
        for position, token in enumerate(tokens):
            kv[:, position] = self.kv(self.read_at(kv, position), token)
        return kv

    def read_at(self, kv: np.ndarray, position: int) -> list[np.ndarray]:
        ranges = [self.reads(group, position) for group in self.groups]
        return [kv[index, each.start : each.stop] for index, each in enumerate(ranges)]

    def answer(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        known = self._answers.get(tuple(prompt))
        tokens, kv = known or (list(prompt), self.truth(prompt))
        while len(tokens) < len(prompt) + num_tokens:
            tokens.append(self.sample(self.read_at(kv, len(tokens))))
            new = self.kv(self.read_at(kv, len(tokens) - 1), tokens[-1])
            kv = np.concatenate((kv, np.array(new, np.int64)[:, None]), axis=1)
        self._answers[tuple(prompt)] = tokens, kv
        return tokens[len(prompt) : len(prompt) + num_tokens]


@dataclass
class _Known:
    num_prompt: int
    tokens: list[int]
    tables: list[list[int]]


class GroupsWorker(CheckedWorker):
    """See the module. What the scheduler says is to be zeroed is, after the parks of the step."""

    def __init__(self, model: GroupsModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._model = model

    def _place(self, index: int, tables: Sequence[Sequence[int]], position: int) -> tuple[int, int]:
        group = self._model.groups[index]
        block = tables[index][position // group.block_tokens]
        assert block != NULL_BLOCK, f"group {index} has given back the block of token {position}, which is read"
        return block, 0 if group.is_state else position % group.block_tokens

    def _compute(self, scheduled: Any) -> dict[str, list[int]]:
        model, plan = self._model, scheduled.kv_connector_metadata.plan
        zeroed = scheduled.new_block_ids_to_zero or ()
        assert all(block < self._first_zone_block for block in zeroed), "a lane is zeroed, which is other layers' too"
        filled = {block for _, _, runs, _ in self._fetching for block in device_blocks(runs)}
        assert filled.isdisjoint(zeroed), "a block is zeroed that a fetch fills, which begins before that"
        self.device[list(zeroed)] = 0
        for name in scheduled.finished_req_ids:
            self._known.pop(name, None)
        starts: dict[str, int] = {}
        for new in scheduled.scheduled_new_reqs:
            tables = [list(table) for table in new.block_ids]
            self._known[new.req_id] = _Known(len(new.prompt_token_ids), list(new.prompt_token_ids), tables)  # type: ignore[assignment]
            starts[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for index, name in enumerate(cached.req_ids):
            known: Any = self._known[name]
            starts[name], num_output = cached.num_computed_tokens[index], cached.num_output_tokens[index]
            del known.tokens[known.num_prompt + num_output :]
            if name in cached.resumed_req_ids:
                known.tables = [[] for _ in model.groups]
            if self._gets_all_tokens and num_output and name in cached.all_token_ids:
                known.tokens = list(cached.all_token_ids[name])
            for table, more in zip(known.tables, cached.new_block_ids[index] or [()] * len(model.groups), strict=True):
                table += more
        sampled: dict[str, list[int]] = {}
        for name, num_tokens in scheduled.num_scheduled_tokens.items():
            known = self._known[name]
            end = starts[name] + num_tokens
            in_zone = any(block >= self._first_zone_block for table in known.tables for block in table)
            assert plan.is_layered or not in_zone, f"{name} computes in lanes, and the plan does not say so"
            for position in range(starts[name], end):
                new_kv = model.kv(self._read(known.tables, position), known.tokens[position])
                for index, value in enumerate(new_kv):
                    self.device[self._place(index, known.tables, position)] = value
            sampled[name] = []
            if end == len(known.tokens):
                sampled[name] = [model.sample(self._read(known.tables, end))]
                known.tokens += sampled[name]
        return sampled

    def _read(self, tables: Sequence[Sequence[int]], position: int) -> list[np.ndarray]:
        found = []
        for index, group in enumerate(self._model.groups):
            reads = self._model.reads(group, position)
            positions = np.arange(reads.start, reads.stop)
            blocks = np.array(tables[index], np.int64)[positions // group.block_tokens]
            assert (blocks != NULL_BLOCK).all(), f"group {index} has given back a block that token {position} reads"
            found.append(self.device[blocks, 0 if group.is_state else positions % group.block_tokens])
        return found


class GroupsEngine(HandEngine):
    """A hand-driven engine of a model with two layers of each of these kinds: full, window, chunk, state, and wide: a
    window whose blocks have twice as many tokens as others'."""

    def __init__(self, model: Path, *, kinds: Sequence[str], **options: Any) -> None:
        self._kinds = kinds
        super().__init__(model, **options)

    def _configs(self, *args: Any) -> tuple[Any, Any]:
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

        model, pool_blocks, host_blocks, extra_config, engine_args = args
        config, plain = super()._configs(model, pool_blocks, host_blocks // 3, extra_config, engine_args)
        full = plain.kv_cache_groups[0].kv_cache_spec
        groups = [
            KVCacheGroupSpec([f"layers.{i}.{kind}.{slot}" for slot in range(2)], _spec(kind, full))
            for i, kind in enumerate(self._kinds)
        ]
        num_ids = sum(
            ZONE_BLOCKS * BLOCK_TOKENS // group.kv_cache_spec.block_size
            for kind, group in zip(self._kinds, groups, strict=True)
            if kind != "state" and extra_config.get("mode") != "resident"
        )
        num_blocks = pool_blocks + 1 + num_ids
        config.cache_config.num_gpu_blocks = num_blocks
        return config, KVCacheConfig(num_blocks, [], groups)

    def _worker(self, **options: Any) -> CheckedWorker:
        self.model = GroupsModel(self.ledger.geometry.groups)
        return GroupsWorker(self.model, self.ledger.geometry, self.ledger.host.count, **options)

    def _layered_room(self, name: str) -> tuple[int, int]:
        geometry, num_tokens = self.ledger.geometry, self.requests[name].num_tokens
        return -(-num_tokens // geometry.block_tokens), host_blocks(geometry.groups, num_tokens)

    def _answer(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        return self.model.answer(prompt, num_tokens)

    def check_kept_kv(self) -> None:
        """The copies of parked requests are right."""
        self.worker.end_background_stores()
        for name in self.ledger.residency:
            if (num_tokens := self.ledger.parked_tokens(name)) > 0:
                right = self.model.truth(self.requests[name].all_token_ids[:num_tokens])
                copy = self.ledger._copies[name]
                for index, group in enumerate(self.model.groups):
                    for position in self.model.reads(group, num_tokens):
                        [host] = copy.of(
                            index, range(position // group.block_tokens, position // group.block_tokens + 1)
                        )
                        offset = 0 if group.is_state else position % group.block_tokens
                        assert self.worker.host[host, offset] == right[index, position], f"{name} is parked wrong"


def _spec(kind: str, full: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, MambaSpec, SlidingWindowSpec

    from layerkv.vllm_plugin.spec import ours

    if kind == "full":
        return full
    if kind == "state":
        page = full.page_size_bytes
        return MambaSpec(block_size=MAX_TOKENS, shapes=((4,),), dtypes=(torch.float32,), page_size_padded=page)
    shape = {"block_size": BLOCK_TOKENS, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    if kind == "wide":
        shape |= {"block_size": WIDE_BLOCK_TOKENS, "head_size": 32}
    if kind in ("window", "wide"):
        return ours(SlidingWindowSpec(sliding_window=WINDOW, **shape), full.memory)
    assert kind == "chunk"
    return ours(ChunkedLocalAttentionSpec(attention_chunk_size=CHUNK, **shape), full.memory)
