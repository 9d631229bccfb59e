from __future__ import annotations

import math
from pathlib import Path

import pytest

from layerkv.bench.suite.case import load_case
from layerkv.bench.suite.plan import plan_requests
from layerkv.bench.suite.stretch import stretched
from layerkv.errors import ConfigError

CASES = Path(__file__).parents[4] / "benchmarks" / "cases"


@pytest.mark.parametrize("name", ["two_classes", "multi_turn"])
def test_every_time_is_longer_and_nothing_else_changes(name: str) -> None:
    case = load_case(CASES / f"{name}.yaml")
    longer = stretched(case, 2)
    for key, before in case.policy.classes.items():
        after = longer.policy.classes[key]
        assert (after.ttft_s, after.tpot_s, after.max_lag_s) == (2 * before.ttft_s, 2 * before.tpot_s, 2.0)
        assert (after.max_stall_s, after.weight) == (None, before.weight)
    for before_point, after_point in zip(case.points, longer.points, strict=True):
        planned = plan_requests(case, before_point, seed=0)
        slower = plan_requests(longer, after_point, seed=0)
        assert (after_point.name, after_point.x) == (before_point.name, before_point.x)
        assert [each.arrival_s for each in slower] == pytest.approx([2 * each.arrival_s for each in planned])
        assert [each.prompt for each in slower] == [each.prompt for each in planned]
    assert "stretched by 2" in longer.notes[-1]
    assert longer.settings == case.settings


def test_the_longest_stall_is_stretched_where_there_is_one() -> None:
    from msgspec.structs import replace as with_fields

    case = load_case(CASES / "two_classes.yaml")
    case.policy.classes["batch"] = with_fields(case.policy.classes["batch"], max_stall_s=0.5)
    assert stretched(case, 3).policy.classes["batch"].max_stall_s == 1.5


def test_one_leaves_the_case_as_it_is_and_no_number_is_refused() -> None:
    case = load_case(CASES / "two_classes.yaml")
    assert stretched(case, 1) is case
    for wrong in (0, -1, math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"--stretch: found .*; expected a number above zero"):
            stretched(case, wrong)
