"""The demo with engines that are small scripts: what it does when one dies, hangs, lies or is interrupted."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from layerkv.bench import demo, records
from layerkv.bench.plan import demo_load, engine_specs
from layerkv.bench.records import EngineFailure
from layerkv.bench.suite.terminal import print_result
from layerkv.bench.supervise import LOG_TAIL_LINES, run_child
from layerkv.bench.tiny_model import SHAPES
from layerkv.errors import ConfigError
from tests.unit.bench import made_records as made

FAKE_ENGINE = """
import os, pathlib, signal, sys, time
from layerkv.bench.records import EngineSpec, read_json
spec = read_json(pathlib.Path(sys.argv[1]), EngineSpec)
print("loading", spec.name, file=sys.stderr)
print('{"progress":3,"total":6}', flush=True)
if spec.name == "layerkv":
    FAULT
pathlib.Path(sys.argv[2]).write_bytes((pathlib.Path(__file__).parent / f"{spec.name}.made").read_bytes())
"""


def run_fakes(tmp_path: Path, fault: str, names: Sequence[str] = demo.ENGINE_NAMES) -> demo.Outcomes:
    """Runs the demo's loop over scripts that hand out made records, of which layerkv's has `fault`."""
    script = tmp_path / "fake_engine.py"
    script.write_text(FAKE_ENGINE.replace("FAULT", fault))
    for name, run in made.all_runs().items():
        records.write_json(run, tmp_path / f"{name}.made")
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    return demo.run_engines(made.specs(names), out_dir, Console(quiet=True), command=[sys.executable, str(script)])


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def run_script(tmp_path: Path, script: str, **options: object) -> tuple[EngineFailure | None, list[records.Progress]]:
    seen: list[records.Progress] = []
    failure = run_child(
        [sys.executable, "-c", script],
        env=os.environ,
        log_path=tmp_path / "child.log",
        on_progress=seen.append,
        **options,
    )
    return failure, seen


def test_every_engine_runs_and_is_compared(tmp_path: Path) -> None:
    outcomes = run_fakes(tmp_path, "pass")
    assert outcomes == demo.Outcomes(runs=made.all_runs())
    result = demo.compare(made.specs(), outcomes)
    assert result.complete
    assert result.tokens_equal


def test_an_engine_that_dies_is_reported_with_its_last_words_and_the_others_finish(tmp_path: Path) -> None:
    outcomes = run_fakes(tmp_path, "raise SystemExit('no KV memory')")
    assert list(outcomes.runs) == ["stock", "oracle"]
    failure = outcomes.failures["layerkv"]
    assert failure.reason == "ended with exit status 1"
    assert failure.log_tail == ["loading layerkv", "no KV memory"]
    assert not outcomes.interrupted
    assert "no KV memory" in (tmp_path / "out" / "layerkv.log").read_text()


def test_an_engine_killed_by_the_system_is_reported_by_the_signal_name(tmp_path: Path) -> None:
    outcomes = run_fakes(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert outcomes.failures["layerkv"].reason == "was killed by SIGKILL"


def test_an_engine_that_leaves_no_result_counts_as_failed(tmp_path: Path) -> None:
    outcomes = run_fakes(tmp_path, "raise SystemExit(0)")
    assert outcomes.failures["layerkv"].reason.startswith("left no readable result")


@pytest.fixture
def listens_to_ctrl_c() -> Iterator[None]:
    """A shell that starts the tests in the background has SIGINT ignored in them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listens_to_ctrl_c")
def test_ctrl_c_ends_the_running_engine_and_keeps_what_was_measured(tmp_path: Path) -> None:
    note = "pathlib.Path(sys.argv[2] + '.pid').write_text(str(os.getpid()))"
    outcomes = run_fakes(tmp_path, f"{note}; os.kill(os.getppid(), signal.SIGINT); time.sleep(600)")
    assert outcomes.interrupted
    assert list(outcomes.runs) == ["stock"]
    assert list(outcomes.failures) == ["layerkv"]
    assert is_gone(int((tmp_path / "out" / "layerkv.json.pid").read_text()))
    result = demo.compare(made.specs(), outcomes)
    assert (result.complete, result.interrupted) == (False, True)


def test_results_of_an_earlier_demo_do_not_survive(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("result.json", "report.html", "oracle.json", "oracle.log"):
        (tmp_path / "out" / name).write_text("old")
    demo.run_engines(made.specs(["stock"]), tmp_path / "out", Console(quiet=True), command=["false"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["stock.log", "stock.spec.json"]


def test_unknown_doubled_or_no_engines_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    for engines in (["stok"], ["stock", "stock"], []):
        with pytest.raises(ConfigError, match="expected some of stock, layerkv, oracle"):
            demo.run_demo(tmp_path / "out", engines=engines)
    assert not (tmp_path / "out").exists()


def test_stock_and_layerkv_get_the_same_kv_memory_for_about_four_and_the_oracle_enough_for_all() -> None:
    shape = SHAPES["demo"]
    load = demo_load(shape, seed=0, quick=False)
    specs = engine_specs(demo.ENGINE_NAMES, Path("model"), shape, load)
    stock, layerkv, oracle = (spec.engine_args for spec in specs)
    request_bytes = load.mean_context_tokens * shape.kv_bytes_per_token
    assert stock["kv_cache_memory_bytes"] == layerkv["kv_cache_memory_bytes"]
    assert stock["kv_cache_memory_bytes"] / request_bytes == pytest.approx(4, abs=0.1)
    assert oracle["kv_cache_memory_bytes"] > load.num_requests * load.max_context_tokens * shape.kv_bytes_per_token
    differing = {"kv_cache_memory_bytes", "kv_transfer_config"}
    assert all(stock[key] == layerkv[key] == oracle[key] for key in stock.keys() - differing)


def test_progress_lines_are_passed_on_and_other_output_is_not(tmp_path: Path) -> None:
    script = 'print(\'hello\'); print(\'{"progress":1,"total":2}\'); print(\'{"progress":2,"total":2}\')'
    failure, seen = run_script(tmp_path, script)
    assert failure is None
    assert seen == [records.Progress(1, 2), records.Progress(2, 2)]


def test_a_child_without_progress_is_ended_and_reported(tmp_path: Path) -> None:
    failure, _ = run_script(tmp_path, "import time; time.sleep(600)", stall_limit_s=0.0)
    assert failure is not None
    assert failure.reason == "made no progress for 0 s"


def test_only_the_end_of_a_long_log_is_shown(tmp_path: Path) -> None:
    script = "import sys; [print(f'line {i}\\n', file=sys.stderr) for i in range(100)]; sys.exit(3)"
    failure, _ = run_script(tmp_path, script)
    assert failure is not None
    assert failure.log_tail == [f"line {i}" for i in range(100 - LOG_TAIL_LINES, 100)]


def test_the_terminal_shows_table_ratios_and_the_failed_engines_log(tmp_path: Path) -> None:
    runs = {name: run for name, run in made.all_runs().items() if name != "oracle"}
    failure = EngineFailure(reason="ended with exit status 1", log_tail=["[not markup] boom"])
    console = Console(record=True, width=120, quiet=False, file=(tmp_path / "terminal").open("w"))
    result = made.result(demo.Outcomes(runs=runs, failures={"oracle": failure}))
    print_result(demo.as_case(result, runs)[0], console)
    shown = console.export_text()
    assert "TTFT mean" in shown
    assert "oracle (FAILED)" in shown
    assert "5.5x sooner" in shown
    assert "[not markup] boom" in shown
