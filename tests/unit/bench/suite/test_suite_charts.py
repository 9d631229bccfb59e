import functools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.bench.records import RequestRecord
from layerkv.bench.suite import axes, charts, run_charts
from layerkv.bench.suite.charts import Plot
from layerkv.bench.suite.run_charts import TimelineRow
from tests.unit.bench.suite import made_results as made

TIMES = st.floats(min_value=1e-4, max_value=1e4)


@functools.cache
def plots() -> dict[str, Plot]:
    runs = made.load_runs()
    result = made.case_result(runs)
    return {plot.name: plot for plot in [*charts.against_axis(result), run_charts.cdf(result, runs)]}


def corners(points: str) -> list[tuple[float, float]]:
    return [(float(left), float(top)) for left, top in (pair.split(",") for pair in points.split())]


def request(times_s: list[float], error: str | None = None) -> RequestRecord:
    return RequestRecord(
        request_id="r", arrival_s=1.0, prompt_tokens=8, output_tokens=8, token_times_s=times_s, error=error
    )


def row_of(of: RequestRecord) -> TimelineRow:
    run = msgspec.structs.replace(made.load_run("stock", 4.0, 0, 1), requests=[of], wall_s=10.0)
    return run_charts.timeline({"stock": run}).panels[0].rows[0]


def kinds(of: RequestRecord) -> list[str]:
    return [bar.kind for bar in row_of(of).bars]


def test_every_mark_of_every_plot_lies_within_its_plot() -> None:
    for plot in plots().values():
        for curve in plot.curves:
            drawn = [corner for part in curve.parts for corner in corners(part)]
            drawn += [(point.left, point.top) for point in curve.points]
            drawn += [(point.left, at) for point in curve.points for at in (point.low, point.high) if at is not None]
            assert all(0 <= left <= 100 and 0 <= top <= 100 for left, top in drawn)
        assert all(0 <= mark.at <= 100 for mark in (*plot.x_marks, *plot.y_marks))


def test_a_whisker_spans_the_seeds_around_the_median() -> None:
    # Positions count from the top: the least seed is lowest.
    points = [point for curve in plots()["ttft"].curves for point in curve.points]
    assert all(point.low is not None and point.high is not None for point in points)
    assert all(point.low >= point.top >= point.high for point in points)  # type: ignore[operator]


def test_one_seed_has_no_whiskers() -> None:
    plot = charts.against_axis(made.case_result(made.load_runs(seeds=(0,))))[0]
    assert all(point.low is None for curve in plot.curves for point in curve.points)


def test_layerkv_is_drawn_on_top_of_the_others() -> None:
    assert all(plot.curves[-1].engine == "layerkv" for plot in plots().values())


def test_a_wide_spread_of_first_tokens_gets_a_logarithmic_axis() -> None:
    assert axes.of_times([0.1, 3.0]).is_log
    assert not axes.of_times([0.2, 3.0]).is_log


def test_the_oracle_lies_on_or_below_the_offered_rate() -> None:
    goodput = plots()["goodput"]
    offered = corners(goodput.reference)
    oracle = next(curve for curve in goodput.curves if curve.engine == "oracle")
    assert [left for left, _ in offered] == pytest.approx([point.left for point in oracle.points], abs=0.01)
    assert offered[0][1] > offered[-1][1]


def test_a_case_with_fewer_than_two_points_with_figures_has_no_curves() -> None:
    assert charts.against_axis(made.case_result([], tokens_equal=None)) == []
    assert charts.against_axis(made.case_result(made.load_runs(rates=(4.0,), seeds=(0,)))) == []


def test_bars_are_as_long_as_their_figures() -> None:
    result = made.case_result(made.load_runs(rates=(4.0,)))
    ttft = charts.bars(result)[0]
    longest = max(ttft.rows, key=lambda row: row.width)
    for row in ttft.rows:
        ratio = result.engines[row.engine].ttft_s.mean.median / result.engines[longest.engine].ttft_s.mean.median
        assert row.width / longest.width == pytest.approx(ratio, rel=0.01)


def test_the_distribution_pools_all_seeds_of_the_main_point_only() -> None:
    runs = made.load_runs(rates=(2.0, 4.0), engines=("layerkv",), seeds=(0, 1), num_requests=10)
    plot = run_charts.cdf(made.case_result(runs, main="rate-4"), runs)
    assert len(plot.curves[0].points) == 20


def test_failed_requests_keep_a_distribution_below_its_top() -> None:
    run = made.load_run("stock", 4.0, 0, num_requests=10, num_failed=4)
    # Of the four, two had tokens before they failed.
    assert corners(run_charts.cdf(made.case_result([run]), [run]).curves[0].parts[0])[-1] == (100.0, 20.0)


def test_a_long_distribution_keeps_few_corners_and_its_end() -> None:
    runs = [made.load_run("oracle", 4.0, 0, num_requests=700)]
    curve = run_charts.cdf(made.case_result(runs), runs).curves[0]
    assert len(corners(curve.parts[0])) <= 2 * run_charts.MAX_CDF_STEPS + 2
    assert corners(curve.parts[0])[-1] == (100.0, 0.0)


def test_a_request_waits_then_decodes() -> None:
    row = row_of(request([2.0, 2.1, 2.2, 2.3]))
    assert [bar.kind for bar in row.bars] == ["waiting", "decoding"]
    assert row.first_token == pytest.approx(row.bars[1].left, abs=0.01)
    assert row.first_token_title == "request 1: first token after 1.00 s"


def test_only_a_gap_far_above_the_median_and_a_quarter_second_is_a_pause() -> None:
    assert kinds(request([2.0, 2.1, 2.2, 4.0, 4.1])) == ["waiting", "decoding", "paused", "decoding"]
    # Ten times a small gap is still no pause, nor is a slow request paused at each of its tokens.
    assert kinds(request([2.0, 2.01, 2.02, 2.22, 2.23])) == ["waiting", "decoding"]
    assert kinds(request([2.0, 3.0, 4.0, 5.0])) == ["waiting", "decoding"]


def test_a_pause_right_after_the_first_token_leaves_no_empty_bar() -> None:
    assert kinds(request([2.0, 5.0, 5.1, 5.2, 5.3])) == ["waiting", "paused", "decoding"]


def test_failed_requests_are_marked_from_their_last_sign_of_life() -> None:
    assert kinds(request([], error="refused")) == ["failed"]
    bars = row_of(request([2.0, 2.1], error="timed <out>")).bars
    assert [bar.kind for bar in bars] == ["waiting", "decoding", "failed"]
    assert bars[-1].title == "request 1: failed after 2 tokens: timed <out>"


def test_a_request_without_token_and_without_error_waits_to_the_end() -> None:
    bars = row_of(request([])).bars
    assert [bar.kind for bar in bars] == ["waiting"]
    assert bars[0].title.endswith("to 10.00 s)")


def test_a_timeline_shows_the_first_sixty_requests_in_order_of_arrival() -> None:
    run = made.load_run("stock", 4.0, 0, num_requests=80)
    shuffled = msgspec.structs.replace(run, requests=run.requests[::-1])
    timeline = run_charts.timeline({"stock": shuffled})
    lefts = [row.bars[0].left for row in timeline.panels[0].rows]
    assert len(lefts) == 60
    assert lefts == sorted(lefts)
    assert timeline.num_requests == {"stock": 80}
    bars = [bar for row in timeline.panels[0].rows for bar in row.bars]
    assert all(bar.width >= 0 and bar.left + bar.width <= 100.01 for bar in bars)


def test_raw_plots_use_one_seed_of_the_main_point() -> None:
    runs = made.load_runs(rates=(2.0, 4.0), engines=("stock", "layerkv"), seeds=(3, 1), num_requests=4)
    chosen = run_charts.first_runs(made.case_result(runs, main="rate-4"), runs)
    assert list(chosen) == ["stock", "layerkv"]
    assert {(run.point, run.seed) for run in chosen.values()} == {("rate-4", 1)}


def test_host_kv_lies_on_top_of_device_kv() -> None:
    runs = made.load_runs(rates=(8.0,), seeds=(0,))
    result = made.case_result(runs)
    panels = {panel.engine: panel for panel in run_charts.memory(result, run_charts.first_runs(result, runs)).panels}
    assert panels["stock"].host == ""
    device, host = corners(panels["layerkv"].device), corners(panels["layerkv"].host)
    half = len(device) // 2
    assert host[half:] == device[:half][::-1]
    assert all(top <= bottom for (_, top), (_, bottom) in zip(host[:half], device[:half], strict=True))


def test_a_capacity_far_beyond_what_is_used_is_told_in_words_only() -> None:
    runs = made.load_runs(rates=(4.0,), seeds=(0,))
    result = made.case_result(runs)
    panels = {panel.engine: panel for panel in run_charts.memory(result, run_charts.first_runs(result, runs)).panels}
    assert panels["stock"].capacity is not None
    assert panels["oracle"].capacity is None
    assert "of 3.12GiB on the device" in panels["oracle"].peaks


def test_thinned_samples_keep_the_peak() -> None:
    run = made.load_run("oracle", 8.0, 0, num_requests=700)
    panel = run_charts.memory(made.case_result([run]), {"oracle": run}).panels[0]
    assert len(corners(panel.device)) <= 2 * run_charts.MAX_SAMPLES
    top_bytes = max(sample.device_kv_bytes for sample in run.samples)
    assert min(top for _, top in corners(panel.device)) == pytest.approx(100 - 100 / 1.04, abs=0.1), top_bytes


@given(st.lists(TIMES, min_size=1, max_size=20))
def test_an_axis_of_times_holds_all_its_values_in_order(values_s: list[float]) -> None:
    axis = axes.of_times(values_s)
    positions = [axis.position(value) for value in sorted(values_s)]
    assert positions == sorted(positions)
    assert 1 <= len(axis.marks) <= 10
    assert [mark.at for mark in axis.marks] == sorted(mark.at for mark in axis.marks)


# Rates and lengths that a person would write; two that differ in the sixteenth digit are one point.
@given(st.lists(st.integers(1, 10**6).map(lambda tenths: tenths / 10), min_size=2, max_size=12, unique=True))
def test_points_of_an_axis_are_apart_from_its_ends_and_labels_from_each_other(xs: list[float]) -> None:
    axis = axes.of_points(xs)
    assert all(0 < axis.position(x) < 100 for x in xs)
    gaps = [after.at - before.at for before, after in zip(axis.marks, axis.marks[1:], strict=False)]
    assert all(gap >= axes.LABEL_GAP_PERCENT for gap in gaps)


def test_an_axis_of_one_value_is_refused() -> None:
    with pytest.raises(ValueError, match="found the one value 4 on the axis"):
        axes.of_points([4.0, 4.0])


@pytest.mark.parametrize(
    ("end", "values"),
    [(0.7, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]), (53, [0, 10, 20, 30, 40, 50]), (8.4, [0, 2, 4, 6, 8])],
)
def test_axis_marks_are_round_and_few(end: float, values: list[float]) -> None:
    assert axes.round_values(end) == pytest.approx(values)
