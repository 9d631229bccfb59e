"""Requests longer than the pool that take turns in the zone, on vLLM's real scheduler: every token right, whatever
happens to one while it is away, on its way back, or just there again.

Each with one step in flight and with two, where a step is scheduled before the last one's output is processed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from layerkv.core.residency import Residency
from layerkv.scheduler.reasons import Reason
from tests.vllm.hand_engine import BLOCK_TOKENS, ZONE_BLOCKS, HandEngine, Step

pytestmark = pytest.mark.vllm

POOL_BLOCKS = 8
LONG = 10 * BLOCK_TOKENS
"""A prompt that the pool does not hold; the zone holds one such request at a time."""
RETURN = (Residency.PARKED.value, Residency.LAYERED.value)


class Turns(HandEngine):
    """Remembers who came back to the zone, by id as often as that was."""

    def __init__(self, model: Path, *, ahead: bool, **more: Any) -> None:
        super().__init__(model, ahead=ahead, pool_blocks=POOL_BLOCKS, extra_config={"long_contexts": True}, **more)
        self.came_back: list[str] = []
        self.ledger.residency.listener = self._moved

    def _moved(self, name: str, old: str, new: str) -> None:
        if (old, new) == RETURN:
            self.came_back.append(name)

    def give_way(self, *names: str) -> None:
        """Park these, and let nobody come back who is held."""
        self.held.update(names)
        self.force(park=names)
        self.step()


def tokens(seed: int, num_tokens: int = LONG) -> list[int]:
    choose = random.Random(seed)
    return [choose.randrange(400) for _ in range(num_tokens)]


def away(model: Path, *, ahead: bool, max_tokens: int = 30) -> Turns:
    """An engine whose request `long` has made some tokens in the zone, and has left it, with nothing under way."""
    engine = Turns(model, ahead=ahead)
    engine.add("long", tokens(1), max_tokens)
    while len(engine.tokens["long"]) < 3:
        engine.step()
    engine.give_way("long")
    engine.drain()
    assert engine.residency("long") is Residency.PARKED
    assert engine.ledger.zone.num_available == ZONE_BLOCKS
    assert engine.scheduler.requests["long"].num_computed_tokens == 0
    engine.check_kept_kv()
    return engine


def back(engine: Turns) -> Step:
    """Schedule the step in which `long` is in the zone again."""
    engine.held.clear()
    step = engine.schedule()
    assert engine.residency("long") is Residency.LAYERED
    assert step.request_ids == {"long"}
    assert step.scheduled.num_scheduled_tokens == {"long": 1}, "nothing is computed a second time"
    return step


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def ahead(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_who_comes_back_goes_on_where_it_left(tiny_model: Path, ahead: bool) -> None:
    engine = away(tiny_model, ahead=ahead)
    step = back(engine)
    plan = step.scheduled.kv_connector_metadata.plan
    assert plan.zone_hits, "layers with a lane for themselves load it too"
    assert not plan.loads
    engine.run()
    assert engine.came_back == ["long"]
    assert engine.ledger.counters.recomputes == engine.ledger.counters.fetches == 0


def test_prompts_get_the_zone_in_the_place_of_who_decodes_there(tiny_model: Path, ahead: bool) -> None:
    engine = Turns(tiny_model, ahead=ahead)
    lengths = (LONG, 40, LONG + 20, 100, LONG, 100)
    for i, num_tokens in enumerate(lengths):
        engine.add(f"r{i}", tokens(i, num_tokens), max_tokens=30)
    firsts: list[str] = []
    while len(firsts) < len(lengths):
        engine.step()
        firsts += [name for name, made in engine.tokens.items() if made and name not in firsts]
        assert all(len(made) < 30 for made in engine.tokens.values()), f"nobody ends before {lengths} have all begun"
    engine.run()
    assert {"r0", "r2"} <= set(engine.came_back)
    assert engine.ledger.counters.recomputes == 0


def test_one_hangs_up_while_it_is_away(tiny_model: Path, ahead: bool) -> None:
    engine = away(tiny_model, ahead=ahead)
    engine.abort("long")
    assert engine.ledger.num_host_blocks_used == 0, "the room of its tokens to come too"
    engine.run()


def test_one_hangs_up_in_its_first_step_back(tiny_model: Path, ahead: bool) -> None:
    engine = away(tiny_model, ahead=ahead)
    back(engine)
    engine.abort("long")
    engine.add("other", tokens(2), max_tokens=5)
    engine.run()


def test_what_one_that_left_had_is_found_by_a_prompt_that_begins_alike(tiny_model: Path, ahead: bool) -> None:
    engine = away(tiny_model, ahead=ahead)
    engine.abort("long")
    engine.add("alike", [*tokens(1)[: 5 * BLOCK_TOKENS], 3], max_tokens=5)
    engine.run()
    assert engine.ledger.counters.prefix_hit_blocks == 5


def test_all_start_over_after_a_reset_while_one_is_away(tiny_model: Path, ahead: bool) -> None:
    engine = away(tiny_model, ahead=ahead)
    assert engine.reset_prefix_cache(reset_running_requests=True)
    assert engine.residency("long") is Residency.WAITING
    engine.held.clear()
    engine.run()
    assert engine.ledger.counters.recomputes == 1


def test_the_prefix_cache_is_not_reset_under_one_that_is_away(tiny_model: Path, ahead: bool) -> None:
    engine = away(tiny_model, ahead=ahead)
    assert not engine.reset_prefix_cache()
    engine.held.clear()
    engine.run()
    assert engine.ledger.counters.recomputes == 0


def test_one_is_preempted_just_when_it_is_back(tiny_model: Path, ahead: bool) -> None:
    engine = away(tiny_model, ahead=ahead)
    back(engine)
    engine.force(recompute=["long"])
    engine.run()
    assert engine.ledger.counters.recomputes == 1


def test_one_leaves_again_just_when_it_is_back(tiny_model: Path, ahead: bool) -> None:
    engine = away(tiny_model, ahead=ahead)
    back(engine)
    engine.give_way("long")
    engine.drain()
    engine.check_kept_kv()
    engine.held.clear()
    engine.run()
    assert engine.came_back == ["long", "long"]


def test_its_kv_cannot_be_loaded_when_it_is_back(tiny_model: Path, ahead: bool) -> None:
    engine = away(tiny_model, ahead=ahead)
    engine.fail_zone_hits = True
    back(engine)
    if ahead:
        engine.schedule()
    assert not engine.process(), "nothing is delivered that was computed from KV that was not there"
    assert engine.residency("long") in (Residency.WAITING, None)
    engine.run()
    assert engine.ledger.counters.recomputes == 1


@pytest.mark.parametrize("is_back", [False, True])
def test_the_store_of_its_last_step_fails_and_that_is_known_when_it_has_left(
    tiny_model: Path, ahead: bool, is_back: bool
) -> None:
    """Its newest token is right, and delivered; what it left in host memory is not, and is never read."""
    from vllm.v1.outputs import KVConnectorOutput

    from layerkv.vllm_plugin.failed_copies import FailedCopies

    engine = away(tiny_model, ahead=ahead)
    num_tokens = engine.ledger.parked_tokens("long")
    lost = engine.ledger.host_blocks_of("long")[(num_tokens - 1) // BLOCK_TOKENS]
    engine.worker.host[lost] = -1
    engine.add("other", tokens(2, 20), max_tokens=10)
    if is_back:
        engine.held.clear()
        engine.fail_zone_hits = True  # the load comes after the store, and fails with it
    step = engine.schedule()
    received = step.output.kv_connector_output or KVConnectorOutput()
    unloaded = getattr(received.kv_connector_worker_meta, "unloaded", frozenset())
    received.kv_connector_worker_meta = FailedCopies(unstored=frozenset({lost}), unloaded=unloaded)
    step.output.kv_connector_output = received
    engine.drain()
    engine.held.clear()
    engine.run()
    assert engine.ledger.counters.recomputes == 1


def test_a_pause_waits_for_one_that_is_away(tiny_model: Path, ahead: bool) -> None:
    from vllm.v1.core.sched.interface import PauseState

    engine = away(tiny_model, ahead=ahead)
    engine.held.clear()
    scheduler = engine.scheduler
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    assert scheduler.pause_state is PauseState.PAUSED_NEW
    engine.add("new", tokens(2, 20), max_tokens=3)
    for _ in range(100):
        if not scheduler.get_num_unfinished_requests():
            break
        engine.step()
    assert len(engine.tokens["long"]) == 30
    assert not engine.tokens["new"]
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert scheduler.pause_state is PauseState.UNPAUSED
    engine.run()


def test_who_is_decided_to_come_back_and_is_declined_stays_away(tiny_model: Path, ahead: bool) -> None:
    """vLLM's scan stops before it: what was reserved is free again, and it has computed nothing by vLLM's books."""
    engine = away(tiny_model, ahead=ahead)
    engine.held.clear()
    scheduler = engine.scheduler
    most, scheduler.max_num_active_reqs = scheduler.max_num_active_reqs, 0
    state = scheduler._reader.state
    scheduler._reader.state = lambda: state()._replace(free_slots=1)
    engine.schedule()
    assert engine.residency("long") is Residency.PARKED
    assert engine.ledger.zone.num_available == ZONE_BLOCKS
    assert scheduler.requests["long"].num_computed_tokens == 0
    scheduler.max_num_active_reqs, scheduler._reader.state = most, state
    engine.run()
    assert engine.came_back == ["long"]


def test_who_is_skipped_by_vllm_stands_where_it_stood(tiny_model: Path, ahead: bool) -> None:
    """As when another takes the last place for an adapter in that very step. vLLM puts whoever it skips, and says that
    it has computed tokens, among those that hold KV."""
    engine = away(tiny_model, ahead=ahead)
    handle = engine.scheduler._handle_blocked_waiting_request
    engine.scheduler._handle_blocked_waiting_request = lambda _: False
    engine.held.clear()
    assert not engine.schedule().request_ids
    engine.scheduler._handle_blocked_waiting_request = handle
    engine.drain()
    assert not engine.scheduler.kv_holding_waiting
    assert engine.residency("long") is Residency.PARKED
    assert engine.ledger.zone.num_available == ZONE_BLOCKS
    engine.run()
    assert engine.came_back == ["long"]


def test_two_with_room_in_host_memory_for_one_are_served_one_after_the_other(tiny_model: Path, ahead: bool) -> None:
    engine = Turns(tiny_model, ahead=ahead, host_blocks=20)
    for name in ("a", "b"):
        engine.add(name, tokens(ord(name)), max_tokens=30)
    engine.run()
    assert engine.ledger.counters.recomputes == 0


def test_a_policy_without_turns_brings_back_who_was_away_when_it_came(tiny_model: Path, ahead: bool) -> None:
    engine = away(tiny_model, ahead=ahead)
    mean = msgspec.structs.replace(engine.scheduler._controller.policy, policy="slo")
    engine.scheduler._policy_source = SimpleNamespace(policy=mean)
    engine.held.clear()
    engine.run()
    assert engine.came_back == ["long"]


def test_the_tokens_of_any_mix_are_right_whatever_happens_to_it(tiny_model: Path, ahead: bool) -> None:
    """Requests come, hang up, are parked, preempted and fail to load at random."""
    num_returns = 0
    for seed in range(12):
        rng = random.Random(seed)
        engine = Turns(tiny_model, ahead=ahead, host_blocks=rng.choice([20, 60, 200]))
        names: list[str] = []
        for _ in range(120):
            if rng.random() < 0.08 and len(names) < 8:
                name = f"r{len(names)}"
                engine.add(name, tokens(rng.randrange(4), rng.choice([20, 90, LONG, LONG + 30])), rng.randrange(1, 40))
                names.append(name)
            _trouble(engine, rng, names)
            engine.fail_zone_hits = rng.random() < 0.1
            engine.schedule()
            if len(engine.in_flight) >= (2 if ahead else 1):
                engine.process()
        engine.run(most_steps=2_000)
        num_returns += len(engine.came_back)
    assert num_returns > 20


def _trouble(engine: Turns, rng: random.Random, names: Sequence[str]) -> None:
    running = [request.request_id for request in engine.scheduler.running if not request.is_prefill_chunk]
    in_zone = [name for name in running if engine.residency(name) is Residency.LAYERED]
    if in_zone and rng.random() < 0.1:
        engine.force(**{rng.choice(["park", "park", "recompute"]): [rng.choice(in_zone)]})
    if names and rng.random() < 0.02:
        engine.abort(rng.choice(names))


def test_the_decision_says_whose_turn_it_is_and_whose_is_over(tiny_model: Path, ahead: bool) -> None:
    engine = Turns(tiny_model, ahead=ahead)
    said: set[Reason] = set()
    decides = engine.scheduler._controller.decide

    def listen(*args: Any, **kwargs: Any) -> Any:
        snapshot, decision = decides(*args, **kwargs)
        said.update(decision.reasons.values())
        return snapshot, decision

    engine.scheduler._controller.decide = listen
    for i in range(2):
        engine.add(f"r{i}", tokens(i), max_tokens=30)
    engine.run()
    assert {Reason.ZONE_TURN, Reason.ZONE_TURN_OVER} <= said
