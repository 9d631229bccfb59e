"""Whole runs of a case with toy servers in place of `vllm serve`: what is kept when something goes wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import yaml

from layerkv.bench.priorities import allowed_here
from layerkv.bench.records import read_json
from layerkv.bench.suite import run as suite_run
from layerkv.bench.suite.generator import GeneratorRun
from layerkv.bench.suite.health_probe import Probe
from layerkv.bench.suite.kept import read_runs, run_figures
from layerkv.bench.suite.result import CaseResult
from layerkv.bench.suite.run import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, RunOptions, run_suite
from layerkv.errors import ConfigError, LayerKVError

ROOT = Path(__file__).parents[4]
TOY = ROOT / "tests" / "fakes" / "toy_server.py"


def case_file(folder: Path, **more: Any) -> Path:
    document = {
        "version": 1,
        "case": "made",
        "question": "Does it run?",
        "axis": "requests per second",
        "engine": {"model": "somebody/model", "kv_memory": "1MiB", "max_model_len": 512},
        "workload": {"classes": [{"prompt_tokens": {"fixed": 8}, "output_tokens": {"fixed": 6}}]},
        "points": [{"rate": 40, "requests": 6}, {"rate": 80, "requests": 6}],
        "engines": ["stock", "layerkv", "oracle"],
        "sizes": {"full": {"seeds": 2}},
        **more,
    }
    path = folder / "made.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def toy(**behaviours: str) -> Any:
    """Serves every engine by a toy, with a behaviour by engine name."""

    def serve(_case: object, engine: str, *, port: int, **_: object) -> list[str]:
        return [sys.executable, str(TOY), str(port), behaviours.get(engine, "")]

    return serve


def answers_health_after(monkeypatch: pytest.MonkeyPatch, *took_s: float) -> None:
    """The slowest answer to `/health` in each load that is run, in order; quick ones after that."""
    left = list(took_s)

    def read(path: Path, of_type: type[GeneratorRun]) -> GeneratorRun:
        probe = Probe(0.05, left.pop(0) if left else 0.01)
        return msgspec.structs.replace(read_json(path, of_type), longest_probe=probe)

    monkeypatch.setattr(suite_run, "read_json", read)


def options(tmp_path: Path, **more: Any) -> RunOptions:
    return RunOptions(out_dir=tmp_path / "out", json_path=tmp_path / "result.json", **more)


def read(tmp_path: Path) -> CaseResult:
    return msgspec.json.decode((tmp_path / "result.json").read_bytes(), type=CaseResult)


def test_a_case_runs_all_engines_points_and_seeds(tmp_path: Path) -> None:
    assert run_suite(case_file(tmp_path), options(tmp_path), serve=toy()) == EXIT_OK
    result = read(tmp_path)
    assert result.complete
    assert not result.interrupted
    assert result.tokens_equal is True
    assert [point.name for point in result.points] == ["40", "80"]
    for point in result.points:
        assert point.engines.keys() == {"stock", "layerkv", "oracle"}
        for figures in point.engines.values():
            assert len(figures.ttft_s.mean.values) == 2
            assert figures.num_requests.median == 6
            assert figures.num_failed.median == 0
    assert result.engines == result.points[-1].engines
    assert result.goodput_rps["stock"].keys() == {"40", "80"}
    assert "<svg" in (tmp_path / "out" / "made" / "report.html").read_text()


def test_every_load_keeps_its_records_from_which_the_same_result_follows(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "made"
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "oracle.40.seed7.json.gz").write_text("of an earlier case")
    run_suite(case_file(tmp_path, engines=["stock", "layerkv"]), options(tmp_path), serve=toy())
    runs = read_runs(folder)
    assert len(runs) == 2 * 2 * 2
    assert all(len(request.token_times_s) == 6 for run in runs for request in run.requests)
    assert run_figures(folder, json_path=tmp_path / "again.json") == 0
    again = msgspec.json.decode((tmp_path / "again.json").read_bytes(), type=CaseResult)
    assert again == read(tmp_path)


def test_the_json_has_the_keys_that_other_tools_read(tmp_path: Path) -> None:
    run_suite(case_file(tmp_path, engines=["stock", "layerkv"]), options(tmp_path, num_seeds=1), serve=toy())
    result = json.loads((tmp_path / "result.json").read_text())
    for key in ("schema", "case", "command", "machine", "versions", "goodput_rps", "slo_attainment", "ratios"):
        assert key in result
    stock = result["engines"]["stock"]
    for latency in ("ttft_s", "tpot_s", "time_between_tokens_s", "second_token_s", "queue_s"):
        for part in ("mean", "p50", "p90", "p99"):
            assert stock[latency][part].keys() == {"median", "spread", "values"}
    for latency in ("lag_s", "longest_pause_s", "end_to_end_s"):
        assert stock[latency]["p99"].keys() == {"median", "spread", "values"}
    for figure in ("fluid", "tokens_on_time", "fluid_goodput_rps", "fluidity_index"):
        assert stock[figure].keys() == {"median", "spread", "values"}
    assert result["ratios"]["fluid_gain"].keys() == {"median", "spread", "values"}
    assert result["fluid"]["layerkv"].keys() == {"40", "80"}
    for figure in ("output_tokens_per_s", "preemptions", "bytes_stored", "bytes_loaded", "wall_s", "goodput_rps"):
        assert stock[figure].keys() == {"median", "spread", "values"}


def test_a_disturbed_load_is_run_again_on_a_fresh_server_and_the_log_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers_health_after(monkeypatch, 0.01, 0.9)  # the second point
    path = case_file(tmp_path, engines=["stock"])
    assert run_suite(path, options(tmp_path, num_seeds=1), serve=toy()) == EXIT_OK
    result = read(tmp_path)
    assert result.complete
    assert [point.engines["stock"].longest_probe_s for point in result.points] == [0.01, 0.01]
    assert not any(point.engines["stock"].disturbed for point in result.points)
    said = " ".join(capsys.readouterr().out.split())
    assert "stock at 80, seed 0, try 1 of 3: /health took 0.90 s, 0.1 s into the load; expected at most 0.3 s" in said
    assert "run again on a fresh server" in said
    logs = {log.name for log in (tmp_path / "out" / "made").glob("stock.*")}
    assert logs == {"stock.seed0.log", "stock.seed0.server2.log"}


def test_a_load_that_stays_disturbed_keeps_its_quietest_try_and_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers_health_after(monkeypatch, 0.9, 0.4, 0.7)  # all tries of the first point
    path = case_file(tmp_path, engines=["stock"])
    assert run_suite(path, options(tmp_path, num_seeds=1), serve=toy()) == EXIT_OK
    stock = json.loads((tmp_path / "result.json").read_text())["points"][0]["engines"]["stock"]
    assert stock["longest_probe_s"] == 0.4
    assert stock["disturbed"] is True
    assert len(stock["wall_s"]["values"]) == 1
    assert read(tmp_path).points[1].engines["stock"].disturbed is False
    said = " ".join(capsys.readouterr().out.split())
    for number in (1, 2, 3):
        assert f"stock at 40, seed 0, try {number} of 3" in said
    assert "the least disturbed try is kept, and marked" in said
    assert "* Disturbed: stock" in said
    assert "* Disturbed: stock" in (tmp_path / "out" / "made" / "report.html").read_text()


def test_a_server_that_does_not_start_again_leaves_the_disturbed_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers_health_after(monkeypatch, 0.01, 0.9)
    behaviours = iter(["", "broken"])

    def serve(_case: object, _engine: str, *, port: int, **_: object) -> list[str]:
        return [sys.executable, str(TOY), str(port), next(behaviours)]

    path = case_file(tmp_path, engines=["stock"])
    assert run_suite(path, options(tmp_path, num_seeds=1), serve=serve) == EXIT_FAILED
    result = read(tmp_path)
    assert result.points[1].engines["stock"].disturbed
    assert "no such device: toy" in result.failures["stock"].reason


def test_every_engine_runs_with_the_priorities_that_are_allowed_and_the_result_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers_health_after(monkeypatch)
    seen: list[tuple[str, set[int]]] = []
    observe = suite_run.Server.observe

    def look(server: Any) -> Any:
        threads = psutil.Process(server._process.pid).threads()
        seen.append((server.url, {os.sched_getscheduler(thread.id) for thread in threads}))
        return observe(server)

    monkeypatch.setattr(suite_run.Server, "observe", look)
    assert run_suite(case_file(tmp_path), options(tmp_path, num_seeds=1), serve=toy()) == EXIT_OK
    assert json.loads((tmp_path / "result.json").read_text())["priorities"] == allowed_here()
    wanted = {os.SCHED_RR} if allowed_here() == "realtime" else {os.SCHED_OTHER}
    assert len({url for url, _ in seen}) == 3
    assert all(policies == wanted for _, policies in seen)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_an_engine_that_does_not_start_says_so_and_the_others_finish(tmp_path: Path) -> None:
    assert run_suite(case_file(tmp_path), options(tmp_path, num_seeds=1), serve=toy(layerkv="broken")) == EXIT_FAILED
    result = read(tmp_path)
    assert not result.complete
    assert result.failures.keys() == {"layerkv"}
    assert result.failures["layerkv"].reason == "ended with exit status 1 (RuntimeError: no such device: toy)"
    assert "no such device: toy" in result.failures["layerkv"].log_tail[-1]
    assert result.engines.keys() == {"stock", "oracle"}
    assert result.tokens_equal is None


def test_an_engine_that_dies_in_mid_run_says_where_and_the_others_finish(tmp_path: Path) -> None:
    assert run_suite(case_file(tmp_path), options(tmp_path, num_seeds=1), serve=toy(stock="dies")) == EXIT_FAILED
    result = read(tmp_path)
    assert result.failures["stock"].reason == "ended with exit status 7"
    at_failure = [point for point in result.points if "stock" in point.failures]
    assert len(at_failure) == 1
    assert all(point.engines.keys() >= {"layerkv", "oracle"} for point in result.points)
    assert len(result.points[0].engines["layerkv"].ttft_s.mean.values) == 1


def test_an_engine_that_dies_under_its_last_request_is_no_complete_run(tmp_path: Path) -> None:
    path = case_file(tmp_path, points=[{"rate": 40, "requests": 6}])
    assert run_suite(path, options(tmp_path, num_seeds=1), serve=toy(layerkv="fades")) == EXIT_FAILED
    result = read(tmp_path)
    assert not result.complete
    assert result.failures["layerkv"].reason == "ended with exit status 7"
    assert result.engines.keys() == {"stock", "oracle"}


def test_an_engine_that_the_case_expects_to_fail_is_not_missed(tmp_path: Path) -> None:
    path = case_file(tmp_path, expected_to_fail=["stock"])
    assert run_suite(path, options(tmp_path, num_seeds=1), serve=toy(stock="broken")) == EXIT_OK
    result = read(tmp_path)
    assert result.complete
    assert result.failures.keys() == {"stock"}


def test_requests_that_layerkv_fails_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_run, "DEATH_LIMIT_S", 0.0)
    path = case_file(tmp_path, engines=["stock", "layerkv"])
    assert run_suite(path, options(tmp_path, num_seeds=1), serve=toy(layerkv="refuses")) == EXIT_FAILED
    assert read(tmp_path).complete


def test_a_server_that_stalls_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It holds for the oracle's load generator too, which takes seconds to start on a busy machine.
    monkeypatch.setattr(suite_run, "STALL_LIMIT_S", 25.0)
    monkeypatch.setattr(suite_run, "DEATH_LIMIT_S", 0.0)
    monkeypatch.setattr("layerkv.bench.suite.server.STOP_LIMIT_S", 0.5)  # it waits for its requests to end
    path = case_file(tmp_path, engines=["stock", "oracle"])
    assert run_suite(path, options(tmp_path, num_seeds=1), serve=toy(stock="stalls")) == EXIT_FAILED
    result = read(tmp_path)
    assert "no progress" in result.failures["stock"].reason
    assert result.engines.keys() == {"oracle"}


def test_refused_requests_are_counted_and_do_not_fail_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite_run, "DEATH_LIMIT_S", 0.0)
    path = case_file(tmp_path, engines=["stock"])
    assert run_suite(path, options(tmp_path, num_seeds=1), serve=toy(stock="refuses")) == EXIT_OK
    assert read(tmp_path).engines["stock"].num_failed.median == 3


def test_a_port_in_use_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port: found {port} in use") as caught:
            run_suite(case_file(tmp_path), options(tmp_path, port=port), serve=toy())
    assert "leave --port out" in str(caught.value)
    assert not (tmp_path / "result.json").exists()


def test_a_full_disk_is_named_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(suite_run.shutil, "disk_usage", lambda _: usage(10, 9, 1 << 20))
    with pytest.raises(ConfigError, match=r"found 1MiB of free space; expected at least 256MiB"):
        run_suite(case_file(tmp_path), options(tmp_path), serve=toy())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="no folder that can be written to"):
        run_suite(case_file(tmp_path), options(tmp_path), serve=toy())


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="no folder that can be written to"):
        run_suite(case_file(tmp_path), options(tmp_path), serve=toy())


def test_a_disk_that_fills_up_in_mid_run_takes_no_figures_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = suite_run.write_json

    def full(value: Any, path: Path) -> None:
        if isinstance(value, CaseResult):
            raise OSError(28, "No space left on device", str(path))
        write(value, path)

    monkeypatch.setattr(suite_run, "write_json", full)
    path = case_file(tmp_path, engines=["stock"])
    with pytest.raises(LayerKVError, match=r"result\.json: could not be written \(No space left on device\)"):
        run_suite(path, options(tmp_path, num_seeds=1), serve=toy())
    assert "TTFT mean" in capsys.readouterr().out


def test_wrong_engines_and_seeds_are_refused(tmp_path: Path) -> None:
    path = case_file(tmp_path)
    with pytest.raises(ConfigError, match="--engines: found stok; expected some of stock"):
        run_suite(path, options(tmp_path, engines=("stok",)), serve=toy())
    with pytest.raises(ConfigError, match=r"--engines: .* expected each once"):
        run_suite(path, options(tmp_path, engines=("stock", "stock")), serve=toy())
    with pytest.raises(ConfigError, match="--seeds: found 0"):
        run_suite(path, options(tmp_path, num_seeds=0), serve=toy())


def test_a_suite_gives_each_case_files_of_its_own(tmp_path: Path) -> None:
    case_file(tmp_path, engines=["stock"], sizes={"full": {"seeds": 1}})
    other = yaml.safe_load((tmp_path / "made.yaml").read_text()) | {"case": "other"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    suite = tmp_path / "all.yaml"
    suite.write_text("suite: [made.yaml, other.yaml]")
    given = RunOptions(out_dir=tmp_path / "out", json_path=tmp_path / "json", html_path=tmp_path / "html")
    assert run_suite(suite, given, serve=toy()) == EXIT_OK
    assert sorted(path.name for path in (tmp_path / "json").iterdir()) == ["made.json", "other.json"]
    assert sorted(path.name for path in (tmp_path / "html").iterdir()) == ["made.html", "other.html"]


def test_a_suite_with_a_wrong_case_starts_none(tmp_path: Path) -> None:
    case_file(tmp_path)
    (tmp_path / "all.yaml").write_text("suite: [made.yaml, missing.yaml]")
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        run_suite(tmp_path / "all.yaml", options(tmp_path), serve=toy())
    assert not (tmp_path / "out").exists()


INTERRUPTED = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner in the background has it ignored
from layerkv.bench.suite.run import RunOptions, run_suite
folder, toy = Path(sys.argv[1]), sys.argv[2]
def serve(_case, engine, *, port, **_):
    return [sys.executable, toy, str(port), "stalls" if engine == "layerkv" else ""]
options = RunOptions(out_dir=folder / "out", json_path=folder / "result.json")
sys.exit(run_suite(folder / "made.yaml", options, serve=serve))
"""


def test_ctrl_c_keeps_and_marks_what_was_measured_and_leaves_no_process(tmp_path: Path) -> None:
    case_file(tmp_path, engines=["stock", "layerkv"])
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), str(TOY)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def interrupt_when_stock_is_done() -> None:
        while not (tmp_path / "out" / "made" / "layerkv.seed0.log").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)

    waiter = threading.Thread(target=interrupt_when_stock_is_done)
    waiter.start()
    out, _ = process.communicate(timeout=120)
    waiter.join()
    assert process.returncode == EXIT_INTERRUPTED, out
    result = read(tmp_path)
    assert result.interrupted
    assert not result.complete
    assert result.engines.keys() == {"stock"}
    left = [p.info["pid"] for p in psutil.process_iter(["pid", "cmdline"]) if str(tmp_path) in str(p.info["cmdline"])]
    assert not left
