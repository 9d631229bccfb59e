"""The table of model families in ``docs/models.md``, made from what the tests ran (``docs/families.json``).

``python tools/families.py --write`` writes it; without the flag it says whether it is what it should be.
``LAYERKV_WRITE_FAMILIES=1 pytest tests/vllm/test_families.py tests/vllm/test_groups.py`` writes the JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- families: written by tools/families.py -->\n", "<!-- end of families -->\n"
COLUMNS = ("requests", "parks", "fetches", "layered_prefills", "recomputes", "wrong_tokens")


def table(families: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row for each family."""
    heads = ["model or feature", *(column.replace("_", " ") for column in COLUMNS), "settings", "remark"]
    rows = [heads, ["---", *["---:"] * len(COLUMNS), "---", "---"]]
    for family in families.values():
        counts = [f"{family[column]:,}" for column in COLUMNS]
        rows.append([family["title"], *counts, ", ".join(family["settings"]), family["remark"]])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def with_table(text: str, families: dict[str, dict[str, Any]]) -> str:
    """The document with this table in it."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table(families) + END + after


def main(*arguments: str) -> int:
    """Whether the document was right; with ``--write`` it is."""
    path = DOCS / "models.md"
    text = path.read_text()
    wanted = with_table(text, json.loads((DOCS / "families.json").read_text()))
    if wanted == text:
        return 0
    if "--write" in arguments:
        path.write_text(wanted)
        return 0
    print(f"{path} is not what tools/families.py would write: run it with --write")
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
