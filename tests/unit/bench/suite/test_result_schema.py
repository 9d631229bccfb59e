"""The JSON schema beside the cases is that of the results which are written, and the committed results obey it."""

import json
from pathlib import Path

import msgspec
import pytest

from layerkv.bench.suite.case import load_case
from layerkv.bench.suite.result import CaseResult

BENCHMARKS = Path(__file__).parents[4] / "benchmarks"
CASE_NAMES = {load_case(path).name for path in (BENCHMARKS / "cases").glob("*.yaml") if path.stem != "all"}


def suite_results() -> list[Path]:
    return [
        path
        for path in sorted((BENCHMARKS / "results").glob("*.json"))
        if json.loads(path.read_text()).get("case") in CASE_NAMES
    ]


def test_the_schema_is_current() -> None:
    written = json.loads((BENCHMARKS / "result.schema.json").read_text())
    assert written == msgspec.json.schema(CaseResult), "write it again: see benchmarks/README.md"


@pytest.mark.parametrize("path", suite_results(), ids=lambda path: path.stem)
def test_a_committed_result_is_whole(path: Path) -> None:
    result = msgspec.json.decode(path.read_bytes(), type=CaseResult)
    assert not result.interrupted
    assert result.command
    assert result.seeds
    assert result.tokens_equal is not False
    for point in result.points:
        for figures in point.engines.values():
            assert len(figures.ttft_s.mean.values) == len(result.seeds)
