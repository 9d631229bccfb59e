from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.metrics import METRICS, MetricSamples, MetricSpec, merge_payloads, split_key
from layerkv.scheduler.reasons import Resource

NUMBERS = st.integers(-1000, 1000)
KEYS = st.sampled_from(("layerkv_a", "layerkv_b|x", "layerkv_b|y"))
PAYLOADS = st.fixed_dictionaries(
    {
        "counters": st.dictionaries(KEYS, NUMBERS),
        "gauges": st.dictionaries(KEYS, NUMBERS),
        "histograms": st.dictionaries(KEYS, st.lists(NUMBERS, max_size=3)),
    }
)


@pytest.mark.parametrize("spec", METRICS, ids=lambda spec: spec.name)
def test_every_metric_is_described_as_prometheus_wants_it(spec: MetricSpec) -> None:
    assert re.fullmatch(r"layerkv(_[a-z]+)+", spec.name)
    assert not spec.name.endswith("_total"), "the client adds that"
    assert spec.help.endswith(".")
    assert len(spec.help.split()) >= 3
    assert spec.kind in ("counter", "gauge", "histogram")
    assert bool(spec.buckets) == (spec.kind == "histogram")
    assert list(spec.buckets) == sorted(set(spec.buckets))
    assert spec.label is None or re.fullmatch(r"[a-z_]+", spec.label)


def test_each_resource_that_is_waited_for_shows_from_the_start() -> None:
    (spec,) = (spec for spec in METRICS if spec.label == "resource")
    assert spec.label_values == tuple(Resource)


def test_every_metric_has_a_name_of_its_own() -> None:
    kinds = {spec.name: spec.kind for spec in METRICS}
    assert len(kinds) == len(METRICS)
    assert kinds["layerkv_parks"] == "counter"


def test_all_that_the_issue_asks_for_is_measured() -> None:
    labels = {spec.name: spec.label for spec in METRICS}
    assert labels["layerkv_requests"] == "residency"
    assert labels["layerkv_bytes"] == labels["layerkv_copy_seconds"] == "direction"
    assert labels["layerkv_ttft_slo_met"] == labels["layerkv_ttft_slo_missed"] == "slo_class"
    assert {
        "layerkv_parks",
        "layerkv_fetches",
        "layerkv_host_blocks_used",
        "layerkv_admission_wait_seconds",
    } <= labels.keys()


def test_counters_add_up_gauges_keep_the_latest_and_histograms_every_sample() -> None:
    samples = MetricSamples()
    assert not samples
    samples.add("layerkv_bytes", 10, "store")
    samples.add("layerkv_bytes", 5, "store")
    samples.add("layerkv_bytes", 7, "load")
    samples.add("layerkv_parks", 1)
    samples.set("layerkv_requests", 3, "parked")
    samples.set("layerkv_requests", 2, "parked")
    samples.observe("layerkv_admission_wait_seconds", 0.5)
    samples.observe("layerkv_admission_wait_seconds", 0.1)
    assert samples
    assert samples.take() == {
        "counters": {"layerkv_bytes|store": 15, "layerkv_bytes|load": 7, "layerkv_parks": 1},
        "gauges": {"layerkv_requests|parked": 2},
        "histograms": {"layerkv_admission_wait_seconds": [0.5, 0.1]},
    }


def test_samples_are_taken_once_and_a_payload_does_not_change_afterwards() -> None:
    samples = MetricSamples()
    samples.add("layerkv_parks", 1)
    samples.observe("layerkv_admission_wait_seconds", 0.5)
    payload = samples.take()
    before = json.dumps(payload)
    assert not samples
    samples.add("layerkv_parks", 5)
    samples.observe("layerkv_admission_wait_seconds", 9.0)
    assert json.dumps(payload) == before
    assert samples.take()["counters"] == {"layerkv_parks": 5}


@pytest.mark.parametrize("kind", ["counters", "gauges", "histograms"])
def test_one_sample_of_any_kind_is_worth_sending(kind: str) -> None:
    samples = MetricSamples()
    record = {"counters": samples.add, "gauges": samples.set, "histograms": samples.observe}[kind]
    record("layerkv_something", 0)
    assert samples
    assert samples.take()[kind]


@pytest.mark.parametrize(
    ("key", "name_and_label"),
    [
        ("layerkv_parks", ("layerkv_parks", None)),
        ("layerkv_bytes|store", ("layerkv_bytes", "store")),
        ("layerkv_ttft_slo_met|a|b", ("layerkv_ttft_slo_met", "a|b")),
    ],
)
def test_a_key_is_a_name_and_perhaps_a_label(key: str, name_and_label: tuple[str, str | None]) -> None:
    assert split_key(key) == name_and_label
    samples = MetricSamples()
    samples.add(name_and_label[0], 1, name_and_label[1])
    assert list(samples.take()["counters"]) == [key]


@given(PAYLOADS, PAYLOADS)
def test_two_payloads_merge_into_what_one_would_have_held(first: dict, second: dict) -> None:
    before = json.dumps([first, second])
    merged = merge_payloads(first, second)
    assert json.dumps([first, second]) == before, "neither is changed"
    for key in first["counters"] | second["counters"]:
        assert merged["counters"][key] == first["counters"].get(key, 0) + second["counters"].get(key, 0)
    for key in first["gauges"] | second["gauges"]:
        assert merged["gauges"][key] == second["gauges"].get(key, first["gauges"].get(key))
    for key in first["histograms"] | second["histograms"]:
        assert merged["histograms"][key] == first["histograms"].get(key, []) + second["histograms"].get(key, [])
    for kind in ("counters", "gauges", "histograms"):
        assert merged[kind].keys() == first[kind].keys() | second[kind].keys()


@given(PAYLOADS, PAYLOADS, PAYLOADS)
def test_merging_is_associative_so_that_the_order_of_workers_does_not_matter(a: dict, b: dict, c: dict) -> None:
    assert merge_payloads(merge_payloads(a, b), c) == merge_payloads(a, merge_payloads(b, c))


def test_an_empty_payload_may_lack_its_kinds() -> None:
    full = {"counters": {"layerkv_parks": 1}, "gauges": {"layerkv_host_blocks": 4}, "histograms": {"h": [1.0]}}
    assert merge_payloads({}, full) == full == merge_payloads(full, {})
