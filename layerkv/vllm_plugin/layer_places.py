"""Where each layer's KV is, by vLLM's names of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from layerkv.core.geometry import KVGeometry


class LayerPlaces:
    """Groups, slots and the order in which layers run.

    Args:
        names: Of each KV-cache group the layers, by slot.
        order: All layers of the model, and others perhaps, in the order in which they run. Of one group, the order of
            its slots is that, whatever stands here.

    Attributes:
        slots: Of each layer its slot.
    """

    def __init__(self, names: Sequence[Sequence[str]], order: Sequence[str] = ()) -> None:
        self._names = names
        self.slots = {name: slot for group in names for slot, name in enumerate(group)}
        placed = {name: place for place, name in enumerate(order)} if len(names) > 1 else self.slots
        self._places = tuple(tuple(placed[name] for name in group) for group in names)

    def geometry(self, geometry: KVGeometry) -> KVGeometry:
        """The same geometry, which knows the order of layers. One of one group knows it already."""
        if len(self._names) == 1:
            return geometry
        groups = [replace(group, places=own) for group, own in zip(geometry.groups, self._places, strict=True)]
        return replace(geometry, groups=tuple(groups))

    def layer_index(self, geometry: KVGeometry) -> dict[str, int]:
        """Of each layer that passes through lanes, how many of them run before it."""
        return {self._names[row.group][row.slot]: index for index, row in enumerate(self.geometry(geometry).rows())}
