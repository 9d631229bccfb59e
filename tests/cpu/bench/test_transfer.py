"""`layerkv bench transfer`: what its file holds. How fast copies are is for the file to say, not for a test."""

from __future__ import annotations

import json
from pathlib import Path

from layerkv.bench.transfer import run_transfer, scattered


def test_the_file_has_rates_by_direction_and_size_and_overlap_by_lanes(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "transfer.json"
    assert run_transfer(path, quick=True) == 0
    result = json.loads(path.read_text())
    assert result["schema"] == 1
    assert result["device"]
    assert {(row["direction"], row["fragment_bytes"]) for row in result["rows"]} == {
        (direction, size << 10) for direction in ("store", "load", "both") for size in (16, 64)
    }
    assert all(row["gb_per_s"] > 0 and row["memcpy_gb_per_s"] > 0 for row in result["rows"])
    assert [(figure["lanes"], figure["chunk_tokens"]) for figure in result["overlap"]] == [(1, 512), (2, 512)]
    assert all(figure["hidden_fraction"] < 1 for figure in result["overlap"])
    for key in ("command", "date", "machine", "versions", "rounds"):
        assert key in result


def test_pieces_touch_no_other_on_the_device() -> None:
    runs = scattered(50, 1)
    assert all(run.num_blocks == 1 for run in runs)
    assert sorted(run.device_block for run in runs) == list(range(1, 100, 2))
    assert sorted(run.host_block for run in runs) == list(range(50, 100))
