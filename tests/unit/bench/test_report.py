"""The demo's report is the suite's, of a case with one point: what is the demo's own in it."""

from collections.abc import Sequence

import pytest

from layerkv.bench.demo import Outcomes, as_case
from layerkv.bench.records import EngineFailure
from layerkv.bench.suite import summary
from layerkv.bench.suite.result import CaseResult
from layerkv.config import default_policy
from tests.unit.bench import made_records as made
from tests.unit.bench.suite.test_suite_report import has_marks
from tests.unit.bench.suite.test_suite_report import rendered as rendered_case

ENGINES = ("stock", "layerkv", "oracle")
FAILURE = EngineFailure(reason="ended with exit status 1", log_tail=["ValueError: <script>alert(1)</script>"])


def rendered(outcomes: Outcomes) -> str:
    return rendered_case(*as_case(made.result(outcomes), outcomes.runs), default_policy())


def case_of(names: Sequence[str] = ENGINES) -> CaseResult:
    outcomes = Outcomes(runs={name: run for name, run in made.all_runs().items() if name in names})
    return as_case(made.result(outcomes), outcomes.runs)[0]


def test_a_complete_report_has_headline_table_timeline_and_distributions() -> None:
    html = rendered(Outcomes(runs=made.all_runs()))
    said = "First tokens came 5.5x sooner than with stock vLLM on average (1.00 s against 5.50 s)"
    # One of layerkv's two is parked for ten seconds and one of stock's waits as long for its first token; each token
    # takes a second, which is slower than layerkv's default class reads.
    assert summary.headline(case_of()) == "0 of 2 readers served in time, with hardly a pause; stock vLLM: 0 of 2."
    assert summary.sentences(case_of())[0].startswith(said)
    assert "<h1>0 of 2 readers served in time" in html
    assert all(f'<figure id="plot-stream-0-{name}"' in html for name in ENGINES)
    for plot in ("bars-ttft", "cdf"):
        assert all(has_marks(html, plot, name) for name in ENGINES)
    assert all(f'<figure id="plot-requests-{name}"' in html for name in ENGINES)
    assert "Every request got exactly the same tokens" in html
    assert "<title>layerkv demo</title>" in html


def test_its_figures_are_those_of_the_demos_json() -> None:
    result, case = made.result(), case_of()
    for name, written in result.engines.items():
        shown = case.engines[name]
        for figure in ("ttft_s", "tpot_s", "time_between_tokens_s", "second_token_s", "queue_s"):
            for part in ("mean", "p50", "p90", "p99"):
                assert getattr(getattr(shown, figure), part).median == getattr(getattr(written, figure), part)
        assert shown.output_tokens_per_s.median == written.output_tokens_per_s
    for ratio in ("ttft_mean_speedup", "ttft_p99_speedup", "throughput_ratio", "ttft_mean_over_oracle"):
        assert getattr(case.ratios, ratio).median == pytest.approx(getattr(result.ratios, ratio))


def test_it_has_no_rows_of_what_only_a_server_tells() -> None:
    labels = {row.label for row in summary.figure_rows(case_of())}
    assert {"TTFT mean", "Queue mean", "Parks / fetches", "Stored"} <= labels
    assert not {"Engine CPU", "Peak device KV", "Hits device / host", "Scheduler per step"} & labels


def test_a_request_that_the_engine_moved_is_drawn_as_the_engine_moved_it() -> None:
    html = rendered(Outcomes(runs=made.all_runs()))
    assert "request 2: queued for 9.00 s" in html
    assert "request 2: parked for 10.0 s" in html


@pytest.mark.parametrize("missing", ENGINES)
def test_a_failed_engine_says_why_and_the_others_are_still_shown(missing: str) -> None:
    runs = {name: run for name, run in made.all_runs().items() if name != missing}
    html = rendered(Outcomes(runs=runs, failures={missing: FAILURE}))
    assert f"{summary.ENGINE_TITLES[missing]} ended with exit status 1." in html
    assert "&lt;script&gt;alert(1)" in html
    assert not has_marks(html, "cdf", missing)
    assert all(has_marks(html, "cdf", name) for name in runs)


def test_a_report_without_any_run_still_renders() -> None:
    html = rendered(Outcomes(failures=dict.fromkeys(made.all_runs(), FAILURE)))
    assert "Nothing to compare" in html
    assert "<h2>Requests" not in html


def test_an_interrupted_demo_is_marked_and_shows_what_was_measured() -> None:
    failures = {"layerkv": EngineFailure(reason="was interrupted", log_tail=[])}
    html = rendered(Outcomes(runs={"stock": made.stock_run()}, failures=failures, interrupted=True))
    assert "<strong>Interrupted.</strong>" in html
    assert has_marks(html, "cdf", "stock")


def test_different_tokens_are_an_alarm() -> None:
    runs = made.all_runs()
    runs["layerkv"].requests[0].token_ids[0] += 1
    assert "<strong>Tokens differ.</strong>" in rendered(Outcomes(runs=runs))


def test_requests_without_any_token_are_drawn_as_waiting() -> None:
    stuck = made.engine_run("stock", [made.request(0, 0.0, None, [])])
    html = rendered(Outcomes(runs={"stock": stuck}))
    assert "request 1: waiting for 20.0 s" in html
    assert 'id="plot-cdf"' not in html
