"""Predictions of output lengths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.scheduler.lengths import (
    LOW_QUANTILE,
    MIDDLE_QUANTILE,
    MIN_SAMPLES,
    WINDOW,
    LengthPredictor,
    MaxTokens,
    QuantileLengths,
)


def learned(*lengths: int, slo_class: str = "chat") -> QuantileLengths:
    predictor = QuantileLengths()
    for length in lengths:
        predictor.observe(slo_class, length)
    return predictor


def test_without_prediction_nothing_is_known() -> None:
    predictor = MaxTokens()
    for _ in range(100):
        predictor.observe("chat", 5)
    assert predictor.total_tokens("chat", 0, 400, LOW_QUANTILE) is None


def test_a_quantile_is_used_once_enough_requests_have_finished() -> None:
    few = learned(*range(1, MIN_SAMPLES))
    assert few.total_tokens("chat", 0, 400, MIDDLE_QUANTILE) is None
    few.observe("chat", MIN_SAMPLES)
    assert few.total_tokens("chat", 0, 400, MIDDLE_QUANTILE) == MIN_SAMPLES // 2 + 1


def test_quantiles_are_what_they_are_called() -> None:
    predictor = learned(*range(1, 101))
    assert predictor.total_tokens("chat", 0, 400, LOW_QUANTILE) == 26
    assert predictor.total_tokens("chat", 0, 400, MIDDLE_QUANTILE) == 51


def test_only_requests_that_got_as_far_count() -> None:
    predictor = learned(*([10] * 100), *([200] * 20))
    assert predictor.total_tokens("chat", 0, 400, MIDDLE_QUANTILE) == 10
    assert predictor.total_tokens("chat", 10, 400, LOW_QUANTILE) == 200
    assert predictor.total_tokens("chat", 200, 400, LOW_QUANTILE) is None, "nobody got further"


def bounded(ends: list[int], bounds: list[int]) -> QuantileLengths:
    predictor = learned(*ends)
    for bound in bounds:
        predictor.observe("chat", bound, is_bound=True)
    return predictor


def test_a_lower_bound_counts_among_those_that_got_that_far() -> None:
    ends = [10] * 50 + [100] * 50
    assert learned(*ends).total_tokens("chat", 0, 400, 0.45) == 10
    assert bounded(ends, [20] * 50).total_tokens("chat", 0, 400, 0.45) == 100, "a third ended after 10, not half"
    assert bounded(ends, [5] * 50).total_tokens("chat", 0, 400, 0.45) == 10, "how many got to 10 is as before"
    assert bounded(ends, [20] * 50).total_tokens("chat", 10, 400, LOW_QUANTILE) == 100


def test_bounds_alone_say_nothing() -> None:
    assert bounded([], [20] * 100).total_tokens("chat", 0, 400, LOW_QUANTILE) is None
    assert bounded([10] * 20, [20] * 200).total_tokens("chat", 0, 400, MIDDLE_QUANTILE) is None, "half got beyond 20"


@given(
    ends=st.lists(st.integers(1, 50), min_size=MIN_SAMPLES, max_size=60),
    bounds=st.lists(st.integers(1, 50), max_size=60),
    num_made=st.integers(0, 60),
)
def test_a_lower_bound_never_makes_a_prediction_shorter(ends: list[int], bounds: list[int], num_made: int) -> None:
    without = learned(*ends).total_tokens("chat", num_made, 1000, MIDDLE_QUANTILE)
    with_bounds = bounded(ends, bounds).total_tokens("chat", num_made, 1000, MIDDLE_QUANTILE)
    assert without is None or with_bounds is None or with_bounds >= without


@given(lengths=st.lists(st.integers(1, 50), min_size=MIN_SAMPLES, max_size=60), num_made=st.integers(0, 60))
def test_without_bounds_it_is_the_plain_quantile(lengths: list[int], num_made: int) -> None:
    longer = sorted(length for length in lengths if length > num_made)
    expected = longer[int(LOW_QUANTILE * len(longer))] if len(longer) >= MIN_SAMPLES else None
    assert learned(*lengths).total_tokens("chat", num_made, 1000, LOW_QUANTILE) == expected


def test_classes_do_not_learn_from_each_other() -> None:
    predictor = learned(*([10] * 100))
    assert predictor.total_tokens("batch", 0, 400, MIDDLE_QUANTILE) is None


def test_old_lengths_are_forgotten() -> None:
    predictor = learned(*([10] * WINDOW))
    for _ in range(WINDOW):
        predictor.observe("chat", 300)
    assert predictor.total_tokens("chat", 0, 400, LOW_QUANTILE) == 300
    assert predictor.total_tokens("chat", 0, 400, 0.0) == 300


@pytest.mark.parametrize("make", [MaxTokens, QuantileLengths])
@given(
    lengths=st.lists(st.integers(1, 50), max_size=60),
    num_made=st.integers(0, 60),
    max_tokens=st.integers(1, 60),
    quantile=st.sampled_from((LOW_QUANTILE, MIDDLE_QUANTILE)),
)
def test_a_prediction_is_more_than_was_made_and_no_more_than_may_be(
    make: type[LengthPredictor], lengths: list[int], num_made: int, max_tokens: int, quantile: float
) -> None:
    predictor = make()
    for length in lengths:
        predictor.observe("chat", length)
    total = predictor.total_tokens("chat", num_made, max_tokens, quantile)
    assert total is None or num_made + 1 <= total <= max(max_tokens, num_made + 1)
