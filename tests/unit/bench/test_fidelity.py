"""What a real run and its simulation are compared in."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from layerkv.bench import fidelity
from layerkv.bench.board import ProgressBoard
from layerkv.sim.config import load_sim_config
from layerkv.sim.run import requests_of
from tests.unit.bench import made_records as made

CONFIG = Path(__file__).parents[3] / "configs" / "sim" / "cpu_two_classes.yaml"


def real_figures(pause_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of a run of two requests that begin at once and then come at reading pace, but for one pause."""
    config = load_sim_config(CONFIG)
    load = requests_of(config, config.rates[0], 0)[:2]
    records = []
    for index, request in enumerate(load):
        first_s, pace_s = request.arrival_s + 0.1, request.slo.tpot_s
        times_s = [first_s, first_s + pace_s, first_s + 2 * pace_s + pause_s]
        record = made.request(index, request.arrival_s, request.arrival_s, times_s)
        records.append(msgspec.structs.replace(record, request_id=request.request_id))
    monkeypatch.setattr(fidelity, "_spec", lambda *_: None)
    monkeypatch.setattr(fidelity, "run_engine", lambda *_: made.engine_run("stock", records))
    board = ProgressBoard(["stock"], Console(quiet=True))
    return fidelity._run_real(config, "stock", load, 0, tmp_path, board)


def test_readers_of_a_real_run_are_judged_by_the_classes_of_the_load_whatever_the_engine_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = real_figures(1.5, tmp_path, monkeypatch)
    assert found["fluid"] == 0
    assert found["lag_s"]["mean"] == pytest.approx(1.5)
    assert real_figures(0.5, tmp_path, monkeypatch)["fluid"] == 1
    assert json.loads(json.dumps(found)) == found


def test_a_figure_that_one_of_the_two_does_not_know_has_no_ratio() -> None:
    each = {"mean": 2.0, "p99": 4.0}
    known = {"ttft_s": each, "output_tokens_per_s": 8.0, "fluid": 0.5, "tokens_on_time": 0.8, "lag_s": each}
    silent = {"ttft_s": each, "output_tokens_per_s": 4.0}
    row = {"policy": "stock", "rate_per_s": 1.0, "seed": 0, "real": known, "simulated": silent}
    (merged,) = fidelity._over_seeds([row])
    ratios = merged["simulated_over_real"]
    assert (ratios["fluid"], ratios["lag_s.p99"]) == (None, None)
    assert (ratios["ttft_s.mean"], ratios["output_tokens_per_s"]) == (1.0, 0.5)
    (merged,) = fidelity._over_seeds([{**row, "simulated": {**known, "lag_s": None}}])
    assert (merged["simulated_over_real"]["fluid"], merged["simulated_over_real"]["lag_s.mean"]) == (1.0, None)
