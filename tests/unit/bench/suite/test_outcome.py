"""What a result says of the load that it was measured with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from layerkv.bench.suite.case import load_case
from layerkv.bench.suite.ends import Ends
from layerkv.bench.suite.outcome import load_digest

BENCHMARKS = Path(__file__).parents[4] / "benchmarks"


@pytest.mark.parametrize("name", ["rate_sweep-4", "overload"])
def test_results_from_before_a_new_key_of_cases_stay_comparable(name: str) -> None:
    """A case that was changed since has no such result any more: take another one here."""
    written = json.loads((BENCHMARKS / "results" / f"2026-11-29-suite-{name}.json").read_text())
    case = load_case(BENCHMARKS / "cases" / f"{name.partition('-')[0]}.yaml", written["size"])
    assert written["load"] == load_digest(case)


def test_a_load_that_ends_otherwise_is_another_load() -> None:
    case = load_case(BENCHMARKS / "cases" / "stop_strings.yaml")
    point = case.points[0]
    others = [replace(point, ends=ends) for ends in (None, Ends(("x",), 0.2), Ends(("ay",), 0.2), Ends(("x",), 0.3))]
    assert len({load_digest(replace(case, points=(other,))) for other in (point, *others)}) == 5
