"""Where the bytes of a block lie, for kernels that know neither dtype nor attention backend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Block ``b`` is ``num_rows`` rows of ``row_bytes`` bytes, row ``r`` at ``b * block_stride + r * row_stride``.

    All sizes are bytes. What lies between rows and between blocks (padding, other heads, other layers) is never
    touched. Two layouts can be copied into each other when their rows have equal number and size.

    Raises:
        ValueError: rows or blocks would overlap.
    """

    block_stride: int
    row_bytes: int
    num_rows: int = 1
    row_stride: int = 0

    def __post_init__(self) -> None:
        if min(self.block_stride, self.row_bytes, self.num_rows) < 1:
            raise ValueError(f"block_stride, row_bytes and num_rows are at least 1: {self}")
        rows_end = (self.num_rows - 1) * self.row_stride + self.row_bytes
        if (self.num_rows > 1 and self.row_stride < self.row_bytes) or rows_end > self.block_stride:
            raise ValueError(f"rows or blocks overlap: {self}")

    @classmethod
    def contiguous(cls, page_bytes: int) -> BlockLayout:
        """Blocks of ``page_bytes`` one behind the other."""
        return cls(block_stride=page_bytes, row_bytes=page_bytes)
