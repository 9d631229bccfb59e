"""A request's place in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain


@dataclass(slots=True)
class HostCopy:
    """Which host block each entry of a request's block tables has.

    Attributes:
        tables: For each KV-cache group the host blocks of consecutive entries of its block table,
        firsts: and which entry is the first of them: those before it are needed no more. With one group that keeps
            all of them, 0.
        spare: Host blocks that it was promised and has no entry for yet. None with one group that keeps all blocks.
        num_tokens: Tokens whose KV is (or, for stores under way, will be) valid there; set when parked.
        is_ahead: The request is resident: its leading whole blocks, of groups that keep all, were stored before anybody
            parked it.
        num_shared: Of the blocks of such a one, those that it shares with the prefix cache: given up, they are not free
            before the next plan, nor while others share them.
        is_trusted: It may become a cached prefix. Not after something in host memory could not be read.
        loads_prefix: The request is layered and starts with blocks that it shares with the prefix cache, or comes back
            to the zone: its next step loads them into all layers, those that have a lane for themselves among them.
        is_short: Host memory had no room for what it must write, so it does not start now.
    """

    tables: list[list[int]]
    firsts: list[int] = field(default_factory=lambda: [0])
    spare: list[int] = field(default_factory=list)
    num_tokens: int = 0
    is_ahead: bool = False
    num_shared: int = 0
    is_trusted: bool = True
    loads_prefix: bool = False
    is_short: bool = False

    @classmethod
    def empty(cls, num_groups: int) -> HostCopy:
        """A copy without blocks."""
        return cls([[] for _ in range(num_groups)], [0] * num_groups)

    @property
    def blocks(self) -> Sequence[int]:
        """All its host blocks: of one group the very list, by position."""
        if len(self.tables) == 1 and not self.spare:
            return self.tables[0]
        return [*chain(*self.tables), *self.spare]

    @property
    def num_blocks(self) -> int:
        """How many these are."""
        if len(self.tables) == 1:
            return len(self.tables[0]) + len(self.spare)
        return sum(map(len, self.tables)) + len(self.spare)

    def of(self, group: int, entries: range) -> list[int]:
        """The host blocks of these entries of a group's block table."""
        first = self.firsts[group]
        return self.tables[group][max(entries.start - first, 0) : max(entries.stop - first, 0)]

    def num_before(self, group: int, entry: int) -> int:
        """How many of a group's entries before this one have a host block."""
        return max(min(entry - self.firsts[group], len(self.tables[group])), 0)

    def drop_before(self, group: int, entry: int) -> list[int]:
        """Forget the host blocks of a group's entries before this one; which they were."""
        num_dropped = self.num_before(group, entry)
        dropped = self.tables[group][:num_dropped]
        del self.tables[group][:num_dropped]
        self.firsts[group] = max(self.firsts[group], entry)
        return dropped

    def missing(self, group: int, entries: range) -> int:
        """How many of a group's entries, the last of these among them, have no host block yet."""
        return max(entries.stop - max(self.firsts[group] + len(self.tables[group]), entries.start), 0)
