"""Layered prompts that begin with a prefix in host memory, on vLLM's real scheduler: loaded, shared, and always right.

Each with one step in flight and with two. The worker's lanes forget everything after a step, so a block that is not
loaded when it is read makes every later token wrong.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from layerkv.core.residency import Residency
from tests.vllm.hand_engine import BLOCK_TOKENS, HandEngine

pytestmark = pytest.mark.vllm

PREFIX_BLOCKS = 4
PREFIX = [11 * i % 400 for i in range(PREFIX_BLOCKS * BLOCK_TOKENS)]
REST = [*range(300, 340)]
"""With it a prompt has seven blocks, of which the last one is not whole."""


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def ahead(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def with_host_prefix(model: Path, *, ahead: bool, **more: object) -> HandEngine:
    """An engine that has PREFIX in host memory only."""
    engine = HandEngine(model, ahead=ahead, **more)  # type: ignore[arg-type]
    engine.add("first", [*PREFIX, 1])
    engine.run()
    engine.forget_on_device()
    assert engine.ledger.host.num_cached == PREFIX_BLOCKS
    return engine


def start_layered(engine: HandEngine, *names: str) -> None:
    engine.force(layered=names)
    step = engine.schedule()
    assert step.request_ids >= set(names)
    assert all(engine.residency(name) is Residency.LAYERED for name in names)


def computed_tokens(engine: HandEngine, name: str) -> int:
    return int(engine.in_flight[-1].scheduled.num_scheduled_tokens[name])


def test_a_layered_prompt_computes_only_what_host_memory_does_not_cache(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("layered", [*PREFIX, *REST])
    start_layered(engine, "layered")
    assert computed_tokens(engine, "layered") == len(REST)
    assert engine.ledger.counters.prefix_hit_blocks == PREFIX_BLOCKS
    engine.run()


def test_it_takes_no_host_blocks_for_what_is_there_already(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead)
    cached = engine.ledger.host.find(engine.requests["first"].block_hashes)
    engine.add("one", [*PREFIX, *REST])
    engine.add("two", [*PREFIX, *REST[:20]])
    start_layered(engine, "one", "two")
    assert engine.ledger.host_blocks_of("one")[:PREFIX_BLOCKS] == engine.ledger.host_blocks_of("two")[:4] == (*cached,)
    assert engine.ledger.num_host_blocks_used == 7 + 6 - PREFIX_BLOCKS
    assert engine.ledger.host.num_cached == PREFIX_BLOCKS, "and others find it as before"
    engine.run()


def test_a_prompt_in_many_chunks_loads_its_prefix_again_with_each(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("chunks", [*PREFIX, *REST])
    engine.force(layered=["chunks"], prefill_tokens=9)
    engine.schedule()
    assert computed_tokens(engine, "chunks") == 9
    while not engine.tokens["chunks"]:
        engine.force(prefill_tokens=9)
        engine.step()
    engine.run()


def test_it_decodes_in_the_zone_from_its_prefix(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("streams", [*PREFIX, *REST], max_tokens=20)
    engine.keep_in_zone.add("streams")
    start_layered(engine, "streams")
    while len(engine.tokens["streams"]) < 12:
        engine.step()
    assert engine.residency("streams") is Residency.LAYERED
    engine.run()


def test_a_parked_one_keeps_its_prefix_while_others_fill_host_memory(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead, host_blocks=14)
    engine.add("parked", [*PREFIX, *REST], max_tokens=20)
    start_layered(engine, "parked")
    engine.held.add("parked")
    while engine.residency("parked") is not Residency.PARKED:
        engine.step()
    engine.drain()
    for index in range(6):
        engine.add(f"other {index}", [index * 50 + i for i in range(100)], max_tokens=4)
        while f"other {index}" in engine.scheduler.requests:
            engine.step()
        engine.drain()
    engine.schedule()  # stores what the last one left
    engine.drain()
    assert engine.ledger.host.num_cached >= PREFIX_BLOCKS
    engine.check_kept_kv()
    engine.held.clear()
    engine.run()


def test_the_same_prompt_again_loads_what_the_first_layered_one_left(tiny_model: Path, ahead: bool) -> None:
    """Parked, fetched and ended, it leaves all its whole blocks, the shared ones among them."""
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("one", [*PREFIX, *REST])
    start_layered(engine, "one")
    engine.run()
    engine.forget_on_device()
    engine.add("again", [*PREFIX, *REST, 7])
    start_layered(engine, "again")
    assert computed_tokens(engine, "again") == (len(REST) + 1) % BLOCK_TOKENS
    engine.run()


def test_hits_on_the_device_come_before_those_in_host_memory(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("device", [*PREFIX[: 2 * BLOCK_TOKENS], 5], max_tokens=40)
    engine.step()
    engine.add("layered", [*PREFIX, *REST])
    start_layered(engine, "layered")
    assert computed_tokens(engine, "layered") == len(REST)
    table = engine.scheduler.kv_cache_manager.get_block_ids("layered")[0]
    assert engine.ledger.geometry.num_leading_pool_blocks(table) == 2
    engine.run()


# What was decided from is gone when vLLM looks -----------------------------------------------------------------------


def change_before_vllm_looks(engine: HandEngine, change: object) -> None:
    """Once the next reservation has been made, something else happens in the same step."""
    reserve = engine.scheduler._execution._desk.reserve

    def then_change(*args: object) -> None:
        reserve(*args)
        engine.scheduler._execution._desk.reserve = reserve
        change()  # type: ignore[operator]

    engine.scheduler._execution._desk.reserve = then_change


def drop_device_block(engine: HandEngine, index: int) -> None:
    """vLLM's prefix cache gives up one block of PREFIX."""
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    pool = engine.scheduler.kv_cache_manager.block_pool
    block_hash = engine.requests["first"].block_hashes[index]
    [block] = pool.get_cached_block(block_hash, [0])
    assert make_block_hash_with_group_id(block_hash, 0) == block.block_hash
    pool.evict_blocks({block.block_id})


def on_both_sides(model: Path, *, ahead: bool, num_on_device: int, on_host: range, **more: object) -> HandEngine:
    """PREFIX's first blocks are on the device, and those of a range in host memory."""
    engine = with_host_prefix(model, ahead=ahead, **more)
    engine.add("device", [*PREFIX[: num_on_device * BLOCK_TOKENS], 5], max_tokens=1)
    engine.step()
    engine.drain()
    engine.schedule()
    engine.drain()
    host, hashes = engine.ledger.host, engine.requests["first"].block_hashes
    gone = [host._block_of[h] for i, h in enumerate(hashes[:PREFIX_BLOCKS]) if i not in on_host]
    host.unpin()
    host._forget(gone)
    return engine


@pytest.mark.parametrize("on_host", [range(4), range(2, 4)], ids=["host has all", "host has the rest"])
@pytest.mark.parametrize("num_lost", [1, 2])
def test_blocks_that_the_device_gives_up_before_it_starts_are_loaded_or_computed(
    tiny_model: Path, ahead: bool, on_host: range, num_lost: int
) -> None:
    """It had two hits on the device, and shared what comes after them; without them that is not the beginning."""
    engine = on_both_sides(tiny_model, ahead=ahead, num_on_device=2, on_host=on_host)
    engine.add("layered", [*PREFIX, *REST])

    def change() -> None:
        for index in range(2 - num_lost, 2):
            drop_device_block(engine, index)

    change_before_vllm_looks(engine, change)
    engine.force(layered=["layered"])
    engine.schedule()
    assert engine.residency("layered") is Residency.LAYERED
    num_found = PREFIX_BLOCKS if on_host.start == 0 else 2 - num_lost
    assert computed_tokens(engine, "layered") == len(PREFIX) + len(REST) - num_found * BLOCK_TOKENS
    shares = [engine.ledger.host.num_sharers(block) for block in engine.ledger.host_blocks_of("layered")]
    in_pool = 2 - num_lost
    assert shares == [int(in_pool <= place < num_found) for place in range(7)]
    engine.ledger.check()
    engine.run()


def test_without_room_for_what_it_must_write_itself_it_waits_for_the_next_step(tiny_model: Path, ahead: bool) -> None:
    """Seven blocks, of which it shares two that it then may not write, and nothing is free."""
    engine = on_both_sides(tiny_model, ahead=ahead, num_on_device=2, on_host=range(2, 4), host_blocks=20)
    engine.add("layered", [*PREFIX, *REST])
    host, taken = engine.ledger.host, []

    def change() -> None:
        drop_device_block(engine, 1)
        taken.extend(host.take(host.num_free))

    change_before_vllm_looks(engine, change)
    engine.force(layered=["layered"])
    step = engine.schedule()
    assert step.request_ids == set()
    assert engine.residency("layered") is Residency.WAITING
    assert engine.ledger.zone.num_available == engine.ledger.geometry.zone_blocks
    host.give_back(taken)
    engine.ledger.check()
    engine.run()


def test_a_prefix_given_up_between_the_decision_and_the_reservation_is_computed(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("layered", [*PREFIX, *REST])
    desk = engine.scheduler._execution._desk
    reserve = desk.reserve

    def forget_first(*args: object) -> None:
        assert engine.ledger.host.num_cached == PREFIX_BLOCKS
        engine.ledger.forget_prefixes()
        reserve(*args)

    desk.reserve = forget_first
    start_layered(engine, "layered")
    desk.reserve = reserve
    assert computed_tokens(engine, "layered") == len(PREFIX) + len(REST)
    engine.run()


# Whatever may happen to it --------------------------------------------------------------------------------------------


def test_an_aborted_one_leaves_the_prefix_to_others(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("aborted", [*PREFIX, *REST])
    engine.add("stays", [*PREFIX, *REST])
    start_layered(engine, "aborted", "stays")
    engine.abort("aborted")
    engine.ledger.check()
    engine.drain()
    engine.add("later", [*PREFIX, 9, 9])
    engine.run()
    assert engine.ledger.counters.prefix_hit_blocks >= 3 * PREFIX_BLOCKS


@pytest.mark.parametrize("move", ["park", "recompute"])
def test_it_may_leave_the_zone_in_the_step_after_it_has_started(tiny_model: Path, ahead: bool, move: str) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("leaves", [*PREFIX, *REST])
    start_layered(engine, "leaves")
    if not ahead:
        engine.process()
    engine.force(**{move: ["leaves"]})
    engine.schedule()
    assert engine.residency("leaves") is not Residency.LAYERED
    engine.run()


def test_a_reset_of_everything_starts_it_over_and_gives_its_blocks_back(tiny_model: Path) -> None:
    engine = with_host_prefix(tiny_model, ahead=False)
    engine.add("layered", [*PREFIX, *REST])
    engine.keep_in_zone.add("layered")
    start_layered(engine, "layered")
    engine.process()
    assert engine.reset_prefix_cache(reset_running_requests=True)
    engine.ledger.check()
    assert engine.ledger.num_host_blocks_used == 0
    engine.schedule()
    assert computed_tokens(engine, "layered") > len(PREFIX)
    engine.run()


def test_prefixes_that_are_forgotten_stay_with_who_shares_them(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("layered", [*PREFIX, *REST], max_tokens=20)
    engine.keep_in_zone.add("layered")
    start_layered(engine, "layered")
    engine.drain()
    engine.ledger.forget_prefixes()
    engine.add("other", [*PREFIX, *REST])
    engine.schedule()
    assert computed_tokens(engine, "other") == len(PREFIX) + len(REST)
    engine.run()


# Loads that fail ------------------------------------------------------------------------------------------------------


def test_a_prefix_that_cannot_be_loaded_is_computed_instead(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("one", [*PREFIX, *REST])
    engine.add("two", [*PREFIX, *REST, 3])
    engine.fail_zone_hits = True
    start_layered(engine, "one", "two")
    assert not engine.process(), "what the step delivered was computed from KV that was not there"
    assert engine.residency("one") is engine.residency("two") is Residency.WAITING
    assert engine.ledger.host.num_cached == engine.ledger.num_host_blocks_used == 0
    engine.schedule()
    assert sum(engine.in_flight[-1].scheduled.num_scheduled_tokens.values()) > len(PREFIX)
    engine.run()


@pytest.mark.parametrize("move", ["park", "recompute", "abort"])
def test_who_leaves_the_zone_before_the_failure_is_known_leaves_nothing_wrong(tiny_model: Path, move: str) -> None:
    engine = with_host_prefix(tiny_model, ahead=True)
    engine.add("layered", [*PREFIX, *REST])
    engine.fail_zone_hits = True
    start_layered(engine, "layered")
    if move == "abort":
        engine.abort("layered")
    else:
        engine.force(**{move: ["layered"]})
    engine.schedule()
    if move == "park":
        engine.abort("layered")  # parked, it would leave its copy as a prefix
    assert not engine.process()
    engine.drain()
    engine.check_kept_kv()
    engine.add("later", [*PREFIX, *REST, 7])
    engine.run()


def test_a_sharer_that_is_parked_starts_over_with_the_one_whose_load_failed(tiny_model: Path, ahead: bool) -> None:
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("parked", [*PREFIX, *REST], max_tokens=20)
    start_layered(engine, "parked")
    engine.held.add("parked")
    while engine.residency("parked") is not Residency.PARKED:
        engine.step()
    engine.drain()
    engine.add("loads", [*PREFIX, *REST, 7])
    engine.fail_zone_hits = True
    start_layered(engine, "loads")
    engine.process()
    assert engine.residency("parked") is Residency.WAITING
    engine.held.clear()
    engine.run()


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_everything_leaves_every_answer_right(tiny_model: Path, ahead: bool, seed: int) -> None:
    """Bursts of prompts that begin alike, most of them layered, with little host memory, and whatever may happen."""
    rng = random.Random(seed)
    engine = HandEngine(tiny_model, ahead=ahead, fetch_steps=rng.randint(1, 3), host_blocks=rng.choice((18, 30, 80)))
    text, num_hits, num_failed = [rng.randrange(400) for _ in range(150)], 0, 0
    for burst in range(8):
        engine.add(f"{burst} first", text[: rng.randrange(40, 150)])
        engine.run()
        engine.forget_on_device()
        for step in range(10):
            names = []
            for index in range(rng.choice((0, 0, 1, 2)) if step else 2):
                names.append(f"{burst}.{step}.{index}")
                prompt = [*text[: rng.randrange(20, 150)], *range(rng.randrange(1, 40))]
                engine.add(names[-1], prompt, max_tokens=rng.randint(1, 12))
            running = sorted(request.request_id for request in engine.scheduler.running)
            tables = [engine.scheduler.kv_cache_manager.get_block_ids(name)[0] for name in running]
            kinds = ["park", "recompute"] if engine.ledger.host.num_free >= sum(map(len, tables)) else ["recompute"]
            moves = {rng.choice(kinds): [rng.choice(running)]} if running and rng.random() < 0.4 else {}
            waiting = [name for name in engine.scheduler.requests if engine.residency(name) is Residency.WAITING]
            prefill_tokens = rng.choice((None, None, 8, 40))
            engine.force(layered=waiting, prefill_tokens=prefill_tokens, **moves)
            engine.fail_hits, engine.fail_zone_hits, engine.fail_fetches = (rng.random() < p for p in (0.2, 0.2, 0.1))
            fails = engine.fail_zone_hits
            if rng.random() < 0.1:
                engine.ledger.forget_prefixes()
            ran = engine.schedule()
            plan = ran.scheduled.kv_connector_metadata.plan
            num_hits += bool(plan.zone_hits) and not fails
            num_failed += bool(plan.zone_hits) and fails
            concerned = sorted(ran.request_ids & engine.scheduler.requests.keys())
            if concerned and rng.random() < 0.2:
                engine.abort(rng.choice(concerned))
            if len(engine.in_flight) >= (2 if ahead else 1):
                engine.process()
    engine.run()
    assert num_hits > 0
    assert num_failed > 0


def test_a_copy_that_shares_blocks_is_not_kept(tiny_model: Path, ahead: bool) -> None:
    """Decisions count on what a copy frees that gives way, and shared blocks are not free at once."""
    engine = with_host_prefix(tiny_model, ahead=ahead)
    engine.add("shares", [*PREFIX, *REST], max_tokens=20)
    start_layered(engine, "shares")
    while engine.residency("shares") is not Residency.RESIDENT or len(engine.tokens["shares"]) < 3:
        engine.step()
    engine.drain()
    [seen] = engine.scheduler._reader.state().running
    assert (seen.num_host_blocks, seen.num_shared) == (0, 0)
    engine.run()
