"""Which KV-cache group each layer that passes through lanes is of, and which slot of a block it uses."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from layerkv.core.geometry import KVGeometry
from layerkv.core.groups import Row
from layerkv.core.transfer import BlockRun


class Rows:
    """The layers of a worker in the order in which they run, and its slots.

    Args:
        rows: Of each layer.
        num_slots: All slots of a block.
        zone_starts: For each group the first of its ids in the lane zone, ascending.
        has_states: Whether there are layers besides these, which may use any slot from the first one on.
    """

    def __init__(
        self, rows: Sequence[Row], num_slots: int, zone_starts: Sequence[int] = (0,), *, has_states: bool = False
    ) -> None:
        self._rows = rows
        self.num_slots = num_slots
        self._zone_starts = zone_starts
        self._has_states = has_states

    @classmethod
    def of(cls, geometry: KVGeometry) -> Rows:
        """Those of an engine."""
        groups = range(len(geometry.groups))
        return cls(
            geometry.rows(),
            geometry.num_layers,
            [geometry.first_zone_block(group) for group in groups],
            has_states=any(group.is_state for group in geometry.groups),
        )

    @classmethod
    def of_one_group(cls, num_layers: int) -> Rows:
        """Each layer has a slot of its own."""
        return cls([Row(0, slot) for slot in range(num_layers)], num_layers)

    def __getitem__(self, layer: int) -> Row:
        return self._rows[layer]

    def group_of(self, layer: int) -> int:
        """The group that a layer is of."""
        return self._rows[layer].group

    def divide(self, runs: Sequence[BlockRun]) -> Sequence[Sequence[BlockRun]]:
        """Runs of zone blocks by group; no run has blocks of two."""
        if len(self._zone_starts) == 1:
            return (runs,)
        divided: list[list[BlockRun]] = [[] for _ in self._zone_starts]
        for run in runs:
            divided[bisect_right(self._zone_starts, run.device_block) - 1].append(run)
        return divided

    def slot_groups(self, most_groups: int) -> list[tuple[int, Sequence[int]]]:
        """All slots in as many parts as that, in the order in which they are used; of each its first layer."""
        if self._has_states:
            return [(0, range(self.num_slots))]
        first_use: dict[int, int] = {}
        for layer, row in enumerate(self._rows):
            first_use.setdefault(row.slot, layer)
        slots = list(first_use)
        num_groups = min(len(slots), most_groups)
        starts = [group * len(slots) // num_groups for group in range(num_groups + 1)]
        return [(first_use[slots[start]], slots[start:end]) for start, end in pairwise(starts)]
