"""KV-cache groups: layers that share a block table, and what a request holds of each.

All groups take their blocks from one pool. A block has a page in each *slot*, and the ``j``-th layer of a group uses
slot ``j``: so a block is the same bytes whatever group it belongs to, and whoever copies all slots need not know whose
it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from layerkv.errors import ConfigError

Tables = Sequence[Sequence[int]]
"""A request's block tables, one for each group. An entry that its group needs no more is the null block."""

NULL_BLOCK = 0
"""What stands in a block table where a group has given its block back (vLLM's null block)."""


class Row(NamedTuple):
    """A layer whose blocks may pass through a lane: which group it is of, and which slot it uses."""

    group: int
    slot: int


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a block table.

    Attributes:
        block_tokens: Tokens of one block.
        num_layers: Its layers, which use slots ``0 .. num_layers - 1``.
        window: Tokens up to the next one, itself included, that it may still read; 0 is all. Blocks before that are
            given back while the request runs.
        chunk: Tokens of a chunk, where it reads none before the chunk that the next token is in; 0: it is not divided.
        is_state: Its blocks keep states in the place of KV: the last one is written anew by every token, and never
            passes through a lane.
        most_blocks: Blocks that a request may come to hold at most while its prompt is computed; 0: for all its tokens.
        places: At which place among all layers each of its own runs; left out, one after another.
    """

    block_tokens: int
    num_layers: int
    window: int = 0
    chunk: int = 0
    is_state: bool = False
    most_blocks: int = 0
    places: tuple[int, ...] = ()

    @property
    def keeps_all(self) -> bool:
        """Whether a request keeps every block: then a whole one is never written again, nor given back."""
        return not (self.window or self.chunk or self.is_state)

    def num_entries(self, num_tokens: int) -> int:
        """Entries of a block table that has room for so many tokens."""
        return -(-num_tokens // self.block_tokens)

    def first_needed(self, num_computed: int) -> int:
        """The first entry that is read by whatever comes after so many tokens."""
        if self.window:
            return max(num_computed - self.window + 1, 0) // self.block_tokens
        if self.chunk:
            return num_computed // self.chunk * self.chunk // self.block_tokens
        return 0

    def needed(self, num_computed: int) -> range:
        """The entries without which a request cannot go on that has computed so many tokens."""
        first = self.first_needed(num_computed)
        if self.chunk and num_computed % self.chunk == 0:
            return range(first, first)  # a new chunk begins, and be it within a block
        return range(first, self.num_entries(num_computed))

    def most_needed(self, num_tokens: int) -> int:
        """Entries needed at most by a request that has computed up to so many tokens."""
        most = self.num_entries(num_tokens)
        if tokens := self.window or self.chunk:
            most = min(most, -(-(tokens - 1) // self.block_tokens) + 1)
        return most


def blocks_held(groups: Sequence[Group], num_tokens: int, num_computed: int) -> int:
    """Blocks that a request holds in all groups: room for ``num_tokens``, less what ``num_computed`` leave behind."""
    return sum([max(g.num_entries(num_tokens) - g.first_needed(num_computed), 0) for g in groups])


def most_blocks_held(groups: Sequence[Group], num_tokens: int) -> int:
    """Blocks that a prompt of so many tokens comes to hold at most in all groups while it is computed in chunks."""
    return sum([min(g.num_entries(num_tokens), g.most_blocks or g.num_entries(num_tokens)) for g in groups])


def whole_blocks(groups: Sequence[Group], num_computed: int) -> int:
    """Blocks that are never written again, nor given back before the request ends."""
    return sum([num_computed // g.block_tokens for g in groups if g.keeps_all])


def host_blocks(groups: Sequence[Group], num_tokens: int) -> int:
    """Host blocks that hold all that a request of up to so many tokens needs to go on."""
    return sum([g.most_needed(num_tokens) for g in groups])


def growth_tokens(groups: Sequence[Group]) -> int:
    """Tokens per block that a request takes as it grows, all groups together; window groups as if nothing came back."""
    per_token = sum(1 / g.block_tokens for g in groups if not g.is_state)
    return max(int(1 / per_token), 1)


def longest_fitting(groups: Sequence[Group], num_blocks: int, most_tokens: int) -> int:
    """Tokens, ``most_tokens`` at most, of the longest request that so many blocks hold."""
    low, high = 0, most_tokens + 1
    while high - low > 1:
        middle = (low + high) // 2
        if most_blocks_held(groups, middle) <= num_blocks:
            low = middle
        else:
            high = middle
    return low


def is_plain(groups: Sequence[Group]) -> bool:
    """Whether there is one group, which keeps all blocks."""
    return len(groups) == 1 and groups[0].keeps_all


def zone_block_tokens(groups: Sequence[Group]) -> int:
    """Tokens of a block of the zone: of the longest that pass through lanes, which those of other groups divide.

    Raises:
        ConfigError: they do not, so that no zone has room for as many tokens in each group.
    """
    sizes = [group.block_tokens for group in groups if not group.is_state]
    longest = max(sizes)
    if odd := [size for size in sizes if longest % size]:
        raise ConfigError(
            f"the model's KV-cache groups have blocks of {longest} and of {odd[0]} tokens, and layerkv needs sizes of "
            "which the longest is a multiple of each: set --block-size to another size, or use another model"
        )
    return longest


def zone_shares(groups: Sequence[Group], block_tokens: int) -> tuple[int, ...]:
    """For each group, how many of its blocks one of so many tokens is; 0 of a group that passes through no lane."""
    return tuple(0 if group.is_state else block_tokens // group.block_tokens for group in groups)


def rows_of(groups: Sequence[Group]) -> list[Row]:
    """By the places at which the layers run; without those, group by group."""
    placed = [
        (place, Row(index, slot))
        for index, group in enumerate(groups)
        if not group.is_state
        for slot, place in enumerate(group.places or range(group.num_layers))
    ]
    return [row for _, row in sorted(placed)]
