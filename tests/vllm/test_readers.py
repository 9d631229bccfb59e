"""What `/metrics` says of readers, on vLLM's own scheduler: hung-up clients, parks, clocks that jump."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from layerkv.metrics import merge_payloads
from layerkv.scheduler.decision_log import read_log
from layerkv.scheduler.reasons import Event, Reason
from tests.vllm.hand_engine import HandEngine

pytestmark = pytest.mark.vllm

AHEAD = pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])


class Reported:
    """All that an engine has reported, as a front end adds it up."""

    def __init__(self, engine: HandEngine) -> None:
        self._side = engine.scheduler.connector.scheduler_side
        self._take, self._all = self._side.take_metrics, dict[str, Any]()
        self._side.take_metrics = self._keep

    def _keep(self) -> Any:
        payload = self._take()
        self._all = merge_payloads(self._all, payload or {})
        return payload

    def counters(self) -> Counter[str]:
        kinds = ("tokens_on_time", "tokens_late", "fluid_requests", "not_fluid_requests")
        found = self._all.get("counters", {})
        return Counter({kind: found[key] for kind in kinds if (key := f"layerkv_{kind}|default") in found})

    def gauges(self, name: str) -> dict[str, float]:
        """By their label."""
        found = (key.partition("|") for key in self._all.get("gauges", {}))
        return {label: self._all["gauges"][f"{each}|{label}"] for each, _, label in found if each == name}

    def pauses_s(self) -> list[float]:
        found: list[float] = self._all.get("histograms", {}).get("layerkv_longest_pause_seconds|default", [])
        return found


@AHEAD
def test_every_token_and_every_request_is_told_by_the_step_that_ends_it(tiny_model: Path, ahead: bool) -> None:
    engine = HandEngine(tiny_model, ahead=ahead)
    reported = Reported(engine)
    for index in range(3):
        engine.add(f"r{index}", [index, *range(20)], max_tokens=1 + 4 * index)
    engine.run()
    assert reported.counters() == Counter(tokens_on_time=1 + 5 + 9, fluid_requests=3)
    assert reported.pauses_s() == [0.0] * 3


@AHEAD
def test_a_client_that_hangs_up_in_mid_stream_is_counted_once_with_the_tokens_it_got(
    tiny_model: Path, ahead: bool
) -> None:
    engine = HandEngine(tiny_model, ahead=ahead)
    reported = Reported(engine)
    engine.add("a", [*range(20)], max_tokens=100)
    while len(engine.tokens["a"]) < 5:
        engine.step()
    engine.abort("a")
    engine.run()
    got = len(engine.tokens["a"])
    assert reported.counters() == Counter(tokens_on_time=got, fluid_requests=1)
    assert reported.pauses_s() == [0.0]


@AHEAD
def test_who_hangs_up_while_parked_has_waited_until_then(tiny_model: Path, tmp_path: Path, ahead: bool) -> None:
    path = tmp_path / "decisions.jsonl"
    engine = HandEngine(tiny_model, ahead=ahead, extra_config={"decision_log": str(path)})
    reported = Reported(engine)
    engine.add("a", [*range(20)], max_tokens=100)
    engine.step()
    engine.force(park=["a"])
    engine.held.add("a")
    for _ in range(3):
        engine.step()
    engine._now_s += 30.0
    engine.abort("a")
    engine.held.clear()
    engine.run()
    assert reported.counters()["not_fluid_requests"] == 1
    [pause_s] = reported.pauses_s()
    assert 29.0 < pause_s < 30.5
    engine.scheduler.shutdown()
    [told] = [entry for entry in read_log(path) if entry.event is Event.READER_WAITED]
    assert (told.reason, told.facts["left"]) == (Reason.MAKES_ROOM, "parked")


@AHEAD
def test_a_reader_waits_for_a_park_and_the_log_says_for_which(tiny_model: Path, tmp_path: Path, ahead: bool) -> None:
    path = tmp_path / "decisions.jsonl"
    engine = HandEngine(tiny_model, ahead=ahead, extra_config={"decision_log": str(path)})
    reported = Reported(engine)
    engine.add("a", [*range(20)], max_tokens=20)
    for _ in range(4):
        engine.step()
    engine.force(park=["a"])
    engine.held.add("a")
    for _ in range(3):
        engine.step()
    engine._now_s += 10.0
    engine.held.clear()
    engine.run()
    assert reported.counters()["not_fluid_requests"] == 1
    assert sum(reported.counters()[kind] for kind in ("tokens_on_time", "tokens_late")) == 20
    engine.scheduler.shutdown()
    entries = list(read_log(path))
    [told] = [entry for entry in entries if entry.event is Event.READER_WAITED]
    assert (told.reason, told.facts["left"]) == (Reason.MAKES_ROOM, "parked")
    assert reported.pauses_s() == [pytest.approx(told.facts["wait_s"])]
    assert entries[-1].facts["longest_pause_s"] == told.facts["wait_s"]


@pytest.mark.parametrize("jump_s", [-7200.0, -5.0, 7200.0])
def test_a_clock_on_the_wall_that_jumps_makes_nobody_late(tiny_model: Path, jump_s: float) -> None:
    """Before the engine has taken the request in, and in mid-stream. An hour and more back was once taken for an hour
    of waiting."""
    engine = HandEngine(tiny_model)
    reported = Reported(engine)
    at_its_time = engine._at_its_time

    def jumped() -> Any:
        now_s = lambda: engine._now_s  # noqa: E731
        return mock.patch.multiple(time, monotonic=now_s, time=lambda: engine._now_s + jump_s)

    engine.add("before", [*range(20)], max_tokens=8)
    engine.step()
    with at_its_time():
        added = _request(engine, "during")
    engine._at_its_time = jumped  # type: ignore[method-assign]
    with jumped():
        engine.scheduler.add_request(added)
    engine.run()
    assert reported.counters() == Counter(tokens_on_time=16, fluid_requests=2)
    assert reported.pauses_s() == [0.0, 0.0]


def _request(engine: HandEngine, name: str) -> Any:
    """A request that a front end has taken in and the engine has not."""
    with mock.patch.object(engine.scheduler, "add_request"):
        engine.add(name, [1, *range(20)])
    return engine.requests[name]


@AHEAD
def test_somebody_who_hangs_up_in_mid_step_costs_no_other_reader_anything(tiny_model: Path, ahead: bool) -> None:
    """The tokens of the steps before, all of them alike, have come and are not noted yet."""
    engine = HandEngine(tiny_model, ahead=ahead)
    reported = Reported(engine)
    for name in ("a", "b", "c"):
        engine.add(name, [ord(name), *range(20)], max_tokens=60)
    for _ in range(30):
        engine.step()
    engine.schedule()
    engine.abort("c")
    engine.process()
    engine.run()
    assert reported.pauses_s() == [0.0] * 3
