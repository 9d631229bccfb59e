"""What a case leaves behind is enough to compute its result again."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from layerkv.bench import demo, records
from layerkv.bench.metrics import DemoResult
from layerkv.bench.suite.kept import forget, keep, read_runs, run_figures
from layerkv.bench.suite.outcome import with_figures
from layerkv.bench.suite.result import CaseResult
from layerkv.errors import ConfigError
from tests.unit.bench import made_records
from tests.unit.bench.suite import made_results as made


def kept_case(folder: Path) -> CaseResult:
    runs = made.load_runs(rates=(2.0, 6.0), engines=("stock", "layerkv", "oracle"), seeds=(0, 1), num_requests=12)
    result = made.case_result(runs, main="rate-6")
    result = with_figures(result, runs, made.POLICY)
    keep(folder, result, runs, made.POLICY)
    return result


def read(path: Path) -> CaseResult:
    return records.read_json(path, CaseResult)


def test_figures_are_computed_again_from_the_times_of_all_tokens(tmp_path: Path) -> None:
    result = kept_case(tmp_path)
    emptied = msgspec.structs.replace(
        result, engines={}, points=[msgspec.structs.replace(point, engines={}) for point in result.points]
    )
    records.write_json(emptied, tmp_path / "result.json")
    assert run_figures(tmp_path) == 0
    assert read(tmp_path / "result.json") == result
    assert "Single answers" in (tmp_path / "report.html").read_text()


def test_every_engine_point_and_seed_has_a_file_of_its_own(tmp_path: Path) -> None:
    kept_case(tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == 3 * 2 * 2
    found = {(run.engine, run.point, run.seed): run for run in read_runs(tmp_path)}
    run = made.load_run("layerkv", 6.0, 1, num_requests=12)
    assert found["layerkv", "rate-6", 1] == run


def test_runs_of_an_earlier_case_are_forgotten(tmp_path: Path) -> None:
    kept_case(tmp_path)
    forget(tmp_path)
    assert read_runs(tmp_path) == []
    forget(tmp_path / "none")


def test_a_point_may_have_any_name(tmp_path: Path) -> None:
    run = msgspec.structs.replace(made.load_run("stock", 2.0, 0, num_requests=2), point="../2 per/s")
    keep(tmp_path, made.case_result([]), [run], made.POLICY)
    assert read_runs(tmp_path) == [run]


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"{}"), lambda path: path.write_bytes(b"\x1f\x8b")])
def test_records_that_are_none_are_named(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    kept_case(tmp_path)
    path = min((tmp_path / "runs").iterdir())
    spoil(path)
    with pytest.raises(ConfigError, match=f"{path.name}: found no records of a run"):
        run_figures(tmp_path)


def test_a_folder_that_nothing_was_measured_in_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"result\.json: found no result .* expected a folder that"):
        run_figures(tmp_path)


def test_the_demos_result_is_computed_again_too(tmp_path: Path) -> None:
    result = made_records.result()
    for name, run in made_records.all_runs().items():
        records.write_json(run, tmp_path / f"{name}.json")
    old = {key: figures for key, figures in msgspec.to_builtins(result).items() if key != "ratios"}
    old["ratios"] = dict.fromkeys(
        ("ttft_mean_speedup", "ttft_p99_speedup", "throughput_ratio", "ttft_mean_over_oracle")
    )
    for figures in old["engines"].values():
        for key in ("fluid", "lag_s", "end_to_end_s"):
            del figures[key]
    (tmp_path / "result.json").write_bytes(msgspec.json.encode(old))
    assert run_figures(tmp_path, json_path=tmp_path / "again.json") == 0
    assert records.read_json(tmp_path / "again.json", DemoResult) == result
    case, _ = demo.as_case(result, made_records.all_runs())
    assert case.engines["stock"].fluid is not None
