"""What ran of each family, for ``docs/families.json``, from which ``tools/families.py`` makes the docs' table.

Tests note it; with ``LAYERKV_WRITE_FAMILIES`` set it is written, of the families of which every setting ran.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.vllm.forked import ROOT

FAMILIES_JSON = ROOT / "docs" / "families.json"
WRITES_ROWS = bool(os.environ.get("LAYERKV_WRITE_FAMILIES"))
"""Whether a run has the time for all there is to try."""
_COUNTED = {
    "parks": "parks",
    "fetches": "fetches",
    "layered_prefills": "layered_admissions",
    "recomputes": "recomputes",
}
"""Columns by the moves that they count."""


@dataclass(frozen=True)
class Head:
    """What a family is called there, what is to be said of it, and how many settings it has."""

    title: str
    remark: str
    num_settings: int


class Rows:
    """Rows of that table, of families by name."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Any]] = {}

    def note(self, family: str, setting: str, moves: Mapping[str, int], *, num_compared: int) -> None:
        """That a setting of a family ran, with so many requests' tokens compared and none wrong."""
        columns = ("requests", *_COUNTED, "wrong_tokens")
        row = self._rows.setdefault(family, {"settings": [], **dict.fromkeys(columns, 0)})
        row["settings"].append(setting)
        row["requests"] += num_compared
        for column, move in _COUNTED.items():
            row[column] += moves[move]

    def write_if_asked(self, families: Mapping[str, Head]) -> None:
        """Put them in the place of what stood there of the same families, and new ones behind all others."""
        if not WRITES_ROWS:
            return
        import vllm

        known = json.loads(FAMILIES_JSON.read_text())
        for name, family in families.items():
            row = self._rows.get(name, {"settings": ()})
            if len(row["settings"]) == family.num_settings:
                known[name] = {"title": family.title, "remark": family.remark, **row, "vllm": vllm.__version__}
        FAMILIES_JSON.write_text(json.dumps(known, indent=2) + "\n")
