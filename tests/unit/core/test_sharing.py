from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.core.sharing import LEAST_WEIGHT, Wish, divide, token_pressure


def wish(need: int = 0, like: int = 0, *, floor: int = 0, held: int = 0, weight: float = 1.0, segment: int = 1) -> Wish:
    return Wish(segment, floor, ceiling=100, held=held, need=need, like=like, weight=weight, can_leave=100)


def test_floors_go_before_needs_and_needs_before_likes() -> None:
    wishes = {"a": wish(need=9, like=9), "b": wish(need=4, floor=6, like=9), "c": wish(need=1, floor=5, like=9)}
    assert divide(wishes, 3) == {"a": 0, "b": 2, "c": 1}, "a floor that is not needed is not kept free"
    assert divide(wishes, 10) == {"a": 5, "b": 4, "c": 1}
    assert divide(wishes, 20) == {"a": 9, "b": 6, "c": 5}, "likes go to who has least"
    assert divide(wishes, 99) == {"a": 9, "b": 9, "c": 9}


@pytest.mark.parametrize("weight", [0.1, 1.0, 7.0])
def test_for_likes_nobody_gives_up_what_it_has(weight: float) -> None:
    a = Wish(1, 10, 100, held=70, need=20, like=94, can_leave=20, weight=weight)
    b = Wish(1, 10, 100, held=40, need=40, like=64, can_leave=40)
    assert divide({"a": a, "b": b}, 110) == {"a": 70, "b": 40}
    assert divide({"a": a, "b": b}, 158) == {"a": 94, "b": 64}
    assert divide({"a": a, "b": replace(b, need=50)}, 110) == {"a": 60, "b": 50}, "for a need it does"


def test_whoever_makes_more_tokens_in_less_time_gets_more() -> None:
    slow, fast = token_pressure(100, 1000, 0.1), token_pressure(100, 1000, 0.025)
    assert fast == 4 * slow
    assert token_pressure(0, 1000, 0.1) == LEAST_WEIGHT
    got = divide({"slow": wish(need=50, weight=slow), "fast": wish(need=50, weight=fast)}, 50)
    assert got == {"slow": 10, "fast": 40}


def test_what_cannot_leave_stays_where_it_is_but_for_floors() -> None:
    full = Wish(1, floor=2, ceiling=20, held=15, need=15, can_leave=3)
    assert divide({"full": full, "asks": wish(need=15, floor=5)}, 20) == {"full": 12, "asks": 8}
    assert divide({"full": full, "asks": wish(need=15, floor=10)}, 20) == {"full": 10, "asks": 10}


def test_what_is_no_whole_segment_is_no_use() -> None:
    wishes = {"a": Wish(7, 0, ceiling=20, need=15), "b": Wish(5, 0, ceiling=20, need=6)}
    assert divide(wishes, 100) == {"a": 14, "b": 10}, "the ceiling of a holds two"
    assert divide(wishes, 13) == {"a": 7, "b": 5}
    assert divide(wishes, 6) == {"a": 0, "b": 5}, "the first in line cannot use what is left"


WISHES = st.builds(
    Wish,
    segment_bytes=st.integers(1, 9),
    floor=st.integers(0, 40),
    ceiling=st.integers(0, 120),
    held=st.integers(0, 120),
    need=st.integers(0, 120),
    like=st.integers(0, 120),
    can_leave=st.integers(0, 120),
    weight=st.floats(LEAST_WEIGHT, 1e9),
)


@given(st.dictionaries(st.sampled_from("abcd"), WISHES), st.integers(0, 300))
def test_a_division_is_whole_fits_and_wastes_nothing(wishes: dict[str, Wish], capacity: int) -> None:
    got = divide(wishes, capacity)
    left = capacity - sum(got.values())
    assert left >= 0
    for engine, its in wishes.items():
        assert got[engine] % its.segment_bytes == 0
        assert got[engine] <= its.ceiling
        wanted = its.whole(max(its.need, its.like, min(its.held, its.need) - its.can_leave))
        assert got[engine] <= wanted
        assert got[engine] == wanted or left < its.segment_bytes
    assert divide(wishes, capacity) == got


@pytest.mark.parametrize(("num_bytes", "whole"), [(-5, 0), (0, 0), (1, 8), (8, 8), (9, 16), (99, 24)])
def test_bytes_in_whole_segments(num_bytes: int, whole: int) -> None:
    assert Wish(8, 0, ceiling=31).whole(num_bytes) == whole
