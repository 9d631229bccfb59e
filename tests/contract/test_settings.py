"""The contract with vLLM, setting by setting: no token lost or wrong, every block back, and what was to happen did."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.contract.mixes import SETTINGS, run_mix
from tests.vllm.checked_groups import CHUNK, GroupsEngine

pytestmark = pytest.mark.vllm

SEEDS = range(3)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_answer_is_right_and_the_setting_did_what_it_is_there_for(tiny_model: Path, name: str) -> None:
    setting = SETTINGS[name]
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        seen.update(run_mix(tiny_model, setting, seed))
    assert not {what: seen[what] for what, least in setting.least.items() if seen[what] < least}, dict(seen)


@pytest.mark.parametrize("kinds", [("chunk",), ("state", "chunk")], ids="-".join)
def test_a_prompt_in_the_zone_that_keeps_nothing_when_a_chunk_ends_is_answered_right(
    tiny_model: Path, kinds: tuple[str, ...]
) -> None:
    """The steps that end there store nothing out of the lanes, and load into them all the same."""
    engine = GroupsEngine(
        tiny_model, kinds=kinds, pool_blocks=30, max_num_batched_tokens=CHUNK // 3, enable_prefix_caching=False
    )
    engine.add("a", range(2 * CHUNK + 5), max_tokens=4)
    engine.force(layered=["a"])
    plans = []
    while not engine.tokens["a"]:
        plans.append(engine.schedule().scheduled.kv_connector_metadata.plan)
        engine.process()
    assert engine.ledger.counters.layered_admissions == 1
    assert [len(plan.loads) > 0 for plan in plans] == [False, True, True, False, True, True, False]
    assert [len(plan.stores) > 0 for plan in plans] == [True, True, False, True, True, False, True]
    assert all(plan.is_layered for plan in plans)
    engine.run()
