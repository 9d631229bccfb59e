"""Where requests draft, a step takes several tokens of each: pool, steps and claims count them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from layerkv.scheduler.controller import Controller
from layerkv.scheduler.engine import EngineShape, Running
from layerkv.scheduler.needs import blocks_to_resume
from layerkv.scheduler.reasons import Reason
from layerkv.scheduler.running import look
from tests.fakes.snapshots import changed, resident, snapshot
from tests.fakes.tiny_controller import SHAPE, arrive, decoding, engine
from tests.fakes.tiny_scheduler import BLOCK_TOKENS, policy, profile

DRAFTS = 3


def drafting(**changes: Any) -> EngineShape:
    return replace(SHAPE, **{"tokens_per_decode": 1 + DRAFTS, **changes})


def controller(shape: EngineShape) -> Controller:
    return Controller(policy(), shape, profile(), is_measured=True)


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_growth_is_what_the_drafts_of_a_step_may_take_too(steps_ahead: int) -> None:
    last = 11 * BLOCK_TOKENS  # slots that eleven blocks have
    for lookahead in (0, 2):
        shape = drafting(lookahead_tokens=lookahead)
        step_tokens = (1 + DRAFTS) * (1 + steps_ahead) + lookahead
        for num_computed, growth in ((last - step_tokens, 0), (last - step_tokens + 1, 1)):
            running = decoding("a", num_tokens=num_computed + 1, num_blocks=11)
            load, _ = look(controller(shape), engine(running, steps_ahead=steps_ahead), 10.0)
            assert load.growth_blocks == growth
    assert look(controller(SHAPE), engine(decoding("a", num_tokens=last)), 10.0)[0].growth_blocks == 0


def test_more_than_a_block_of_drafts_may_take_several() -> None:
    shape = drafting(tokens_per_decode=1 + 2 * BLOCK_TOKENS)
    running = decoding("a", num_tokens=11 * BLOCK_TOKENS, num_blocks=11)
    assert look(controller(shape), engine(running), 10.0)[0].growth_blocks == 2
    assert shape.drafting_blocks == 3  # it may begin anywhere in a block
    assert not controller(shape).is_quiet(1, 3, 0, 10.0)
    assert controller(SHAPE).is_quiet(1, 3, 0, 10.0) == (1 + 64 // BLOCK_TOKENS <= 3)


def test_prompts_get_what_decodes_with_all_their_drafts_leave_of_a_step() -> None:
    load = {"budget_tokens": 100, "decode_tokens": 10}
    assert snapshot(**load).most_prefill_tokens == 90
    assert snapshot(**load, tokens_per_decode=1 + DRAFTS).most_prefill_tokens == 60
    assert snapshot(**load, tokens_per_decode=20).most_prefill_tokens == 0


def test_who_goes_on_after_a_pause_needs_room_for_its_drafts() -> None:
    r = resident("a", num_tokens=10 * BLOCK_TOKENS - 1, num_blocks=10)
    s = snapshot()
    assert blocks_to_resume(s, r) == 0
    assert blocks_to_resume(changed(s, tokens_per_decode=1 + DRAFTS), r) == 1


def test_a_parked_request_asks_for_the_blocks_that_the_engine_keeps_free_for_its_drafts() -> None:
    for shape, more in ((SHAPE, 0), (drafting(), 1), (drafting(lookahead_tokens=BLOCK_TOKENS), 2)):
        c = controller(shape)
        arrive(c, "a", num_tokens=160)
        c.admitted("a", layered=False, reason=Reason.FITS, step=1, now_s=10.0)
        c.park("a", num_computed=160, num_tokens=161, num_output=1, reason=Reason.MAKES_ROOM, now_s=11.0)
        [claim] = c.parked.head(1, 11.0, None)
        assert claim.num_blocks == -(-161 // BLOCK_TOKENS) + more
        assert shape.fetchable_blocks == SHAPE.pool_blocks - more


def test_a_prompt_takes_slots_for_what_is_drafted_after_it() -> None:
    c = controller(drafting(lookahead_tokens=DRAFTS))
    arrive(c, "a", num_tokens=160)
    [w] = c.waiting.head(1, 10.0, None)
    assert (w.num_tokens, w.num_blocks) == (160, 11)


def test_who_decodes_in_the_zone_leaves_it_only_for_a_pool_that_could_fetch_it() -> None:
    """Its own blocks are not enough where the engine wants some for drafts: it would be parked, and wait."""
    streams = Running("a", 161, 160, 1, False, 11, num_zone_blocks=11, is_layered=True, num_host_blocks=11)
    for shape, num_blocks in ((SHAPE, 11), (drafting(), 12), (drafting(lookahead_tokens=BLOCK_TOKENS), 13)):
        for free_blocks in (num_blocks - 1, num_blocks):
            c = Controller(policy(streamed_decode=True), shape, profile(), is_measured=True)
            arrive(c, "a", num_tokens=160)
            c.admitted("a", layered=True, reason=Reason.FITS, step=1, now_s=10.0)
            c.first_token("a", 10.2)
            _, decision = c.decide(engine(streams, free_blocks=free_blocks), 10.3)
            assert decision.park == (("a",) if free_blocks == num_blocks else ())


def test_who_outgrows_the_pool_is_promised_room_for_drafts_beyond_its_last_token() -> None:
    for longest_tokens, num_blocks in ((4096, 111), (110 * BLOCK_TOKENS, 110)):
        c = controller(drafting(long_contexts=True, longest_tokens=longest_tokens))
        arrive(c, "a", num_tokens=110 * BLOCK_TOKENS - 50)  # and 50 to come
        [prompt] = c.waiting.views
        assert prompt.most_blocks == num_blocks
