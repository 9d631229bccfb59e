"""What every figure means."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.config import SloClass
from layerkv.figures import (
    ReaderClock,
    StreamTally,
    distribution,
    fluidity_index,
    is_fluid,
    met_slo,
    num_late,
    num_on_time,
    percentile,
    reader_of,
    tally_of,
    tpot_s,
)

CHAT = SloClass(name="chat", ttft_s=1.0, tpot_s=0.1)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0.0, 1.0))
def test_a_percentile_is_numpys(samples: list[float], share: float) -> None:
    expected = float(np.percentile(samples, share * 100))
    assert percentile(sorted(samples), share) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_values_that_are_not_there_are_left_out() -> None:
    assert distribution([None, 2.0, None]) == {"mean": 2.0, "p50": 2.0, "p90": 2.0, "p99": 2.0}
    assert distribution([None]) is None
    assert distribution([3.0, 1.0]) == {"mean": 2.0, "p50": 2.0, "p90": pytest.approx(2.8), "p99": pytest.approx(2.98)}


def test_one_token_has_no_time_per_token() -> None:
    assert tpot_s(1.0, 1.0, 1) is None
    assert tpot_s(1.0, 3.0, 3) == 1.0


@pytest.mark.parametrize(
    ("ttft_s", "tpot", "gap_s", "stall_s", "is_met"),
    [
        (1.0, 0.1, 9.0, None, True),
        (1.01, 0.1, 0.1, None, False),
        (None, None, 0.0, None, False),
        (0.5, 0.11, 0.2, None, False),
        (0.5, None, 0.0, None, True),
        (0.5, 0.1, 2.0, 2.0, True),
        (0.5, 0.1, 2.1, 2.0, False),
    ],
)
def test_an_slo_is_met_if_every_objective_of_the_class_is(
    ttft_s: float | None, tpot: float | None, gap_s: float, stall_s: float | None, is_met: bool
) -> None:
    slo = SloClass(name="chat", ttft_s=1.0, tpot_s=0.1, max_stall_s=stall_s)
    assert met_slo(slo, ttft_s, tpot, gap_s) is is_met


# A reader's clock ------------------------------------------------------------------------------------------------

READS = SloClass(name="reads", ttft_s=2.0, tpot_s=0.5)


def test_a_reader_who_always_finds_a_token_never_waits() -> None:
    reader = reader_of(READS, [3.0, 3.1, 3.2, 3.3])
    assert (reader.lag_s, reader.longest_pause_s, reader.num_tokens) == (0.0, 0.0, 4)
    assert reader.wants_next_s == pytest.approx(5.0)


def test_each_wait_moves_what_comes_after_it() -> None:
    reader = reader_of(READS, [0.0, 0.1, 3.0, 3.4, 5.0])
    assert reader.longest_pause_s == pytest.approx(2.0)
    assert reader.paused_at == 2
    assert reader.lag_s == pytest.approx(3.0)  # then wanted at 3.5, had; at 4.0, came at 5.0


@given(st.lists(st.floats(0, 10), min_size=1, max_size=40).map(sorted), st.floats(0.01, 3))
def test_lag_is_how_far_the_latest_token_is_behind_the_pace(times_s: list[float], pace_s: float) -> None:
    reader = reader_of(SloClass(name="any", ttft_s=1.0, tpot_s=pace_s), times_s)
    assert reader.lag_s == pytest.approx(max(at_s - times_s[0] - k * pace_s for k, at_s in enumerate(times_s)))
    assert 0 <= reader.longest_pause_s <= reader.lag_s + 1e-9


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 5), st.floats(0, 1) | st.just(0.0)), min_size=1, max_size=20))
def test_tokens_told_together_are_tokens_one_by_one(batches: list[tuple[float, int, float]]) -> None:
    together, one_by_one = ReaderClock(0.3), ReaderClock(0.3)
    at_s = 0.0
    for gap_s, num, every_s in batches:
        at_s += gap_s
        together.add(at_s, num, every_s)
        for k in range(num):
            one_by_one.add(at_s + k * every_s)
        at_s += (num - 1) * every_s
    assert together.lag_s == pytest.approx(one_by_one.lag_s)
    assert together.wants_next_s == pytest.approx(one_by_one.wants_next_s)
    assert together.longest_pause_s == pytest.approx(one_by_one.longest_pause_s)


def test_a_stream_is_fluid_if_it_begins_in_time_and_its_reader_hardly_waits() -> None:
    strict = SloClass(name="strict", ttft_s=2.0, tpot_s=0.5, max_lag_s=0.0)
    assert is_fluid(READS, 2.0, 1.0)
    assert not is_fluid(READS, 2.1, 0.0)
    assert not is_fluid(READS, None, 0.0)
    assert not is_fluid(READS, 1.0, 1.1)
    assert is_fluid(strict, 1.0, 0.0)
    assert not is_fluid(strict, 1.0, 0.1)


def test_nobody_waits_for_what_nobody_reads() -> None:
    for slo in (
        SloClass(name="batch", ttft_s=2.0, tpot_s=math.inf),
        SloClass(name="whole", ttft_s=2.0, tpot_s=0.1, stream=False),
    ):
        assert not slo.has_reader
        assert reader_of(slo, [0.0, 5.0, 50.0]).lag_s == 0.0


def test_a_token_is_on_time_by_the_request_s_arrival_and_not_by_its_first_token() -> None:
    assert num_on_time(READS, 10.0, [10.1, 12.5, 13.0, 13.6]) == 3  # due at 12.0, 12.5, 13.0, 13.5
    assert num_on_time(SloClass(name="batch", ttft_s=2.0, tpot_s=math.inf), 0.0, [2.0, 99.0]) == 2


EIGHTHS = st.integers(-40, 80).map(lambda eighths: eighths / 8)  # exact: a token that is due now is on time
TPOTS = st.sampled_from((0.125, 0.5, 1.0, math.inf))


@given(st.integers(0, 6), EIGHTHS, st.integers(1, 30), st.integers(0, 16).map(lambda eighths: eighths / 8), TPOTS)
def test_of_tokens_told_together_as_many_are_late_as_one_by_one(
    k: int, at_s: float, num_tokens: int, every_s: float, tpot_s: float
) -> None:
    slo = SloClass(name="any", ttft_s=2.0, tpot_s=tpot_s)
    times_s = [at_s + i * every_s for i in range(num_tokens)]
    before = [-100.0] * k
    on_time = num_on_time(slo, 1.0, before + times_s) - k
    assert num_late(slo, 1.0, k, at_s, num_tokens, every_s) == num_tokens - on_time


def test_the_fluidity_index_counts_every_deadline_that_passes_and_begins_anew_after_a_late_token() -> None:
    assert fluidity_index(READS, 0.0, []) is None
    assert fluidity_index(READS, 0.0, [1.0, 1.1, 1.2]) == 1.0
    assert fluidity_index(READS, 0.0, [1.0, 2.6]) == pytest.approx(1 - 1 / 2)  # due at 2.5
    # 1.3 s late are three deadlines missed; the next one counts from there
    assert fluidity_index(READS, 0.0, [1.0, 3.8, 4.3]) == pytest.approx(1 - 3 / 5)


# Counted as it comes ----------------------------------------------------------------------------------------------


def sixty_fourths(most: int) -> st.SearchStrategy[float]:
    """Times that sums of floats hold exactly: then a token that is due is not late by a rounding."""
    return st.integers(0, most).map(lambda n: n / 64)


classes = st.builds(
    SloClass,
    name=st.just("any"),
    ttft_s=st.integers(1, 200).map(lambda n: n / 64),
    tpot_s=st.integers(1, 100).map(lambda n: n / 64) | st.just(math.inf),
    stream=st.booleans(),
)
batches_of_tokens = st.lists(
    st.tuples(sixty_fourths(300), st.integers(1, 30), sixty_fourths(150)), min_size=1, max_size=12
)


@given(classes, sixty_fourths(100), sixty_fourths(500), batches_of_tokens)
def test_a_tally_of_tokens_told_together_is_what_the_list_of_their_times_says(
    slo: SloClass, arrival_s: float, first_s: float, batches: list[tuple[float, int, float]]
) -> None:
    together = StreamTally(slo, arrival_s)
    times: list[float] = []
    at_s = arrival_s + first_s
    for gap_s, num, every_s in batches:
        at_s += gap_s
        together.add(at_s, num, every_s)
        times += [at_s + k * every_s for k in range(num)]
        at_s += (num - 1) * every_s
    reader = reader_of(slo, times)
    for tally in (together, tally_of(slo, arrival_s, times)):
        assert tally.num_tokens == len(times)
        assert tally.num_on_time == num_on_time(slo, arrival_s, times)
        assert tally.fluidity_index == pytest.approx(fluidity_index(slo, arrival_s, times), abs=1e-12)
        assert tally.first_s == times[0]
        assert tally.second_token_s == (times[1] - times[0] if len(times) > 1 else None)
        assert tally.reader.lag_s == pytest.approx(reader.lag_s)
        assert tally.reader.longest_pause_s == pytest.approx(reader.longest_pause_s)
        assert tally.reader.wants_next_s == pytest.approx(reader.wants_next_s)
        assert tally.reader.num_tokens == reader.num_tokens


@given(st.floats(0.01, 3), st.lists(st.floats(0, 10), min_size=1, max_size=40).map(sorted))
def test_asking_a_tally_in_between_changes_nothing(tpot: float, times: list[float]) -> None:
    slo = SloClass(name="any", ttft_s=1.0, tpot_s=tpot)
    asked, alone = StreamTally(slo, 0.0), tally_of(slo, 0.0, times)
    for at_s in times:
        asked.add(at_s)
        assert asked.reader.num_tokens == asked.num_tokens
        assert asked.fluidity_index is not None
    assert (asked.num_on_time, asked.fluidity_index) == (alone.num_on_time, pytest.approx(alone.fluidity_index))
    assert asked.reader.lag_s == pytest.approx(alone.reader.lag_s)


def test_a_tally_without_tokens_has_no_index() -> None:
    tally = StreamTally(READS, 0.0)
    assert (tally.num_tokens, tally.num_on_time, tally.fluidity_index, tally.second_token_s) == (0, 0, None, None)
