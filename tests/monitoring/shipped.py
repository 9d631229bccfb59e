"""What is shipped for Prometheus and Grafana, read for tests: rules, the dashboard's queries, the names in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from layerkv.metrics import METRICS

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "configs" / "prometheus"
CONFIG = PROMETHEUS / "prometheus.yml"
RULES = PROMETHEUS / "layerkv-rules.yml"
ALERTS = PROMETHEUS / "layerkv-alerts.yml"
DASHBOARD = ROOT / "configs" / "grafana" / "layerkv.json"
PAGE = ROOT / "docs" / "monitoring.md"
FOREIGN_METRICS = Path(__file__).parent / "vllm_metrics.txt"
"""Names that rules and dashboard take from vLLM and its web framework: not layerkv's to know."""
OWN_TO_PROMETHEUS = "up"

_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
_WORDS = frozenset(("and", "or", "unless", "bool", "offset", "inf", "nan"))
_LABEL_LISTS = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_NAME = re.compile(r"(?<![\w:.])[a-zA-Z_:][\w:]*\b(?!\s*\()")


def layerkv_names() -> set[str]:
    """Every sample that layerkv exports, as PromQL writes it."""
    return {spec.name + suffix for spec in METRICS for suffix in _SUFFIXES[spec.kind]}


def foreign_names() -> set[str]:
    """The names listed in `vllm_metrics.txt`, which was written from a server's `/metrics`."""
    lines = FOREIGN_METRICS.read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def rules(path: Path) -> list[dict[str, Any]]:
    """The rules of all groups of a file."""
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def recorded_names() -> set[str]:
    """What the recording rules make."""
    return {rule["record"] for rule in rules(RULES)}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


def data_panels() -> list[dict[str, Any]]:
    """Panels that show data: all but the rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Each query with a name for it: the panel's title and the query's letter."""
    for panel in data_panels():
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]


def metric_names(expression: str) -> set[str]:
    """The metrics that a PromQL expression reads."""
    without_strings = re.sub(r'"(\\.|[^"\\])*"', '""', expression)
    without_matchers = re.sub(r"\{[^{}]*\}|\[[^\]]*\]", "", without_strings)
    without_labels = _LABEL_LISTS.sub("", without_matchers)
    return {name for name in _NAME.findall(without_labels) if name.lower() not in _WORDS}
