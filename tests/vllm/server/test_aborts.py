"""A client that goes away takes nothing with it, whatever state its requests are in.

When to leave is told by the streams themselves: `/metrics` answers late while the engine is busy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.vllm.engines_in_turn import prompt
from tests.vllm.server.served import POLL_LIMIT_S, Completion, Server, body

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ADDED, ABORTED = "Added request", " aborted."


@dataclass(frozen=True)
class Situation:
    """Requests, how many streams have tokens when their client leaves, and who is then as the name says."""

    name: str
    requests: Sequence[Mapping[str, Any]]
    num_begun: int
    is_so: Callable[[Completion], bool]


def has_tokens(completion: Completion) -> bool:
    return bool(completion.token_ids)


def has_none(completion: Completion) -> bool:
    return not completion.token_ids


def has_one(completion: Completion) -> bool:
    return len(completion.token_ids) == 1


SITUATIONS = [
    Situation("just-started", [body(prompt(900, seed=seed), 100) for seed in range(200, 204)], 0, has_none),
    Situation("decoding", [body(prompt(100, seed=seed), 900) for seed in range(210, 216)], 1, has_tokens),
    # Too long for the zone, and only two of them fit into the pool.
    Situation("waiting", [body(prompt(900, seed=seed), 100) for seed in range(220, 228)], 2, has_none),
    # Only six of them fit into the pool: some wait, one is layered, others are parked after their first token.
    # The client learns of first tokens some at a time, so it leaves early enough for most to be without.
    Situation("prefilling", [body(prompt(300, seed=seed), 300) for seed in range(230, 254)], 3, has_none),
    Situation("parked", [body(prompt(300, seed=seed), 300) for seed in range(260, 284)], 24, has_one),
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_a_client_that_goes_away_gives_every_block_back(server: Server, situation: Situation) -> None:
    before = server.wait_until_idle()
    num_added, num_aborted = server.num_logged(ADDED), server.num_logged(ABORTED)
    num_requests = len(situation.requests)
    end_s = time.monotonic() + POLL_LIMIT_S

    def is_reached(completions: list[Completion]) -> bool:
        if situation.num_begun:
            return sum(map(has_tokens, completions)) >= situation.num_begun
        return server.num_logged(ADDED) == num_added + num_requests

    def until(completions: list[Completion]) -> None:
        while not is_reached(completions):
            assert time.monotonic() < end_s
            time.sleep(0.001)

    completions = server.stream(situation.requests, until)
    assert any(completion.finish_reason is None and situation.is_so(completion) for completion in completions)

    def are_all_gone() -> bool:
        finished = server.metrics()("vllm:request_success_total", "length") - before(
            "vllm:request_success_total", "length"
        )
        # Not of all requests: one that its client leaves before the engine has it is neither aborted nor finished.
        num_there = server.num_logged(ADDED) - num_added
        return finished + server.num_logged(ABORTED) - num_aborted >= num_there

    while not are_all_gone():  # only then idle means something
        assert time.monotonic() < end_s
        time.sleep(0.05)
    assert server.num_logged(ABORTED) > num_aborted
    server.wait_until_idle()
    assert len(server.complete(prompt(300, seed=299), 8).token_ids) == 8
