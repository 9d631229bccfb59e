"""The blocks that a next chunk takes are those that the policy reckons with, whatever windows give back meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.checked_groups import GroupsEngine

pytestmark = pytest.mark.vllm


class Watched(GroupsEngine):
    """An engine that notes what the policy saw last."""

    growth = 0

    def _decide(self, *args: Any, **kwargs: Any) -> Any:
        snapshot, decision = super()._decide(*args, **kwargs)
        self.growth = snapshot.load.growth_blocks
        return snapshot, decision


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("kinds", [("full", "window"), ("full", "chunk"), ("full", "window", "state")])
def test_a_chunk_takes_the_blocks_that_were_reckoned_with(tiny_model: Path, ahead: bool, kinds: Sequence[str]) -> None:
    """The second chunk on: a prompt that starts is no growth."""
    engine = Watched(
        tiny_model,
        kinds=kinds,
        ahead=ahead,
        pool_blocks=60,
        extra_config={"mode": "resident"},
        max_num_batched_tokens=48,
        enable_prefix_caching=False,
    )
    engine.add("a", range(220), max_tokens=4)
    pool = engine.scheduler.kv_cache_manager.block_pool
    taken, reckoned = [], []
    engine.step()
    while engine.requests["a"].is_prefill_chunk:
        before = pool.get_num_free_blocks()
        engine.step()
        taken.append(before - pool.get_num_free_blocks())
        reckoned.append(engine.growth)
    assert len(taken) >= 4
    assert sum(taken) > 0
    assert reckoned == [max(num, 0) for num in taken]
    engine.run()
