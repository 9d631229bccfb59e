"""Streams take turns at slots on vLLM's real scheduler: where ``max_num_seqs`` binds and the pool does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from layerkv.core.cost import Curve
from layerkv.core.residency import Residency
from tests.fakes.tiny_scheduler import profile
from tests.vllm.hand_engine import HandEngine

pytestmark = pytest.mark.vllm

BLOCK_BYTES = 6 * 2 * 16 * 2 * 64 * 4
WAYS = pytest.mark.parametrize(
    "how",
    [{"ahead": False}, {"ahead": True}, {"ahead": False, "v2": True}, {"ahead": True, "v2": True}],
    ids=["in turn", "ahead", "V2 in turn", "V2 ahead"],
)


class SlotEngine(HandEngine):
    """Costs are known: a step takes 10 ms. No step has more requests than slots."""

    def __init__(self, model: Path, *, slots: int, v2: bool = False, **engine: Any) -> None:
        link = Curve([(BLOCK_BYTES, 5e-4)])
        costs = model.parent / "costs.json"
        costs.write_text(profile(store=link, load=link, decode_context=Curve([(100_000, 1e-6)])).to_json())
        extra = {"cost_profile": str(costs)}
        super().__init__(model, max_num_seqs=slots, extra_config=extra, **{"pool_blocks": 200, **engine})
        self.slots = slots
        if v2:
            self.scheduler.use_v2_model_runner, self.worker.num_places = True, slots
        self.seen_paused: set[str] = set()

    @property
    def paused(self) -> set[str]:
        return self.scheduler._controller.paused

    def schedule(self) -> Any:
        step = super().schedule()
        assert len(step.request_ids) <= self.slots
        assert not step.request_ids & self.paused
        self.seen_paused |= self.paused
        return step

    def until_paused(self, least_tokens: int = 1) -> str:
        for _ in range(500):
            for name in sorted(self.paused):
                if len(self.tokens[name]) >= least_tokens:
                    return name
            self.step()
        raise AssertionError("nobody is paused")


def crowd(model: Path, *, num: int = 8, slots: int = 3, **engine: Any) -> SlotEngine:
    made = SlotEngine(model, slots=slots, **engine)
    for index in range(num):
        made.add(f"r{index}", [index, *range(50)], max_tokens=60)
    return made


@WAYS
@pytest.mark.parametrize("slots", [1, 3])
def test_prompts_get_a_slot_at_once_and_every_answer_is_right(tiny_model: Path, how: Any, slots: int) -> None:
    engine = crowd(tiny_model, slots=slots, **how)
    for _ in range(40):
        engine.step()
    assert all(engine.tokens.values()), "after 40 steps some wait for their first token"
    engine.run(3_000)
    assert engine.seen_paused
    assert engine.ledger.counters.parks == engine.ledger.counters.recomputes == 0
    assert not engine.paused


@WAYS
def test_clients_that_hang_up_while_paused_leave_nothing_behind(tiny_model: Path, how: Any) -> None:
    engine = crowd(tiny_model, **how)
    engine.abort(engine.until_paused())
    engine.run(3_000)
    assert not engine.paused


@WAYS
def test_a_reset_makes_paused_requests_start_over(tiny_model: Path, how: Any) -> None:
    engine = crowd(tiny_model, **how)
    engine.until_paused()
    engine.drain()
    assert engine.reset_prefix_cache(reset_running_requests=True)
    assert not engine.paused
    engine.run(3_000)


@WAYS
def test_where_the_pool_runs_short_the_paused_are_parked_first(tiny_model: Path, how: Any) -> None:
    engine = crowd(tiny_model, num=10, slots=4, pool_blocks=45, **how)
    parked_from: list[str] = []
    engine.scheduler.residency_listener = lambda name, old, new, _: (
        parked_from.append(name) if (old, new) == ("resident", "parked") else None
    )
    before: set[str] = set()
    first: str | None = None
    for _ in range(3_000):
        if not engine.scheduler.has_requests():
            break
        before = set(engine.paused)
        engine.step()
        if parked_from and first is None:
            first = parked_from[0]
            assert first in before
    assert first is not None
    engine.run()
    assert engine.ledger.counters.recomputes == 0


@WAYS
def test_paused_in_mid_rotation_of_a_small_pool(tiny_model: Path, how: Any) -> None:
    engine = crowd(tiny_model, num=10, slots=2, pool_blocks=30, **how, host_blocks=60)
    engine.run(6_000)
    assert engine.seen_paused


@WAYS
def test_a_paused_request_can_be_preempted_and_parked(tiny_model: Path, how: Any) -> None:
    engine = crowd(tiny_model, **how)
    name = engine.until_paused()
    engine.force(park=[name])
    engine.schedule()
    assert engine.residency(name) is Residency.PARKED
    engine.process()
    other = engine.until_paused()
    engine.force(recompute=[other])
    engine.run(3_000)
    assert engine.ledger.counters.recomputes == 1


@WAYS
def test_prompts_share_the_blocks_of_a_paused_one(tiny_model: Path, how: Any) -> None:
    engine = crowd(tiny_model, slots=2, **how)
    name = engine.until_paused(least_tokens=2)
    engine.add("twin", [*engine.requests[name].prompt_token_ids, 7, 8], max_tokens=40)
    engine.run(3_000)
    assert len(engine.tokens["twin"]) == 40


@WAYS
def test_a_policy_that_knows_no_turns_lets_the_paused_go_on(tiny_model: Path, how: Any) -> None:
    engine = crowd(tiny_model, **how)
    engine.until_paused()
    source = engine.scheduler._policy_source
    source._policy = msgspec.structs.replace(source.policy, policy="slo")
    engine.run(3_000)
    assert not engine.paused
