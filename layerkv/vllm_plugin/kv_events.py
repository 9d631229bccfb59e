"""KV events of the host prefix cache, for routers that send a prompt to where its prefix is.

vLLM publishes what its device cache holds; these say the same of host memory, with medium ``CPU`` and the same hashes.
An event goes out with the outputs of the step in which a request ended. Its blocks are stored by the plan of the next
step, before any hit of that step is loaded, so whoever comes because of the event finds them.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import MEDIUM_CPU, BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import (
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    to_event_extra_keys,
)

from layerkv.core.host_tier import HostTier

if TYPE_CHECKING:
    from vllm.v1.request import Request

_GROUP = 0  # the only one


class DescribedHash(bytes):
    """vLLM's hash of a block, and what an event says of that block.

    It is equal to the plain hash. The tier keeps it as its key, so a description lives as long as what it describes.
    """

    position: int
    parent: bytes | None
    tokens: array[int]
    extra_keys: tuple[Any, ...] | None
    lora: tuple[int | None, str | None]
    session_id: str | None


class HostPrefixEvents:
    """Describes the blocks that are about to be kept, and translates the tier's news.

    Args:
        tier: It keeps news from now on.
        block_tokens: Tokens of a block.
        spec_kind: What vLLM's events call our kind of KV cache.
        sliding_window: And its window in tokens.
    """

    def __init__(self, tier: HostTier, block_tokens: int, spec_kind: str, sliding_window: int | None) -> None:
        self._tier = tier
        self._news = tier.listen()
        self._block_tokens = block_tokens
        self._spec_kind = spec_kind
        self._sliding_window = sliding_window

    def describe(self, request: Request) -> list[Hashable]:
        """Hashes of a request's blocks, described as far as the tier does not know them."""
        hashes = request.block_hashes
        known = self._tier.known(hashes)
        return [
            block_hash if block is not None else self._described(request, index)
            for index, (block_hash, block) in enumerate(zip(hashes, known, strict=True))
        ]

    def take(self) -> list[KVCacheEvent]:
        """Events since the last call; removals come first."""
        gone, new = self._news.take()
        events: list[KVCacheEvent] = []
        if gone:
            hashes = [maybe_convert_block_hash(bytes(block_hash)) for block_hash in gone]  # type: ignore[call-overload]
            events.append(BlockRemoved(block_hashes=hashes, medium=MEDIUM_CPU, group_idx=_GROUP))
        events += map(self._stored, _runs(new))
        return events

    def _described(self, request: Request, index: int) -> DescribedHash:
        tokens, lora = self._block_tokens, request.lora_request
        first, end = index * tokens, (index + 1) * tokens
        described = DescribedHash(request.block_hashes[index])
        described.position = index
        described.parent = request.block_hashes[index - 1] if index else None
        described.tokens = array("i", request.all_token_ids[first:end])
        described.extra_keys = generate_block_hash_extra_keys(request, first, end, 0)[0]
        described.lora = (None, None) if lora is None else (lora.adapter_id, lora.name)
        described.session_id = request.session_id
        return described

    def _stored(self, run: list[DescribedHash]) -> BlockStored:
        first = run[0]
        return BlockStored(
            block_hashes=[maybe_convert_block_hash(bytes(block)) for block in run],
            parent_block_hash=None if first.parent is None else maybe_convert_block_hash(first.parent),
            token_ids=[token for block in run for token in block.tokens],
            block_size=self._block_tokens,
            lora_id=first.lora[0],
            medium=MEDIUM_CPU,
            lora_name=first.lora[1],
            extra_keys=to_event_extra_keys([block.extra_keys for block in run]),
            group_idx=_GROUP,
            kv_cache_spec_kind=self._spec_kind,
            kv_cache_spec_sliding_window=self._sliding_window,
            session_id=first.session_id,
        )


def _runs(new: Sequence[Hashable]) -> list[list[DescribedHash]]:
    """Blocks that follow each other, together; a run comes after the one that its first block continues.

    A router that derives its own hashes from tokens needs to know a block's parent first.
    """
    runs: list[list[DescribedHash]] = []
    ends: dict[bytes, list[DescribedHash]] = {}
    for block in sorted(new, key=attrgetter("position")):
        assert isinstance(block, DescribedHash)
        run = None if block.parent is None else ends.pop(block.parent, None)
        if run is None or run[0].session_id != block.session_id:
            run = []
            runs.append(run)
        run.append(block)
        ends[bytes(block)] = run
    return runs
