import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from layerkv.bench.records import LoadRun, RequestRecord
from layerkv.bench.suite import summary
from layerkv.bench.suite.report import render_report, write_report
from layerkv.bench.suite.result import CaseResult
from layerkv.config import SloPolicy
from tests.unit.bench.suite import made_results as made

VOID = {"meta", "rect", "line", "circle", "input"}
PLOTS = ("fluid", "ttft", "goodput", "attainment", "cdf")
REASON = made.FAILURE.reason


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


def rendered(result: CaseResult, runs: Sequence[LoadRun] = (), policy: SloPolicy = made.POLICY) -> str:
    html = render_report(result, runs, policy)
    balance = TagBalance()
    balance.feed(html)
    assert not balance.open
    # Text that says that a value was missing or not a number has no place in a report.
    assert not re.search(r"\bnan\b|\binf\b|>None<|=\"None", html)
    return html


def has_marks(html: str, plot: str, engine: str) -> bool:
    """Whether anything in a plot is an engine's."""
    figure = html.partition(f'<figure id="plot-{plot}"')[2].partition("</figure>")[0]
    return f'class="engine {engine}"' in figure


def test_what_requests_waited_for_is_there_for_every_point_and_engine_that_tells() -> None:
    runs = made.load_runs()
    html = rendered(made.case_result(runs), runs)
    _, _, table = html.partition("What requests waited for</h2>")
    table, _, _ = table.partition("</table>")
    assert table.count('<th scope="rowgroup"') == 5
    assert [table.count(f'class="name">{title}</th>') for title in ("layerkv", "layerkv without SLO", "oracle")] == [
        5,
        5,
        0,
    ]
    assert "Lane zone" in table
    runs = made.load_runs(engines=("stock", "oracle"))
    assert "What requests waited for" not in rendered(made.case_result(runs), runs)


def test_what_the_oracle_is_follows_from_the_case() -> None:
    runs = made.load_runs((4.0,), seeds=(0,))
    result = made.case_result(runs)
    assert "stock with KV memory for everything" in rendered(result, runs)
    slots = msgspec.structs.replace(result, max_num_seqs={"stock": 4, "layerkv": 4, "oracle": 64})
    html = rendered(slots, runs)
    assert "KV memory for everything" not in html
    assert html.count("64 slots (max_num_seqs) where the others have 4") > 2


def test_a_complete_report_has_every_kind_of_plot_for_every_engine() -> None:
    runs = made.load_runs()
    html = rendered(made.case_result(runs), runs)
    for engine in summary.ENGINE_TITLES:
        assert all(has_marks(html, plot, engine) for plot in PLOTS)
        assert f'<figure id="plot-requests-{engine}" class="engine {engine}">' in html
        assert f'<figure id="plot-memory-{engine}" class="engine {engine}">' in html
    assert "the first 60 of 80 requests" in html
    assert 'id="plot-bars-' not in html


def test_the_tables_have_a_row_for_every_figure_and_for_every_engine_at_every_point() -> None:
    runs = made.load_runs()
    result = made.case_result(runs)
    tell_waits = [engine for engine in made.ENGINES if engine.startswith("layerkv")]
    of_points = 5 * (len(made.ENGINES) + len(tell_waits))
    assert rendered(result, runs).count("<tr") == 3 + len(summary.figure_rows(result)) + of_points


def test_the_report_needs_nothing_from_outside() -> None:
    runs = made.load_runs(rates=(2.0, 4.0), seeds=(0,), num_requests=12)
    html = rendered(made.case_result(runs), runs)
    assert not re.search(r"https?://|<script|<link|<img|@import|url\((?!#)", html)


def test_the_offered_rate_is_drawn_only_where_the_axis_is_the_rate() -> None:
    result = made.case_result(made.load_runs(seeds=(0,)))
    assert "offered rate" in rendered(result)
    points = [msgspec.structs.replace(point, x=point.x * 1000) for point in result.points]
    assert "offered rate" not in rendered(msgspec.structs.replace(result, points=points, axis="prompt tokens"))


def test_a_case_with_one_point_has_bars_instead_of_curves() -> None:
    runs = made.load_runs(rates=(4.0,), seeds=(0,), num_requests=12)
    html = rendered(made.case_result(runs), runs)
    assert all(f'id="plot-bars-{name}"' in html for name in ("ttft", "goodput", "attainment"))
    assert 'id="plot-ttft"' not in html
    assert 'id="plot-cdf"' in html
    assert "the first 60 of" not in html


def test_without_raw_runs_the_figures_are_still_shown() -> None:
    html = rendered(made.case_result(made.load_runs(seeds=(0,))))
    assert 'id="plot-ttft"' in html
    assert 'id="plot-cdf"' not in html
    assert "<h2>Requests" not in html
    assert "<h2>KV in memory" not in html


def test_a_report_without_any_figures_says_why_of_every_engine() -> None:
    html = rendered(made.case_result([], dict.fromkeys(made.ENGINES, made.FAILURE), tokens_equal=None))
    assert "Nothing to compare: no figures of stock vLLM and layerkv." in html
    assert html.count(f"<strong>{summary.ENGINE_TITLES['oracle']} {REASON}.</strong>") == 1
    assert "<svg" not in html
    assert "<h2>Figures" not in html


@pytest.mark.parametrize("missing", made.ENGINES)
def test_an_engine_with_failures_only_says_why_and_the_others_are_still_shown(missing: str) -> None:
    others = [name for name in made.ENGINES if name != missing]
    runs = made.load_runs(rates=(2.0, 4.0), engines=others, seeds=(0,), num_requests=12)
    html = rendered(made.case_result(runs, {missing: made.FAILURE}), runs)
    assert f"{summary.ENGINE_TITLES[missing]} {REASON}." in html
    assert "&lt;script&gt;alert(1)" in html
    for plot in PLOTS:
        assert not has_marks(html, plot, missing)
        assert all(has_marks(html, plot, name) for name in others)


def test_an_engine_none_of_whose_requests_was_answered_is_no_winner() -> None:
    runs = [run for run in made.load_runs(seeds=(0,), num_requests=10) if run.engine != "stock"]
    for rate in (1.0, 2.0, 4.0, 6.0, 8.0):
        silent = made.load_run("stock", rate, 0, num_requests=10, num_failed=10)
        requests = [msgspec.structs.replace(request, token_times_s=[]) for request in silent.requests]
        runs.append(msgspec.structs.replace(silent, requests=requests))
    html = rendered(made.case_result(runs), runs)
    assert "no figures of stock vLLM" in html
    assert "stock vLLM failed 10 of 10 requests" in html
    # Goodput and attainment are zero; a time to first token there is none of.
    assert [has_marks(html, plot, "stock") for plot in PLOTS] == [True, False, True, True, False]


def test_zero_goodput_everywhere_still_renders() -> None:
    runs = made.load_runs(rates=(1.0, 2.0), engines=("stock", "layerkv"), seeds=(0,), num_requests=4)
    runs = [msgspec.structs.replace(run, requests=[failed(r) for r in run.requests]) for run in runs]
    html = rendered(made.case_result(runs), runs)
    assert "No request met its objectives, neither with layerkv nor with stock" in html


def failed(request: RequestRecord) -> RequestRecord:
    return msgspec.structs.replace(request, error="timed out")


def test_an_interrupted_case_is_marked_and_shows_what_was_measured() -> None:
    runs = made.load_runs(rates=(2.0, 4.0), engines=("stock",), seeds=(0,))
    html = rendered(made.case_result(runs, interrupted=True, tokens_equal=None), runs)
    assert "<strong>Interrupted.</strong>" in html
    assert all(has_marks(html, plot, "stock") for plot in PLOTS)


def test_different_tokens_are_an_alarm() -> None:
    result = made.case_result(made.load_runs(rates=(4.0,), seeds=(0,), num_requests=4), tokens_equal=False)
    assert "<strong>Tokens differ.</strong>" in rendered(result)


def test_where_and_with_what_it_was_measured_is_at_the_end(tmp_path: Path) -> None:
    result = made.case_result(made.load_runs(rates=(4.0,), seeds=(0, 1), num_requests=4))
    write_report(result, [], tmp_path / "report.html")
    footer = (tmp_path / "report.html").read_text(encoding="utf-8").partition("<footer>")[2]
    for text in (result.command, result.date, result.machine.cpu, "vllm 0.32.0", "0, 1", "layerkv 240MiB", "no server"):
        assert text in footer
