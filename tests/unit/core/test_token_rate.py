"""The rate by which an engine is weighed: tokens per second of the time in which it has requests."""

import math

import pytest

from layerkv.core.sharing import RATE_MEMORY_S, TokenRate


def test_an_engine_that_has_done_nothing_has_no_rate():
    rate = TokenRate()
    assert rate.per_s == 0
    rate.note(0, 100.0, is_busy=False)
    rate.note(0, 200.0, is_busy=True)
    assert rate.per_s == 0


def test_time_without_requests_does_not_count():
    rate = TokenRate()
    rate.note(0, 0.0, is_busy=True)
    rate.note(300, 1.0, is_busy=False)
    rate.note(0, 41.0, is_busy=True)  # a burst wakes it
    rate.note(300, 42.0, is_busy=True)
    assert rate.per_s == pytest.approx(300, rel=0.02)


def test_an_hour_without_a_word_is_no_more_than_the_memory():
    rate = TokenRate()
    rate.note(0, 0.0, is_busy=True)
    rate.note(0, 3600.0, is_busy=True)
    for second in range(30):
        rate.note(1000, 3601.0 + second, is_busy=True)
    assert rate.per_s > 300


def test_what_has_just_begun_outranks_nobody():
    rate = TokenRate()
    rate.note(0, 0.0, is_busy=True)
    rate.note(8192, 0.0005, is_busy=True)
    assert rate.per_s == pytest.approx(8192, rel=1e-3)


def test_what_is_long_ago_counts_less():
    rate = TokenRate()
    rate.note(0, 0.0, is_busy=True)
    rate.note(1000, 1.0, is_busy=True)
    for second in range(2, 62):
        rate.note(10, float(second), is_busy=True)
    left = math.exp(-60 / RATE_MEMORY_S)
    others = sum(math.exp(-k / RATE_MEMORY_S) for k in range(60))
    assert rate.per_s == pytest.approx((1000 * left + 10 * others) / (left + others), rel=0.02)


def test_a_clock_that_stands_or_goes_back_does_no_harm():
    rate = TokenRate()
    rate.note(0, 5.0, is_busy=True)
    rate.note(7, 5.0, is_busy=True)
    assert rate.per_s == 7
    rate.note(0, 4.0, is_busy=True)
    rate.note(0, 6.0, is_busy=True)
    assert rate.per_s == pytest.approx(3.5, rel=0.05)
