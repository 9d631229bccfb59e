"""A request whose copies fail again and again is ended; one that gets further in between is not."""

from __future__ import annotations

from layerkv.scheduler.tracker import MOST_FAILURES, TrackedRequest
from tests.fakes.tiny_scheduler import job


def tracked() -> TrackedRequest:
    return TrackedRequest(slo=job("", 1, 1).slo, arrival_s=0.0)


def test_failures_without_a_token_in_between_are_counted_to_the_limit() -> None:
    request = tracked()
    assert [request.copy_failed(0) for _ in range(MOST_FAILURES)] == [False] * (MOST_FAILURES - 1) + [True]


def test_a_token_in_between_begins_the_count_anew() -> None:
    request = tracked()
    assert not any(request.copy_failed(num_output) for num_output in (0, 0, 1, 1, 2, 2, 3, 3))
    assert request.copy_failed(3)
