"""How the adapter holds prompts to their share of a step, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from layerkv.scheduler.snapshot import Decision
from tests.fakes.snapshots import snapshot

pytestmark = pytest.mark.vllm


def scheduler(*are_prompts: bool) -> Any:
    """What `limit_prefill` touches of a scheduler."""
    return SimpleNamespace(
        max_num_scheduled_tokens=2048,
        running=[SimpleNamespace(is_prefill_chunk=is_prompt) for is_prompt in are_prompts],
        scheduler_config=SimpleNamespace(long_prefill_token_threshold=0),
        adaptive_long_prefill_threshold=True,
        max_num_active_reqs=16,
    )


def limit(s: Any, prefill_tokens: int = 512, **changes: Any) -> Any:
    from layerkv.vllm_plugin.execution import limit_prefill

    s.held = limit_prefill(s, snapshot(**changes), Decision(prefill_tokens=prefill_tokens))
    return s


def test_prompts_go_last_and_share_the_budget() -> None:
    s = limit(scheduler(True, False, True), decode_tokens=1, prefilling_tokens=900)
    assert [request.is_prefill_chunk for request in s.running] == [False, True, True]
    assert s.scheduler_config.long_prefill_token_threshold == 256
    assert not s.adaptive_long_prefill_threshold, "it would raise the share again"
    assert s.max_num_scheduled_tokens == 513


def test_tokens_of_requests_that_do_not_run_are_shared_among_nobody() -> None:
    """A fetch that failed, or has ended and found no block, has tokens to compute though no prompt runs."""
    s = limit(scheduler(False), decode_tokens=1, prefilling_tokens=1)
    assert s.scheduler_config.long_prefill_token_threshold == 0
    assert s.max_num_scheduled_tokens == 513


def test_with_no_tokens_for_prompts_vllm_sees_none_of_them() -> None:
    """A limit of one token each would make every layered prompt load all its chunks for it."""
    s = limit(scheduler(True, False, True), 0, decode_tokens=1, prefilling_tokens=900)
    assert [request.is_prefill_chunk for request in s.running] == [False]
    assert [request.is_prefill_chunk for request in s.held] == [True, True]
    assert s.max_num_active_reqs == 14, "they keep their places"
    alone = limit(scheduler(True), 0, prefilling_tokens=900)
    assert (len(alone.running), alone.held) == (1, []), "the engine never stands still"
