"""The table of model families in the docs is what the tests ran."""

from __future__ import annotations

import json

from tests.vllm.families import FAMILIES as TRIED
from tests.vllm.test_groups import TITLES
from tools.families import COLUMNS, DOCS, END, main, table

FAMILIES = json.loads((DOCS / "families.json").read_text())


def test_the_docs_have_the_table_of_what_ran() -> None:
    assert main() == 0


def test_each_family_that_is_tried_has_a_row_and_no_other() -> None:
    tried = {family.name for family in TRIED}
    assert tried <= set(FAMILIES) <= tried | {name for name, _, _ in TITLES.values()}


def test_each_family_ran_at_least_a_hundred_requests_and_was_moved_without_a_wrong_token() -> None:
    for name, family in FAMILIES.items():
        assert family["requests"] >= 100, name
        assert family["wrong_tokens"] == 0, name
        assert min(family["parks"], family["fetches"], family["layered_prefills"]) > 0, name


def test_a_row_has_a_cell_for_each_column() -> None:
    rows = table(FAMILIES).splitlines()
    assert len(rows) == 2 + len(FAMILIES)
    assert {row.count("|") for row in rows} == {len(COLUMNS) + 4}
    assert END.endswith("\n")
