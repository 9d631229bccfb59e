"""When the reader of a stream runs dry, and until when its stream flows: the deadlines of the fluid policy."""

from __future__ import annotations

import math
from typing import Any

import pytest

from layerkv.config import SloClass
from layerkv.scheduler.tracker import TrackedRequest


def stream(first_s: float | None = 11.0, num_tokens: int = 0, *, at_s: float = 11.0, **slo: Any) -> TrackedRequest:
    """A request that came at 10 s, of a class whose readers take ten tokens a second, and its tokens."""
    tracked = TrackedRequest(SloClass(**{"name": "chat", "ttft_s": 2.0, "tpot_s": 0.1, **slo}), arrival_s=10.0)
    tracked.first_token_s = first_s
    if num_tokens:
        tracked.reader.add(at_s, num_tokens)
    return tracked


def test_a_reader_runs_dry_when_it_has_read_all_that_was_made() -> None:
    tracked = stream(num_tokens=5)
    assert tracked.dry_s(5, 11.2, 0.01) == pytest.approx(11.5)
    assert tracked.dry_s(5, 99.0, 0.01) == pytest.approx(11.5), "it has waited since then"


def test_each_wait_of_a_reader_moves_what_is_due_after_it() -> None:
    tracked = stream(num_tokens=5)
    tracked.reader.add(11.9, 2)
    assert tracked.dry_s(7, 12.0, 0.01) == pytest.approx(12.1)


def test_while_the_first_token_is_on_its_way_its_reader_gets_it_now() -> None:
    assert stream(None).dry_s(1, 11.0, 0.01) == pytest.approx(11.1)
    assert stream(None).dry_s(1, 11.4, 0.01) == pytest.approx(11.5)


def test_the_longest_stall_of_a_class_is_counted_from_now_where_the_reader_has_more_to_read() -> None:
    tracked = stream(num_tokens=50, max_stall_s=0.3)
    assert tracked.dry_s(50, 11.0, 0.01) == pytest.approx(11.3)
    assert tracked.dry_s(50, 15.9, 0.01) == pytest.approx(16.0)


@pytest.mark.parametrize("slo", [{"stream": False}, {"tpot_s": math.inf}])
def test_what_nobody_reads_goes_by_its_slack_on_the_mean(slo: dict[str, Any]) -> None:
    tracked = stream(num_tokens=5, **slo)
    tracked.low_tokens = 25
    assert tracked.dry_s(5, 11.2, 0.04) == tracked.start_by_s(5, 11.2, 0.04)
    if "stream" in slo:
        assert tracked.dry_s(5, 11.2, 0.04) == pytest.approx(11.0 + 25 * 0.1 - 20 * 0.04)
    assert tracked.flows_until_s(12.0) == 12.0, "there is no lag to spend"


def test_a_request_may_have_no_reader_though_its_class_has() -> None:
    tracked = TrackedRequest(
        SloClass(name="chat", ttft_s=2.0, tpot_s=0.1), arrival_s=10.0, first_token_s=11.0, has_reader=False
    )
    assert tracked.dry_s(5, 11.2, 0.2) == pytest.approx(11.5) == tracked.start_by_s(5, 11.2, 0.2)


def test_a_stream_flows_until_its_reader_has_waited_for_all_its_lag() -> None:
    tracked = stream(num_tokens=5)
    assert tracked.flows_until_s(11.5) == pytest.approx(12.5)
    tracked.reader.add(11.9)
    assert tracked.flows_until_s(12.0) == pytest.approx(12.6), "0.4 s are spent"


def test_a_stream_without_lag_to_spend_flows_until_its_reader_runs_dry() -> None:
    assert stream(num_tokens=5, max_lag_s=0.0).flows_until_s(11.5) == 11.5


@pytest.mark.parametrize("ttft_s", [2.0, 500.0])
def test_a_reader_who_has_waited_too_long_is_lost_for_ever(ttft_s: float) -> None:
    """Regression: with a TTFT that was still to come, a lost stream counted as one that flows."""
    tracked = stream(num_tokens=5, ttft_s=ttft_s)
    tracked.reader.add(12.6, 100)  # 1.1 s late
    for now_s in (12.6, 20.0, 100.0):
        assert tracked.flows_until_s(tracked.dry_s(105, now_s, 0.01)) < now_s


@pytest.mark.parametrize("slo", [{}, {"stream": False}])
def test_a_stream_whose_first_token_was_late_is_lost_for_ever(slo: dict[str, Any]) -> None:
    tracked = stream(12.1, 5, at_s=12.1, **slo)
    tracked.low_tokens = 500
    assert tracked.flows_until_s(tracked.dry_s(5, 12.1, 0.01)) < 12.1
    on_time = stream(12.0, 5, at_s=12.0, **slo)
    assert on_time.flows_until_s(on_time.dry_s(5, 12.0, 0.01)) > 12.0
