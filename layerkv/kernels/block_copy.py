"""Block copies by a Triton kernel: between device memory, staging, and host memory that is pinned.

For fragments too small for the copy engines: a kernel's loads and stores over the link cost nothing per fragment. Few
programs are started, each working off many rows, so that nearly all of the device is left to the model.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl

from layerkv.kernels.layout import BlockLayout

NUM_PROGRAMS = 16
"""Programs of one launch. A few saturate the link. Not measured: chosen by judgement."""

_WORDS = 1024
"""Words that a program moves at a time. Not measured: chosen by judgement."""

_WORD_TYPES = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@triton.jit
def _copy_rows(
    source,
    source_blocks,
    source_block_stride,
    source_row_stride,
    to,
    to_blocks,
    to_block_stride,
    to_row_stride,
    num_blocks,
    num_rows,
    row_words,
    WORDS: tl.constexpr,
):
    num_chunks = (row_words + WORDS - 1) // WORDS
    num_jobs = num_blocks * num_rows * num_chunks
    job = tl.program_id(0)
    while job < num_jobs:
        chunk = job % num_chunks
        row = job // num_chunks % num_rows
        pair = job // num_chunks // num_rows
        # 64-bit from here on: KV memory is far larger than what 32-bit offsets reach
        source_block = tl.load(source_blocks + pair).to(tl.int64)
        to_block = tl.load(to_blocks + pair).to(tl.int64)
        words = chunk * WORDS + tl.arange(0, WORDS)
        mask = words < row_words
        source_at = source_block * source_block_stride + row.to(tl.int64) * source_row_stride
        to_at = to_block * to_block_stride + row.to(tl.int64) * to_row_stride
        moved = tl.load(source + source_at + words, mask=mask)
        tl.store(to + to_at + words, moved, mask=mask)
        job += tl.num_programs(0)


def copy_blocks(
    source: torch.Tensor,
    source_layout: BlockLayout,
    source_blocks: torch.Tensor,
    to: torch.Tensor,
    to_layout: BlockLayout,
    to_blocks: torch.Tensor,
) -> None:
    """Copy block ``source_blocks[i]`` of ``source`` to block ``to_blocks[i]`` of ``to``, row by row.

    On a GPU the copy is enqueued on the current stream. All tensors must be readable by the device (host memory:
    pinned), and live until the kernel has ended.

    Args:
        source: Flat int8.
        source_layout: Where its blocks lie.
        source_blocks: ``[n]``, int64.
        to: Flat int8; bytes outside of the rows of ``to_blocks`` keep their value.
        to_layout: Rows of the same number and size as ``source_layout``'s.
        to_blocks: ``[n]``, int64, no block twice.

    Raises:
        ValueError: the layouts differ in their rows, or the lists of blocks in length.
    """
    if (source_layout.num_rows, source_layout.row_bytes) != (to_layout.num_rows, to_layout.row_bytes):
        raise ValueError(f"rows differ: {source_layout} and {to_layout}")
    if source_blocks.shape != to_blocks.shape:
        raise ValueError(f"{len(source_blocks)} blocks cannot be copied to {len(to_blocks)}")
    num_blocks = len(source_blocks)
    if num_blocks == 0:
        return
    word = _word_bytes(source, source_layout, to, to_layout)
    row_words = source_layout.row_bytes // word
    num_jobs = num_blocks * source_layout.num_rows * triton.cdiv(row_words, _WORDS)
    _copy_rows[(min(num_jobs, NUM_PROGRAMS),)](
        _as_words(source, word),
        source_blocks,
        source_layout.block_stride // word,
        source_layout.row_stride // word,
        _as_words(to, word),
        to_blocks,
        to_layout.block_stride // word,
        to_layout.row_stride // word,
        num_blocks,
        source_layout.num_rows,
        row_words,
        WORDS=_WORDS,
    )


def _word_bytes(source: torch.Tensor, source_layout: BlockLayout, to: torch.Tensor, to_layout: BlockLayout) -> int:
    """The widest word that everything is aligned to: as few loads and stores as can be."""
    return gcd(
        8,
        source.data_ptr(),
        to.data_ptr(),
        source_layout.row_bytes,
        source_layout.block_stride,
        source_layout.row_stride,
        to_layout.block_stride,
        to_layout.row_stride,
    )


def _as_words(memory: torch.Tensor, word: int) -> torch.Tensor:
    return memory[: memory.numel() // word * word].view(_WORD_TYPES[word])
