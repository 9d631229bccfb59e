"""Requests that come and go in a prefix-cached pool, without an engine: what they hit, and where what they use lies.

Two loads. *Chat*: conversations, each turn begins with all that was said before. *Long*: questions about documents.
How many requests run swings widely, so that the share of the pool that is in use passes every value often.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sin
from typing import Protocol

from layerkv.core.free_blocks import FreeBlocks
from layerkv.core.segments import SegmentLayout


class FreeQueue(Protocol):
    """What a pool asks of its free blocks."""

    def take(self, num_blocks: int) -> list[int]: ...
    def remove(self, block: int) -> None: ...
    def put_cached(self, blocks: Sequence[int]) -> None: ...
    def put_loose(self, blocks: Sequence[int]) -> None: ...


class LeastRecentlyUsed:
    """vLLM's order: blocks that cache nothing first, the last freed of them first; then the least recently used."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def take(self, num_blocks: int) -> list[int]:
        return [self._blocks.popitem(last=False)[0] for _ in range(num_blocks)]

    def remove(self, block: int) -> None:
        del self._blocks[block]

    def put_cached(self, blocks: Sequence[int]) -> None:
        self._blocks.update(dict.fromkeys(blocks))

    def put_loose(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block, last=False)


class PrefixPool:
    """vLLM's block pool in short: blocks in use are counted, whole ones are known by what they cache."""

    def __init__(self, num_blocks: int, free: FreeQueue) -> None:
        self.num_blocks = num_blocks
        self.free = free
        self.num_users = [1] * num_blocks
        self.num_used = num_blocks
        self.block_of: dict[object, int] = {}
        self.hash_of: dict[int, object] = {}
        self.give_back(list(range(num_blocks - 1, 0, -1)))  # block 0 is the null block

    def find(self, hashes: Sequence[object]) -> list[int]:
        found: list[int] = []
        for block_hash in hashes:
            if (block := self.block_of.get(block_hash)) is None:
                break
            found.append(block)
        return found

    def touch(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if self.num_users[block] == 0:
                self.free.remove(block)
                self.num_used += 1
            self.num_users[block] += 1

    def take(self, num_blocks: int) -> list[int]:
        taken = self.free.take(num_blocks)
        for block in taken:
            self.num_users[block] = 1
            self.block_of.pop(self.hash_of.pop(block, None), None)
        self.num_used += num_blocks
        return taken

    def name(self, blocks: Sequence[int], hashes: Sequence[object]) -> None:
        for block, block_hash in zip(blocks, hashes, strict=False):
            if block_hash not in self.block_of:
                self.block_of[block_hash] = block
                self.hash_of[block] = block_hash

    def give_back(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.num_users[block] -= 1
        freed = [block for block in reversed(blocks) if self.num_users[block] == 0]
        self.num_used -= len(freed)
        self.free.put_loose([block for block in freed if block not in self.hash_of])
        self.free.put_cached([block for block in freed if block in self.hash_of])


@dataclass(frozen=True)
class Load:
    """Sizes in blocks; ranges of uniform random numbers.

    Attributes:
        num_contexts: Conversations or documents that are alive at a time.
        begin: What a context begins with.
        ask: What a request adds to it.
        answer: What is made.
        turns: Requests until the context is replaced by another.
        grows: Whether what was asked and answered belongs to the context afterwards.
    """

    num_contexts: int
    begin: tuple[int, int]
    ask: tuple[int, int]
    answer: tuple[int, int]
    turns: tuple[int, int]
    grows: bool


CHAT = Load(num_contexts=26, begin=(10, 60), ask=(2, 20), answer=(5, 40), turns=(4, 16), grows=True)
LONG = Load(num_contexts=12, begin=(300, 900), ask=(1, 6), answer=(5, 25), turns=(30, 90), grows=False)


@dataclass
class Context:
    hashes: list[object]
    turns_left: int
    is_busy: bool = False


@dataclass(frozen=True)
class Figures:
    """What a run was seen to do.

    Attributes:
        hit: Of the prompt blocks, those that were cached.
        returnable: Of the free memory, what is in segments of which no block is in use: the mean of all samples.
        num_samples: Times at which the share in use passed the one that was asked for.
    """

    hit: float
    returnable: float
    num_samples: int


def churn(
    load: Load, *, segment_blocks: int, packs: bool, seed: int, steps: int, num_blocks: int = 8192, at: float = 0.3
) -> Figures:
    """Serve a load for so many steps, a block of every answer in each."""
    rng = random.Random(seed)
    layout = SegmentLayout(segment_blocks, num_blocks // segment_blocks)
    pool = PrefixPool(num_blocks, FreeBlocks(layout) if packs else LeastRecentlyUsed())
    ids = iter(range(1 << 60))
    contexts = [new_context(load, rng, ids) for _ in range(load.num_contexts)]
    running: list[tuple[int, int, Context, list[int], list[object]]] = []
    num_prompt = num_hit = 0
    shares: list[float] = []
    was_above = False
    for step in range(steps):
        while running and running[0][0] <= step:
            _, _, context, blocks, hashes = heapq.heappop(running)
            pool.name(blocks, hashes)
            pool.give_back(blocks)
            context.is_busy = False
            context.turns_left -= 1
            if load.grows:
                context.hashes = hashes
            if context.turns_left <= 0:
                contexts[contexts.index(context)] = new_context(load, rng, ids)
        wanted = (0.32 + 0.28 * sin(step / 60) + rng.uniform(-0.05, 0.05)) * num_blocks
        idle = [context for context in contexts if not context.is_busy]
        rng.shuffle(idle)
        while idle and pool.num_used < wanted:
            context = idle.pop()
            prompt = context.hashes + [next(ids) for _ in range(rng.randint(*load.ask))]
            answer = rng.randint(*load.answer)
            hits = pool.find(prompt)
            pool.touch(hits)
            blocks = hits + pool.take(len(prompt) - len(hits) + answer)
            num_prompt += len(prompt)
            num_hit += len(hits)
            context.is_busy = True
            hashes = prompt + [next(ids) for _ in range(answer - 1)]  # the last block is not whole
            heapq.heappush(running, (step + answer, next(ids), context, blocks, hashes))
        is_above = pool.num_used > at * num_blocks
        if was_above and not is_above and step > steps // 10:
            shares.append(returnable_share(pool, layout))
        was_above = is_above
    return Figures(num_hit / num_prompt, sum(shares) / len(shares), len(shares))


def new_context(load: Load, rng: random.Random, ids: Iterator[int]) -> Context:
    hashes: list[object] = [next(ids) for _ in range(rng.randint(*load.begin))]
    return Context(hashes, rng.randint(*load.turns))


def returnable_share(pool: PrefixPool, layout: SegmentLayout) -> float:
    """Of the free blocks, those in segments of which no block is in use."""
    empty = sum(not any(pool.num_users[block] for block in layout.blocks(s)) for s in range(layout.num_segments))
    return empty * layout.segment_blocks / (pool.num_blocks - pool.num_used)
