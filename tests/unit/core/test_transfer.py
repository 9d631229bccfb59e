from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.core.transfer import BlockRun, StepPlan, cut, merge_runs, num_blocks


def test_blocks_that_follow_each_other_on_both_sides_are_one_run() -> None:
    assert merge_runs([7, 8, 9, 3, 4, 12], [1, 2, 3, 4, 5, 7]) == (
        BlockRun(3, 4, 2),
        BlockRun(7, 1, 3),
        BlockRun(12, 7, 1),
    )


def test_blocks_that_follow_each_other_on_one_side_only_are_not() -> None:
    assert merge_runs([1, 2], [5, 7]) == (BlockRun(1, 5, 1), BlockRun(2, 7, 1))
    assert merge_runs([1, 3], [5, 6]) == (BlockRun(1, 5, 1), BlockRun(3, 6, 1))


def test_tables_of_different_length_are_a_bug_of_ours() -> None:
    with pytest.raises(ValueError, match="zip"):
        merge_runs([1, 2], [5])


@given(st.permutations(range(12)), st.permutations(range(20, 32)), st.integers(0, 12))
def test_runs_hold_exactly_the_pairs_and_none_could_be_longer(devices: list[int], hosts: list[int], count: int) -> None:
    pairs = list(zip(devices, hosts, strict=True))[:count]
    runs = merge_runs(devices[:count], hosts[:count])
    assert sorted((run.device_block + i, run.host_block + i) for run in runs for i in range(run.num_blocks)) == sorted(
        pairs
    )
    assert num_blocks(runs) == count
    ends = {(run.device_block + run.num_blocks, run.host_block + run.num_blocks) for run in runs}
    assert not ends & {(run.device_block, run.host_block) for run in runs}


def test_a_plan_is_layered_if_it_stores_or_says_so() -> None:
    run = (BlockRun(0, 0, 1),)
    assert not StepPlan(parks=run, num_tokens=4).is_layered
    assert StepPlan(stores=run).is_layered
    assert StepPlan(loads=run, num_tokens=4, uses_lanes=True).is_layered, "a chunk ends with the step"


@given(
    lengths=st.lists(st.integers(1, 9), max_size=6),
    most_blocks=st.integers(1, 12),
)
def test_cutting_loses_no_block_and_fills_every_unit_but_the_last(lengths: list[int], most_blocks: int) -> None:
    runs = [BlockRun(100 * i, 50 * i, length) for i, length in enumerate(lengths)]
    units = cut(runs, most_blocks)
    sizes = [sum(run.num_blocks for run in unit) for unit in units]
    assert all(size == most_blocks for size in sizes[:-1])
    assert all(0 < size <= most_blocks for size in sizes)
    pairs = [(d + i, h + i) for unit in units for d, h, length in unit for i in range(length)]
    assert pairs == [(d + i, h + i) for d, h, length in runs for i in range(length)]
