"""The forecast of the pool's use, against requests that grow token by token."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.scheduler.forecast import Forecast

BLOCK = 4
requests = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), max_size=6)
"""Of each the tokens left, and the blocks held."""


def used_at(running: list[tuple[int, int]], step: int, *, ended: bool) -> Fraction:
    """Blocks in use after `step` steps; those whose last token that is have left if `ended`.

    Blocks in parts: whether a request's last block is full is not what a forecast goes by.
    """
    return sum(
        (held + Fraction(step, BLOCK) for left, held in running if left > step or (left == step and not ended)),
        start=Fraction(0),
    )


@given(requests, st.tuples(st.integers(1, 40), st.integers(1, 12)), st.integers(1, 60))
def test_a_newcomer_fits_exactly_if_nobody_will_be_in_want_of_blocks(
    running: list[tuple[int, int]], newcomer: tuple[int, int], pool: int
) -> None:
    """A peak after the newcomer's end is not its affair."""
    left, held = newcomer
    together = [*running, newcomer]
    while_it_runs = max(used_at(together, step, ended=False) for step in range(1, left + 1))
    assert Forecast(pool, BLOCK, running).fits(held, left) == (while_it_runs <= pool)


@given(requests, st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), max_size=4), st.integers(1, 80))
def test_newcomers_count_like_those_who_were_there(
    running: list[tuple[int, int]], newcomers: list[tuple[int, int]], pool: int
) -> None:
    grown = Forecast(pool, BLOCK, running)
    for left, held in newcomers:
        grown.add(held, left)
    fresh = Forecast(pool, BLOCK, [*running, *newcomers])
    for left, held in ((1, 1), (10, 3), (40, 12)):
        assert grown.fits(held, left) == fresh.fits(held, left)
        assert grown.shortage(left, held) == fresh.shortage(left, held)
        assert grown.steps_until_free(held, 0) == fresh.steps_until_free(held, 0)


@given(requests, st.integers(1, 50), st.integers(0, 30))
def test_the_shortage_is_the_worst_within_the_horizon(
    running: list[tuple[int, int]], num_steps: int, free: int
) -> None:
    held = used_at(running, 0, ended=True)
    worst = max(used_at(running, step, ended=False) - held - free for step in range(num_steps + 1))
    assert Forecast(100, BLOCK, running).shortage(num_steps, free) == max(int(worst), 0)


@given(requests, st.integers(1, 60), st.integers(0, 20))
def test_blocks_are_free_at_the_first_end_that_leaves_so_many(
    running: list[tuple[int, int]], wanted: int, free: int
) -> None:
    held = used_at(running, 0, ended=True)
    ends = sorted({left for left, _ in running})
    found = Forecast(100, BLOCK, running).steps_until_free(wanted, free)
    expected = next((end for end in ends if free + held - used_at(running, end, ended=True) >= wanted), None)
    assert found == expected


def test_an_empty_pool_holds_what_fits_it_and_has_nothing_to_wait_for() -> None:
    empty = Forecast(10, BLOCK, [])
    assert empty.fits(8, 8)
    assert not empty.fits(8, 9)
    assert empty.shortage(100, 0) == 0
    assert empty.steps_until_free(1, 0) is None


@pytest.mark.parametrize(("num_blocks", "left", "fits"), [(6, 4, True), (6, 40, True), (7, 8, False), (7, 40, False)])
def test_two_that_end_at_different_times_need_not_fit_together_at_their_longest(
    num_blocks: int, left: int, fits: bool
) -> None:
    """The pool has 20 blocks; one holds 10 of them and ends after 8 tokens, with 12."""
    assert Forecast(20, BLOCK, [(8, 10)]).fits(num_blocks, left) == fits
