"""`layerkv simulate` and `layerkv bench decide`, as a user runs them."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerkv.bench import decide
from layerkv.cli import main
from layerkv.sim.config import POLICIES


def simulation(**changes: Any) -> dict[str, Any]:
    """Return a small good file: KV memory for about three of its requests."""
    return {
        "version": 1,
        "engine": {"device": "L20", "model": "llama-2-7b", "kv_memory": "2GiB", "max_model_len": 2048},
        "policy": {"version": 1, "default_class": "chat", "classes": {"chat": {"ttft": "2s", "tpot": "150ms"}}},
        "policies": ["stock", "layerkv"],
        "workload": {
            "requests": 30,
            "rates": [1.0, 3.0],
            "classes": [{"prompt_tokens": {"uniform": [100, 1000]}, "output_tokens": {"uniform": [20, 100]}}],
        },
        **changes,
    }


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return written(tmp_path, simulation())


def written(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "sim.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def test_a_simulation_prints_a_table_for_each_rate(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("simulate", config) == 0
    printed = capsys.readouterr().out
    assert "1 requests per second" in printed
    assert "3 requests per second" in printed
    assert printed.count("layerkv ") >= 2
    assert printed.count("stock ") >= 2


def test_the_json_holds_every_policy_and_every_run(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert run("simulate", config, "--json", path) == 0
    result = json.loads(path.read_text())
    assert result["schema"] == 1
    assert result["config"] == str(config)
    assert set(result["policies"]) == {"stock", "layerkv"}
    for figures in result["policies"].values():
        for name in ("ttft_s", "tpot_s", "time_between_tokens_s"):
            assert set(figures[name]) == {"mean", "p50", "p90", "p99"}
        assert 0 <= figures["slo_attainment"] <= 1
        assert figures["goodput_rps"] >= 0
        assert figures["output_tokens_per_s"] > 0
        assert figures["preemptions"] >= 0
    assert len(result["runs"]) == 4


def test_the_json_holds_what_readers_saw(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert run("simulate", config, "--json", path) == 0
    for figures in json.loads(path.read_text())["policies"].values():
        for name in ("lag_s", "longest_pause_s", "end_to_end_s", "second_token_s"):
            assert set(figures[name]) == {"mean", "p50", "p90", "p99"}
        for name in ("fluid", "tokens_on_time", "fluidity_index"):
            assert 0 <= figures[name] <= 1
        assert figures["fluid_goodput_rps"] >= 0
        assert set(figures["link_utilisation"]) == {"store", "load"}


def test_the_table_fits_80_columns_and_names_what_it_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    document = simulation(policies=list(POLICIES))
    document["workload"]["rates"] = [20.0]
    assert run("simulate", written(tmp_path, document)) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "\u2026" not in printed  # nothing was cut off
    for words in ("TTFT", "fluid", "2nd tok", "pause", "end to", "tok/s", "SLOs", "by mean TPOT", *POLICIES):
        assert words in printed


def test_capacity_is_searched_and_written(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "capacity.json"
    assert run("simulate", config, "--capacity", "--json", path) == 0
    result = json.loads(path.read_text())
    assert result["schema"] == 1
    assert set(result["fluid_capacity_rps"]) == {"stock", "layerkv", "layerkv-slo", "oracle"}
    assert result["fluid_capacity_rps"]["oracle"] > result["fluid_capacity_rps"]["stock"] > 0
    rates = [row["rate"] for row in result["rates"]]
    assert rates == sorted(rates)
    for row in result["rates"]:
        assert all(0 <= share <= 1 for share in row["fluid"].values())
    for name, rate in result["fluid_capacity_rps"].items():
        (row,) = (row for row in result["rates"] if row["rate"] == rate)
        assert row["fluid"][name] >= 0.9
    printed = capsys.readouterr().out
    assert "fluid capacity" in printed
    assert "30 requests a run" in printed


@pytest.mark.parametrize("flag", ["--plots", "--log", "--offline"])
def test_what_capacity_makes_nothing_of_is_refused_beside_it(
    flag: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = [] if flag == "--offline" else [tmp_path / "there"]
    assert run("simulate", config, "--capacity", flag, *value) == 2
    error = capsys.readouterr().err
    assert flag in error
    assert "leave one out" in error


def test_offline_says_what_could_be_fluid_at_each_rate(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    assert run("simulate", config, "--offline", "--json", path) == 0
    result = json.loads(path.read_text())
    assert [(row["rate_per_s"], row["seed"]) for row in result["offline"]] == [(1.0, 0), (3.0, 0)]
    by_run = {(each["rate_per_s"], each["policy"]): each["fluid"] for each in result["runs"]}
    for row in result["offline"]:
        assert by_run[row["rate_per_s"], "stock"] <= row["schedule"] <= row["bound"] <= 1
    assert "known beforehand, seed 0" in capsys.readouterr().out


def test_the_same_file_gives_the_same_figures(config: Path, tmp_path: Path) -> None:
    results = []
    for name in ("first.json", "again.json"):
        assert run("simulate", config, "--json", tmp_path / name) == 0
        results.append(json.loads((tmp_path / name).read_text())["policies"])
    assert results[0] == results[1]


def test_exact_decides_more_often_and_serves_the_same(config: Path, tmp_path: Path) -> None:
    assert run("simulate", config, "--json", tmp_path / "exact.json", "--exact") == 0
    figures = json.loads((tmp_path / "exact.json").read_text())["policies"]["layerkv"]
    assert figures["requests"] == 30
    assert figures["refused"] == 0


def test_plots_are_svg_with_the_names_of_the_policies(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config, folder = written(tmp_path, simulation(policies=list(POLICIES))), tmp_path / "plots" / "new"
    assert run("simulate", config, "--plots", folder) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["rates.svg", "ttft.svg"]
    for path in folder.iterdir():
        text = path.read_text()
        assert ET.fromstring(text).tag.endswith("svg")
        for name in POLICIES:
            assert f"<!-- {name} -->" in text or f">{name}<" in text


def test_one_rate_makes_no_plot_against_the_rate(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document = simulation()
    document["workload"]["rates"] = [2.0]
    assert run("simulate", written(tmp_path, document), "--plots", tmp_path / "plots") == 0
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["ttft.svg"]


def test_the_decision_log_can_be_explained(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("simulate", config, "--log", tmp_path / "decisions.log") == 0
    assert run("explain", tmp_path / "decisions.log", "r00", "--json") == 0
    assert "r00" in capsys.readouterr().out


@pytest.mark.parametrize("trouble", ["missing file", "unknown policy", "no folder", "too little KV memory", "no YAML"])
def test_what_is_wrong_is_one_line_with_status_2(
    trouble: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = simulation()
    arguments: list[str | Path] = []
    if trouble == "unknown policy":
        document["policies"] = ["stock", "layerk"]
    elif trouble == "too little KV memory":
        document["engine"]["kv_memory"] = "256MiB"
    elif trouble == "no folder":
        arguments = ["--json", tmp_path / "nowhere" / "out.json"]
    config = written(tmp_path, document)
    if trouble == "missing file":
        config = tmp_path / "other.yaml"
    elif trouble == "no YAML":
        config.write_text("engine: [")
    said = {
        "missing file": ("other.yaml", "found no readable file"),
        "unknown policy": ("$.policies[1]", "did you mean layerkv"),
        "no folder": ("out.json", "found no folder"),
        "too little KV memory": ("engine.kv_memory", "the longest request"),
        "no YAML": ("sim.yaml", "mend the YAML there"),
    }[trouble]
    assert run("simulate", config, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("layerkv: ")
    for part in said:
        assert part in error


def test_broken_rows_of_a_trace_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace.csv").write_text(
        "arrived_at,num_prefill_tokens,num_decode_tokens\n0,100,5\n1,oops,6\n2,300,7\n3,90000,7\n4,10,0\n"
    )
    document = simulation(workload={"arrivals": {"trace": {"path": "trace.csv"}}})
    assert run("simulate", written(tmp_path, document)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 broken rows left out, the first is line 3" in printed
    assert "1 failed and 1 too long requests left out" in printed


def test_the_decision_benchmark_writes_the_times_of_each_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"ROUNDS": 3, "WARM_UP_ROUNDS": 1, "WAITING": 40, "FEW_WAITING": 10, "MANY_WAITING": 80}.items():
        monkeypatch.setattr(decide, name, value)
    monkeypatch.setattr(decide.measure, "__kwdefaults__", {"seed": 0, "rounds": 3})
    path = tmp_path / "decide.json"
    assert run("bench", "decide", "--json", path) == 0
    result = json.loads(path.read_text())
    assert (result["schema"], result["rounds"], result["waiting"]) == (1, 3, 40)
    assert (result["running"], result["parked"]) == (decide.RUNNING, decide.PARKED)
    for kind in ("decide_ms", "whole_ms"):
        for name in (kind, f"{kind}_at_100_waiting", f"{kind}_at_10000_waiting"):
            assert set(result[name]) == {"p50", "p99"}
            assert 0 < result[name]["p50"] <= result[name]["p99"]
    assert "40 waiting" in capsys.readouterr().out
