"""Segments in the order of a small whole number, such as how many blocks are in use; each operation in O(1)."""

from __future__ import annotations


class Ranking:
    """Some of the segments, each at a level; one of the highest is at hand. Not thread-safe.

    Sets are integers, a bit per member, of which the highest and the lowest are found at once.
    """

    def __init__(self, highest_level: int) -> None:
        self._segments_at = [0] * (highest_level + 1)  # by level: bit s: segment s has it
        self._levels = 0  # bit n: some segment has level n
        self._level_of: dict[int, int] = {}

    def __contains__(self, segment: int) -> bool:
        return segment in self._level_of

    def first(self) -> int | None:
        """The segment at the highest level, of several the lowest segment; None where there is none."""
        if not self._levels:
            return None
        segments = self._segments_at[self._levels.bit_length() - 1]
        return (segments & -segments).bit_length() - 1

    def put(self, segment: int, level: int) -> None:
        """The segment is among them, at that level."""
        before = self._level_of.get(segment)
        if before == level:
            return
        if before is not None:
            self.discard(segment)
        self._level_of[segment] = level
        self._segments_at[level] |= 1 << segment
        self._levels |= 1 << level

    def discard(self, segment: int) -> None:
        """The segment is not among them, whether it was or not."""
        if (level := self._level_of.pop(segment, None)) is None:
            return
        self._segments_at[level] ^= 1 << segment
        if not self._segments_at[level]:
            self._levels ^= 1 << level
