"""Places for LoRA adapters in a step's batch: vLLM's scheduler ends the engine if more adapters run than there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerkv.core.residency import Residency
from tests.vllm.hand_engine import HandEngine

pytestmark = pytest.mark.vllm


@pytest.fixture
def engine(tiny_model: Path) -> HandEngine:
    """With a place for one adapter. In the step in which a request with the first one is fetched, a prompt with the
    second has begun; it takes 20 tokens a step. Another request decodes."""
    engine = HandEngine(tiny_model, fetch_steps=2, enable_lora=True, max_loras=1, max_lora_rank=8)
    engine.add("fetched", range(40), max_tokens=30, adapter=1)
    engine.step()
    engine.held = {"fetched"}
    engine.force(park=["fetched"])
    engine.step()
    engine.add("decodes", range(2, 12), max_tokens=100)
    engine.step()
    engine.add("prompt", range(1, 101), max_tokens=10, adapter=2)
    engine.force(fetch=["fetched"], prefill_tokens=20)
    assert engine.schedule().request_ids == {"decodes", "prompt"}
    engine.process()
    assert engine.residency("fetched") is Residency.FETCHING
    engine.force(prefill_tokens=20)
    engine.step()
    assert engine.residency("fetched") is Residency.RESIDENT, "it has arrived, and waits for its adapter's place"
    engine.held = set()
    return engine


def test_a_prompt_that_a_step_leaves_out_keeps_its_adapters_place(engine: HandEngine) -> None:
    engine.force(prefill_tokens=0)
    assert engine.schedule().request_ids == {"decodes"}
    engine.process()
    engine.force(prefill_tokens=20)
    assert engine.schedule().request_ids == {"decodes", "prompt"}
    engine.process()
    assert engine.scheduler.lora_config.max_loras == 1
    engine.run()


def test_who_is_fetched_gets_the_next_place_for_adapters(engine: HandEngine) -> None:
    """And not those who come meanwhile with the adapter that has it."""
    for index in range(40):
        engine.add(f"other{index}", [index, *range(20)], max_tokens=6, adapter=2)
        engine.step()
        if len(engine.tokens["fetched"]) > 1:
            break
    else:
        raise AssertionError("others came in before it in each step")
    engine.run(2000)
