"""Prefixes in host memory: what requests leave there when they end, and what prompts that begin alike load of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import islice

from layerkv.core.host_copy import HostCopy
from layerkv.core.host_tier import HostTier
from layerkv.core.plan_draft import PlanDraft
from layerkv.core.transfer import merge_runs
from layerkv.errors import CapacityError


class HostPrefixes:
    """Makes a ledger's host copies cached prefixes, and finds them again. Keeps no books of its own."""

    def __init__(self, host: HostTier, block_tokens: int) -> None:
        self._host = host
        self._block_tokens = block_tokens

    def num_found(self, hashes: Sequence[Hashable], blocks: range) -> int:
        """Cached blocks of a prompt, from the first of ``blocks`` on."""
        return len(self._host.find(islice(hashes, blocks.start, blocks.stop)))

    def num_held(self, hashes: Sequence[Hashable], blocks: range) -> int:
        """Of those blocks, how many are not free: others share them, or a plan has them pinned."""
        found = self._host.find(islice(hashes, blocks.start, blocks.stop))
        return len(found) - self._host.num_that_count_as_free(found)

    def load(self, draft: PlanDraft, block_ids: Sequence[int], hashes: Sequence[Hashable], blocks: range) -> None:
        """Load ``blocks`` of a block table, all of them found before in this step."""
        found = self._host.find(hashes[blocks.start : blocks.stop])
        assert len(found) == len(blocks), "a prefix that was found is gone"
        self._host.pin(found)
        draft.hits += merge_runs(block_ids[blocks.start : blocks.stop], found)

    def reserve(self, num_blocks: int, hashes: Sequence[Hashable], first: int) -> HostCopy:
        """Host blocks for a layered prompt's table of ``num_blocks``.

        Args:
            num_blocks: Of its whole table.
            hashes: Of the blocks that it need not compute.
            first: Block from which on those that are cached are shared; all others are taken.

        Raises:
            CapacityError: there are not so many; nothing changed.
        """
        host = self._host
        found = host.find(hashes[first:])
        wanted, free = num_blocks - len(found), host.num_free - host.num_that_count_as_free(found)
        if wanted > free:
            raise CapacityError(f"host memory: {wanted} blocks wanted, {free} free")
        host.share(found)  # before others are taken, which they might give way to
        own = host.take(wanted)
        return HostCopy([[*own[:first], *found, *own[first:]]])

    def settle(self, copy: HostCopy, hashes: Sequence[Hashable], first: int) -> int:
        """A layered prompt starts, and what it has on the device, before ``first``, may not be what was expected.

        It shares what is cached from there on, and has every block after that, which it writes, for itself.

        Returns:
            Blocks that it loads, from ``first`` on.

        Raises:
            CapacityError: host memory has no room for those that it writes.
        """
        host, blocks = self._host, copy.tables[0]
        found = host.find(hashes[first:])
        for place, block in enumerate(found, first):
            if blocks[place] != block:
                host.share([block])
                host.give_back([blocks[place]])
                blocks[place] = block
        written = range(first + len(found), len(blocks))
        shared = [place for place in written if host.num_sharers(blocks[place])]
        for place, block in zip(shared, host.take(len(shared)), strict=True):
            host.give_back([blocks[place]])
            blocks[place] = block
        return len(found)

    def keep_copy(self, copy: HostCopy, hashes: Sequence[Hashable]) -> None:
        """The whole blocks of a parked request's copy become a cached prefix; the rest is given back."""
        num_whole = min(copy.num_tokens // self._block_tokens, len(hashes)) if copy.is_trusted else 0
        self._host.give_back(copy.blocks[num_whole:])
        self._host.keep(copy.blocks[:num_whole], hashes[:num_whole])

    def keep_resident(
        self, draft: PlanDraft, ahead: HostCopy | None, hashes: Sequence[Hashable], block_ids: Sequence[int]
    ) -> int:
        """The whole blocks of a resident request become a cached prefix, as far as host memory has room.

        What was stored ahead is there; of the rest, only what no other prefix has is stored. vLLM frees the blocks now,
        but mostly keeps them as they are for long.

        Returns:
            Blocks that are stored for that.
        """
        host = self._host
        num_ahead = 0 if ahead is None else min(len(ahead.blocks), len(hashes))
        if ahead is not None:
            host.give_back(ahead.blocks[num_ahead:])
            host.keep(ahead.blocks[:num_ahead], hashes[:num_ahead])
        known = host.known(hashes)
        host.pin(block for block in known if block is not None)
        new = [i for i in range(num_ahead, len(hashes)) if known[i] is None][: host.num_free]
        blocks = host.take(len(new))
        draft.prefixes += merge_runs([block_ids[i] for i in new], blocks)
        host.keep(blocks, [hashes[i] for i in new])
        return len(new)
