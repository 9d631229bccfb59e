"""The dashboard as a file: whether Grafana can import it, on any data source, and what it reads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.monitoring import shipped

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
ROWS = ["First tokens", "Tokens", "KV memory by tier", "Transfers", "Decisions", "Memory that grows and shrinks"]
COLUMNS = 24


@pytest.fixture(params=shipped.data_panels(), ids=lambda panel: panel["title"])
def panel(request: pytest.FixtureRequest) -> dict[str, Any]:
    one: dict[str, Any] = request.param
    return one


def test_grafana_10_can_import_it_as_a_new_dashboard() -> None:
    board = shipped.dashboard()
    assert board["schemaVersion"] >= 38  # Grafana 10.0
    assert board["id"] is None
    assert board["uid"] == "layerkv"
    assert board["title"] == "layerkv"
    assert [panel["title"] for panel in board["panels"] if panel["type"] == "row"] == ROWS


def test_data_source_model_and_engine_are_chosen_on_the_page() -> None:
    variables = {variable["name"]: variable for variable in shipped.dashboard()["templating"]["list"]}
    assert list(variables) == ["datasource", "model_name", "engine"]
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    for name in ("model_name", "engine"):
        variable = variables[name]
        assert variable["datasource"] == DATASOURCE
        assert variable["query"]["query"].endswith(f", {name})")
        assert (variable["multi"], variable["includeAll"], variable["allValue"]) == (True, True, ".*")


def test_panels_have_ids_of_their_own() -> None:
    ids = [panel["id"] for panel in shipped.dashboard()["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in shipped.data_panels()]
    assert len(set(titles)) == len(titles)


def test_panels_lie_within_the_grid_and_never_on_each_other() -> None:
    places = [panel["gridPos"] for panel in shipped.dashboard()["panels"]]
    for place in places:
        assert place["w"] > 0
        assert place["h"] > 0
        assert 0 <= place["x"] <= COLUMNS - place["w"]
    for one, other in itertools.combinations(places, 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        is_above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert is_beside or is_above, (one, other)


def test_a_panel_says_what_it_shows_in_which_unit_and_from_the_chosen_data_source(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["datasource"] == DATASOURCE
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    assert defaults["thresholds"]["steps"][0]["value"] is None
    letters = [target["refId"] for target in panel["targets"]]
    assert letters == sorted(set(letters))
    for target in panel["targets"]:
        assert target["datasource"] == DATASOURCE
        assert target["legendFormat"]


def test_a_panel_reads_only_metrics_that_are_exported(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        names = shipped.metric_names(target["expr"])
        assert names
        assert names <= shipped.layerkv_names() | shipped.foreign_names()


def test_a_panel_shows_the_chosen_models_and_engines_over_windows_that_fit_the_zoom(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        expression = target["expr"]
        if "http_requests_total" not in expression:  # the web framework does not know models
            assert expression.count('{model_name=~"$model_name", engine=~"$engine"}') == expression.count("{")
        assert expression.count("[$__rate_interval]") == expression.count("rate(")


def test_legends_name_only_labels_that_the_query_keeps(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        labels = [part.split("}}")[0] for part in target["legendFormat"].split("{{")[1:]]
        kept = target["expr"].split(" by (", 1)[1].split(")", 1)[0].split(", ")
        assert set(labels) <= set(kept)


def test_every_metric_of_layerkv_is_on_the_dashboard() -> None:
    shown = {name for _, expression in shipped.dashboard_queries() for name in shipped.metric_names(expression)}
    assert shipped.layerkv_names() <= shown


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (a, le) (rate(vllm:x_bucket{b="c"}[5m]))', {"vllm:x_bucket"}),
        ("a_total / on (job) group_left (b) (c:d:e > 0)", {"a_total", "c:d:e"}),
        ('up{job="vllm"} == 0', {"up"}),
        ("(a or 0 * b) unless bool_total", {"a", "b", "bool_total"}),
        ("rate(a[$__rate_interval]) > 2.5e3", {"a"}),
    ],
)
def test_the_names_in_an_expression_are_found(expression: str, names: set[str]) -> None:
    assert shipped.metric_names(expression) == names
