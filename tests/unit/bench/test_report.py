import re
from html.parser import HTMLParser

import msgspec
import pytest

from layerkv.bench import charts, summary
from layerkv.bench.demo import Outcomes
from layerkv.bench.metrics import EngineFailure
from layerkv.bench.records import EngineRun
from layerkv.bench.report import render_report
from tests.unit.bench import made_records as made

VOID = {"meta", "circle", "rect", "line", "polyline"}
FAILURE = EngineFailure(reason="ended with exit status 1", log_tail=["ValueError: <script>alert(1)</script>"])


class TagBalance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def rendered(outcomes: Outcomes) -> str:
    html = render_report(made.result(outcomes), outcomes.runs)
    balance = TagBalance()
    balance.feed(html)
    assert not balance.open
    return html


def runs_without(*names: str) -> dict[str, EngineRun]:
    return {name: run for name, run in made.all_runs().items() if name not in names}


def test_a_complete_report_has_headline_table_timeline_and_distributions() -> None:
    html = rendered(Outcomes(runs=made.all_runs()))
    assert "First tokens came 5.5x sooner than with stock vLLM on average (1.00 s against 5.50 s)" in html
    assert html.count("<tr>") == 1 + len(summary.figure_rows(made.result()))
    assert all(f"Timeline of 2 requests through {title}" in html for title in summary.ENGINE_TITLES.values())
    assert html.count("<polyline") == 3
    assert "request 2: parked for 10.0 s" in html
    assert "All 2 requests got exactly the same tokens" in html


def test_the_report_needs_nothing_from_outside() -> None:
    html = rendered(Outcomes(runs=made.all_runs()))
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", html)


@pytest.mark.parametrize("missing", ["stock", "layerkv", "oracle"])
def test_a_failed_engine_says_why_and_the_others_are_still_shown(missing: str) -> None:
    html = rendered(Outcomes(runs=runs_without(missing), failures={missing: FAILURE}))
    assert f"{summary.ENGINE_TITLES[missing]} ended with exit status 1." in html
    assert "&lt;script&gt;alert(1)" in html
    assert html.count("<polyline") == 2


def test_a_report_without_any_run_still_renders() -> None:
    html = rendered(Outcomes(failures=dict.fromkeys(made.all_runs(), FAILURE)))
    assert "Nothing to compare" in html
    assert "<h2>Timeline" not in html


def test_an_interrupted_demo_is_marked_and_shows_what_was_measured() -> None:
    interrupted = Outcomes(
        runs=runs_without("layerkv", "oracle"),
        failures={"layerkv": EngineFailure(reason="was interrupted", log_tail=[])},
        interrupted=True,
    )
    html = rendered(interrupted)
    assert "<strong>Interrupted.</strong>" in html
    assert html.count("<polyline") == 1


def test_different_tokens_are_an_alarm() -> None:
    runs = made.all_runs()
    runs["layerkv"].requests[0].token_ids[0] += 1
    assert "<strong>Tokens differ.</strong>" in rendered(Outcomes(runs=runs))


def test_requests_without_any_token_are_drawn_as_queued() -> None:
    stuck = made.engine_run("stock", [made.request(0, 0.0, None, [])])
    html = rendered(Outcomes(runs={"stock": stuck}))
    assert "request 1: queued for 20.0 s" in html
    assert "<polyline" not in html


@pytest.mark.parametrize(
    ("mean", "p99", "words"),
    [
        (
            25.0,
            30.4,
            "25x sooner than with stock vLLM on average (1.00 s against 5.50 s) and 30x sooner at p99",
        ),
        (
            1.02,
            0.97,
            "about as soon as with stock vLLM on average (1.00 s against 5.50 s) and about as soon at",
        ),
        (
            0.5,
            2.5,
            "2.0x later than with stock vLLM on average (1.00 s against 5.50 s) and 2.5x sooner at p99",
        ),
    ],
)
def test_the_headline_says_sooner_later_or_the_same_as_the_ratios_have_it(mean: float, p99: float, words: str) -> None:
    result = made.result()
    ratios = msgspec.structs.replace(result.ratios, ttft_mean_speedup=mean, ttft_p99_speedup=p99)
    assert words in summary.headline(msgspec.structs.replace(result, ratios=ratios))


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0, "0 s"),
        (0.00052, "0.52 ms"),
        (0.0123, "12.3 ms"),
        (0.9, "900 ms"),
        (1.234, "1.23 s"),
        (37.31, "37.3 s"),
    ],
)
def test_durations_have_three_digits_and_the_unit_that_suits(duration_s: float, text: str) -> None:
    assert summary.format_duration(duration_s) == text


def test_a_wide_spread_of_first_tokens_gets_a_logarithmic_axis() -> None:
    near = made.engine_run("layerkv", [made.request(0, 0.0, 0.0, [1.0, 2.0])])
    far = made.engine_run("stock", [made.request(0, 0.0, 0.0, [30.0, 31.0])])
    assert not charts.cdf({"layerkv": near}).is_log
    assert charts.cdf({"stock": far, "layerkv": near}).is_log


def test_every_mark_of_the_plots_lies_within_the_plot() -> None:
    timeline, cdf = charts.timeline(made.all_runs()), charts.cdf(made.all_runs())
    bars = [bar for panel in timeline.panels for row in panel.rows for bar in row.bars]
    assert all(bar.left >= 0 and bar.left + bar.width <= 100.01 for bar in bars)
    points = [point for series in cdf.series for point in series.points]
    assert all(0 <= point.left <= 100 and 0 <= point.top <= 100 for point in points)
    assert all(0 <= tick.left <= 100 for tick in [*timeline.ticks, *cdf.ticks])


@pytest.mark.parametrize(
    ("end", "values"),
    [(0.7, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]), (53, [0, 10, 20, 30, 40, 50]), (8.4, [0, 2, 4, 6, 8])],
)
def test_axis_marks_are_round_and_few(end: float, values: list[float]) -> None:
    found = charts.round_values(end)
    assert found == pytest.approx(values)
