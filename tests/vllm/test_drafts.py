"""Speculative decoding: KV of drafts that turn out wrong is never taken for the request's, wherever that is moved.

Over vLLM's scheduler and a model whose KV is checked. Steps scheduled ahead count drafts as computed whose verification
is still under way: no engine on a CPU runs that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerkv.core.residency import Residency
from layerkv.errors import ConfigError
from tests.vllm.hand_engine import BLOCK_TOKENS, ZONE_BLOCKS, HandEngine

pytestmark = pytest.mark.vllm

FEW, MANY = 3, BLOCK_TOKENS + 4  # more than a block: what is taken back may be blocks
AHEAD = pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
DRAFTS = pytest.mark.parametrize("num_drafts", [FEW, MANY])


def drafting(num_drafts: int) -> dict[str, Any]:
    return {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": num_drafts, "prompt_lookup_max": 2},
    }


@AHEAD
@DRAFTS
def test_every_way_of_moving_kv_leaves_every_answer_right(tiny_model: Path, ahead: bool, num_drafts: int) -> None:
    engine = HandEngine(tiny_model, ahead=ahead, pool_blocks=34, fetch_steps=2, **drafting(num_drafts))
    for index in range(12):
        engine.add(f"r{index}", [index, *range(60 + 7 * index)], max_tokens=60)
    engine.force(layered=["r0"])
    for _ in range(4):
        engine.step()
    running = [request.request_id for request in engine.scheduler.running]
    moved = [name for name in running if engine.residency(name) is Residency.RESIDENT]
    engine.force(store_ahead=moved[:2])
    engine.step()
    engine.force(store_ahead=moved[:1])  # what has become whole since
    engine.step()
    engine.force(park=moved[:1], recompute=[name for name in running if name not in moved[:1]][:1])
    engine.run()
    engine.forget_on_device()
    engine.add("again", [3, *range(60 + 21)])
    engine.run()
    counters = engine.ledger.counters
    assert min(counters.parks, counters.fetches, counters.layered_admissions, counters.recomputes) > 0
    assert min(counters.stored_ahead_blocks, counters.prefix_hit_blocks) > 0
    assert min(engine.worker.num_right, engine.worker.num_wrong) > 20


@AHEAD
@DRAFTS
def test_who_is_parked_in_each_step_in_turn_keeps_what_was_verified(
    tiny_model: Path, ahead: bool, num_drafts: int
) -> None:
    engine = HandEngine(tiny_model, ahead=ahead, **drafting(num_drafts))
    engine.add("a", range(40), max_tokens=100)
    engine.add("b", range(100, 150), max_tokens=100)
    for step in range(200):
        if not engine.scheduler.has_requests():
            break
        if step % 5 == 4:
            engine.force(park=["a"], store_ahead=["b"])
        engine.step()
        if step % 7 == 0:
            engine.drain()
            engine.schedule()  # stores what whoever has ended left
            engine.drain()
            engine.check_kept_kv()
    engine.run()
    assert engine.ledger.counters.parks >= 3


@AHEAD
@DRAFTS
def test_who_decodes_in_the_zone_finds_what_was_verified(tiny_model: Path, ahead: bool, num_drafts: int) -> None:
    engine = HandEngine(tiny_model, ahead=ahead, **drafting(num_drafts))
    engine.keep_in_zone = {"a"}
    engine.add("a", range(40), max_tokens=100)
    engine.force(layered=["a"])
    while len(engine.tokens["a"]) < 60:
        engine.step()
        assert engine.residency("a") in (Residency.WAITING, Residency.LAYERED)
    engine.keep_in_zone = set()
    engine.run()
    assert engine.ledger.counters.parks == 1


@AHEAD
def test_a_request_that_fills_the_pool_is_fetched(tiny_model: Path, ahead: bool) -> None:
    """vLLM keeps blocks free for its drafts beside those that it loads: start-up asks for a pool that has them."""
    longest = 256
    num_blocks = longest // BLOCK_TOKENS
    with pytest.raises(ConfigError, match=f"max_model_len: found {longest}, but the KV pool holds {longest - 32}"):
        HandEngine(tiny_model, ahead=ahead, pool_blocks=num_blocks, **drafting(MANY))
    engine = HandEngine(tiny_model, ahead=ahead, pool_blocks=num_blocks + 2, **drafting(MANY))
    for name in ("a", "b"):
        engine.add(name, [ord(name), *range(200)], max_tokens=50)
    while len(engine.tokens["a"]) < 46:
        engine.step()
    engine.force(park=["a"])
    engine.run()
    assert engine.ledger.counters.fetches > 0


@AHEAD
def test_streams_that_are_paused_go_on(tiny_model: Path, ahead: bool) -> None:
    engine = HandEngine(tiny_model, ahead=ahead, max_num_seqs=2, **drafting(FEW))
    for index in range(6):
        engine.add(f"r{index}", [index, *range(30)], max_tokens=100)
    engine.run(2000)
    assert min(engine.worker.num_right, engine.worker.num_wrong) > 0


def test_a_prompt_that_fills_the_zone_leaves_the_pool_to_others(tiny_model: Path) -> None:
    """vLLM asks what each prompt under way may come to need, drafts after its last token included, and keeps that of
    the pool. Of one in a zone that has no room for more, it would keep all."""
    engine = HandEngine(tiny_model, **drafting(FEW))
    engine.add("parked", range(40), max_tokens=20)
    engine.step()
    engine.held = {"parked"}
    engine.force(park=["parked"])
    engine.step()
    engine.add("layered", range(100, 100 + ZONE_BLOCKS * BLOCK_TOKENS - 2), max_tokens=2)
    engine.force(layered=["layered"], prefill_tokens=64)
    engine.step()
    assert engine.residency("layered") is Residency.LAYERED
    assert engine.scheduler.requests["layered"].is_prefill_chunk
    engine.force(fetch=["parked"], prefill_tokens=64)
    engine.step()
    assert engine.residency("parked") is not Residency.PARKED
    engine.held.clear()
    engine.run()


@AHEAD
def test_who_outgrows_the_pool_has_room_for_its_last_drafts(tiny_model: Path, ahead: bool) -> None:
    """They are computed and stored though they lie beyond its last token, and somebody else has the rest of host
    memory."""
    engine = HandEngine(
        tiny_model, ahead=ahead, pool_blocks=10, host_blocks=17, extra_config={"long_contexts": True}, **drafting(FEW)
    )
    engine.add("other", range(20), max_tokens=20)
    engine.step()
    engine.drain()
    engine.held = {"other"}
    engine.force(park=["other"])
    engine.step()
    engine.add("long", range(200), max_tokens=15 * BLOCK_TOKENS - 200)
    for _ in range(60):
        engine.step()
    engine.held = set()
    engine.run(2000)
    assert engine.ledger.counters.layered_admissions > 0


@pytest.mark.parametrize("num_drafts", [FEW, BLOCK_TOKENS // 2 - 1, BLOCK_TOKENS // 2, MANY])
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_start_up_fetches_and_vllm_count_the_same_room_for_drafts(
    tiny_model: Path, method: str, num_drafts: int
) -> None:
    """In the line for the pool less would be declined again and again, and a pool without it could not fetch all."""
    from layerkv.vllm_plugin.drafts import drafting_blocks

    how = {"prompt_lookup_max": 2} if method == "ngram" else {"model": str(tiny_model)}
    engine = HandEngine(tiny_model, speculative_config={"method": method, "num_speculative_tokens": num_drafts, **how})
    room = engine.scheduler._spec_decode_step_blocks
    assert engine.scheduler._controller.shape.drafting_blocks == room
    assert drafting_blocks(engine.scheduler.vllm_config, BLOCK_TOKENS) == room
