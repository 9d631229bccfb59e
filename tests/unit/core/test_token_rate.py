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
    assert rate.per_s == pytest.approx(300)


def test_what_is_long_ago_counts_less():
    rate = TokenRate()
    rate.note(0, 0.0, is_busy=True)
    rate.note(1000, 1.0, is_busy=True)
    for second in range(2, 62):
        rate.note(10, float(second), is_busy=True)
    left = math.exp(-60 / RATE_MEMORY_S)
    others = sum(math.exp(-k / RATE_MEMORY_S) for k in range(60))
    assert rate.per_s == pytest.approx((1000 * left + 10 * others) / (left + others))


def test_a_clock_that_stands_or_goes_back_does_no_harm():
    rate = TokenRate()
    rate.note(0, 5.0, is_busy=True)
    rate.note(7, 5.0, is_busy=True)
    assert rate.per_s == 0
    rate.note(0, 4.0, is_busy=True)
    rate.note(0, 6.0, is_busy=True)
    assert rate.per_s == pytest.approx(3.5, rel=0.05)
