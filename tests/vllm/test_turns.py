"""Turns on vLLM's real scheduler and block manager: streams share the pool, and what goes wrong costs no token."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerkv.core.cost import Curve
from layerkv.core.residency import Residency
from tests.fakes.tiny_scheduler import profile
from tests.vllm.hand_engine import HandEngine

pytestmark = pytest.mark.vllm

BLOCK_BYTES = 6 * 2 * 16 * 2 * 64 * 4


def engine_of(model: Path, *, ahead: bool, host_blocks: int = 200) -> HandEngine:
    """A pool of thirty blocks, and costs that are known: a step takes 10 ms, a block half a millisecond to copy."""
    link = Curve([(BLOCK_BYTES, 5e-4)])
    costs = model.parent / "costs.json"
    costs.write_text(profile(store=link, load=link, decode_context=Curve([(100_000, 1e-6)])).to_json())
    return HandEngine(
        model,
        ahead=ahead,
        pool_blocks=30,
        host_blocks=host_blocks,
        fetch_steps=2,
        extra_config={"cost_profile": str(costs)},
    )


def crowd(model: Path, *, ahead: bool, host_blocks: int = 200) -> HandEngine:
    """Eight streams of eleven blocks each at the end, whose readers take a token in 200 ms."""
    engine = engine_of(model, ahead=ahead, host_blocks=host_blocks)
    for index in range(8):
        engine.add(f"r{index}", [index, *range(50)], max_tokens=120)
    return engine


def parked_in_mid_stream(engine: HandEngine, least_tokens: int = 5) -> str:
    """A request that has been parked after so many tokens."""
    for _ in range(500):
        found = [r for r in engine.requests if engine.residency(r) is Residency.PARKED]
        found = [r for r in found if len(engine.tokens[r]) >= least_tokens]
        if found:
            return found[0]
        engine.step()
    raise AssertionError("nobody is parked")


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_streams_take_turns_keep_their_copies_and_every_answer_is_right(tiny_model: Path, ahead: bool) -> None:
    engine = crowd(tiny_model, ahead=ahead)
    name = parked_in_mid_stream(engine)
    while engine.residency(name) is not Residency.RESIDENT:
        engine.step()
    assert engine.ledger.num_host_blocks_of(name) > 0, "what its fetch has loaded stays in host memory"
    engine.run(3_000)
    counters = engine.ledger.counters
    assert counters.fetches > 6
    assert counters.stored_ahead_blocks > counters.stored_blocks / 2
    assert counters.recomputes == 0


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_a_fetch_that_fails_while_its_reader_is_dry_costs_time_and_no_token(tiny_model: Path, ahead: bool) -> None:
    engine = crowd(tiny_model, ahead=ahead)
    name = parked_in_mid_stream(engine)
    engine.held.add(name)
    made = len(engine.tokens[name])
    for _ in range(20 * (made + 5)):  # its reader takes a token in twenty steps
        engine.step()
    tracked = engine.scheduler._controller.tracked[name]
    assert tracked.reader.wants_next_s < engine._now_s
    engine.held.clear()
    engine.force(fetch=[name])
    engine.fail_fetches = True
    before = engine.ledger.counters.recomputes
    engine.run(3_000)
    assert engine.ledger.counters.recomputes > before
    assert len(engine.tokens[name]) == 120


@pytest.mark.parametrize("where", [Residency.RESIDENT, Residency.FETCHING, Residency.PARKED])
def test_clients_that_hang_up_in_mid_rotation_leave_nothing_behind(tiny_model: Path, where: Residency) -> None:
    engine = crowd(tiny_model, ahead=True)
    parked_in_mid_stream(engine)
    for _ in range(500):
        found = [r for r in engine.requests if engine.residency(r) is where and engine.ledger.num_host_blocks_of(r)]
        if found:
            break
        engine.step()
    engine.abort(found[0])
    engine.run(3_000)


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("host_blocks", [12, 40])
def test_where_host_memory_fills_in_mid_rotation_every_answer_is_right(
    tiny_model: Path, host_blocks: int, ahead: bool
) -> None:
    crowd(tiny_model, ahead=ahead, host_blocks=host_blocks).run(6_000)


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_prompts_that_share_host_prefixes_take_turns_too(tiny_model: Path, ahead: bool) -> None:
    """Their copies are shared with the prefix cache: they do not give way as their own would."""
    engine = engine_of(tiny_model, ahead=ahead, host_blocks=40)
    engine.add("first", [*range(65)], max_tokens=2)
    engine.run()
    engine.forget_on_device()
    for index in range(6):
        engine.add(f"r{index}", [*range(64), index, *range(20)], max_tokens=100)
        engine.force(layered=[f"r{index}"])
        engine.step()
    engine.run(6_000)
    assert engine.ledger.counters.prefix_hit_blocks > 0
