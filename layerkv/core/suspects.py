"""Who may have computed from KV that could not be loaded, though nobody knew when it was scheduled.

A prefix that is loaded counts as loaded from the moment its step is scheduled: others find its blocks in the prefix
cache, and a step scheduled ahead may park, finish or abort any of them before the failure is reported. So what those
held who gave their blocks up is remembered until the steps that may have read them have been processed. Pure
bookkeeping on block ids; one per scheduler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import NamedTuple


class Table(NamedTuple):
    """The block table of a request, beginning of the prompt first."""

    request_id: str
    block_ids: Sequence[int]


@dataclass(slots=True)
class _Step:
    loads_prefixes: bool
    left: list[Table] = field(default_factory=list)
    left_zone: list[Table] = field(default_factory=list)


class StepsInFlight:
    """Steps that are scheduled and not processed, oldest first, and who gave blocks up while they were.

    A block that a step in flight may use is given to nobody else before that step has been processed, so a block id
    means the same in all tables here. Without a prefix being loaded nothing is remembered.
    """

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque()

    def scheduled(self, *, loads_prefixes: bool) -> None:
        """A step has been scheduled."""
        self._steps.append(_Step(loads_prefixes))

    def processed(self) -> None:
        """The output of the oldest step has been processed: what it loaded has arrived, or the failure was seen to."""
        self._steps.popleft()

    @property
    def are_loading(self) -> bool:
        """Whether it is not known yet of some prefix if it could be loaded."""
        return any(step.loads_prefixes for step in self._steps)

    def left(self, request_id: str, block_ids: Sequence[int]) -> None:
        """A request that the steps in flight compute gives its blocks up: parked, preempted, finished or aborted."""
        self._steps[-1].left.append(Table(request_id, block_ids))

    def left_zone(self, request_id: str, host_blocks: Sequence[int]) -> None:
        """A layered request that the steps in flight compute leaves the zone, and these host blocks perhaps too."""
        self._steps[-1].left_zone.append(Table(request_id, host_blocks))

    def that_left_zone(self, host_blocks: Set[int]) -> list[str]:
        """Requests that have left the zone since the oldest step was scheduled, and had any of these host blocks."""
        left = [table for step in self._steps for table in step.left_zone]
        return [table.request_id for table in left if not host_blocks.isdisjoint(table.block_ids)]

    def tables_left(self) -> list[Table]:
        """What was given up since the oldest step was scheduled; a request may be in it more than once."""
        return [table for step in self._steps for table in step.left]


def follow(wrong: Iterable[int], tables: Iterable[Table]) -> tuple[set[int], list[str]]:
    """Blocks that hold wrong KV if these do, and the requests that held one of them.

    Whoever reads a wrong block computes wrong ones after it, which others may share.
    """
    blocks, tables, num_before = set(wrong), list(tables), -1
    while len(blocks) > num_before:
        num_before = len(blocks)
        for table in tables:
            blocks.update(dropwhile(lambda block_id: block_id not in blocks, table.block_ids))
    return blocks, list(dict.fromkeys(t.request_id for t in tables if not blocks.isdisjoint(t.block_ids)))
