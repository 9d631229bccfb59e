"""What other tests stand on: the engine driven by hand moves KV as a real one does, and notices a wrong number."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from layerkv.core.residency import Residency
from tests.vllm.checked_model import answer, truth
from tests.vllm.hand_engine import HandEngine

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_every_way_of_moving_kv_leaves_every_answer_right(tiny_model: Path, ahead: bool) -> None:
    engine = HandEngine(tiny_model, ahead=ahead, pool_blocks=30, fetch_steps=2)
    for index in range(12):
        engine.add(f"r{index}", [index, *range(60 + 7 * index)], max_tokens=20)
    engine.force(layered=["r0"])
    engine.step()
    engine.step()
    running = [request.request_id for request in engine.scheduler.running]
    moved = next(name for name in running if engine.residency(name) is Residency.RESIDENT)
    engine.force(store_ahead=[moved])
    engine.step()
    engine.force(park=[moved], recompute=[name for name in running if name != moved][:1])
    engine.run()
    engine.forget_on_device()
    engine.add("again", [3, *range(60 + 21)])
    engine.run()
    counters = engine.ledger.counters
    assert min(counters.parks, counters.fetches, counters.layered_admissions, counters.recomputes) > 0
    assert min(counters.stored_ahead_blocks, counters.prefix_hit_blocks) > 0


def test_while_kv_is_fetched_decisions_stand(tiny_model: Path) -> None:
    engine = HandEngine(tiny_model, fetch_steps=10)
    for name in ("a", "b"):
        engine.add(name, [ord(name), *range(60)], max_tokens=40)
    for _ in range(3):
        engine.step()
    engine.force(park=["a"])
    while engine.residency("a") is not Residency.FETCHING:
        engine.step()
    decided_in, decide = list[int](), engine.scheduler._controller.decide
    with mock.patch.object(
        engine.scheduler._controller,
        "decide",
        lambda *args, **kwargs: decided_in.append(engine.scheduler.current_step) or decide(*args, **kwargs),
    ):
        num_steps = 0
        while engine.residency("a") is Residency.FETCHING:
            engine.step()
            num_steps += 1
    assert num_steps >= 8
    assert 1 <= len(decided_in) <= 1 + num_steps // 4
    engine.run()


def test_a_single_wrong_number_is_noticed(tiny_model: Path) -> None:
    engine = HandEngine(tiny_model)
    engine.add("first", [*range(40)])
    engine.run()
    cached = next(b for b in engine.scheduler.kv_cache_manager.block_pool.blocks if b.block_hash is not None)
    engine.worker.device[cached.block_id, 3] += 1
    with pytest.raises(AssertionError, match="vLLM's prefix cache holds wrong KV"):
        engine.check_kept_kv()
    engine.add("shares", [*range(40), 1])
    with pytest.raises(AssertionError, match="shares was answered wrong tokens"):
        engine.run()


def test_what_is_right_depends_on_every_token_before() -> None:
    assert truth([1, 2, 3])[2] != truth([4, 2, 3])[2]
    assert answer([1, 2, 3], 5)[:2] == answer([1, 2, 3], 2)
    assert answer([1, 2, 3], 5)[1:] == answer([1, 2, 3, *answer([1, 2, 3], 1)], 4)
