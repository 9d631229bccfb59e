"""What the engine tells of itself, without an engine around vLLM's scheduler: what is experimental, what binds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from layerkv.metrics import MetricSamples
from layerkv.scheduler.reasons import Reason, Resource
from layerkv.vllm_plugin import telling
from tests.vllm.hand_engine import HandEngine

pytestmark = pytest.mark.vllm

STREAMED = "version: 1\ndefault_class: a\nclasses: {a: {ttft: 1s, tpot: 1s}}\nstreamed_decode: true\n"


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    heard: list[str] = []

    class Hears(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                heard.append(record.getMessage())

    handler, logger = Hears(), logging.getLogger(telling.logger.name)
    logger.addHandler(handler)
    yield heard
    logger.removeHandler(handler)


def test_what_binds_is_told_at_intervals_and_once_more_when_nobody_waits() -> None:
    metrics, controller = MetricSamples(), SimpleNamespace(waits={}, behind={})
    parallel = SimpleNamespace(_api_process_count=1)
    scheduler: Any = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
    side: Any = SimpleNamespace(ledger=None, metrics=metrics)
    told = telling.Telling(scheduler, side, controller)  # type: ignore[arg-type]
    pool, slot = "layerkv_waiting_requests|pool", "layerkv_waiting_requests|slot"

    def after(waits: dict[str, Reason], now_s: float) -> dict[str, float]:
        controller.waits = waits
        told.waits(now_s)
        gauges: dict[str, float] = metrics.take()["gauges"]
        return gauges

    assert after({}, 10.0) == {}
    three = {"a": Reason.POOL_FULL, "b": Reason.HELD, "c": Reason.NO_SLOT}
    controller.behind = {"b": Resource.SLOT}
    assert after(three, 5.0) == {pool: 1, slot: 2}
    controller.behind = {}
    assert after(three, 10.0) == {pool: 2, slot: 1}
    assert after({"c": Reason.NO_SLOT}, 10.0 + telling.WAITS_INTERVAL_S / 2) == {}
    assert after({"c": Reason.NO_SLOT}, 10.0 + telling.WAITS_INTERVAL_S) == {pool: 0}
    assert after({}, 10.0 + telling.WAITS_INTERVAL_S) == {slot: 0}
    assert after({}, 20.0) == {}


def test_an_engine_tells_who_waits_for_a_slot_and_that_nobody_does_in_the_end(tiny_model: Path) -> None:
    engine = HandEngine(tiny_model, max_num_seqs=1)
    for name in "abc":
        engine.add(name, range(20), max_tokens=4)
    seen: list[int] = []
    tell = engine.scheduler._telling.waits

    def tell_and_look(now_s: float) -> None:
        tell(now_s)
        seen.append(engine.scheduler._telling._waiting_for[Resource.SLOT])

    engine.scheduler._telling.waits = tell_and_look
    engine.run()
    assert max(seen) == 2
    assert seen[-1] == 0


@pytest.mark.parametrize(
    ("flag", "is_streamed", "named"),
    [
        ({}, False, None),
        ({"retained_layers": 1}, False, "retained_layers"),
        ({"retained_layers": 1}, True, "retained_layers and streamed_decode"),
        ({"retained_layers": 1, "long_contexts": True}, True, None),
    ],
)
def test_what_is_experimental_is_said_once_at_start(
    tiny_model: Path, tmp_path: Path, warnings: list[str], flag: dict[str, Any], is_streamed: bool, named: str | None
) -> None:
    (tmp_path / "slo.yaml").write_text(STREAMED.replace("true", str(is_streamed).lower()))
    engine = HandEngine(tiny_model, extra_config={"policy": str(tmp_path / "slo.yaml"), **flag})
    engine.add("a", range(20), max_tokens=2)
    engine.run()
    assert warnings == (
        []
        if named is None
        else [f"experimental without long_contexts, its speed was never measured: {named} (docs/configuration.md)"]
    )


def test_a_pool_that_grows_on_cuda_is_warned_about_at_start(tiny_model: Path, warnings: list[str]) -> None:
    size = 60 * 6 * 2 * 16 * 2 * 64 * 4
    engine = HandEngine(tiny_model, extra_config={"kv_ceiling": f"{size}B", "allow_untested_elastic_cuda": True})
    assert warnings == [], "the CPU's is tested"
    device_config = engine.scheduler.vllm_config.device_config
    device_config.device_type = "cuda"
    engine.scheduler._telling.capacity()
    [warning] = warnings
    assert "never run on a GPU (allow_untested_elastic_cuda)" in warning
