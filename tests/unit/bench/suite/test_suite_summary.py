import functools

import msgspec
import pytest

from layerkv.bench.suite import summary, tables
from layerkv.bench.suite.result import CaseResult, Distribution, Figures, Spread
from layerkv.bench.words import format_duration
from tests.unit.bench.suite import made_results as made


@functools.cache
def case() -> CaseResult:
    return made.case_result(made.load_runs(), main="rate-6")


def with_ratios(result: CaseResult, **ratios: Spread | None) -> CaseResult:
    return msgspec.structs.replace(result, ratios=msgspec.structs.replace(result.ratios, **ratios))


def with_figures(result: CaseResult, engine: str, **figures: object) -> CaseResult:
    """The result with other figures of an engine at the main point."""
    changed = msgspec.structs.replace(result.engines[engine], **figures)
    points = [
        msgspec.structs.replace(point, engines={**point.engines, engine: changed})
        if point.name == result.main_point
        else point
        for point in result.points
    ]
    return msgspec.structs.replace(result, points=points, engines={**result.engines, engine: changed})


def said(result: CaseResult) -> str:
    return "\n".join(summary.sentences(result))


def cells(result: CaseResult, label: str) -> dict[str, str]:
    row: tables.Row = next(row for row in summary.figure_rows(result) if row.label == label)
    return dict(zip(summary.engine_order(result), row.cells, strict=True))


def test_how_requests_ended_is_said_where_they_did_not_name_a_length() -> None:
    ends = {"hang_up": Spread.of([20.0]), "stop": Spread.of([59.0]), "length": Spread.of([1.0])}
    result = with_figures(case(), "layerkv", ends=ends, output_tokens=Spread.of([71.4]))
    ended = "Of 80 requests to layerkv, 59 ended by a stop string and 20 when their client hung up"
    assert f"{ended}; answers had 71 tokens on average." in said(result)
    only_lengths = with_figures(case(), "layerkv", ends={"length": Spread.of([80.0])})
    assert "stop string" not in said(only_lengths) + said(case())


@pytest.mark.parametrize(
    ("mean", "p99", "words"),
    [
        (15.0, 30.4, ("15x sooner than with stock vLLM on average", "and 30x sooner at p99")),
        (1.02, 0.97, ("about as soon as with stock vLLM on average", "and about as soon at p99")),
        (0.5, 2.5, ("2.0x later than with stock vLLM on average", "and 2.5x sooner at p99")),
    ],
)
def test_first_tokens_are_said_to_come_sooner_later_or_the_same_as_the_ratios_have_it(
    mean: float, p99: float, words: tuple[str, str]
) -> None:
    ratios = {"ttft_mean_speedup": Spread.of([mean]), "ttft_p99_speedup": Spread.of([p99])}
    first = summary.sentences(with_ratios(case(), **ratios))[0]
    assert first.startswith(f"First tokens came {words[0]}")
    assert words[1] in first


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
    assert format_duration(duration_s) == text


def test_both_times_to_first_token_and_the_throughput_are_said() -> None:
    result = with_ratios(case(), throughput_ratio=Spread.of([0.9, 0.8, 0.85]))
    times = {name: cells(result, "TTFT mean")[name].partition(tables.PLUS_MINUS)[0] for name in ("stock", "layerkv")}
    first = summary.sentences(result)[0]
    assert f"({times['layerkv']} against {times['stock']})" in first
    assert first.endswith("at 85.0 % of its throughput.")


def test_the_headline_counts_the_readers_of_all_seeds() -> None:
    result = with_figures(case(), "layerkv", fluid=Spread.of([1.0, 0.95, 1.0]))
    result = with_figures(result, "stock", fluid=Spread.of([0.1, 0.0, 0.25]))
    assert summary.headline(result) == "236 of 240 readers served in time, with hardly a pause; stock vLLM: 28 of 240."


def test_what_readers_waited_is_said_beside() -> None:
    each, none = Spread.of([0.2, 0.3, 0.4]), Spread.of([0.0, 0.0, 0.0])
    result = with_figures(
        case(), "layerkv", lag_s=Distribution(each, each, each, each), tokens_on_time=Spread.of([0.9])
    )
    result = with_figures(result, "stock", lag_s=Distribution(none, none, none, none), tokens_on_time=Spread.of([0.4]))
    assert "a reader waited, in all, 300 ms on average, p99 300 ms (stock: 0 s on average, p99 0 s)" in said(result)
    assert "90.0 % of the tokens came on time (stock: 40.0 %)" in said(result)
    assert "a reader's lag p99 (300 ms against 0 s)" in said(result)


def test_fewer_readers_than_stock_are_a_loss_and_a_wait_that_nobody_notices_is_none() -> None:
    result = with_ratios(case(), fluid_gain=Spread.of([-0.1, 0.05, -0.2]))
    result = with_figures(result, "layerkv", fluid=Spread.of([0.4, 0.5, 0.3]))
    result = with_figures(result, "stock", fluid=Spread.of([0.5, 0.45, 0.5]))
    assert "Worse than stock with layerkv: fluid requests (40.0 % against 50.0 %)" in said(result)
    assert "fluid 40.0 % against 50.0 %" in said(result)
    little, none = (Distribution(*[Spread.of([wait_s] * 3)] * 4) for wait_s in (0.09, 0.0))
    result = with_figures(with_figures(result, "layerkv", lag_s=little), "stock", lag_s=none)
    assert "lag p99" not in said(result)


def test_a_result_from_before_readers_were_measured_speaks_of_first_tokens_and_shows_dashes() -> None:
    old = msgspec.to_builtins(case())
    for figures in (*old["engines"].values(), *(f for point in old["points"] for f in point["engines"].values())):
        for key in ("fluid", "fluid_goodput_rps", "tokens_on_time", "fluidity_index", "lag_s", "longest_pause_s"):
            del figures[key]
    del old["ratios"]["fluid_gain"], old["fluid"]
    result = msgspec.convert(old, CaseResult)
    assert summary.headline(result).startswith("First tokens came ")
    assert "First tokens came" not in said(result)
    assert "reader waited" not in said(result)
    for label in ("Fluid", "Fluid goodput", "Tokens on time", "Lag p99", "Longest pause p99", "Fluidity index"):
        assert set(cells(result, label).values()) == {"-"}
    assert all(row.cells[0] == "-" for row in summary.point_rows(result))
    assert set(cells(result, "SLOs met by mean TPOT").values()) != {"-"}


def test_without_figures_of_both_there_is_nothing_to_compare() -> None:
    runs = made.load_runs(engines=("layerkv", "oracle"), seeds=(0,))
    result = made.case_result(runs, {"stock": made.FAILURE})
    assert summary.headline(result) == "Nothing to compare: no figures of stock vLLM."
    assert "stock vLLM has no figures at the main point: it ended with exit status 1." in said(result)


def test_every_peer_and_the_oracle_have_their_sentence() -> None:
    text = said(case())
    for name in summary.PEERS:
        assert f"Against {summary.ENGINE_TITLES[name]} ({summary.ENGINE_NOTES[name]}): first tokens" in text
    assert "times that of the oracle" in text


def test_a_ratio_of_goodput_comes_with_its_range_over_seeds() -> None:
    # The median of ratios within seeds may be below one where the ratio of medians is above it.
    result = with_ratios(case(), goodput_ratio=Spread.of([0.8, 0.9, 1.5]))
    assert "Goodput was 0.90x stock's (0.80x to 1.50x over seeds; " in said(result)


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (0.0, 0.0, "No request met its objectives, neither with layerkv nor with stock"),
        (2.0, 0.0, "Objectives were met by 2.00 requests per second with layerkv, 0.00 with stock"),
        (0.0, 2.0, "Objectives were met by 0.00 requests per second with layerkv, 2.00 with stock"),
    ],
)
def test_zero_goodput_is_said_without_a_ratio(ours: float, theirs: float, words: str) -> None:
    result = with_ratios(case(), goodput_ratio=None)
    result = with_figures(result, "layerkv", goodput_rps=Spread.of([ours]))
    assert words in said(with_figures(result, "stock", goodput_rps=Spread.of([theirs])))


def test_what_is_worse_with_layerkv_is_listed_with_both_figures() -> None:
    losses = next(text for text in summary.sentences(case()) if text.startswith("Worse than stock with layerkv:"))
    for label in ("second token p99 (", "TPOT mean (", "engine CPU (", "peak resident memory (5GiB against 4GiB)"):
        assert label in losses
    assert "failed requests" not in losses


def test_points_at_which_a_rival_is_ahead_are_named() -> None:
    result = with_figures(case(), "vllm-cpu-offload", goodput_rps=Spread.of([9.0]))
    layerkv = f"{result.engines['layerkv'].goodput_rps.median:.2f}"
    expected = (
        f"Behind vLLM CPU offload at 1 of 5 points: 6 requests per second (goodput {layerkv} against 9.00 per second)"
    )
    assert expected in said(result)
    assert "At no point was layerkv more than 5 % behind stock vLLM, stock + watermark or LMCache" in said(result)


def test_failed_requests_are_said_beside_the_latencies_that_leave_them_out() -> None:
    runs = [made.load_run("stock", 4.0, 0, 20, num_failed=6), made.load_run("layerkv", 4.0, 0, 20)]
    result = made.case_result(runs)
    words = "stock vLLM failed 6 of 20 requests at 4 requests per second; its latencies there are those of tokens"
    assert words in said(result)
    assert cells(result, "Failed requests") == {"stock": "6 of 20", "layerkv": "0 of 20"}


def test_one_seed_says_that_the_variation_is_not_known() -> None:
    result = made.case_result(made.load_runs(seeds=(0,)))
    assert "One seed only" in said(result)
    assert all(tables.PLUS_MINUS not in cell for row in summary.figure_rows(result) for cell in row.cells)


@pytest.mark.parametrize(("equal", "words"), [(True, "exactly the same tokens"), (False, "WRONG"), (None, "")])
def test_equal_tokens_are_said_only_when_they_were_compared(equal: bool | None, words: str) -> None:
    text = said(made.case_result(made.load_runs(rates=(4.0,), seeds=(0,)), tokens_equal=equal))
    assert words in text
    assert (equal is None) == ("same tokens" not in text and "WRONG" not in text)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (tables.duration_cell(Spread.of([1.13, 1.23, 1.33])), "1.23 s ±0.10"),
        (tables.duration_cell(Spread.of([0.0123, 0.0129])), "12.6 ms ±0.3"),
        (tables.duration_cell(Spread.of([1.5])), "1.50 s"),
        (tables.number_cell(Spread.of([118, 124]), unit=" tok/s"), "121 tok/s ±3"),
        (tables.percent_cell(Spread.of([0.97, 0.99])), "98.0 % ±1.0"),
        (tables.size_cell(Spread.of([2**30, 3 * 2**30])), "2GiB ±1GiB"),
        (tables.size_cell(Spread.of([0, 0])), "0"),
    ],
)
def test_a_cell_is_the_median_and_half_of_the_spread_in_the_same_unit(cell: str, text: str) -> None:
    assert cell == text


def test_figures_that_do_not_exist_are_dashes_and_not_zeros() -> None:
    result = case()
    assert cells(result, "Scheduler per step")["vllm-cpu-offload"] == "-"
    nothing: Figures = result.engines["stock"]
    zero = Spread.of([0.0])
    silent = with_figures(result, "stock", ttft_s=type(nothing.ttft_s)(zero, zero, zero, zero))
    assert cells(silent, "TTFT mean")["stock"] == "-"
    assert cells(silent, "Queue mean")["stock"] == "-"


def test_hits_are_shares_of_prompt_tokens() -> None:
    assert cells(case(), "Hits device / host")["stock"] == "9.4 / 0.0 %"


def test_every_engine_has_a_row_at_every_point_where_it_ran_or_failed() -> None:
    runs = [run for run in made.load_runs(seeds=(0,)) if (run.engine, run.point) != ("stock", "rate-4")]
    rows = summary.point_rows(made.case_result(runs, {"stock": made.FAILURE}))
    assert len(rows) == 5 * len(made.ENGINES)
    missing = next(row for row in rows if (row.point, row.engine) == ("4", "stock"))
    assert missing.is_main
    assert missing.failure == made.FAILURE.reason
    assert set(missing.cells) == {"-"}
    assert all(len(row.cells) == len(summary.POINT_COLUMNS) for row in rows)


def test_figures_of_a_disturbed_engine_are_marked_and_a_sentence_says_why() -> None:
    result = with_figures(case(), "stock", longest_probe_s=0.84, disturbed=True)
    for row in summary.figure_rows(result):
        marked = {name for name, cell in cells(result, row.label).items() if cell.endswith(tables.DISTURBED)}
        assert marked == {"stock"}, row.label
    at_main = [row for row in summary.point_rows(result) if row.is_main]
    assert [row.engine for row in at_main if row.cells[0].endswith(tables.DISTURBED)] == ["stock"]
    assert cells(result, "Longest probe")["stock"] == f"840 ms{tables.DISTURBED}"
    sentence = next(sentence for sentence in summary.sentences(result) if sentence.startswith(tables.DISTURBED))
    assert summary.ENGINE_TITLES["stock"] in sentence
    assert "840 ms" in sentence


def test_without_a_disturbed_run_nothing_is_marked() -> None:
    result = with_figures(case(), "stock", longest_probe_s=0.02)
    assert not any(cell.endswith(tables.DISTURBED) for row in summary.figure_rows(result) for cell in row.cells)
    assert tables.DISTURBED not in said(result)
    assert set(cells(result, "Longest probe").values()) == {"20.0 ms", tables.MISSING}
