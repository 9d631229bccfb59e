"""Elastic engines that rest (paused, with nobody under way) or fall asleep: what is nobody's goes back first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerkv.core.segments import SegmentState
from tests.vllm.engines_in_turn import prompt
from tests.vllm.test_elastic import ElasticEngine
from tests.vllm.test_elastic_host import SharingEngine
from tests.vllm.test_readers import Reported

pytestmark = pytest.mark.vllm


def until_still(engine: Any, most: int = 4000) -> None:
    """As the engine core's busy loop: it steps while asked to, else ends what is in flight, else sleeps."""
    for _ in range(most):
        if engine.scheduler.has_requests():
            engine.step()
        elif engine.in_flight:
            engine.process()
        else:
            return
    raise AssertionError("never still")


def abort_all(engine: Any) -> None:
    from vllm.v1.request import RequestStatus

    with engine._at_its_time():
        engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)


def pause(engine: Any, state: str = "PAUSED_NEW") -> None:
    from vllm.v1.core.sched.interface import PauseState

    engine.scheduler.set_pause_state(PauseState[state])


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("mode", ["abort", "wait"])
def test_a_pool_gives_back_at_rest_what_became_empty_after_the_last_look(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool, mode: str
) -> None:
    engine = ElasticEngine(tiny_model, monkeypatch, ahead=ahead, enable_prefix_caching=False)
    for i in range(12):
        engine.add(f"r{i}", prompt(120, seed=i), 100 if mode == "abort" else 30)
    for _ in range(30):
        engine.step()
    engine.share.allowed = 1 if mode == "abort" else 4
    if mode == "abort":
        abort_all(engine)
    pause(engine)
    until_still(engine)
    leaving = engine.table.all_in(SegmentState.LEAVING)
    assert not [segment for segment in leaving if engine.queue.is_empty(segment)]


@pytest.mark.parametrize("ahead", [False, True])
def test_host_memory_gives_back_at_rest_what_became_empty_after_the_last_look(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    engine = SharingEngine(tiny_model, monkeypatch, ahead=ahead)
    for i in range(6):
        engine.add(f"r{i}", prompt(120, seed=i), 100)
    for _ in range(30):
        engine.step()
    engine.host_share.allowed = 1
    abort_all(engine)
    pause(engine)
    until_still(engine)
    leaving = engine.host_table.all_in(SegmentState.LEAVING)
    assert not [segment for segment in leaving if engine.tier.is_empty(segment)]
    assert engine.host_table.num_held == 1


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("rests", ["idle", "paused"])
def test_before_it_falls_silent_an_engine_has_told_what_it_holds_and_needs(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool, rests: str
) -> None:
    engine = SharingEngine(tiny_model, monkeypatch, ahead=ahead)
    reported = Reported(engine)
    for i in range(6):
        engine.add(f"r{i}", prompt(120, seed=i), 40)
    for _ in range(20):
        engine.step()
    if rests == "paused":
        abort_all(engine)
        pause(engine)
    until_still(engine)
    side = engine.scheduler.connector.scheduler_side
    for name, sizes, amounts in (
        ("layerkv_kv_bytes", side.sizes, side.elastic.amounts),
        ("layerkv_host_bytes", side.host_sizes, side.elastic.host.amounts),
    ):
        told = reported.gauges(name)
        assert told == {amount: num * sizes.segment_bytes for amount, num in amounts.items()}


def test_a_resting_engine_offers_no_host_memory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SharingEngine(tiny_model, monkeypatch)
    for i in range(6):
        engine.add(f"r{i}", prompt(100, seed=i), 60)
    for _ in range(20):
        engine.step()
    pause(engine, "PAUSED_ALL")
    until_still(engine)
    asked = engine.host_share.asked[-1]
    assert asked["can_leave"] == 0
    assert asked["need"] == engine.host_table.num_held


def test_an_idle_engine_keeps_what_fits_its_floor_though_segments_are_not_full(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = SharingEngine(tiny_model, monkeypatch, host_blocks=60)
    floor = engine.scheduler._side.host_sizes.floor
    for i in range(12):
        engine.add(f"r{i}", prompt(120, seed=i), 20)
    engine.run_out()
    engine.step()
    engine.drain()
    size = engine.host._layout.segment_blocks
    engine.tier._forget([block for block in list(engine.tier._evictable) if block % 3 == 0])
    in_segments = {block // size for block in engine.tier._evictable}
    engine.idle()
    assert engine.host_table.num_held == min(floor, len(in_segments))


def test_pinned_host_memory_beside_a_broker_is_the_engines_own(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerkv.device import mechanism
    from layerkv.vllm_plugin.elastic_setup import elastic_sizes
    from layerkv.vllm_plugin.setup import engine_config, geometry_request, setup_of
    from tests.vllm.hand_engine import configs

    extra = {"kv_ceiling": "1GiB", "broker": "broker.sock", "zone_tokens": 256}
    config, kv = configs(tiny_model, 40, 4000, extra, {})
    config.device_config.device_type = "cuda"
    config.kv_transfer_config.kv_connector_extra_config["allow_untested_elastic_cuda"] = True
    ours = engine_config(config)
    group = kv.kv_cache_groups[0]
    sizes = elastic_sizes(config, ours, geometry_request(config, ours, group.kv_cache_spec, 6))
    object.__setattr__(group, "kv_cache_spec", replace(group.kv_cache_spec, segments=sizes.plan))
    kv.num_blocks = sizes.geometry.total_blocks
    setup = setup_of(config, ours, kv)
    assert setup is not None
    assert setup.host is None
    made = []
    monkeypatch.setattr(mechanism, "_make_cuda", lambda *args: made.append(args))
    mechanism.make_mechanism("cuda", setup.geometry, setup.host_blocks, setup.segments, host_layout=None)
    assert made
