"""Loads that fail, on vLLM's real scheduler: nobody is answered from KV that was not there, now or later.

Each with one step in flight and with two, where a step is scheduled before it is known that the last one failed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from layerkv.core.residency import Residency
from tests.vllm.hand_engine import BLOCK_TOKENS, HandEngine

pytestmark = pytest.mark.vllm

PREFIX = [11 * i % 400 for i in range(4 * BLOCK_TOKENS)]


def with_host_prefix(
    model: Path, *, ahead: bool, others: Iterable[tuple[str, list[int]]] = (), **more: Any
) -> HandEngine:
    """An engine that has PREFIX in host memory only; requests named in `others` are parked and held."""
    engine = HandEngine(model, ahead=ahead, **more)
    engine.add("first", [*PREFIX, 1])
    engine.run()
    for name, prompt in others:
        engine.add(name, prompt, max_tokens=30)
        while len(engine.tokens[name]) < 2:
            engine.step()
        engine.held.add(name)
        engine.force(park=[name])
        engine.step()
        engine.drain()
        assert engine.residency(name) is Residency.PARKED
    engine.forget_on_device()
    return engine


def fail_load_of(engine: HandEngine, *names: str) -> None:
    """Schedule a step in which the first one's cached prefix cannot be loaded; the others share its blocks."""
    engine.fail_hits = True
    before = engine.ledger.counters.prefix_hit_blocks
    step = engine.schedule()
    assert engine.ledger.counters.prefix_hit_blocks == before + len(PREFIX) // BLOCK_TOKENS
    assert step.request_ids == set(names)


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def ahead(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_a_prefix_that_cannot_be_loaded_is_computed_instead(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("loads", [*PREFIX, 2, 3])
    engine.add("shares", [*PREFIX, 4, 5])
    fail_load_of(engine, "loads", "shares")
    if ahead:
        engine.schedule()
    assert not engine.process(), "what the step delivered was computed from KV that was not there"
    engine.run()


def test_a_last_token_computed_from_a_failed_load_is_not_delivered(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("loads", [*PREFIX, 2, 3], max_tokens=1)
    fail_load_of(engine, "loads")
    assert not engine.process()
    engine.run()
    assert len(engine.tokens["loads"]) == 1


@pytest.mark.parametrize("move", ["park", "recompute"])
def test_who_leaves_the_device_before_the_failure_is_known_starts_over(tiny_model: Path, move: str) -> None:
    """It shares the failed blocks through vLLM's prefix cache, and the step scheduled ahead takes it off the device."""
    engine = with_host_prefix(tiny_model, ahead=True)
    engine.add("loads", [*PREFIX, 2, 3])
    engine.add("shares", [*PREFIX, 4, 5])
    fail_load_of(engine, "loads", "shares")
    engine.force(**{move: ["shares"]})
    engine.schedule()
    assert not engine.process()
    assert engine.residency("shares") is Residency.WAITING
    engine.run()


def test_who_leaves_the_lane_zone_before_the_failure_is_known_starts_over(tiny_model: Path) -> None:
    """Its prompt begins with the failed blocks, in the pool; what it computed from them is in host memory."""
    engine = with_host_prefix(tiny_model, ahead=True)
    engine.add("loads", [*PREFIX, 2, 3])
    engine.add("shares", [*PREFIX, *range(40)])
    engine.force(layered=["shares"])
    fail_load_of(engine, "loads", "shares")
    assert engine.residency("shares") is Residency.LAYERED
    engine.force(park=["shares"])
    engine.schedule()
    assert engine.residency("shares") is Residency.PARKED
    assert not engine.process()
    assert engine.residency("shares") is Residency.WAITING
    engine.run()


def test_what_an_aborted_request_computed_from_a_failed_load_is_not_found_again(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("loads", [*PREFIX, *range(40)])
    fail_load_of(engine, "loads")
    engine.abort("loads")
    engine.process()
    engine.check_kept_kv()
    engine.add("later", [*PREFIX, *range(40), 7])
    engine.run()


def test_a_newcomer_that_found_blocks_of_an_aborted_one_starts_over(tiny_model: Path) -> None:
    """Nobody runs any more whose load failed, but what it left in vLLM's prefix cache is found."""
    engine = with_host_prefix(tiny_model, ahead=True)
    engine.add("loads", [*PREFIX, *range(40)])
    fail_load_of(engine, "loads")
    engine.abort("loads")
    engine.add("newcomer", [*PREFIX, *range(40), 7])
    engine.schedule()
    engine.process()
    engine.check_kept_kv()
    engine.run()


def test_an_aborted_sharer_leaves_nothing_either(tiny_model: Path, ahead: bool) -> None:
    """What it computed after the shared blocks is in no other request's block table."""
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("loads", [*PREFIX, 2, 3])
    engine.add("shares", [*PREFIX, *range(40)])
    fail_load_of(engine, "loads", "shares")
    if ahead:
        engine.schedule()
    engine.abort("shares")
    engine.process()
    engine.check_kept_kv()
    engine.add("later", [*PREFIX, *range(40), 7])
    engine.run()


def test_a_fetch_into_blocks_beside_failed_ones_is_given_up(tiny_model: Path, ahead: bool) -> None:
    """A parked request comes back, and finds the beginning of its prompt on the device: the failed blocks."""
    parked = [(name, [*PREFIX, *range(20), seed]) for seed, name in enumerate(("one", "two"))]
    engine = with_host_prefix(tiny_model, ahead=ahead, others=parked, fetch_steps=3)
    engine.add("loads", [*PREFIX, 2, 3])
    engine.held.clear()
    engine.held |= {"one", "two"} if ahead else set()
    fail_load_of(engine, "loads")
    if ahead:
        engine.held.clear()
        engine.schedule()
    assert engine.residency("one") is engine.residency("two") is Residency.FETCHING
    engine.process()
    engine.run()


def test_a_fetch_beside_what_was_computed_from_failed_blocks_is_given_up(tiny_model: Path) -> None:
    """It finds the beginning of its prompt in good blocks, which another one brought back, and the rest in bad ones."""
    more = [*range(300, 340)]
    parked = [("brings", [*PREFIX, 1, 2]), ("follows", [*PREFIX, *more, 3])]
    engine = with_host_prefix(tiny_model, ahead=True, others=parked)
    engine.held.remove("brings")
    engine.schedule()
    assert engine.residency("brings") is Residency.FETCHING
    engine.add("loads", [*PREFIX, *more])
    fail_load_of(engine, "loads")
    engine.process()
    loaded = engine.scheduler.kv_cache_manager.get_block_ids("loads")[0][: len(PREFIX) // BLOCK_TOKENS]
    engine.scheduler.kv_cache_manager.evict_blocks(set(loaded))  # so that those of "brings" are found
    engine.held.clear()
    engine.schedule()
    assert engine.residency("follows") is Residency.FETCHING
    assert set(loaded).isdisjoint(engine.scheduler.kv_cache_manager.get_block_ids("follows")[0])
    engine.run()


def test_a_fetch_that_fails_is_computed_again_by_its_turn(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead, others=[("parked", [*range(70)])])
    engine.held.clear()
    engine.fail_fetches = True
    engine.schedule()
    assert engine.residency("parked") is Residency.FETCHING
    engine.held.add("parked")
    engine.drain()
    assert engine.residency("parked") is Residency.WAITING
    assert engine.scheduler.kv_cache_manager.usage == 0
    assert not engine.scheduler._inflight_prefills, "room is reserved for a request that waits"
    engine.held.clear()
    engine.run()


def test_a_reset_is_refused_while_an_aborted_requests_fetch_is_under_way(tiny_model: Path, ahead: bool) -> None:
    """Its blocks are being written; and vLLM would notice only after it has given everybody's KV up."""
    engine = with_host_prefix(tiny_model, ahead=ahead, others=[("parked", [*range(70)])], fetch_steps=5)
    engine.add("runs", [9] * 40, max_tokens=20)
    engine.held.clear()
    engine.step()
    assert engine.residency("parked") is Residency.FETCHING
    engine.abort("parked")
    engine.drain()
    with pytest.raises(RuntimeError, match="nothing was changed"):
        engine.reset_prefix_cache(reset_running_requests=True)
    assert [request.request_id for request in engine.scheduler.running] == ["runs"]
    assert engine.residency("runs") is Residency.RESIDENT
    engine.run()
    assert engine.reset_prefix_cache(reset_running_requests=True)


def test_a_reset_is_refused_while_a_session_waits_for_its_next_input(tiny_model: Path, ahead: bool) -> None:
    """It keeps its KV; and vLLM would notice only after it has given everybody else's up."""
    engine = with_host_prefix(tiny_model, ahead=ahead, others=[("parked", [*range(70)])])
    engine.add("session", [3] * 20, max_tokens=2, is_session=True)
    engine.add("runs", [9] * 40, max_tokens=20)
    while len(engine.tokens["session"]) < 2:
        engine.step()
    engine.drain()
    with pytest.raises(RuntimeError, match=r"a session waits for its next input.*nothing was changed"):
        engine.reset_prefix_cache(reset_running_requests=True)
    assert [request.request_id for request in engine.scheduler.running] == ["runs"]
    assert [engine.residency(name) for name in ("runs", "parked")] == [Residency.RESIDENT, Residency.PARKED]
    assert engine.ledger.host.num_cached > 0
    engine.abort("session")
    assert engine.reset_prefix_cache(reset_running_requests=True)
    assert engine.residency("parked") is Residency.WAITING
    engine.held.clear()
    engine.run()


def test_a_reset_leaves_no_room_reserved_for_a_request_that_was_just_fetched(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead, others=[("parked", [*range(70)])])
    engine.held.clear()
    engine.schedule()
    assert engine.residency("parked") is Residency.FETCHING
    engine.drain()
    assert engine.residency("parked") is Residency.RESIDENT
    assert engine.reset_prefix_cache(reset_running_requests=True)
    assert engine.residency("parked") is Residency.WAITING
    assert not engine.scheduler._inflight_prefills
    engine.run()


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_failures_parks_and_aborts_leaves_every_answer_right(
    tiny_model: Path, ahead: bool, seed: int
) -> None:
    """Bursts of prompts that begin alike, over a prefix in host memory, and whatever may happen to them."""
    rng = random.Random(seed)
    engine = HandEngine(tiny_model, ahead=ahead, fetch_steps=rng.randint(1, 3))
    text, num_failed = [rng.randrange(400) for _ in range(150)], 0
    for burst in range(10):
        engine.add(f"{burst} first", text)
        engine.run()
        engine.forget_on_device()
        for step in range(8):
            for index in range(rng.choice((0, 0, 1, 3)) if step else 2):
                prompt = [*text[: rng.randrange(60, 150)], index]
                engine.add(f"{burst}.{step}.{index}", prompt, max_tokens=rng.randint(1, 12))
            engine.fail_hits, engine.fail_fetches = fails, _ = rng.random() < 0.6, rng.random() < 0.1
            ran = engine.schedule()
            num_failed += fails and ran.scheduled.has_sync_kv_loads
            concerned = sorted(ran.request_ids & engine.scheduler.requests.keys())
            if concerned and rng.random() < 0.3:
                engine.abort(rng.choice(concerned))
            if concerned and rng.random() < 0.5:
                engine.force(**{rng.choice(["park", "recompute"]): [rng.choice(concerned)]})
            if len(engine.in_flight) >= (2 if ahead else 1):
                engine.process()
    engine.run()
    assert num_failed > 0


# Layers that could not be loaded -------------------------------------------------------------------------------------


def fail_layer_load(engine: HandEngine, *names: str) -> None:
    """The next step's layer-wise loads of these requests have not arrived."""
    from layerkv.vllm_plugin.failed_copies import FailedCopies

    blocks = [block for name in names for block in engine.ledger.host_blocks_of(name)]
    step = engine.schedule()
    assert step.request_ids >= set(names)
    for index, name in enumerate(step.output.req_ids):
        if name in names:
            step.output.sampled_token_ids[index] = [WRONG]
    from vllm.v1.outputs import KVConnectorOutput

    received = step.output.kv_connector_output or KVConnectorOutput()
    received.kv_connector_worker_meta = FailedCopies(unloaded=frozenset(blocks))
    step.output.kv_connector_output = received


WRONG = 7


def streaming(model: Path, *, ahead: bool) -> HandEngine:
    """An engine with a request that decodes in the zone, with nothing under way."""
    engine = HandEngine(model, ahead=ahead)
    engine.add("streams", list(range(70)), max_tokens=12)
    engine.force(layered=["streams"])
    engine.keep_in_zone.add("streams")
    while len(engine.tokens["streams"]) < 3:
        engine.step()
    engine.drain()
    assert engine.residency("streams") is Residency.LAYERED
    return engine


@pytest.mark.parametrize("move", ["park", "recompute"])
def test_a_request_that_leaves_the_zone_before_a_failed_load_is_known_delivers_nothing_of_it(
    tiny_model: Path, move: str
) -> None:
    engine = streaming(tiny_model, ahead=True)
    fail_layer_load(engine, "streams")
    engine.keep_in_zone.clear()
    engine.force(**{move: ["streams"]})
    engine.schedule()
    engine.run()


def test_a_request_that_starts_over_between_two_steps_may_resume_in_the_next(tiny_model: Path) -> None:
    engine = streaming(tiny_model, ahead=True)
    engine.schedule()
    engine.drain()
    fail_layer_load(engine, "streams")
    engine.drain()  # as a pause does: no step is scheduled ahead of this output
    engine.run()


def test_a_fetch_that_ranks_report_one_after_the_other_is_one_failure(tiny_model: Path) -> None:
    from vllm.v1.outputs import KVConnectorOutput

    engine = HandEngine(tiny_model, fetch_steps=3)
    engine.add("fetched", list(range(40)), max_tokens=8)
    engine.step()
    engine.force(park=["fetched"])
    engine.step()
    while engine.residency("fetched") is not Residency.FETCHING:
        engine.step()
    blocks = set(engine.scheduler.kv_cache_manager.get_block_ids("fetched")[0])
    for _ in range(3):
        engine.scheduler._recovery.copies_failed(KVConnectorOutput(invalid_block_ids=blocks))
    assert engine.scheduler._controller.tracked["fetched"].num_failures == 1
    engine.run()
