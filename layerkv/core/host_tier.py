"""The host blocks of one engine: those that requests hold, and finished requests' prefixes that nobody needs to compute
again.

Whoever needs host blocks gets them: a cached prefix gives way, the least recently used first, so caching never costs a
request its place. Where host memory comes and goes by segment, only blocks of segments *in service* are handed out.
Ids only; contents are the workers'. Not thread-safe; one per scheduler.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from itertools import islice

from layerkv.core.prefix_news import PrefixNews
from layerkv.core.runs import RunAllocator
from layerkv.core.segments import SegmentLayout
from layerkv.errors import CapacityError


class HostTier:
    """Host blocks ``[0, count)``: each is free, held by a request, or caches one block of a prefix.

    A cached block may be *shared* besides: requests hold it that only read it, and it gives way to nobody until the
    last of them gives it back. What is forgotten meanwhile is not found any more, and stays theirs.

    A cached block is known by the hash of its block and of all before it, as vLLM's prefix cache knows its own. It is
    *pinned* while a plan that writes or reads it is being made, and gives way to nobody meanwhile: two copies of one
    plan never have the same host block to write.

    Of a segment that is withheld nothing is handed out, found or cached any more. What requests hold of it stays theirs
    until they give it back; then it belongs to nobody, and is not free.

    Args:
        count: Host blocks at their most.
        layout: How they are divided into segments, all of which are in service at first; None: they never leave.
    """

    def __init__(self, count: int, layout: SegmentLayout | None = None) -> None:
        self.count = count
        self._layout = layout or SegmentLayout(segment_blocks=max(count, 1), num_segments=1)
        assert layout is None or layout.num_segments * layout.segment_blocks == count
        self._withheld: dict[int, set[int]] = {}  # segment out of service -> blocks of it that nobody has
        self._num_withheld = 0
        self.news: PrefixNews | None = None
        """For who wants to know what is cached; None until somebody listens."""
        self._allocator = RunAllocator(0, count)
        self._block_of: dict[Hashable, int] = {}
        self._hash_of: dict[int, Hashable] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._pinned: dict[int, None] = {}  # in the order in which they were
        self._sharers: dict[int, int] = {}  # requests that hold a block which was cached when they came
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
    def num_loose(self) -> int:
        """Of those, blocks that cache nothing."""
        return self._allocator.num_free

    @property
    def num_in_service(self) -> int:
        """Blocks of segments that are not withheld."""
        return self.count - len(self._withheld) * self._layout.segment_blocks

    @property
    def num_cached(self) -> int:
        """Blocks that cache prefixes."""
        return len(self._hash_of)

    @property
    def num_held(self) -> int:
        """Blocks that requests hold, shared ones among them."""
        return self.count - self.num_free - len(self._pinned) - len(self._retired) - self._num_withheld

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

    def share(self, blocks: Iterable[int]) -> None:
        """A request holds these cached blocks from now on, to read them, until it gives them back."""
        for block in blocks:
            assert block in self._hash_of, f"block {block} is not cached"
            self._sharers[block] = self.num_sharers(block) + 1
            self._evictable.pop(block, None)
            self._pinned.pop(block, None)

    def num_sharers(self, block: int) -> int:
        """Requests that share ``block``; 0 for one that a request has for itself."""
        return self._sharers.get(block, 0)

    def num_that_count_as_free(self, blocks: Iterable[int]) -> int:
        """Those of these cached blocks that :attr:`num_free` counts, because nobody holds them or has them pinned."""
        return sum(block in self._evictable for block in blocks)

    def give_back(self, blocks: Iterable[int]) -> None:
        """Return blocks taken or shared before. Those that are still cached when nobody shares them are pinned.

        Raises:
            ValueError: a block is out of range or already free.
        """
        blocks = list(blocks)
        self._free([block for block in blocks if block not in self._sharers])
        for block in blocks:
            if block in self._sharers:
                self._end_share(block)

    def keep(self, blocks: Sequence[int], hashes: Sequence[Hashable]) -> None:
        """Blocks taken before cache a prefix from now on, each under its hash, and are pinned.

        One whose hash is known is given back; the one that is known is pinned. One that is shared is given back too: it
        is cached, or was forgotten, and then is not to be trusted. So is one of a segment that is withheld.
        """
        twice: list[int] = []
        for block, block_hash in zip(blocks, hashes, strict=True):
            if block in self._sharers:
                self._end_share(block)
                continue
            if (known := self._block_of.get(block_hash)) is not None:
                twice.append(block)
                self.pin([known])
                continue
            if self._is_withheld(block):
                twice.append(block)
                continue
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            self._pinned[block] = None
            if self.news is not None:
                self.news.kept(block_hash)
        self._free(twice)

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
                self._pinned[block] = None

    def unpin(self) -> None:
        """The plan is made: what was pinned is the most recently used now.

        The beginning of a prefix is the last of it to give way: without that the rest is of no use.
        """
        for block in reversed(self._pinned):
            self._evictable[block] = None
        self._pinned.clear()
        self._free(self._retired)
        self._retired.clear()

    def forget_all(self) -> None:
        """Nothing is found any more. What is pinned stays until the plan is made, which may still write it."""
        self._forget(list(self._evictable))
        for block in list(self._hash_of):
            self._unname(block)
        self._retired += self._pinned
        self._pinned.clear()

    def is_free(self, block: int) -> bool:
        """Whether no request holds ``block``."""
        if block in self._sharers:
            return False
        return block in self._hash_of or block in self._retired or self._is_nobodys(block)

    # Segments ------------------------------------------------------------------------------------------------

    def withhold(self, segment: int) -> None:
        """The segment goes out of service: the prefixes that it caches are forgotten."""
        assert segment not in self._withheld, segment
        blocks = self._layout.blocks(segment)
        nobodys = self._withheld[segment] = set(self._allocator.take_out(blocks))
        for block in blocks:
            if block not in self._hash_of:
                continue
            self._unname(block)
            if block in self._evictable:
                del self._evictable[block]
                nobodys.add(block)
            elif block in self._pinned:
                del self._pinned[block]
                self._retired.append(block)
        self._num_withheld += len(nobodys)

    def restore(self, segment: int) -> None:
        """A withheld segment is in service, again or for the first time."""
        nobodys = self._withheld.pop(segment)
        self._num_withheld -= len(nobodys)
        self._allocator.give_back(nobodys)

    def is_empty(self, segment: int) -> bool:
        """Whether a withheld segment has only blocks that belong to nobody."""
        return len(self._withheld[segment]) == self._layout.segment_blocks

    def newest_in(self) -> dict[int, int]:
        """For each segment that caches prefixes which could give way, how late the most recently used of them would."""
        return {self._layout.segment_of(block): place for place, block in enumerate((*self._evictable, *self._pinned))}

    def check(self) -> None:
        """Assert that every block is in one state (tests call it after every operation)."""
        self._allocator.check()
        assert len(self._block_of) == len(self._hash_of)
        assert all(self._block_of[block_hash] == block for block, block_hash in self._hash_of.items())
        assert {*self._evictable, *self._pinned} == self._hash_of.keys() - self._sharers.keys()
        assert not set(self._evictable) & set(self._pinned)
        assert not any(self._allocator.is_free(block) for block in (*self._hash_of, *self._retired, *self._sharers))
        assert not set(self._retired) & {*self._hash_of, *self._sharers}
        assert all(count > 0 for count in self._sharers.values())
        assert self._num_withheld == sum(map(len, self._withheld.values()))
        for segment, nobodys in self._withheld.items():
            assert nobodys <= set(self._layout.blocks(segment))
            assert not any(map(self._allocator.is_free, self._layout.blocks(segment)))
            assert nobodys.isdisjoint((*self._hash_of, *self._retired, *self._sharers))
            assert not any(block in self._hash_of for block in self._layout.blocks(segment))

    def _free(self, blocks: Iterable[int]) -> None:
        if not self._withheld:
            self._allocator.give_back(blocks)
            return
        in_service = []
        for block in blocks:
            if (nobodys := self._withheld.get(self._layout.segment_of(block))) is None:
                in_service.append(block)
                continue
            if block in nobodys:
                raise ValueError(f"block {block} is given back twice")
            nobodys.add(block)
            self._num_withheld += 1
        self._allocator.give_back(in_service)

    def _is_withheld(self, block: int) -> bool:
        return bool(self._withheld) and self._layout.segment_of(block) in self._withheld

    def _is_nobodys(self, block: int) -> bool:
        if self._is_withheld(block):
            return block in self._withheld[self._layout.segment_of(block)]
        return self._allocator.is_free(block)

    def _forget(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            del self._evictable[block]
            self._unname(block)
        self._allocator.give_back(blocks)

    def _end_share(self, block: int) -> None:
        if (left := self._sharers[block] - 1) > 0:
            self._sharers[block] = left
            return
        del self._sharers[block]
        if block in self._hash_of:
            self._pinned[block] = None
        else:
            self._retired.append(block)  # the plan that is being made may still read it

    def _unname(self, block: int) -> None:
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash]
        if self.news is not None:
            self.news.forgotten(block_hash)
