"""The GPU run book, dry: the script itself, on the CPU engine with tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run_book.py"


def test_steps_run_one_after_the_other_and_a_failed_one_stops_nothing(tmp_path: Path) -> None:
    book_path = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--out", str(tmp_path), "--json", str(book_path)]
    done = subprocess.run(
        [*command, "--steps", "ordering,kernels,exact_elastic,long_context,sanitizer"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads(book_path.read_text())["steps"]
    assert list(steps) == ["ordering", "kernels", "exact_elastic", "long_context", "sanitizer"]
    assert all(step["ok"] for step in steps.values())
    assert steps["ordering"]["tokens_checked"] > 1000
    assert steps["ordering"]["wrong"] == {}
    assert steps["exact_elastic"]["settings"]["elastic"]["differing_requests"] == []
    assert steps["long_context"]["context_over_kv_memory"] >= 4
    [setting] = steps["long_context"]["settings"].values()
    assert setting["differing_requests"] == []
    assert setting["bytes_loaded"] > 0


def test_a_step_that_fails_is_recorded_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").write_text("in the way of the models' folder")
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--out", str(tmp_path), "--steps", "exact,kernels"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert not steps["exact"]["ok"]
    assert "models" in steps["exact"]["error"]
    assert steps["kernels"]["ok"]
