"""Rules and alerts as Prometheus reads them, and each alert in a scenario where it fires and one where it does not."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerkv.config import EngineConfig, SloClass, parse_policy
from tests.monitoring import shipped

SCENARIOS = Path(__file__).parent / "alerts_test.yml"
ENGINE_KEYS = {name.removesuffix("_bytes") for name in EngineConfig.__struct_fields__}
CLASS_KEYS = {name.removesuffix("_s") for name in SloClass.__struct_fields__}
OTHER_WORDS = {"classes", "auto", "error", "max_tokens"}
"""The policy's own key, values that stand alone, and a parameter of requests."""
_UNIT_S = {"s": 1, "m": 60, "h": 3600}


def run(promtool: str, *arguments: str | Path) -> str:
    done = subprocess.run([promtool, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def duration_s(text: str) -> int:
    return sum(int(number) * _UNIT_S[unit] for number, unit in re.findall(r"(\d+)([smh])", text))


def alerts() -> list[dict[str, Any]]:
    return shipped.rules(shipped.ALERTS)


@pytest.fixture(params=alerts(), ids=lambda alert: alert["alert"])
def alert(request: pytest.FixtureRequest) -> dict[str, Any]:
    one: dict[str, Any] = request.param
    return one


def test_prometheus_accepts_the_configuration_and_finds_both_rule_files(promtool: str) -> None:
    said = run(promtool, "check", "config", shipped.CONFIG)
    assert "2 rule files found" in said


@pytest.mark.parametrize("path", [shipped.RULES, shipped.ALERTS], ids=lambda path: path.stem)
def test_prometheus_accepts_the_rules_without_a_complaint(promtool: str, path: Path) -> None:
    run(promtool, "check", "rules", "--lint=all", "--lint-fatal", path)


def test_every_scenario_has_the_alerts_that_it_says(promtool: str) -> None:
    run(promtool, "test", "rules", SCENARIOS)


def test_a_scenario_with_another_outcome_is_noticed(promtool: str, tmp_path: Path) -> None:
    scenarios = yaml.safe_load(SCENARIOS.read_text())
    scenarios["rule_files"] = [str(shipped.RULES), str(shipped.ALERTS)]
    for test in scenarios["tests"]:
        for query in test["promql_expr_test"]:
            query["exp_samples"] = []  # as if nothing ever fired
    path = tmp_path / "alerts_test.yml"
    path.write_text(yaml.safe_dump(scenarios))
    done = subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "LayerKVRealPreemptions" in done.stdout + done.stderr


def test_every_alert_fires_in_one_scenario_and_is_silent_in_another(alert: dict[str, Any]) -> None:
    name = alert["alert"]
    mine = {
        test["name"]: test for test in yaml.safe_load(SCENARIOS.read_text())["tests"] if name in test["name"].split()
    }
    [fires] = [test for title, test in mine.items() if title.startswith(f"{name} fires ")]
    [silent] = [test for title, test in mine.items() if title.startswith(f"{name} is silent ")]
    assert any(name in str(query["exp_samples"]) for query in fires["promql_expr_test"])
    assert all("ALERTS" not in query["expr"] or not query["exp_samples"] for query in silent["promql_expr_test"])
    end_s = max(duration_s(query["eval_time"]) for query in silent["promql_expr_test"])
    assert end_s > duration_s(alert["for"]), "silent, and not only pending"


def test_every_alert_says_how_bad_it_is_since_when_what_it_means_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert duration_s(alert["for"]) > 0
    assert set(alert["annotations"]) == {"summary", "description", "action"}
    assert all(len(text) < 500 for text in alert["annotations"].values())


def test_every_action_names_a_key_or_option_that_exists(alert: dict[str, Any]) -> None:
    quoted = re.findall(r"`([^`]+)`", alert["annotations"]["action"])
    settings = [text for text in quoted if not text.startswith(("-", "layerkv "))]
    assert quoted
    for text in settings:
        key, _, value = text.partition(": ")
        assert key in ENGINE_KEYS | CLASS_KEYS | OTHER_WORDS, text
        if value and key in ENGINE_KEYS:
            EngineConfig.from_extra_config({key: value})
        elif value:
            promises = {"ttft": "1s", "tpot": "1s", key: value}
            parse_policy({"version": 1, "default_class": "a", "classes": {"a": promises}}, where="$")


def test_recording_rules_are_named_level_metric_operations() -> None:
    levels = "model|model_class|model_direction|model_reason|model_residency|engine|engine_direction"
    for rule in shipped.rules(shipped.RULES):
        assert re.fullmatch(rf"({levels}):(layerkv|vllm)_[a-z_]+:[a-z0-9_]+", rule["record"]), rule["record"]
    names = [rule["record"] for rule in shipped.rules(shipped.RULES)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", [shipped.RULES, shipped.ALERTS], ids=lambda path: path.stem)
def test_rules_read_only_metrics_that_are_exported_or_recorded(path: Path) -> None:
    known = shipped.layerkv_names() | shipped.foreign_names() | shipped.recorded_names() | {shipped.OWN_TO_PROMETHEUS}
    for rule in shipped.rules(path):
        names = shipped.metric_names(rule["expr"])
        assert names, rule
        assert names <= known, names - known


def test_the_page_has_every_alert_and_every_metric() -> None:
    page = shipped.PAGE.read_text()
    for alert in alerts():
        assert f"`{alert['alert']}`" in page
    for name in shipped.layerkv_names():
        stem = re.sub(r"_(bucket|count|sum)$", "", name)
        assert f"`{stem}`" in page, stem
