"""What ends say about lengths: stop strings and clients that leave are aborts to vLLM's scheduler."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from layerkv.scheduler.lengths import MIN_SAMPLES
from tests.vllm.hand_engine import HandEngine

pytestmark = pytest.mark.vllm

MOST_TOKENS = 100
"""What a request may make: planned for while nothing is known."""


def planned_tokens(engine: HandEngine) -> int:
    """Output tokens that memory is planned for when a request comes now."""
    engine.add("new", [*range(20)], max_tokens=MOST_TOKENS)
    planned: int = engine.scheduler._controller.tracked["new"].middle_tokens
    engine.abort("new")
    return planned


def serve(engine: HandEngine, *, num_tokens: int) -> None:
    """Enough requests of so many tokens each, which nobody told the engine of: their clients end them."""
    for index in range(MIN_SAMPLES):
        engine.add(f"r{index}", [index, *range(20)], max_tokens=MOST_TOKENS)
        while len(engine.tokens[f"r{index}"]) < num_tokens:
            engine.step()
        engine.abort(f"r{index}")
    engine.run()


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_requests_that_their_clients_end_teach_how_long_requests_get(tiny_model: Path, ahead: bool) -> None:
    engine = HandEngine(tiny_model, ahead=ahead)
    assert planned_tokens(engine) == MOST_TOKENS
    serve(engine, num_tokens=5)
    assert planned_tokens(engine) == 5


def test_requests_that_are_ended_with_all_others_are_lower_bounds(tiny_model: Path) -> None:
    from vllm.v1.request import RequestStatus

    engine = HandEngine(tiny_model)
    for index in range(2 * MIN_SAMPLES):
        engine.add(f"r{index}", [index, *range(5)], max_tokens=MOST_TOKENS)
    for _ in range(4):
        engine.step()
    observe = engine.scheduler._controller.lengths.observe
    with mock.patch.object(engine.scheduler._controller.lengths, "observe", side_effect=observe) as observed:
        engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert observed.call_count >= MIN_SAMPLES
    assert all(call.kwargs["is_bound"] for call in observed.call_args_list)
    assert planned_tokens(engine) == MOST_TOKENS


def test_a_request_that_leaves_while_it_is_parked_is_a_lower_bound(tiny_model: Path) -> None:
    engine = HandEngine(tiny_model)
    engine.add("parked", [*range(20)], max_tokens=MOST_TOKENS)
    engine.step()
    engine.force(park=["parked"])
    engine.held.add("parked")
    engine.step()
    with mock.patch.object(engine.scheduler._controller.lengths, "observe") as observed:
        engine.abort("parked")
    observed.assert_called_once_with("default", 1, is_bound=True)
