"""The tables of README.md and docs/ are those of the result files that they name."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
_SPEC = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
assert _SPEC is not None
assert _SPEC.loader is not None
tables = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tables)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_pages_have_the_figures_of_their_files(page: Path):
    text = page.read_text()
    assert "<!-- table: " in text
    assert tables.render(text) == text, "run `python benchmarks/tables.py`"


def test_a_table_is_of_all_seeds():
    page = (
        "<!-- table: streams 2026-11-29-demo-seed0-4.json 2026-11-29-demo-seed1-4.json -->\nold\n<!-- /table -->\nnext"
    )
    rendered = tables.render(page)
    assert "old" not in rendered
    assert rendered.endswith("<!-- /table -->\nnext")
    stock = next(line for line in rendered.splitlines() if line.startswith("| stock "))
    assert "(9.17 s - 10.9 s)" in stock


def test_files_of_the_suite_follow_each_other():
    page = "<!-- table: rates 2026-11-29-suite-rate_sweep-4.json 2026-11-29-suite-overload.json -->\n<!-- /table -->"
    rates = [line.split("|")[1].strip() for line in tables.render(page).splitlines() if line.startswith("| ")]
    assert rates[2:] == ["1", "2", "3", "4", "8", "12", "24"]
