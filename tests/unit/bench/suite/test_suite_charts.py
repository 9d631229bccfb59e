import functools
import re
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from layerkv.bench import plots
from layerkv.bench.records import RequestRecord
from layerkv.bench.suite import charts
from layerkv.bench.suite.charts import Plot
from tests.unit.bench.suite import made_results as made

TIMES = st.floats(min_value=1e-4, max_value=1e4)


@functools.cache
def drawn() -> dict[str, Plot]:
    runs = made.load_runs()
    result = made.case_result(runs)
    cdf = charts.cdf(result, runs)
    assert cdf is not None
    return {plot.name: plot for plot in [*charts.against_axis(result), cdf]}


def lines(plot: Plot, engine: str) -> list[Line2D]:
    return [line for line in plot.axes.get_lines() if line.get_gid() == f"{engine}|"]


def titles(plot: Plot) -> list[str]:
    artists = [*plot.axes.patches, *plot.axes.collections, *plot.axes.lines]
    found = (str(artist.get_gid()).partition("|")[2] for artist in artists)
    return [title for title in found if title]


def request(times_s: list[float], error: str | None = None) -> RequestRecord:
    return RequestRecord(
        request_id="r", arrival_s=1.0, prompt_tokens=8, output_tokens=8, token_times_s=times_s, error=error
    )


def timeline_of(of: RequestRecord) -> tuple[Plot, list[str]]:
    run = msgspec.structs.replace(made.load_run("stock", 4.0, 0, 1), requests=[of], wall_s=10.0)
    (plot,), _ = charts.timeline(made.case_result([run]), {"stock": run})
    return plot, [title.removeprefix("request 1: ").split()[0] for title in titles(plot)]


def test_every_engine_has_a_line_in_every_plot_and_layerkvs_is_on_top() -> None:
    for plot in drawn().values():
        assert all(len(lines(plot, engine)) == 1 for engine in made.ENGINES)
        order = [str(line.get_gid()) for line in plot.axes.get_lines()]
        assert order[-1].startswith("layerkv|")


def test_everything_lies_within_the_scales() -> None:
    for plot in drawn().values():
        (left, right), (low, high) = plot.axes.get_xlim(), plot.axes.get_ylim()
        for line in plot.axes.get_lines():
            assert all(left <= x <= right for x in line.get_xdata())
            assert all(low <= y <= high for y in line.get_ydata())


def test_a_point_says_its_median_and_its_range_over_seeds() -> None:
    said = [title for title in titles(drawn()["ttft"]) if title.startswith("layerkv, 6 requests per second")]
    assert len(said) == 1
    assert re.search(r": \d+ ms \(\d+ ms to \d+ ms\)$", said[0])
    alone = charts.against_axis(made.case_result(made.load_runs(seeds=(0,))))[0]
    assert not any(" to " in title for title in titles(alone))
    assert not alone.axes.collections, "one seed has no whiskers"


def test_the_offered_rate_is_drawn_at_the_points_that_the_oracle_has() -> None:
    goodput = drawn()["goodput"]
    (offered,) = [line for line in goodput.axes.get_lines() if line.get_gid() == "offered"]
    (oracle,) = lines(goodput, "oracle")
    assert list(offered.get_xdata()) == list(oracle.get_xdata())
    assert list(offered.get_ydata()) == list(offered.get_xdata())
    assert "offered rate" in goodput.note


def test_a_case_with_fewer_than_two_points_with_figures_has_no_curves() -> None:
    assert charts.against_axis(made.case_result([], tokens_equal=None)) == []
    assert charts.against_axis(made.case_result(made.load_runs(rates=(4.0,), seeds=(0,)))) == []


def test_a_line_breaks_where_an_engine_has_no_figures() -> None:
    runs = [run for run in made.load_runs(seeds=(0,)) if (run.engine, run.point) != ("stock", "rate-4")]
    for plot in charts.against_axis(made.case_result(runs, {"stock": made.FAILURE})):
        assert [list(line.get_xdata()) for line in lines(plot, "stock")] == [[1.0, 2.0], [6.0, 8.0]]


def test_bars_are_as_long_as_their_figures() -> None:
    result = made.case_result(made.load_runs(rates=(4.0,)))
    ttft = next(plot for plot in charts.bars(result) if plot.name == "bars-ttft")
    widths = {str(bar.get_gid()).partition("|")[0]: bar.get_width() for bar in ttft.axes.patches}
    assert widths == {name: figures.ttft_s.mean.median for name, figures in result.engines.items()}


def test_the_share_of_fluid_requests_is_drawn_first_and_against_a_whole() -> None:
    result = made.case_result(made.load_runs())
    plot = charts.against_axis(result)[0]
    assert plot.name == "fluid"
    assert plot.axes.get_ylim()[1] >= 1
    shares = [point.engines["layerkv"].fluid for point in result.points]
    assert list(lines(plot, "layerkv")[0].get_ydata()) == [share.median for share in shares if share is not None]


def test_what_a_result_from_before_does_not_know_is_not_drawn() -> None:
    result = made.case_result(made.load_runs(engines=("stock", "layerkv"), seeds=(0,), num_requests=8))
    points = [
        msgspec.structs.replace(
            point, engines={name: msgspec.structs.replace(of, fluid=None) for name, of in point.engines.items()}
        )
        for point in result.points
    ]
    old = msgspec.structs.replace(result, points=points, engines=points[2].engines)
    assert [plot.name for plot in charts.against_axis(old)] == ["ttft", "goodput", "attainment"]
    assert [plot.name for plot in charts.bars(old)] == ["bars-ttft", "bars-goodput", "bars-attainment"]


def test_the_distribution_pools_all_seeds_of_the_main_point_only() -> None:
    runs = made.load_runs(rates=(2.0, 4.0), engines=("layerkv",), seeds=(0, 1), num_requests=10)
    plot = charts.cdf(made.case_result(runs, main="rate-4"), runs)
    assert plot is not None
    assert len(lines(plot, "layerkv")[0].get_xdata()) == 20 + 2


def test_failed_requests_keep_a_distribution_below_its_top() -> None:
    run = made.load_run("stock", 4.0, 0, num_requests=10, num_failed=4)
    plot = charts.cdf(made.case_result([run]), [run])
    assert plot is not None
    # Of the four, two had tokens before they failed.
    assert lines(plot, "stock")[0].get_ydata()[-1] == 0.8


def test_a_long_distribution_keeps_few_corners_and_its_end() -> None:
    runs = [made.load_run("oracle", 4.0, 0, num_requests=700)]
    plot = charts.cdf(made.case_result(runs), runs)
    assert plot is not None
    shares = lines(plot, "oracle")[0].get_ydata()
    assert len(shares) <= charts.MAX_CDF_STEPS + 2
    assert shares[-1] == 1.0


def test_a_request_waits_then_decodes_from_its_first_token() -> None:
    plot, kinds = timeline_of(request([2.0, 2.1, 2.2, 2.3]))
    assert kinds == ["waiting", "decoding", "first"]
    assert "request 1: first token after 1.00 s" in titles(plot)
    assert [(bar.get_x(), bar.get_width()) for bar in plot.axes.patches] == [(1.0, 1.0), (2.0, pytest.approx(0.3))]


def test_only_a_gap_far_above_the_median_and_a_quarter_second_is_a_pause() -> None:
    paused = ["waiting", "decoding", "paused", "decoding", "first"]
    assert timeline_of(request([2.0, 2.1, 2.2, 4.0, 4.1]))[1] == paused
    # Ten times a small gap is still no pause, nor is a slow request paused at each of its tokens.
    assert timeline_of(request([2.0, 2.01, 2.02, 2.22, 2.23]))[1] == ["waiting", "decoding", "first"]
    assert timeline_of(request([2.0, 3.0, 4.0, 5.0]))[1] == ["waiting", "decoding", "first"]


def test_a_pause_right_after_the_first_token_leaves_no_empty_bar() -> None:
    assert timeline_of(request([2.0, 5.0, 5.1, 5.2, 5.3]))[1] == ["waiting", "paused", "decoding", "first"]


def test_failed_requests_are_marked_from_their_last_sign_of_life() -> None:
    assert timeline_of(request([], error="refused"))[1] == ["failed"]
    plot, kinds = timeline_of(request([2.0, 2.1], error="timed <out>"))
    assert kinds == ["waiting", "decoding", "failed", "first"]
    assert "request 1: failed after 2 tokens: timed <out>" in titles(plot)
    assert "<title>request 1: failed after 2 tokens: timed &lt;out&gt;</title>" in plot.svg()


def test_a_request_without_token_and_without_error_waits_to_the_end() -> None:
    plot, kinds = timeline_of(request([]))
    assert kinds == ["waiting"]
    assert titles(plot)[0].endswith("to 10.00 s)")


def test_a_timeline_shows_the_first_sixty_requests_in_order_of_arrival() -> None:
    run = made.load_run("stock", 4.0, 0, num_requests=80)
    shuffled = msgspec.structs.replace(run, requests=run.requests[::-1])
    (plot,), _ = charts.timeline(made.case_result([run]), {"stock": shuffled})
    waits = [bar for bar in plot.axes.patches if "waiting" in str(bar.get_gid())]
    assert len(waits) == 60
    assert [bar.get_x() for bar in waits] == sorted(bar.get_x() for bar in waits)
    assert "the first 60 of 80 requests" in plot.note
    end_s = plot.axes.get_xlim()[1]
    assert all(bar.get_width() >= 0 and bar.get_x() + bar.get_width() <= end_s for bar in plot.axes.patches)


def test_raw_plots_use_one_seed_of_the_main_point() -> None:
    runs = made.load_runs(rates=(2.0, 4.0), engines=("stock", "layerkv"), seeds=(3, 1), num_requests=4)
    chosen = charts.first_runs(made.case_result(runs, main="rate-4"), runs)
    assert list(chosen) == ["stock", "layerkv"]
    assert {(run.point, run.seed) for run in chosen.values()} == {("rate-4", 1)}


def memory(rate: float) -> dict[str, Plot]:
    runs = made.load_runs(rates=(rate,), seeds=(0,))
    result = made.case_result(runs)
    return {plot.engine: plot for plot in charts.memory(result, charts.first_runs(result, runs))}


def test_host_kv_lies_on_top_of_device_kv() -> None:
    found = memory(8.0)
    assert [area.get_gid() for area in found["stock"].axes.collections] == ["device"]
    device, host = found["layerkv"].axes.collections
    tops = {x: y for x, y in device.get_paths()[0].vertices.tolist() if y}
    below = {x: y for x, y in host.get_paths()[0].vertices.tolist() if tops.get(x) == y}
    assert below.keys() == tops.keys()
    assert host.get_paths()[0].vertices[:, 1].max() > max(tops.values())


def test_a_capacity_far_beyond_what_is_used_is_told_in_words_only() -> None:
    found = memory(4.0)
    assert [line.get_gid() for line in found["stock"].axes.get_lines()] == ["capacity"]
    assert not found["oracle"].axes.get_lines()
    assert "of 3.12GiB on the device" in found["oracle"].note


def test_thinned_samples_keep_the_peak() -> None:
    run = made.load_run("oracle", 8.0, 0, num_requests=700)
    (plot,) = charts.memory(made.case_result([run]), {"oracle": run})
    corners = plot.axes.collections[0].get_paths()[0].vertices
    assert len(corners) <= 2 * charts.MAX_SAMPLES + 3
    assert corners[:, 1].max() == max(sample.device_kv_bytes for sample in run.samples)


def shown_ticks(axes: Axes) -> list[float]:
    low, high = axes.get_xlim()
    return [value for value in axes.get_xticks() if low <= value <= high]


@given(st.lists(TIMES, min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_a_scale_of_times_holds_all_its_values_and_has_few_marks(values_s: list[float]) -> None:
    axes = plots.new_plot(100.0)
    is_log = plots.scale_times(axes, "x", values_s, plots.format_tick)
    assert is_log == (max(values_s) / min(values_s) > plots.LOG_AXIS_SPREAD)
    low, high = axes.get_xlim()
    assert all(low <= value <= high for value in values_s)
    assert 1 <= len(shown_ticks(axes)) <= 9


@pytest.mark.parametrize(
    ("most", "values"),
    [(0.7, [0, 0.2, 0.4, 0.6]), (52, [0, 10, 20, 30, 40, 50]), (8.1, [0, 2, 4, 6, 8]), (0, [0, 0.2, 0.4, 0.6, 0.8, 1])],
)
def test_marks_are_round_and_few(most: float, values: list[float]) -> None:
    axes = plots.new_plot(100.0)
    plots.scale_from_zero(axes, "x", most, plots.format_tick)
    assert shown_ticks(axes) == pytest.approx(values)


# Rates and lengths that a person would write; two that differ in the sixteenth digit are one point.
@given(st.lists(st.integers(1, 10**6).map(lambda tenths: tenths / 10), min_size=2, max_size=12, unique=True))
@settings(max_examples=40, deadline=None)
def test_points_lie_inside_of_their_scale_and_their_labels_apart(xs: list[float]) -> None:
    axes = plots.new_plot(100.0)
    plots.scale_points(axes, xs)
    low, high = axes.get_xlim()
    assert all(low < x < high for x in xs)
    at = axes.transData.transform([(x, 1.0) for x in axes.get_xticks()])[:, 0] * 72 / axes.figure.dpi
    halves = [0.3 * plots.FONT * len(f"{x:g}") for x in axes.get_xticks()]
    ends = [(left - half, left + half) for left, half in zip(at, halves, strict=True)]
    assert all(before[1] < after[0] for before, after in pairwise(ends))


def test_a_scale_of_one_value_is_refused() -> None:
    with pytest.raises(ValueError, match="found the one value 4 on the axis"):
        plots.scale_points(plots.new_plot(100.0), [4.0, 4.0])


@pytest.mark.parametrize(("value_s", "text"), [(0, "0"), (0.03, "30 ms"), (0.1, "0.1 s"), (0.3, "0.3 s"), (10, "10 s")])
def test_marks_are_written_without_trailing_zeros(value_s: float, text: str) -> None:
    assert plots.format_tick(value_s) == text


def test_a_drawing_in_a_page_has_the_pages_colours_and_names_of_its_own() -> None:
    svg = drawn()["ttft"].svg()
    assert all(f"var(--{engine})" in svg for engine in made.ENGINES)
    assert "#0000" not in svg, "a colour that stands for a name is left"
    assert all(name.startswith("ttft-") for name in re.findall(r' id="([^"]*)"', svg))
    assert not re.search(r"https?://|<style|<metadata", svg)
    assert to_hex(plots.colour("stock")) == plots.colour("stock")


def test_the_same_plot_is_drawn_the_same_twice() -> None:
    assert drawn()["goodput"].svg() == drawn()["goodput"].svg()
