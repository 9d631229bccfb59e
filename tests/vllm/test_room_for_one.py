"""What start-up refuses because some request that the front end lets in could never run, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from layerkv.config import EngineConfig
from layerkv.core.geometry import KVGeometry
from layerkv.errors import ConfigError

pytestmark = pytest.mark.vllm

GEOMETRY = KVGeometry(num_layers=2, page_bytes=1024, block_tokens=16, pool_blocks=11, zone_blocks=40, lanes=1)


def check(max_model_len: int, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
    from layerkv.vllm_plugin import setup
    from layerkv.vllm_plugin.host_memory import WorkerMemory

    monkeypatch.setattr(setup, "host_blocks_per_worker", lambda *_: 40)
    settings = EngineConfig.from_extra_config({"host_memory": "1MiB", **config})
    model = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len), speculative_config=None)
    setup.require_room_for_one(model, settings, GEOMETRY, WorkerMemory.here())


def test_requests_longer_than_the_pool_need_a_mode_that_runs_them_in_the_zone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(500, monkeypatch, long_contexts=True)
    check(160, monkeypatch, long_contexts=True, mode="resident")
    with pytest.raises(ConfigError, match=r"max_model_len: found 500.*mode: resident.*set mode to auto"):
        check(500, monkeypatch, long_contexts=True, mode="resident")
