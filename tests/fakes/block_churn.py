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
from statistics import mean
from typing import Any, Protocol

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


class ChurnedPool(Protocol):
    """A prefix-cached pool under a load. What a block is, and what tells it, are the pool's."""

    num_blocks: int

    @property
    def num_used(self) -> int: ...
    def find(self, hashes: Sequence[int]) -> list[Any]:
        """The blocks that cache the longest known beginning."""
        ...

    def touch(self, blocks: Sequence[Any]) -> None:
        """A request begins with these, which are cached."""
        ...

    def take(self, num_blocks: int) -> list[Any]:
        """Blocks for one request."""
        ...

    def name(self, blocks: Sequence[Any], hashes: Sequence[int]) -> None:
        """All of a request's blocks but the last are whole, and found by these from now on."""
        ...

    def give_back(self, blocks: Sequence[Any]) -> None:
        """A request has ended."""
        ...

    def is_used(self, block_id: int) -> bool:
        """Whether a request has it."""
        ...


class PrefixPool:
    """vLLM's block pool in short: blocks in use are counted, whole ones are known by what they cache."""

    def __init__(self, num_blocks: int, free: FreeQueue) -> None:
        self.num_blocks = num_blocks
        self.free = free
        self.num_users = [1] * num_blocks
        self.num_used = num_blocks
        self.block_of: dict[int, int] = {}
        self.hash_of: dict[int, int] = {}
        self.give_back(list(range(num_blocks - 1, 0, -1)))  # block 0 is the null block

    def find(self, hashes: Sequence[int]) -> list[int]:
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
            if (block_hash := self.hash_of.pop(block, None)) is not None:
                del self.block_of[block_hash]
        self.num_used += num_blocks
        return taken

    def name(self, blocks: Sequence[int], hashes: Sequence[int]) -> None:
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

    def is_used(self, block_id: int) -> bool:
        return self.num_users[block_id] > 0


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
    hashes: list[int]
    turns_left: int
    is_busy: bool = False


@dataclass(frozen=True)
class Figures:
    """What a run was seen to do.

    Attributes:
        hit: Of the prompt blocks, those that were cached.
        returnable: Of the free memory, what is in segments of which no block is in use: the mean of all samples.
        in_the_way: To give half of the pool back, who has blocks in the emptiest segments must leave them: so many of
            those blocks of all that are in use, the mean of all samples.
        num_samples: Times at which the share in use passed the one that was asked for.
    """

    hit: float
    returnable: float
    in_the_way: float
    num_samples: int


def prefix_pool(num_blocks: int, layout: SegmentLayout, *, packs: bool) -> PrefixPool:
    """One whose free blocks are packed, or in vLLM's order."""
    return PrefixPool(num_blocks, FreeBlocks(layout) if packs else LeastRecentlyUsed())


def churn(load: Load, pool: ChurnedPool, layout: SegmentLayout, *, seed: int, steps: int, at: float = 0.3) -> Figures:
    """Serve a load for so many steps, a block of every answer in each."""
    rng, num_blocks = random.Random(seed), pool.num_blocks
    ids = iter(range(1 << 60))
    contexts = [new_context(load, rng, ids) for _ in range(load.num_contexts)]
    running: list[tuple[int, int, Context, list[Any], list[int]]] = []
    num_prompt = num_hit = 0
    samples: list[list[int]] = []  # blocks in use, by segment
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
            samples.append([sum(map(pool.is_used, layout.blocks(segment))) for segment in range(layout.num_segments)])
        was_above = is_above
    return Figures(
        num_hit / num_prompt,
        mean(returnable_share(sample, layout) for sample in samples),
        mean(share_in_the_way(sample) for sample in samples),
        len(samples),
    )


def new_context(load: Load, rng: random.Random, ids: Iterator[int]) -> Context:
    return Context([next(ids) for _ in range(rng.randint(*load.begin))], rng.randint(*load.turns))


def returnable_share(num_used: Sequence[int], layout: SegmentLayout) -> float:
    """Of the free blocks, those in segments of which no block is in use."""
    num_free = layout.num_segments * layout.segment_blocks - sum(num_used)
    return num_used.count(0) * layout.segment_blocks / num_free


def share_in_the_way(num_used: Sequence[int]) -> float:
    """Of the blocks in use, those in the emptier half of all segments; the first, with the null block, stays."""
    return sum(sorted(num_used[1:])[: len(num_used) // 2]) / sum(num_used)
