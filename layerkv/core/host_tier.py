"""The host blocks of one engine: those that requests hold, and finished requests' prefixes that nobody needs to compute
again.

Whoever needs host blocks gets them: a cached prefix gives way, the least recently used first, so caching never costs a
request its place. Ids only; contents are the workers'. Not thread-safe; one per scheduler.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from layerkv.core.prefix_news import PrefixNews
from layerkv.core.runs import RunAllocator
from layerkv.errors import CapacityError


@dataclass(slots=True)
class HostCopy:
    """A request's place in host memory.

    Attributes:
        blocks: Host block of each entry of the request's block table, by position.
        num_tokens: Tokens whose KV is (or, for stores under way, will be) valid there; set when parked.
        is_ahead: The request is resident: its leading whole blocks were stored before anybody parked it.
        is_trusted: It may become a cached prefix. Not after something in host memory could not be read.
    """

    blocks: list[int]
    num_tokens: int = 0
    is_ahead: bool = False
    is_trusted: bool = True


class HostTier:
    """Host blocks ``[0, count)``: each is free, held by a request, or caches one block of a prefix.

    A cached block is known by the hash of its block and of all before it, as vLLM's prefix cache knows its own. It is
    *pinned* while a plan that writes or reads it is being made, and gives way to nobody meanwhile: two copies of one
    plan never have the same host block to write.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.news: PrefixNews | None = None
        """For who wants to know what is cached; None until somebody listens."""
        self._allocator = RunAllocator(0, count)
        self._block_of: dict[Hashable, int] = {}
        self._hash_of: dict[int, Hashable] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._pinned: list[int] = []
        self._retired: list[int] = []  # were forgotten while pinned: free as soon as the plan is made

    def listen(self) -> PrefixNews:
        """From now on, news are kept of what is cached, beginning with what is cached already.

        A hash object that :meth:`keep` was given comes back in the news: it may say more than that it is equal.
        """
        self.news = PrefixNews()
        for block_hash in self._block_of:
            self.news.kept(block_hash)
        return self.news

    def tell_again(self) -> None:
        """Who listens may have dropped everything, and is told once more."""
        if self.news is not None:
            self.news.tell_again(self._block_of)

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now: free ones, and cached ones that would give way."""
        return self._allocator.num_free + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Blocks that cache prefixes."""
        return len(self._hash_of)

    @property
    def num_held(self) -> int:
        """Blocks that requests hold."""
        return self.count - self._allocator.num_free - self.num_cached - len(self._retired)

    def take(self, num_blocks: int) -> list[int]:
        """Take blocks for a request, in runs as long as there are; cached prefixes give way.

        Raises:
            CapacityError: there are not so many; nothing was taken.
        """
        if num_blocks > self.num_free:
            raise CapacityError(f"host memory: {num_blocks} blocks wanted, {self.num_free} free")
        missing = num_blocks - self._allocator.num_free
        if missing > 0:
            self._forget(list(islice(self._evictable, missing)))
        return self._allocator.take(num_blocks)

    def give_back(self, blocks: Iterable[int]) -> None:
        """Return blocks taken before.

        Raises:
            ValueError: a block is out of range or already free.
        """
        self._allocator.give_back(blocks)

    def keep(self, blocks: Sequence[int], hashes: Sequence[Hashable]) -> None:
        """Blocks taken before cache a prefix from now on, each under its hash, and are pinned.

        One whose hash is known is given back; the one that is known is pinned.
        """
        twice: list[int] = []
        for block, block_hash in zip(blocks, hashes, strict=True):
            if (known := self._block_of.get(block_hash)) is not None:
                twice.append(block)
                self.pin([known])
                continue
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            self._pinned.append(block)
            if self.news is not None:
                self.news.kept(block_hash)
        self._allocator.give_back(twice)

    def known(self, hashes: Iterable[Hashable]) -> list[int | None]:
        """For each hash the block that is cached under it, or None."""
        return [self._block_of.get(block_hash) for block_hash in hashes]

    def find(self, hashes: Iterable[Hashable]) -> list[int]:
        """The cached blocks of the longest run of hashes, from the first one on, that are all known."""
        found: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def pin(self, blocks: Iterable[int]) -> None:
        """Cached blocks are written or read by the plan that is being made, the beginning of a prefix first."""
        for block in blocks:
            if block in self._evictable:
                del self._evictable[block]
                self._pinned.append(block)

    def unpin(self) -> None:
        """The plan is made: what was pinned is the most recently used now.

        The beginning of a prefix is the last of it to give way: without that the rest is of no use.
        """
        for block in reversed(self._pinned):
            self._evictable[block] = None
        self._pinned.clear()
        self._allocator.give_back(self._retired)
        self._retired.clear()

    def forget_all(self) -> None:
        """Nothing is found any more. What is pinned stays until the plan is made, which may still write it."""
        self._forget(list(self._evictable))
        for block in self._pinned:
            self._unname(block)
        self._retired += self._pinned
        self._pinned.clear()

    def is_free(self, block: int) -> bool:
        """Whether no request holds ``block``."""
        return block in self._hash_of or block in self._retired or self._allocator.is_free(block)

    def check(self) -> None:
        """Assert that every block is in one state (tests call it after every operation)."""
        self._allocator.check()
        assert len(self._block_of) == len(self._hash_of)
        assert all(self._block_of[block_hash] == block for block, block_hash in self._hash_of.items())
        assert {*self._evictable, *self._pinned} == set(self._hash_of)
        assert not set(self._evictable) & set(self._pinned)
        assert not any(self._allocator.is_free(block) for block in (*self._hash_of, *self._retired))
        assert not set(self._retired) & set(self._hash_of)

    def _forget(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            del self._evictable[block]
            self._unname(block)
        self._allocator.give_back(blocks)

    def _unname(self, block: int) -> None:
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash]
        if self.news is not None:
            self.news.forgotten(block_hash)
