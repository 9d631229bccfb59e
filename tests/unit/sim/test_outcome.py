import json
import math
from itertools import pairwise
from random import Random

import pytest

from layerkv.config import SloClass
from layerkv.figures import distribution, tally_of
from layerkv.sim.outcome import GapHistogram, RequestOutcome, SimOutcome

CHAT = SloClass(name="chat", ttft_s=1.0, tpot_s=0.1)
STEADY = SloClass(name="steady", ttft_s=1.0, tpot_s=0.1, max_stall_s=0.5)
NOTHING = {"mean": None, "p50": None, "p90": None, "p99": None}


def served(
    *, first: float = 0.5, finish: float = 1.0, tokens: int = 11, slo: SloClass = CHAT, at: float = 0.0, gap: float = 0
) -> RequestOutcome:
    every_s = (finish - first) / max(tokens - 1, 1)
    tally = tally_of(slo, at, [first + k * every_s for k in range(tokens)])
    return RequestOutcome("a", slo, at, 100, tokens, first, finish, tally, gap)


def refused(at: float = 0.0) -> RequestOutcome:
    return RequestOutcome("b", CHAT, at, 100, 0, None, None, tally_of(CHAT, at, []))


def outcome(*requests: RequestOutcome, end_s: float = 10.0) -> SimOutcome:
    return SimOutcome(requests, GapHistogram(), end_s, 7)


@pytest.mark.parametrize("scale", [1e-5, 0.02, 1.0, 300.0])
def test_the_histogram_is_right_to_half_a_per_cent(scale: float) -> None:
    rng = Random(1)
    gaps = [scale * rng.lognormvariate(0.0, 1.0) for _ in range(5000)]
    histogram = GapHistogram()
    for gap in gaps:
        histogram.add(gap)
    found, exact = histogram.summary(), distribution(gaps)
    assert found["mean"] == pytest.approx(exact["mean"])
    for name in ("p50", "p90", "p99"):
        assert found[name] == pytest.approx(exact[name], rel=0.005)


@pytest.mark.parametrize("gap", [0.0123, 0.9999, 1.0, 1.0001, 1.004, 0.996, 57.0])
def test_the_histogram_of_equal_gaps_names_that_gap(gap: float) -> None:
    histogram = GapHistogram()
    histogram.add(gap, 3)
    histogram.add(gap)
    assert histogram.num == 4
    assert histogram.summary()["p99"] == pytest.approx(gap, rel=0.005)


def test_a_histogram_takes_gaps_of_nothing_and_has_no_summary_when_empty() -> None:
    histogram = GapHistogram()
    assert histogram.summary() == NOTHING
    histogram.add(0.0)
    assert histogram.summary()["mean"] == 0.0
    assert histogram.summary()["p50"] == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize(
    ("request_", "met"),
    [
        (served(), True),
        (served(first=1.0, finish=2.0), True),
        (served(first=1.01), False),
        (served(at=0.3, first=1.25, finish=2.0), True),
        (served(finish=1.51), False),  # 101 ms a token
        (served(finish=0.5, tokens=1), True),  # no second token, no time per token
        (served(first=1.5, finish=1.5, tokens=1), False),
        (served(gap=0.9), True),  # its class sets no longest stall
        (served(slo=STEADY, gap=0.5), True),
        (served(slo=STEADY, gap=0.51), False),
        (refused(), False),
    ],
)
def test_a_request_meets_its_slo_if_it_meets_every_objective(request_: RequestOutcome, met: bool) -> None:
    assert request_.met_slo is met


def test_the_time_per_token_is_of_the_tokens_after_the_first() -> None:
    assert served(first=0.5, finish=1.5, tokens=11).tpot_s == pytest.approx(0.1)
    assert served(tokens=1).tpot_s is None
    assert refused().tpot_s is None
    assert refused().ttft_s is None


def test_refused_requests_count_as_missed_and_have_no_times() -> None:
    figures = outcome(served(at=1.0, first=1.5, finish=2.0), refused(at=2.0), end_s=5.0).figures()
    assert (figures["requests"], figures["refused"]) == (2, 1)
    assert figures["slo_attainment"] == 0.5
    assert figures["ttft_s"] == {"mean": 0.5, "p50": 0.5, "p90": 0.5, "p99": 0.5}
    assert figures["goodput_rps"] == pytest.approx(1 / 4.0)  # from the first arrival to the end
    assert figures["output_tokens_per_s"] == pytest.approx(11 / 4.0)


def test_figures_without_any_served_request_are_none_and_not_numbers() -> None:
    empty, all_refused = outcome(end_s=0.0).figures(), outcome(refused()).figures()
    assert empty["slo_attainment"] is empty["goodput_rps"] is empty["output_tokens_per_s"] is None
    assert all_refused["slo_attainment"] == 0
    for figures in (empty, all_refused):
        assert figures["ttft_s"] == figures["tpot_s"] == figures["time_between_tokens_s"] == NOTHING
        json.dumps(figures, allow_nan=False)


def test_attainment_is_also_told_by_class() -> None:
    figures = outcome(served(), served(first=2.0, finish=2.5), served(slo=STEADY), refused()).figures()
    assert figures["slo_attainment"] == 0.5
    assert figures["slo_attainment_by_class"] == {"chat": pytest.approx(1 / 3), "steady": 1.0}
    assert math.isclose(figures["span_s"], 10.0)


def streamed(slo: SloClass, *times: float, at: float = 0.0) -> RequestOutcome:
    gap = max((b - a for a, b in pairwise(times)), default=0.0)
    return RequestOutcome("s", slo, at, 100, len(times), times[0], times[-1], tally_of(slo, at, times), gap)


def test_a_stream_is_fluid_by_its_reader_s_clock_and_not_by_its_mean() -> None:
    slow = [0.5, *(2.5 + 0.01 * k for k in range(40))]  # 60 ms a token on the mean, and two seconds without one
    paused = streamed(CHAT, *slow)
    assert paused.met_slo
    assert not paused.is_fluid
    assert (paused.lag_s, paused.longest_pause_s) == (pytest.approx(1.9), pytest.approx(1.9))
    figures = outcome(paused, streamed(CHAT, 0.5, 0.6, at=0.2), refused()).figures()
    assert figures["fluid"] == pytest.approx(1 / 3)
    assert figures["fluid_goodput_rps"] == pytest.approx(1 / 10)
    assert figures["slo_attainment"] == pytest.approx(2 / 3)
    assert figures["lag_s"]["mean"] == pytest.approx(1.9 / 2)
    assert figures["longest_pause_s"]["p99"] == pytest.approx(1.9 * 0.99)
    assert figures["second_token_s"]["mean"] == pytest.approx((2.0 + 0.1) / 2)
    assert figures["end_to_end_s"]["mean"] == pytest.approx((2.89 + 0.4) / 2)
    # Token k of the first is due at 1.0 + k / 10: from 2.5 s on they catch up, and are there from the 17th on.
    assert figures["tokens_on_time"] == pytest.approx((1 + 24 + 2) / 43)


@pytest.mark.parametrize(
    "nobody_reads",
    [
        SloClass(name="whole", ttft_s=1.0, tpot_s=0.1, stream=False),
        SloClass(name="batch", ttft_s=1.0, tpot_s=math.inf),
    ],
)
def test_where_nobody_reads_along_fluid_is_what_meets_the_objectives(nobody_reads: SloClass) -> None:
    slow = [0.5, *(2.5 + 0.01 * k for k in range(40))]
    done = streamed(nobody_reads, *slow)
    assert done.is_fluid
    assert (done.lag_s, done.longest_pause_s) == (None, None)
    assert not streamed(nobody_reads, 1.1, 1.2).is_fluid
    figures = outcome(done).figures()
    assert figures["lag_s"] == figures["longest_pause_s"] == NOTHING
    assert figures["fluid"] == 1.0


def test_without_tokens_there_is_no_share_of_them_on_time() -> None:
    figures = outcome(refused()).figures()
    assert figures["tokens_on_time"] is figures["fluidity_index"] is None
    assert figures["fluid"] == figures["fluid_goodput_rps"] == 0
    assert figures["second_token_s"] == figures["end_to_end_s"] == NOTHING
    assert outcome(end_s=0.0).figures()["fluid"] is None
