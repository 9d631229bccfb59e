"""How full the pool is while nobody can know how long outputs become: as full as stock vLLM's, which does not ask."""

from __future__ import annotations

import random
from typing import Any

import pytest

from layerkv.scheduler.reasons import End
from layerkv.sim.engine import Scheduled, SimRequest, VirtualEngine
from layerkv.sim.layered import LayeredEngine
from layerkv.sim.stock import StockEngine
from tests.fakes.tiny_scheduler import job, policy, setup

NUM_REQUESTS = 300
POOL: dict[str, Any] = {"num_host_blocks": 4000, "budget_tokens": 2048, "slots": 256}


def load(seed: int, end: End, max_tokens: int) -> list[SimRequest]:
    """Many more than the pool holds, of 20 to 100 tokens, whatever they are allowed."""
    rng = random.Random(seed)
    return [
        job(
            f"r{i}",
            rng.randint(100, 280),
            rng.randint(20, 100),
            i / 40,
            max_tokens=max_tokens,
            ttft_s=2.0,
            tpot_s=0.2,
            end=end,
        )
        for i in range(NUM_REQUESTS)
    ]


class Counting:
    """Counts the requests computed per step while more wait than the pool holds."""

    num_steps = 0
    num_computed = 0

    def _execute(self: Any, scheduled: Scheduled) -> None:
        is_busy = self.num_under_way > NUM_REQUESTS // 3
        step = self.step
        super()._execute(scheduled)  # type: ignore[misc]
        if is_busy:
            self.num_steps += self.step - step
            self.num_computed += len(scheduled) * (self.step - step)

    @property
    def per_step(self) -> float:
        return self.num_computed / self.num_steps


class CountingStock(Counting, StockEngine):
    pass


class CountingLayered(Counting, LayeredEngine):
    pass


def served(engine: VirtualEngine) -> Any:
    engine.run()
    return engine


@pytest.mark.parametrize("prediction", ["quantile", "none"])
@pytest.mark.parametrize("end", [End.FINISHED, End.LEFT])
def test_an_unknown_length_keeps_no_pool_empty(end: End, prediction: str) -> None:
    requests = load(1, end, max_tokens=4096)
    stock = served(CountingStock(setup(pool_blocks=500, zone_blocks=0, **POOL), requests))
    layerkv = served(
        CountingLayered(setup(pool_blocks=475, zone_blocks=25, **POOL), requests, policy(length_prediction=prediction))
    )
    assert layerkv.per_step >= 0.85 * stock.per_step
    assert layerkv.now_s <= stock.now_s / 0.97
