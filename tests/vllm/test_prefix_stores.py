"""Prefixes that are stored in the background hold what they should, however soon vLLM gives their blocks to others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from tests.vllm.hand_engine import BLOCK_TOKENS, HandEngine

pytestmark = pytest.mark.vllm


def add_prompts(engine: HandEngine, num_prompts: int) -> None:
    for n in range(num_prompts):
        engine.add(f"r{n}", [(37 * n + i) % 499 for i in range(2 * BLOCK_TOKENS + 3 * (n % 8))], 8 + n % 3)


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize(("pool_blocks", "host_blocks"), [(8, 200), (8, 9), (30, 12)])
def test_what_is_kept_is_right_though_its_blocks_are_soon_written(
    tiny_model: Path, ahead: bool, pool_blocks: int, host_blocks: int
) -> None:
    engine = HandEngine(
        tiny_model, ahead=ahead, pool_blocks=pool_blocks, host_blocks=host_blocks, max_model_len=7 * BLOCK_TOKENS
    )
    add_prompts(engine, 40)
    engine.run()
    assert engine.ledger.counters.prefix_stored_blocks


def test_no_step_waits_for_a_prefix_while_the_pool_has_other_blocks(tiny_model: Path) -> None:
    engine = HandEngine(tiny_model, pool_blocks=60)
    add_prompts(engine, 8)
    plans = []
    while engine.scheduler.has_requests():
        plans.append(engine.schedule().scheduled.kv_connector_metadata.plan)
        engine.drain()
    engine.run()
    assert engine.ledger.counters.prefix_stored_blocks > 12
    assert not any(plan.settle or plan.parks for plan in plans)


def test_a_step_that_changed_nothing_tells_nobody(tiny_model: Path) -> None:
    engine = HandEngine(tiny_model, max_num_seqs=2)
    engine.scheduler._policy_source = SimpleNamespace(policy=replace(engine.scheduler._controller.policy, policy="slo"))
    add_prompts(engine, 4)  # two wait, and by that policy nothing happens meanwhile
    side = engine.scheduler.connector.scheduler_side
    take_metrics, told = side.take_metrics, []
    side.take_metrics = lambda: told.append(take_metrics())
    for _ in range(6):
        engine.step()
    assert told[0] is not None
    assert told[2:] == [None] * 4
    engine.run()
    with_time = [payload for payload in told[6:] if payload and "layerkv_decide_seconds" in payload["counters"]]
    assert with_time, "it is told with what happens next"
