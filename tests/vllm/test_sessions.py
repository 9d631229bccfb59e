"""Streaming-input sessions: a turn begins with its client's next input, and ends with the answer to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.hand_engine import HandEngine

pytestmark = pytest.mark.vllm

THINKS_S = 50.0


def answered(engine: HandEngine, *, says_more: bool = False) -> Any:
    """The books of a session that has answered; its client may have said more before that."""
    engine.add("session", [3] * 20, max_tokens=2, is_session=True)
    tracked = engine.scheduler._controller.tracked["session"]
    engine.step()
    if says_more:
        say(engine)
    while not (tracked.awaits_input or tracked.arrival_s > 1000.0):
        if not engine.in_flight:
            engine.schedule()
        step = engine.in_flight.popleft()
        with engine._at_its_time():
            engine.scheduler.update_from_output(step.scheduled, step.output)
    return tracked


def say(engine: HandEngine) -> None:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=7, temperature=0, ignore_eos=True)
    with engine._at_its_time():
        more = Request("session", [5] * 9, params, None, block_hasher=engine._hasher, resumable=True)
        engine.scheduler.add_request(more)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_turn_counts_from_the_next_input(tiny_model: Path, *, ahead: bool) -> None:
    engine = HandEngine(tiny_model, ahead=ahead)
    tracked = answered(engine)
    assert tracked.awaits_input
    assert tracked.reader.num_tokens == 2
    engine._now_s += THINKS_S
    say(engine)
    assert not tracked.awaits_input
    assert tracked.arrival_s == pytest.approx(engine._now_s)
    assert (tracked.max_tokens, tracked.reader.num_tokens, tracked.reader.lag_s) == (7, 0, 0.0)
    assert "session" in engine.scheduler._arrivals._no_first_token
    engine.abort("session")
    assert not engine.scheduler._arrivals._sessions


def test_input_that_came_before_the_answer_was_whole_begins_its_turn_then(tiny_model: Path) -> None:
    engine = HandEngine(tiny_model)
    tracked = answered(engine, says_more=True)
    assert not tracked.awaits_input
    assert (tracked.arrival_s, tracked.max_tokens) == (pytest.approx(engine._now_s), 7)
    engine.abort("session")
