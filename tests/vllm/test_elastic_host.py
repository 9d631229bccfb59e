"""Host memory that grows and shrinks under vLLM's real scheduler: nothing parked is lost, and nobody uses host blocks
that are not there.

The engines of `test_elastic.py`, with a share of host memory too; the worker poisons what it gives back.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from layerkv.core.residency import Residency
from layerkv.core.segments import SegmentState
from tests.vllm.engines_in_turn import prompt
from tests.vllm.test_elastic import WAYS, ElasticEngine, FakeShare, under_random_targets

pytestmark = pytest.mark.vllm

HOST_BYTES = "layerkv_host_bytes"


class FakeHostShare:
    """What a broker would allow of host memory, by hand; and what it was told."""

    def __init__(self, limit: int | None) -> None:
        self.allowed, self.held = limit, 1
        self.asked: list[dict[str, Any]] = []

    def limit(self) -> int | None:
        return self.allowed

    def try_hold(self, num_segments: int) -> bool:
        if self.allowed is not None and num_segments > max(self.held, self.allowed):
            return False
        self.held = num_segments
        return True

    def ask(self, **asked: Any) -> None:
        self.asked.append(asked)


class BrokerShare(FakeShare):
    """In the place of the one that waits for a broker."""

    host = FakeHostShare(0)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__(0, 0)


class SharingEngine(ElasticEngine):
    """An elastic engine with a broker: `host_share` is what that says of host memory, which the test changes."""

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch, *, is_divided: bool = True, **engine: Any) -> None:
        monkeypatch.setattr("layerkv.vllm_plugin.elastic_engine.BrokerShare", BrokerShare)
        super().__init__(model, monkeypatch, extra={"broker": "broker.sock"}, **engine)
        self.host: Any = self.elastic.host
        self.host_table, self.tier = self.host._table, self.ledger.host
        self.num_segments = self.host._layout.num_segments
        self.host_share = FakeHostShare(self.num_segments if is_divided else None)
        self.host._share = self.host_share

    def process(self) -> dict[str, list[int]]:
        delivered = super().process()
        table = self.host_table
        assert self.host_share.held == table.num_held
        segment_blocks = self.host._layout.segment_blocks
        assert int(self.worker.host_put.sum()) <= table.num_held * segment_blocks
        return delivered

    @property
    def num_in_service(self) -> int:
        return len(self.host_table.all_in(SegmentState.MAPPED))

    def parked(self) -> list[str]:
        return [r for r in self.ledger.residency if self.residency(r) is Residency.PARKED]

    def run_out(self) -> None:
        """All requests end; the engine is not idle yet."""
        while self.scheduler.requests:
            self.step()
        self.drain()


@pytest.fixture
def engine(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> SharingEngine:
    return SharingEngine(tiny_model, monkeypatch)


def test_it_has_its_floor_from_the_first_step_and_grows_for_who_might_be_parked(engine: SharingEngine) -> None:
    floor = engine.scheduler._side.host_sizes.floor
    assert engine.num_in_service == 1
    engine.add("first", prompt(20, seed=0), 2)
    engine.step()
    assert engine.num_in_service >= floor
    for i in range(8):
        engine.add(f"r{i}", prompt(120, seed=i), 40)
    for _ in range(30):
        engine.step()
    side = engine.scheduler._side
    told = {
        key[1]: value / side.host_sizes.segment_bytes for key, value in side._gauges().items() if key[0] == HOST_BYTES
    }
    asked = engine.host_share.asked[-1]
    assert told == {"held": engine.host_table.num_held, "need": asked["need"], "limit": engine.num_segments}
    num_blocks = sum(-(-request.num_tokens // 16) for request in engine.scheduler.requests.values())
    assert asked["need"] * engine.host._layout.segment_blocks >= num_blocks
    assert engine.host_table.num_held > floor
    assert side._gauges()["layerkv_host_blocks", None] == engine.tier.num_in_service
    engine.run()
    assert engine.lost == 0


@WAYS
def test_cached_prefixes_give_way_to_a_lowered_limit_and_their_memory_is_given_back(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    engine = SharingEngine(tiny_model, monkeypatch, ahead=ahead)
    for i in range(12):
        engine.add(f"r{i}", prompt(120, seed=i), 20)
    engine.run_out()
    engine.step()
    engine.drain()
    assert engine.tier.num_cached > 40
    last = engine.requests["r11"].block_hashes
    assert engine.tier.find(last)
    held = engine.host_table.num_held
    assert held > 4
    engine.host_share.allowed = 3
    for _ in range(15):
        engine.step()
    engine.drain()
    assert engine.host_table.num_held == 3
    assert 0 < engine.tier.num_cached <= 3 * engine.host._layout.segment_blocks
    assert int(engine.worker.host_put.sum()) == 3 * engine.host._layout.segment_blocks
    engine.check_kept_kv()
    engine.add("again", prompt(120, seed=11), 5)
    engine.run()
    assert engine.lost == 0


def test_the_least_recently_used_prefixes_give_way_first(engine: SharingEngine) -> None:
    for i in range(8):
        engine.add(f"r{i}", prompt(100, seed=i), 4)
        engine.run_out()
        engine.step()
        engine.drain()
    engine.host_share.allowed = max(engine.num_in_service // 2, 2)
    for _ in range(15):
        engine.step()
    engine.drain()
    num_found = [len(engine.tier.find(engine.requests[f"r{i}"].block_hashes)) for i in range(8)]
    assert num_found[0] == 6, "they lie in the segment that never leaves"
    assert num_found[3] == 0
    assert num_found[7] > 0
    engine.run()


@WAYS
def test_what_is_parked_stays_until_it_is_fetched_and_what_is_held_falls_with_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    engine = SharingEngine(tiny_model, monkeypatch, ahead=ahead)
    for i in range(6):
        engine.add(f"r{i}", prompt(100, seed=i), 40)
    for _ in range(15):
        engine.step()
    names = [f"r{i}" for i in range(6)]
    engine.held = set(names)
    engine.force(park=names)
    for _ in range(5):
        engine.step()
    assert (parked := engine.parked())
    kept = engine.ledger.num_host_blocks_used
    engine.host_share.allowed = 1
    for _ in range(20):
        engine.step()
    assert engine.parked() == parked
    assert engine.ledger.num_host_blocks_used == kept
    held = engine.host_table.num_held
    size = engine.host._layout.segment_blocks
    assert held * size >= kept
    assert engine.host_table.all_in(SegmentState.LEAVING)
    engine.held = set()
    engine.run()
    assert engine.host_table.num_held == 1
    assert engine.lost == 0


def test_copies_of_residents_give_way_and_nobody_is_computed_again(engine: SharingEngine) -> None:
    names = [f"r{i}" for i in range(4)]
    for i, name in enumerate(names):
        engine.add(name, prompt(100, seed=i), 60)
    while not all(len(engine.tokens[name]) > 2 for name in names):
        engine.step()
    engine.force(store_ahead=names)
    engine.step()
    assert engine.ledger.num_copied_host_blocks > 2 * engine.host._layout.segment_blocks // 2
    engine.host_share.allowed = 1
    for _ in range(12):
        engine.step()
    assert engine.host_table.num_held == 1
    assert engine.ledger.num_copied_host_blocks <= engine.host._layout.segment_blocks
    engine.host_share.allowed = engine.num_segments
    engine.run()
    assert engine.lost == 0


def test_without_room_there_nobody_is_parked_and_pool_memory_is_not_offered(engine: SharingEngine) -> None:
    engine.host_share.allowed = 1
    size = engine.host._layout.segment_blocks
    for i in range(8):
        engine.add(f"r{i}", prompt(100, seed=i), 150)
    for _ in range(40):
        engine.step()
    offered = engine.share.asked[-1]["can_leave"]
    assert engine.tier.num_free <= size
    engine.host_share.allowed = engine.num_segments
    for _ in range(12):
        engine.step()
    assert engine.share.asked[-1]["can_leave"] > offered
    engine.share.allowed, parks = 3, engine.ledger.counters.parks
    for _ in range(60):
        engine.step()
    assert engine.ledger.counters.parks > parks
    assert engine.table.num_held == 3
    engine.share.allowed = engine.queue.layout.num_segments
    engine.run(3000)
    assert engine.lost == 0


@WAYS
def test_idle_it_keeps_prefixes_up_to_its_floor_says_so_and_falls_silent(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    engine = SharingEngine(tiny_model, monkeypatch, ahead=ahead, host_blocks=60)
    floor = engine.scheduler._side.host_sizes.floor
    assert floor > 1
    for i in range(12):
        engine.add(f"r{i}", prompt(120, seed=i), 20)
    engine.run_out()
    engine.idle(1.0)
    assert engine.host_table.num_held > floor, "it waits to be idle"
    engine.idle()
    assert not engine.scheduler.has_requests()
    assert engine.host_share.held == floor
    asked = engine.host_share.asked[-1]
    assert (asked["need"], asked["like"], asked["can_leave"]) == (1, floor, 0)
    assert 0 < engine.tier.num_cached <= floor * engine.host._layout.segment_blocks
    engine.drain()
    engine.check_kept_kv()
    engine.add("next", prompt(200, seed=3), 8)
    engine.run()
    assert engine.lost == 0


def test_idle_with_nothing_cached_it_keeps_one_segment(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SharingEngine(tiny_model, monkeypatch, host_blocks=60, enable_prefix_caching=False)
    for i in range(6):
        engine.add(f"r{i}", prompt(120, seed=i), 20)
    engine.run_out()
    engine.idle()
    assert not engine.scheduler.has_requests()
    assert engine.host_share.held == 1


def test_where_nobody_divides_host_memory_all_of_it_is_there_and_stays(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = SharingEngine(tiny_model, monkeypatch, is_divided=False)
    engine.add("first", prompt(120, seed=0), 20)
    engine.step()
    assert engine.tier.num_in_service == engine.tier.count
    engine.run_out()
    engine.idle()
    assert not engine.scheduler.has_requests()
    assert engine.tier.num_in_service == engine.tier.count
    assert engine.tier.num_cached > 0
    engine.host_share.allowed = 2  # a broker that divides it has come
    engine.add("next", prompt(20, seed=1), 20)
    engine.run()
    assert engine.host_table.num_held <= 2


def test_a_pause_ends_though_host_memory_is_owed(engine: SharingEngine) -> None:
    from vllm.v1.core.sched.interface import PauseState

    for i in range(6):
        engine.add(f"r{i}", prompt(100, seed=i), 60)
    for _ in range(20):
        engine.step()
    engine.held = {f"r{i}" for i in range(6)}
    engine.force(park=engine.held)
    for _ in range(3):
        engine.step()
    engine.host_share.allowed = 1
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(20):
        engine.step()
    assert not engine.scheduler.has_requests()
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.held = set()
    engine.host_share.allowed = engine.num_segments
    engine.run()
    assert engine.lost == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"ahead": True},
        {"enable_prefix_caching": False},
        {"host_blocks": 60},
        {"ahead": True, "fetch_steps": 3, "host_blocks": 60},
        {"maps": True},
        {"maps": True, "ahead": True, "fetch_steps": 3, "host_blocks": 60},
    ],
    ids=lambda how: "-".join(how) or "plain",
)
def test_random_limits_of_both_memories_under_random_requests(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], seed: int
) -> None:
    engine = SharingEngine(tiny_model, monkeypatch, **how)
    num_held, num_released = set[int](), 0

    def step(chance: random.Random) -> None:
        nonlocal num_released
        if chance.random() < 0.1:
            engine.host_share.allowed = None if chance.random() < 0.1 else chance.randint(1, engine.num_segments)
        parked = {r: len(engine.ledger.host_blocks_of(r)) for r in engine.parked()}
        engine.step()
        for request_id in set(parked) & set(engine.parked()):
            assert len(engine.ledger.host_blocks_of(request_id)) == parked[request_id], "nothing parked is lost"
        num_held.add(engine.host_table.num_held)
        num_released += len(engine.host_table.all_in(SegmentState.RELEASING))

    under_random_targets(engine, seed, num_steps=700, step=step)
    assert len(num_held) > engine.num_segments // 2
    assert num_released > 20
    assert engine.ledger.counters.parks > 20
