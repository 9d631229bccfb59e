"""A pool that grows and shrinks under vLLM's real scheduler: nothing is lost, and nobody uses memory that is not there.

The worker's KV is checked (:mod:`tests.vllm.hand_engine`), and so is every block that it touches.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from layerkv.core.segments import SegmentState
from layerkv.scheduler.reasons import Reason
from tests.vllm.engines_in_turn import prompt
from tests.vllm.hand_engine import BLOCK_TOKENS, HandEngine, Step

pytestmark = pytest.mark.vllm

BLOCK_BYTES = 6 * 2 * 16 * 2 * 64 * 4
FLOOR, CEILING = 4, 12  # segments of 5 or 6 blocks
WAYS = pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])


KV_BYTES = "layerkv_kv_bytes"


class FakeShare:
    """What a broker would allow, by hand; and what it was told."""

    def __init__(self, limit: int, held: int) -> None:
        self.allowed, self.held = limit, held
        self.asked: list[dict[str, Any]] = []
        self.failed = 0

    def limit(self) -> int:
        return self.allowed

    def try_hold(self, num_segments: int) -> bool:
        if num_segments > max(self.held, self.allowed):
            return False
        self.held = num_segments
        return True

    def ask(self, **asked: Any) -> None:
        self.asked.append(asked)

    def could_not_get(self, num_segments: int) -> None:
        self.failed += num_segments

    def close(self) -> None:
        """Nothing to do."""


class ElasticEngine(HandEngine):
    """A hand engine whose pool has segments, and a share that the test changes. Books are checked after every step.

    With ``maps``, workers map memory and answer, as on CUDA; otherwise it comes by the first touch.
    """

    def __init__(
        self, model: Path, monkeypatch: pytest.MonkeyPatch, *, extra: Any = None, maps: bool = False, **engine: Any
    ) -> None:
        from layerkv.vllm_plugin import elastic_setup

        small = partial(elastic_setup.layout_for_blocks, most_segments=CEILING)
        monkeypatch.setattr(elastic_setup, "layout_for_blocks", small)
        if maps:
            plan = elastic_setup.SegmentPlan
            monkeypatch.setattr(
                elastic_setup, "SegmentPlan", lambda layout, num_mapped, by_touch: plan(layout, num_mapped)
            )
        sizes = {"kv_floor": f"{36 * BLOCK_BYTES}B", "kv_ceiling": f"{84 * BLOCK_BYTES}B", "zone_tokens": 256}
        super().__init__(model, extra_config={**sizes, **(extra or {})}, **engine)
        self.elastic: Any = self.scheduler._elastic
        self.table, self.queue = self.elastic._table, self.elastic._queue
        self._num_cheaper = 0
        self.vacated: Counter[str] = Counter()
        """Requests that left memory which the pool gave back, by what became of them."""
        self.share = FakeShare(self.table._states.__len__(), self.table.num_held)
        self.elastic._share = self.share
        self.slept: list[float] = []
        its_thread, really_sleep = threading.get_ident(), time.sleep

        def sleep(seconds: float) -> None:  # `time` is everybody's: threads of others in this process sleep for real
            if threading.get_ident() == its_thread:
                self.slept.append(seconds)
            else:
                really_sleep(seconds)

        monkeypatch.setattr("layerkv.vllm_plugin.elasticity.time.sleep", sleep)

    @property
    def lost(self) -> int:
        """Requests that gave their KV up though nobody decided that it is cheaper to compute it again."""
        return self.ledger.counters.recomputes - self._num_cheaper

    def _decide(self, *args: Any, **kwargs: Any) -> Any:
        snapshot, decision = super()._decide(*args, **kwargs)
        reasons = [decision.reasons[request_id] for request_id in decision.recompute]
        self._num_cheaper += reasons.count(Reason.RECOMPUTE_CHEAPER)
        self.vacated["recompute"] += reasons.count(Reason.SEGMENT_LEAVES)
        self.vacated["park"] += [decision.reasons[r] for r in decision.park].count(Reason.SEGMENT_LEAVES)
        return snapshot, decision

    def schedule(self) -> Step:
        step = super().schedule()
        if self.table.is_moving:
            told = step.scheduled.kv_connector_metadata.plan.num_tokens
            assert told == step.scheduled.total_num_scheduled_tokens, "a step with tokens waits for nothing"
        return step

    def process(self) -> dict[str, list[int]]:
        delivered = super().process()
        self.elastic.check()
        assert self.share.held == self.table.num_held
        num_mapped = int(self.worker.mapped[: self.ledger.geometry.pool_blocks].sum())
        assert num_mapped <= self.table.num_held * self.queue.layout.segment_blocks
        return delivered

    def idle(self, seconds: float = 3.0) -> None:
        """Nobody comes; the engine steps as long as it asks for that."""
        until_s = self._now_s + seconds
        while self._now_s < until_s and self.scheduler.has_requests():
            self.step()


@pytest.fixture
def engine(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> ElasticEngine:
    return ElasticEngine(tiny_model, monkeypatch)


def test_it_starts_at_its_floor_and_grows_for_who_waits(engine: ElasticEngine) -> None:
    num_floor = engine.table.num_held
    assert num_floor < engine.queue.layout.num_segments
    for i in range(8):
        engine.add(f"r{i}", prompt(120, seed=i), 40)
    for _ in range(30):
        engine.step()
    assert engine.table.num_held > num_floor
    side = engine.scheduler._side
    told = {key[1]: value / side.sizes.segment_bytes for key, value in side._gauges().items() if key[0] == KV_BYTES}
    needed = engine.share.asked[-1]["need"]
    assert told == {"held": engine.table.num_held, "need": needed, "limit": engine.share.allowed}
    engine.run()
    assert engine.lost == 0


def test_the_broker_hears_in_the_same_step_of_who_comes_and_may_not_grow_yet(engine: ElasticEngine) -> None:
    """Its limit is what it holds, so that nothing could grow: it would say so only at its next look."""
    engine.share.allowed = engine.table.num_held
    engine.step()
    for i in range(3):
        engine.add(f"r{i}", prompt(200, seed=i), 40)
        needed = engine.share.asked[-1]["need"]
        engine.step()
        assert engine.share.asked[-1]["need"] > needed
        assert engine.share.asked[-1]["like"] > max(engine.share.asked[-1]["need"], engine.table.num_held), "and ahead"
    engine.share.allowed = engine.queue.layout.num_segments
    engine.run()


@WAYS
def test_a_lowered_limit_parks_who_is_in_the_way_and_loses_nothing(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    engine = ElasticEngine(tiny_model, monkeypatch, ahead=ahead)
    for i in range(8):
        engine.add(f"r{i}", prompt(100, seed=i), 60)
    for _ in range(40):
        engine.step()
    assert engine.table.num_held > FLOOR
    parks = engine.ledger.counters.parks
    engine.share.allowed = 3
    for _ in range(40):
        engine.step()
    assert engine.table.num_held == 3
    assert engine.ledger.counters.parks > parks
    engine.share.allowed = engine.queue.layout.num_segments
    engine.run()
    assert engine.lost == 0


@WAYS
@pytest.mark.parametrize("give", ["park", "wait", "recompute"])
def test_however_memory_is_given_tokens_are_right_and_every_block_comes_back(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, give: str, ahead: bool
) -> None:
    engine = ElasticEngine(tiny_model, monkeypatch, ahead=ahead, extra={"compare": {"give": give}})
    for i in range(8):
        engine.add(f"r{i}", prompt(100, seed=i), 60)
    for _ in range(40):
        engine.step()
    num_lost = engine.lost
    engine.share.allowed = 3
    for _ in range(6):
        engine.step()
    assert (engine.table.num_held > 3) is (give == "wait"), "who waits goes on where it is"
    num_left = engine.vacated.pop(give, 0)
    assert (num_left > 0) is (give != "wait")
    assert not +engine.vacated, "nobody left in another way"
    assert engine.lost - num_lost == (num_left if give == "recompute" else 0)
    while engine.scheduler.requests:
        engine.step()
    engine.drain()
    for _ in range(3):
        engine.step()
    assert engine.table.num_held <= 3, "the last one has left"
    engine.share.allowed = engine.queue.layout.num_segments
    engine.run()


@WAYS
def test_idle_it_gives_back_all_but_one_segment_says_so_and_falls_silent(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    engine = ElasticEngine(tiny_model, monkeypatch, ahead=ahead)
    for i in range(4):
        engine.add(f"r{i}", prompt(120, seed=i), 20)
    while engine.scheduler.requests:
        engine.step()
    engine.drain()
    assert engine.share.asked[-1]["has_requests"]
    engine.idle(1.5)
    assert engine.table.num_held > 1, "it waits to be idle"
    assert not engine.share.asked[-1]["has_requests"], "the broker may take at once what others need"
    engine.idle()
    assert not engine.scheduler.has_requests()
    assert engine.share.held == 1
    asked = engine.share.asked[-1]
    assert (asked["need"], asked["like"], asked["can_leave"]) == (1, 1, 0)
    engine.add("next", prompt(200, seed=9), 8)
    while engine.scheduler.requests:
        engine.step()
    assert engine.share.held > 1, "the next request grows it again"
    assert engine.lost == 0


@WAYS
def test_a_pause_ends_though_somebody_is_in_the_way(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    from vllm.v1.core.sched.interface import PauseState

    engine = ElasticEngine(tiny_model, monkeypatch, ahead=ahead)
    for i in range(8):
        engine.add(f"r{i}", prompt(100, seed=i), 60)
    for _ in range(20):
        engine.step()
    engine.share.allowed = 3
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(20):
        engine.step()
    engine.drain()
    assert any(not engine.queue.is_empty(each) for each in engine.table.all_in(SegmentState.LEAVING))
    assert not engine.scheduler.has_requests()
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    for _ in range(40):
        engine.step()
    assert engine.table.num_held == 3
    engine.share.allowed = engine.queue.layout.num_segments
    engine.run()
    assert engine.lost == 0


@WAYS
def test_a_paused_engine_gives_back_what_nobody_uses_and_says_that_the_rest_stays(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """Once at rest it cannot be woken: a broker that counted on it would wait for ever."""
    from vllm.v1.core.sched.interface import PauseState

    engine = ElasticEngine(tiny_model, monkeypatch, ahead=ahead)
    for i in range(6):
        engine.add(f"r{i}", prompt(100, seed=i), 20 if i else 120)
    while len(engine.scheduler.requests) > 1:
        engine.step()
    num_used = 1 + sum(not engine.queue.is_empty(each) for each in range(1, engine.queue.layout.num_segments))
    assert engine.table.num_held > num_used
    engine.share.allowed = 1
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(100):
        if not engine.scheduler.has_requests():
            break
        engine.step()
    engine.drain()
    assert not engine.scheduler.has_requests()
    assert engine.table.num_held <= num_used + 1, "a step in flight may have taken a block"
    asked = engine.share.asked[-1]
    assert (asked["need"], asked["like"], asked["can_leave"]) == (engine.table.num_held, engine.table.num_held, 0)
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.share.allowed = engine.queue.layout.num_segments
    for _ in range(10):
        engine.step()
    assert engine.share.asked[-1]["can_leave"] > 0, "it goes on, and can park"
    engine.run()
    assert engine.lost == 0


def test_a_pause_that_waits_for_requests_lets_them_have_what_they_need(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.interface import PauseState

    engine = ElasticEngine(tiny_model, monkeypatch)
    engine.share.allowed = 1
    for i in range(3):
        engine.add(f"r{i}", prompt(60, seed=i), 100)
    for _ in range(30):
        engine.step()
    assert engine.table.num_held == 1
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    engine.share.allowed = engine.queue.layout.num_segments
    for _ in range(1000):
        if not engine.scheduler.get_num_unfinished_requests():
            break
        engine.step()
    assert not engine.scheduler.get_num_unfinished_requests()
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()
    assert engine.lost == 0


def test_nobody_who_waits_grows_a_paused_engine(engine: ElasticEngine) -> None:
    from vllm.v1.core.sched.interface import PauseState

    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    num_held = engine.table.num_held
    for i in range(8):
        engine.add(f"r{i}", prompt(120, seed=i), 20)
    for _ in range(20):
        engine.step()
    assert engine.table.num_held == num_held
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()


@WAYS
def test_when_all_are_ended_at_once_it_does_not_wait_to_be_idle(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """As vLLM ends an engine: what keeps it stepping keeps whoever waits for its process."""
    from vllm.v1.request import RequestStatus

    engine = ElasticEngine(tiny_model, monkeypatch, ahead=ahead)
    for i in range(6):
        engine.add(f"r{i}", prompt(120, seed=i), 60)
    for _ in range(20):
        engine.step()
    assert engine.table.num_held > 1
    engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    num_slept, begun_s = len(engine.slept), engine._now_s
    engine.idle()
    assert not engine.scheduler.has_requests()
    assert engine._now_s - begun_s < engine.elastic._idle_after_s / 4
    assert len(engine.slept) == num_slept
    engine.drain()
    assert engine.share.held == 1


def test_between_two_turns_a_session_keeps_its_segments_and_the_engine_sleeps(engine: ElasticEngine) -> None:
    engine.add("session", prompt(150, seed=0), 4, is_session=True)
    while len(engine.tokens["session"]) < 4:
        engine.step()
    engine.idle(1.5)
    assert engine.scheduler.has_requests()
    assert len(engine.slept) > 50, "it waits to be idle"
    engine.idle()
    assert not engine.scheduler.has_requests()
    its = engine.table.all_in(SegmentState.LEAVING)
    assert its
    assert not any(map(engine.queue.is_empty, its))
    assert engine.table.num_held == 1 + len(its)
    assert engine.share.asked[-1]["need"] >= len(its)
    engine.abort("session")
    engine.idle()
    assert not engine.scheduler.has_requests()
    assert engine.share.held == 1


def test_idle_engines_that_step_together_do_not_wait(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ElasticEngine(tiny_model, monkeypatch, data_parallel_size=2)
    engine.idle(1.0)
    assert engine.slept
    assert not any(engine.slept)


def test_steps_with_tokens_do_not_wait_for_a_move(engine: ElasticEngine) -> None:
    engine.add("runs", prompt(20, seed=0), 40)
    for _ in range(5):
        engine.step()
    engine.worker.answer_steps = 4
    engine.share.allowed = FLOOR - 2
    num_under_way = 0
    for _ in range(8):
        engine.step()  # it looks at what workers are told
        num_under_way += engine.table.is_moving
    assert num_under_way > 1
    engine.run()


def looks(engine: ElasticEngine, name: str, num_steps: int) -> int:
    """How often so many steps do that."""
    its, num_looks = getattr(engine.elastic, name), 0

    def counted(*args: Any) -> Any:
        nonlocal num_looks
        num_looks += 1
        return its(*args)

    setattr(engine.elastic, name, counted)
    for _ in range(num_steps):
        engine.step()
    return num_looks


def test_who_waits_but_not_for_blocks_costs_no_look_in_each_step(engine: ElasticEngine) -> None:
    engine.held = {"waits"}
    engine.add("waits", prompt(20, seed=0), 5)
    engine.add("runs", prompt(20, seed=1), 60)
    for _ in range(5):
        engine.step()
    assert engine.table.num_held < engine.share.limit()
    assert looks(engine, "_view", 50) <= 10


def test_who_leaves_costs_no_look_where_all_have_blocks(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ElasticEngine(tiny_model, monkeypatch)
    engine.held = {"waits"}
    engine.add("waits", prompt(20, seed=0), 5)
    for i in range(7):
        engine.add(f"r{i}", prompt(20, seed=i), 12 + 4 * i if i < 6 else 60)
    for _ in range(10):
        engine.step()
    num_running = len(engine.scheduler.running)
    assert engine.table.num_held < engine.share.limit()
    assert looks(engine, "_view", 30) <= 5
    assert num_running - len(engine.scheduler.running) == 6


def test_who_cannot_be_parked_is_not_looked_for_in_each_step(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ElasticEngine(tiny_model, monkeypatch, host_blocks=2)
    for i in range(5):
        engine.add(f"r{i}", prompt(33, seed=i), 40)
    engine.step()
    engine.share.allowed = 1
    for _ in range(4):
        engine.step()
    assert looks(engine, "_blocks_in", 8) <= 3
    assert engine.elastic.vacating
    engine.share.allowed = engine.queue.layout.num_segments
    engine.run()


def test_memory_that_is_not_there_is_told_once_and_tried_again_later(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ElasticEngine(tiny_model, monkeypatch, maps=True)
    engine.worker.fail_maps = True
    for i in range(8):
        engine.add(f"r{i}", prompt(120, seed=i), 100)
    num_floor = engine.table.num_held
    while not engine.share.failed:
        engine.step()
    num_failed = engine.share.failed
    assert num_failed <= CEILING
    engine.worker.fail_maps = False
    for _ in range(20):
        engine.step()
    assert engine.share.held == num_floor, "all ranks have given it back, and for a while nobody asks"
    assert engine.share.failed == num_failed
    for _ in range(120):
        engine.step()
    assert engine.table.num_held > num_floor
    engine.run()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"ahead": True},
        {"enable_prefix_caching": False},
        {"host_blocks": 30},
        {"ahead": True, "fetch_steps": 3, "host_blocks": 60},
        {"maps": True},
        {"maps": True, "ahead": True, "fetch_steps": 3, "host_blocks": 60},
    ],
    ids=lambda how: "-".join(how) or "plain",
)
def test_random_targets_under_random_requests(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], seed: int
) -> None:
    engine = ElasticEngine(tiny_model, monkeypatch, **how)
    num_held = under_random_targets(engine, seed, num_steps=700)
    assert len(num_held) > engine.queue.layout.num_segments // 2
    assert engine.ledger.counters.parks > 20
    if how.get("host_blocks", 200) >= 200:
        assert engine.lost == 0, "host memory had room for all"


@WAYS
@pytest.mark.parametrize("give", ["wait", "recompute"])
def test_random_targets_of_an_engine_to_compare_with(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, give: str, ahead: bool
) -> None:
    engine = ElasticEngine(tiny_model, monkeypatch, ahead=ahead, extra={"compare": {"give": give}})
    under_random_targets(engine, seed=0, num_steps=500)
    assert engine.vacated["park"] == 0
    assert (engine.vacated["recompute"] > 5) is (give == "recompute")
    if give == "recompute":  # who waits may find no block to go on with, and be preempted by vLLM itself
        assert engine.lost == engine.vacated["recompute"]


def under_random_targets(
    engine: ElasticEngine, seed: int, num_steps: int, step: Callable[[random.Random], None] | None = None
) -> set[int]:
    """Requests come and are aborted, the limit changes and memory fails, until all is over; what was ever held.

    ``step`` is called in the place of the engine's.
    """
    chance = random.Random(seed)
    num_segments, num_held = engine.queue.layout.num_segments, set[int]()
    shared = prompt(70, seed=99)
    for i in range(num_steps):
        if len(engine.scheduler.requests) < 9 and chance.random() < 0.3:
            begin = shared if chance.random() < 0.4 else []
            tokens = begin + prompt(chance.randint(1, 130), seed=1000 * seed + i)
            engine.add(f"r{i}", tokens, chance.randint(1, 50))
        if engine.scheduler.requests and chance.random() < 0.02:
            engine.abort(chance.choice(sorted(engine.scheduler.requests)))
        if chance.random() < 0.2:
            engine.share.allowed = chance.randint(1, num_segments)
        if chance.random() < 0.01:
            engine.idle()
        engine.worker.answer_steps = chance.randint(1, 4)
        engine.worker.fail_maps = chance.random() < 0.05
        engine.step() if step is None else step(chance)
        num_held.add(engine.table.num_held)
    engine.worker.fail_maps = False
    engine.share.allowed = num_segments
    engine.run(3000)
    return num_held


def test_memory_that_comes_by_the_first_touch_is_used_in_the_step_that_it_comes_in(engine: ElasticEngine) -> None:
    num_floor, most = engine.table.num_held, engine.queue.layout.num_segments
    while engine.table.num_held > 1:
        engine.share.allowed = 1
        engine.add("idle", prompt(5, seed=0), 1)
        engine.run()
    engine.share.allowed = most
    engine.add("r", prompt(120, seed=1), 8)
    plan = engine.schedule().scheduled.kv_connector_metadata.plan
    assert plan.num_tokens == 120
    assert plan.moves.maps
    assert 1 + len(plan.moves.maps) == engine.table.num_held < num_floor
    engine.run()


def test_a_prompt_in_the_zone_keeps_no_segment_that_nobody_uses(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no block of the pool, however long it is under way."""
    engine = ElasticEngine(tiny_model, monkeypatch, max_num_batched_tokens=16)
    num_blocks = engine.queue.layout.segment_blocks - 1  # beside the null block
    engine.share.allowed = 2
    engine.add("fills", prompt(BLOCK_TOKENS * (num_blocks - 1) + 1, seed=0), 15)
    while not engine.tokens["fills"]:
        engine.step()
    engine.add("zone", prompt(100, seed=1), 2)
    engine.force(layered=["zone"])
    engine.step()
    assert engine.table.num_held == 2
    assert engine.queue.num_free_blocks == engine.queue.layout.segment_blocks, "one is full, and one is empty"
    engine.share.allowed = 1
    engine.step()
    assert {each.request_id for each in engine.scheduler._inflight_prefills} == engine.ledger.layered_ids == {"zone"}
    engine.step()
    assert engine.table.num_held == 1
    engine.share.allowed = 2
    engine.run()
    assert engine.lost == 0
