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
    page = "<!-- table: streams 2026-11-29-demo-seed0-2.json 2026-11-29-demo-seed1.json -->\nold\n<!-- /table -->\nnext"
    rendered = tables.render(page)
    assert "old" not in rendered
    assert rendered.endswith("<!-- /table -->\nnext")
    stock = next(line for line in rendered.splitlines() if line.startswith("| stock "))
    assert "(8.14 s - 9.11 s)" in stock
