"""The Triton kernels against their definition, in Triton's interpreter: at odd sizes, and with poisoned outputs."""

from __future__ import annotations

import os
from importlib.util import find_spec, module_from_spec
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerkv.kernels.layout import BlockLayout
from tests.fakes import block_copies as reference
from tests.fakes.block_copies import end_of, gather, payload_bytes, scatter


def interpreted(name: str) -> Any:
    """A copy of a module whose kernels run in the interpreter: Triton decides that where a kernel is defined."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        spec.loader.exec_module(module)
    return module


block_copy = interpreted("layerkv.kernels.block_copy")
POISON = -77
LAYOUTS = {
    "page of 16 KiB": BlockLayout.contiguous(16 << 10),
    "odd page": BlockLayout.contiguous(17),
    "one byte": BlockLayout.contiguous(1),
    "padded page": BlockLayout(block_stride=4096, row_bytes=4000),
    "rows of one head": BlockLayout(block_stride=8192, row_bytes=256, num_rows=16, row_stride=512),
    "odd rows": BlockLayout(block_stride=1000, row_bytes=123, num_rows=3, row_stride=301),
    "rows longer than a program moves": BlockLayout(
        block_stride=40_000, row_bytes=18_002, num_rows=2, row_stride=20_000
    ),
}


def noise(num_bytes: int, seed: int = 0) -> torch.Tensor:
    """Bytes, none of them poison."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 128, (num_bytes,), dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("num_blocks", [0, 1, 5])
def test_gather_and_scatter_are_what_the_reference_says(layout: BlockLayout, num_blocks: int) -> None:
    source = noise(end_of(layout, 9))
    blocks = torch.tensor([7, 0, 8, 3, 4])[:num_blocks]
    staged, expected = (torch.full((5 * payload_bytes(layout) + 3,), POISON, dtype=torch.int8) for _ in range(2))
    gather(block_copy.copy_blocks, source, layout, blocks, staged)
    gather(reference.copy_blocks, source, layout, blocks, expected)
    assert torch.equal(staged, expected)
    assert (staged[num_blocks * payload_bytes(layout) :] == POISON).all()
    back, expected = (torch.full_like(source, POISON) for _ in range(2))
    scatter(block_copy.copy_blocks, staged, back, layout, blocks)
    scatter(reference.copy_blocks, staged, expected, layout, blocks)
    assert torch.equal(back, expected)
    assert (back == POISON).any()


@st.composite
def layouts(draw: st.DrawFn, num_rows: int, row_bytes: int) -> BlockLayout:
    row_stride = row_bytes + draw(st.sampled_from([0, 1, 6, 8, 64]))
    padding = draw(st.sampled_from([0, 1, 4, 8, 100]))
    block_stride = (num_rows - 1) * row_stride + row_bytes + padding
    return BlockLayout(block_stride, row_bytes, num_rows, row_stride if num_rows > 1 else 0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_blocks_of_any_layout_come_through_any_other(data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(1, 4))
    row_bytes = data.draw(st.sampled_from([1, 2, 7, 8, 40, 1024, 8200]))
    source_layout, to_layout = data.draw(layouts(num_rows, row_bytes)), data.draw(layouts(num_rows, row_bytes))
    offset = data.draw(st.integers(0, 9))  # memory need not begin at a multiple of a word
    num_blocks = data.draw(st.integers(1, 6))
    ids = st.lists(st.integers(0, 7), min_size=num_blocks, max_size=num_blocks, unique=True).map(torch.tensor)
    source_blocks, to_blocks = data.draw(ids), data.draw(ids)
    source = noise(end_of(source_layout, 8) + offset)[offset:]
    to, expected = (torch.full((end_of(to_layout, 8) + offset,), POISON, dtype=torch.int8)[offset:] for _ in range(2))
    block_copy.copy_blocks(source, source_layout, source_blocks, to, to_layout, to_blocks)
    reference.copy_blocks(source, source_layout, source_blocks, expected, to_layout, to_blocks)
    assert torch.equal(to, expected)


def test_layouts_whose_rows_differ_are_refused() -> None:
    memory, blocks = noise(64), torch.tensor([0])
    with pytest.raises(ValueError, match="rows differ"):
        block_copy.copy_blocks(
            memory, BlockLayout.contiguous(8), blocks, memory.clone(), BlockLayout.contiguous(16), blocks
        )
    layout = BlockLayout.contiguous(8)
    with pytest.raises(ValueError, match="1 blocks cannot be copied to 2"):
        block_copy.copy_blocks(memory, layout, blocks, memory.clone(), layout, torch.tensor([0, 1]))


@pytest.mark.parametrize("wrong", [(0, 0, 1, 0), (8, 9, 1, 0), (16, 8, 2, 4), (15, 8, 2, 8), (8, 8, 0, 0)], ids=str)
def test_layouts_that_overlap_themselves_are_refused(wrong: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"overlap|at least 1"):
        BlockLayout(*wrong)
