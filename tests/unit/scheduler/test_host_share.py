"""eLLM's 3-of-5 rule."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from layerkv.scheduler.host_share import HostShare


def after(*steps: tuple[bool | None, bool | None], num_blocks: int = 100, floor: int = 10) -> int:
    share = HostShare(num_blocks, floor=floor)
    for decodes_are_late, first_was_late in steps:
        share.observe(decodes_are_late=decodes_are_late, first_was_late=first_was_late)
    return share.limit


SLOW, FINE, SILENT, LATE_FIRST = (True, None), (False, None), (None, None), (None, True)


def test_at_first_early_prompts_may_take_all_host_memory() -> None:
    assert after() == 100


def test_three_of_five_steps_with_late_decodes_halve_it() -> None:
    assert after(SLOW, SLOW) == 100
    assert after(SLOW, SLOW, SLOW) == 50
    assert after(SLOW, FINE, SLOW, FINE, SLOW) == 50
    assert after(SLOW, FINE, FINE, SLOW, FINE, SLOW) == 100, "the first is too long ago"


def test_after_a_change_the_count_begins_anew() -> None:
    assert after(*[SLOW] * 5) == 50
    assert after(*[SLOW] * 6) == 25


def test_three_of_five_late_first_tokens_double_it() -> None:
    assert after(*[SLOW] * 6, *[LATE_FIRST] * 2) == 25
    assert after(*[SLOW] * 6, *[LATE_FIRST] * 3) == 50
    assert after(*[SLOW] * 6, LATE_FIRST, (None, False), LATE_FIRST, LATE_FIRST) == 50


def test_steps_that_say_nothing_do_not_count() -> None:
    assert after(SLOW, *[SILENT] * 20, SLOW, *[SILENT] * 20, SLOW) == 50


def test_it_never_leaves_its_bounds() -> None:
    assert after(*[SLOW] * 60) == 10
    assert after(*[LATE_FIRST] * 60) == 100
    assert after(*[SLOW] * 60, num_blocks=5, floor=10) == 5, "less host memory than a zone"


def test_from_nothing_it_can_come_back() -> None:
    assert after(*[SLOW] * 60, floor=0) == 0
    assert after(*[SLOW] * 60, *[LATE_FIRST] * 3, floor=0) == 2


signals = st.sampled_from((None, True, False))


@given(st.lists(st.tuples(signals, signals), max_size=80), st.integers(0, 50), st.integers(0, 60))
def test_the_limit_is_between_floor_and_all_whatever_happens(
    steps: list[tuple[bool | None, bool | None]], num_blocks: int, floor: int
) -> None:
    assert min(floor, num_blocks) <= after(*steps, num_blocks=num_blocks, floor=floor) <= num_blocks
