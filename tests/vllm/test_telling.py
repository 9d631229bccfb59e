"""What the engine says at start of settings that are experimental, from vLLM's own scheduler without an engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
