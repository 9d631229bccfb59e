"""What the kernels do, in plain torch: the definition that tests compare them with.

Memory is always a flat int8 tensor on any device, blocks are ids as in vLLM's block tables.
"""

from __future__ import annotations

from typing import Protocol

import torch

from layerkv.kernels.layout import BlockLayout


class CopyBlocks(Protocol):
    """Copies block ``source_blocks[i]`` of ``source`` to block ``to_blocks[i]`` of ``to``, row by row."""

    def __call__(
        self,
        source: torch.Tensor,
        source_layout: BlockLayout,
        source_blocks: torch.Tensor,
        to: torch.Tensor,
        to_layout: BlockLayout,
        to_blocks: torch.Tensor,
        /,
    ) -> None: ...


def copy_blocks(
    source: torch.Tensor,
    source_layout: BlockLayout,
    source_blocks: torch.Tensor,
    to: torch.Tensor,
    to_layout: BlockLayout,
    to_blocks: torch.Tensor,
) -> None:
    """The definition of :func:`layerkv.kernels.block_copy.copy_blocks`."""
    for source_block, to_block in zip(source_blocks.tolist(), to_blocks.tolist(), strict=True):
        for row in range(source_layout.num_rows):
            source_at = source_block * source_layout.block_stride + row * source_layout.row_stride
            to_at = to_block * to_layout.block_stride + row * to_layout.row_stride
            to[to_at : to_at + to_layout.row_bytes] = source[source_at : source_at + source_layout.row_bytes]


def payload_bytes(layout: BlockLayout) -> int:
    """Bytes of one block that are copied."""
    return layout.num_rows * layout.row_bytes


def end_of(layout: BlockLayout, num_blocks: int) -> int:
    """Bytes from the start of block 0 to the end of the last row of block ``num_blocks - 1``."""
    return (num_blocks - 1) * layout.block_stride + (layout.num_rows - 1) * layout.row_stride + layout.row_bytes


def packed(layout: BlockLayout) -> BlockLayout:
    """The same rows without anything between them."""
    row_stride = layout.row_bytes if layout.num_rows > 1 else 0
    return BlockLayout(payload_bytes(layout), layout.row_bytes, layout.num_rows, row_stride)


def gather(copy: CopyBlocks, source: torch.Tensor, layout: BlockLayout, blocks: torch.Tensor, to: torch.Tensor) -> None:
    """``copy`` takes ``blocks`` of ``source`` one behind the other, without padding, into ``to``: flat int8."""
    copy(source, layout, blocks, to, packed(layout), torch.arange(len(blocks), device=blocks.device))


def scatter(
    copy: CopyBlocks, source: torch.Tensor, to: torch.Tensor, layout: BlockLayout, blocks: torch.Tensor
) -> None:
    """The inverse of :func:`gather`."""
    copy(source, packed(layout), torch.arange(len(blocks), device=blocks.device), to, layout, blocks)
