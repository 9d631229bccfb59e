"""How far host memory has memory of the kernel before anybody stores there: bookkeeping, in bytes of each layer.

The first store into a page waits until the kernel has found and cleared memory for it, several times as long as the
copy itself takes. So a window ahead of what has been stored to is touched while there is nothing to copy. It follows
use: what is never used takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

WINDOW_BYTES = 64 << 20
"""Bytes of all layers together that are touched ahead of use, or a huge page of each layer if that is more. Not
measured: chosen by judgement."""

STEP_BYTES = 2 << 20
"""Most bytes that are touched at a time: a huge page. A store that comes meanwhile waits for one of them. Not measured:
chosen by judgement."""


class Stretch(NamedTuple):
    """Bytes of a layer's host memory, from ``offset`` on."""

    layer: int
    offset: int
    num_bytes: int


class TouchAhead:
    """What is to be touched next. All layers advance together. Not thread-safe."""

    def __init__(self, num_layers: int, layer_bytes: int) -> None:
        self._num_layers, self._layer_bytes = num_layers, layer_bytes
        self._window_bytes = max(WINDOW_BYTES // num_layers, STEP_BYTES)
        self._used_bytes = 0
        self._next = Stretch(0, 0, min(STEP_BYTES, layer_bytes))

    def used(self, layer_bytes: int) -> None:
        """The first ``layer_bytes`` of each layer have been stored to, or will be."""
        self._used_bytes = max(self._used_bytes, layer_bytes)

    def take(self, may_touch: Callable[[int, int], bool] | None = None) -> Stretch | None:
        """The next stretch to touch; None while the window is full, or ``may_touch(offset, num_bytes)`` says no."""
        layer, offset, num_bytes = self._next
        if layer == 0 and offset < (begun := self._used_bytes // STEP_BYTES * STEP_BYTES):  # stores were faster
            offset, num_bytes = begun, min(STEP_BYTES, self._layer_bytes - begun)
        if num_bytes <= 0 or offset >= self._used_bytes + self._window_bytes:
            return None
        if may_touch is not None and not may_touch(offset, num_bytes):
            return None
        following = (layer + 1, offset) if layer + 1 < self._num_layers else (0, offset + STEP_BYTES)
        self._next = Stretch(*following, min(STEP_BYTES, self._layer_bytes - following[1]))
        return Stretch(layer, offset, num_bytes)
