"""What the kernels do, in plain torch: the definition that tests compare them with.

Memory is always a flat int8 tensor on any device, blocks are ids as in vLLM's block tables.
"""

from __future__ import annotations

import torch

from layerkv.kernels.layout import BlockLayout


def copy_blocks(
    source: torch.Tensor,
    source_layout: BlockLayout,
    source_blocks: torch.Tensor,
    to: torch.Tensor,
    to_layout: BlockLayout,
    to_blocks: torch.Tensor,
) -> None:
    """Copy block ``source_blocks[i]`` of ``source`` to block ``to_blocks[i]`` of ``to``, row by row.

    Args:
        source: Flat int8.
        source_layout: Where its blocks lie.
        source_blocks: ``[n]``, int64.
        to: Flat int8; bytes outside of the rows of ``to_blocks`` keep their value.
        to_layout: Rows of the same number and size as ``source_layout``'s.
        to_blocks: ``[n]``, int64, no block twice.
    """
    for source_block, to_block in zip(source_blocks.tolist(), to_blocks.tolist(), strict=True):
        for row in range(source_layout.num_rows):
            source_at = source_block * source_layout.block_stride + row * source_layout.row_stride
            to_at = to_block * to_layout.block_stride + row * to_layout.row_stride
            to[to_at : to_at + to_layout.row_bytes] = source[source_at : source_at + source_layout.row_bytes]


def gather_blocks(source: torch.Tensor, layout: BlockLayout, blocks: torch.Tensor, to: torch.Tensor) -> None:
    """Copy ``blocks`` of ``source`` one behind the other, without padding, into ``to``: flat int8."""
    copy_blocks(source, layout, blocks, to, layout.packed, torch.arange(len(blocks)))


def scatter_blocks(source: torch.Tensor, to: torch.Tensor, layout: BlockLayout, blocks: torch.Tensor) -> None:
    """The inverse of :func:`gather_blocks`."""
    copy_blocks(source, layout.packed, torch.arange(len(blocks)), to, layout, blocks)
