"""How the adapter holds prompts to their share of a step: what vLLM's own scheduler then computes of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerkv.core.residency import Residency
from tests.vllm.hand_engine import HandEngine

pytestmark = pytest.mark.vllm


def scheduled(engine: HandEngine) -> dict[str, int]:
    """Tokens of each request in the next step."""
    step = engine.schedule()
    engine.process()
    return dict(step.scheduled.num_scheduled_tokens)


def two_prompts_and_one_that_decodes(model: Path, **engine_args: int) -> HandEngine:
    """The prompts have 100 tokens, 20 a step, and began first."""
    engine = HandEngine(model, long_prefill_token_threshold=20, **engine_args)
    engine.add("a", range(100))
    engine.add("b", range(1, 101))
    assert scheduled(engine) == {"a": 20, "b": 20}
    engine.add("decodes", range(2, 12), max_tokens=100)
    assert scheduled(engine) == {"a": 20, "b": 20, "decodes": 10}
    return engine


@pytest.fixture
def engine(tiny_model: Path) -> HandEngine:
    return two_prompts_and_one_that_decodes(tiny_model)


def test_prompts_share_what_is_decided(engine: HandEngine) -> None:
    engine.force(prefill_tokens=30)
    assert scheduled(engine) == {"a": 15, "b": 15, "decodes": 1}
    assert scheduled(engine) == {"a": 20, "b": 20, "decodes": 1}, "vLLM's own limit holds again"
    engine.run()


def test_prompts_go_last(engine: HandEngine) -> None:
    """They began first, and a share is a token at least: the second has none left, and not the one that decodes."""
    engine.force(prefill_tokens=1)
    assert scheduled(engine) == {"decodes": 1, "a": 1}
    engine.run()


def test_with_no_tokens_for_prompts_vllm_sees_none_of_them(engine: HandEngine) -> None:
    for _ in range(3):
        engine.force(prefill_tokens=0)
        assert scheduled(engine) == {"decodes": 1}
    assert scheduled(engine) == {"a": 20, "b": 20, "decodes": 1}
    engine.run()


def parked_before(model: Path, *names: str, **engine_args: int) -> HandEngine:
    """One request is parked, and then prompts of 100 tokens begin, 20 a step."""
    engine = HandEngine(model, long_prefill_token_threshold=20, **engine_args)
    engine.add("parked", range(5, 15), max_tokens=100)
    engine.step()
    engine.held = {"parked"}
    engine.force(park=["parked"])
    engine.step()
    for first, name in enumerate(names):
        engine.add(name, range(first, first + 100))
    assert scheduled(engine) == dict.fromkeys(names, 20)
    assert engine.residency("parked") is Residency.PARKED
    return engine


@pytest.mark.parametrize("prefill_tokens", [5, 4])
def test_prompts_leave_the_token_without_which_no_fetch_begins(tiny_model: Path, prefill_tokens: int) -> None:
    engine = parked_before(tiny_model, "a", "b")
    engine.force(prefill_tokens=prefill_tokens, fetch=["parked"])
    assert scheduled(engine) == {"a": 2, "b": 2}
    assert engine.residency("parked") is not Residency.PARKED
    engine.held.clear()
    engine.run()


def test_prompts_without_tokens_leave_it_too(tiny_model: Path) -> None:
    """And a layered one would load all its chunks for a single token."""
    engine = parked_before(tiny_model, "a", "b")
    engine.add("decodes", range(2, 12), max_tokens=100)
    assert scheduled(engine) == {"a": 20, "b": 20, "decodes": 10}
    engine.force(prefill_tokens=0, fetch=["parked"])
    assert scheduled(engine) == {"decodes": 1}
    assert engine.residency("parked") is not Residency.PARKED
    engine.held.clear()
    engine.run()


def test_prompts_that_vllm_does_not_see_keep_their_places(tiny_model: Path) -> None:
    """Whoever came in for them would be one too many, once they are seen again."""
    engine = parked_before(tiny_model, "a", "b", max_num_seqs=3)
    engine.add("decodes", range(2, 12), max_tokens=100)
    assert scheduled(engine) == {"a": 20, "b": 20, "decodes": 10}
    engine.force(prefill_tokens=0, fetch=["parked"])
    assert scheduled(engine) == {"decodes": 1}
    assert engine.residency("parked") is Residency.PARKED
    engine.held.clear()
    engine.run()


def test_the_engine_never_stands_still(tiny_model: Path) -> None:
    engine = HandEngine(tiny_model, long_prefill_token_threshold=20)
    engine.add("a", range(100))
    engine.add("b", range(1, 101))
    engine.step()
    engine.force(prefill_tokens=0)
    assert scheduled(engine) == {"a": 1}
    engine.run()


def test_tokens_of_a_fetch_that_failed_are_not_cut_to_a_share(tiny_model: Path) -> None:
    """They are to be computed though no prompt runs."""
    engine = HandEngine(tiny_model)
    engine.add("fetched", range(100), max_tokens=20)
    engine.add("decodes", range(2, 12), max_tokens=100)
    engine.step()
    engine.force(park=["fetched"])
    engine.step()
    engine.forget_on_device()
    engine.fail_fetches = True
    engine.step()
    while "fetched" not in (tokens := scheduled(engine)):
        engine.force(prefill_tokens=64)
    assert tokens["decodes"] == 1
    assert tokens["fetched"] >= 64
    engine.run()
