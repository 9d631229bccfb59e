"""Regressions and noise."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from layerkv.bench.records import EngineFailure, write_json
from layerkv.bench.suite.compare import compare, run_compare, verdict
from layerkv.bench.suite.result import CaseResult, Distribution, Spread
from layerkv.errors import ConfigError
from tests.unit.bench.suite.made_results import case_result as made_case_result
from tests.unit.bench.suite.made_results import load_runs


def case_result() -> CaseResult:
    return made_case_result(load_runs())


def scaled(result: CaseResult, engine: str, factor: Callable[[str], float]) -> CaseResult:
    """The result with all TTFT means of an engine changed; `factor` is by point."""
    points = []
    for point in result.points:
        engines = dict(point.engines)
        if engine in engines:
            figures = engines[engine]
            values = [value * factor(point.name) for value in figures.ttft_s.mean.values]
            ttft = msgspec.structs.replace(figures.ttft_s, mean=Spread.of(values))
            engines[engine] = msgspec.structs.replace(figures, ttft_s=ttft)
        points.append(msgspec.structs.replace(point, engines=engines))
    return msgspec.structs.replace(result, points=points)


def changed(before: CaseResult, after: CaseResult) -> set[tuple[str, str, str]]:
    return {(c.engine, c.figure, c.verdict) for c in compare(before, after).changes if c.verdict != "same"}


def test_a_result_is_the_same_as_itself() -> None:
    result = case_result()
    assert compare(result, result).changes
    assert not changed(result, result)


def test_a_slower_engine_is_worse_and_a_faster_one_better() -> None:
    result = case_result()
    assert changed(result, scaled(result, "layerkv", lambda _: 10.0)) == {("layerkv", "TTFT mean", "worse")}
    assert changed(result, scaled(result, "layerkv", lambda _: 0.1)) == {("layerkv", "TTFT mean", "better")}


def test_a_machine_that_is_slower_for_all_is_no_regression() -> None:
    result = case_result()
    slower = result
    for engine in result.engines:
        slower = scaled(slower, engine, lambda _: 3.0)
    assert not changed(result, slower)


def test_stock_itself_is_not_judged() -> None:
    result = case_result()
    assert "stock" not in {change.engine for change in compare(result, result).changes}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1.0, 1.1, 0.9], [1.05, 0.95, 1.2], "same"),  # not all the same way
        ([1.0, 1.01, 0.99], [1.03, 1.035, 1.02], "same"),  # all the same way, but by 3 % only
        ([1.0, 5.0, 20.0], [1.2, 6.0, 24.0], "worse"),  # seeds differ by more than that, and yet each got worse
        ([1.0, 1.1, 0.9], [0.5, 0.4, 0.6], "better"),
        ([1.0], [1.3], "same"),  # of one seed nothing is known
        ([1.0], [1.6], "worse"),
        ([0.0, 0.0], [0.0, 0.0], "same"),
        ([0.0, 0.0], [0.5, 0.4], "worse"),
    ],
)
def test_a_change_counts_if_each_seed_moved_the_same_way(
    before: list[float], after: list[float], expected: str
) -> None:
    assert verdict(before, after, less_is_better=True, is_paired=True) == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1.0, 5.0, 20.0], [1.2, 24.0], "same"),  # which seed is missing is not known
        ([1.0, 1.1, 0.9], [1.5, 1.4], "worse"),
        ([1.0, 1.1, 0.9], [0.5, 0.4], "better"),
    ],
)
def test_seeds_that_are_not_the_same_count_if_they_do_not_overlap(
    before: list[float], after: list[float], expected: str
) -> None:
    assert verdict(before, after, less_is_better=True, is_paired=False) == expected


def test_the_command_fails_on_a_regression_and_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    write_json(case_result(), before)
    write_json(scaled(case_result(), "layerkv", lambda _: 10.0), after)
    assert run_compare(before, before) == 0
    assert run_compare(before, after, json_path=tmp_path / "c.json") == 1
    out = capsys.readouterr().out
    assert "layerkv" in out
    assert "worse" in out
    assert msgspec.json.decode((tmp_path / "c.json").read_bytes())["changes"]
    assert run_compare(after, before) == 0


def test_engines_that_are_in_one_result_only_are_named() -> None:
    result = case_result()
    less = msgspec.structs.replace(
        result,
        points=[
            msgspec.structs.replace(p, engines={n: f for n, f in p.engines.items() if n != "oracle"})
            for p in result.points
        ],
    )
    assert compare(less, result).missing == [f"oracle at {point.name}" for point in result.points]
    assert not compare(less, result).broken
    assert len(compare(result, less).broken) == len(result.points)


def test_an_engine_that_fails_anew_is_broken_though_the_run_before_was_not_complete_either() -> None:
    result = msgspec.structs.replace(case_result(), complete=False)
    failure = EngineFailure(reason="ended with exit status 7", log_tail=[])
    assert compare(result, msgspec.structs.replace(result, failures={"layerkv": failure})).broken == [
        "layerkv ended with exit status 7"
    ]


def test_results_of_a_case_that_was_changed_in_between_are_refused(tmp_path: Path) -> None:
    before, after, older = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"
    write_json(msgspec.structs.replace(case_result(), load="1"), before)
    write_json(msgspec.structs.replace(case_result(), load="2"), after)
    write_json(case_result(), older)
    with pytest.raises(ConfigError, match=r"b\.json: found load and settings 2; expected 1"):
        run_compare(before, after)
    assert run_compare(older, after) == 0


def test_files_that_are_no_results_are_refused(tmp_path: Path) -> None:
    good, bad, other = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "other.json"
    write_json(case_result(), good)
    bad.write_text('{"schema": 1}')
    write_json(msgspec.structs.replace(case_result(), case="another"), other)
    with pytest.raises(ConfigError, match=r"none\.json: found no readable file"):
        run_compare(good, tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"bad\.json: found no result of a case"):
        run_compare(bad, good)
    with pytest.raises(ConfigError, match=r"other\.json: found a result of another; expected one of"):
        run_compare(good, other)


def test_what_broke_is_named_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = case_result()
    point = result.points[0]
    failing = msgspec.structs.replace(point.engines["layerkv"], num_failed=Spread.of([3.0, 3.0, 3.0]))
    points = [msgspec.structs.replace(point, engines={**point.engines, "layerkv": failing}), *result.points[1:]]
    broken = msgspec.structs.replace(result, points=points, tokens_equal=False, complete=False)
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    write_json(result, before)
    write_json(broken, after)
    assert run_compare(before, after) == 1
    out = capsys.readouterr().out
    for words in ("9 requests failed instead of 0", "tokens differ", "not complete"):
        assert words in " ".join(out.split())
    assert run_compare(after, before) == 0


def test_results_of_different_sizes_are_refused(tmp_path: Path) -> None:
    full, small = tmp_path / "full.json", tmp_path / "small.json"
    write_json(case_result(), full)
    write_json(msgspec.structs.replace(case_result(), size="ci"), small)
    with pytest.raises(ConfigError, match=r"small\.json: found size ci; expected made"):
        run_compare(full, small)


def with_readers(result: CaseResult, **figures: object) -> CaseResult:
    """The result with other figures of layerkv's readers at every point."""
    points = [
        msgspec.structs.replace(
            point, engines={**point.engines, "layerkv": msgspec.structs.replace(point.engines["layerkv"], **figures)}
        )
        for point in result.points
    ]
    return msgspec.structs.replace(result, points=points)


def test_readers_who_lose_are_seen_though_stock_served_none_of_them() -> None:
    before = with_readers(case_result(), fluid=Spread.of([1.0, 0.9, 1.0]))
    after = with_readers(before, fluid=Spread.of([0.2, 0.1, 0.2]))
    assert changed(before, after) == {("layerkv", "fluid", "worse")}
    assert changed(after, before) == {("layerkv", "fluid", "better")}


def test_a_wait_that_no_reader_notices_is_no_change() -> None:
    before = case_result()

    def waits(wait_s: float) -> CaseResult:
        each = Spread.of([wait_s] * 3)
        return with_readers(before, lag_s=Distribution(each, each, each, each))

    assert not changed(waits(0.001), waits(0.09))
    assert changed(waits(0.001), waits(0.2)) == {("layerkv", "lag p99", "worse")}


def test_results_from_before_readers_were_measured_are_compared_in_what_both_have() -> None:
    after = case_result()
    absent = dict.fromkeys(("fluid", "fluid_goodput_rps", "tokens_on_time", "lag_s", "longest_pause_s"))
    before = with_readers(after, **absent)
    found = {change.figure for change in compare(before, after).changes if change.engine == "layerkv"}
    assert "TTFT mean" in found
    assert not found & {"fluid", "tokens on time", "fluid goodput", "lag p99", "longest pause p99"}
    assert not changed(before, after)
