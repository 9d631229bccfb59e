"""The fluid policy where steps, or loads, take as long as a slice: a turn makes a token all the same."""

from __future__ import annotations

import random
from typing import Any

import pytest

from layerkv.core.cost import Curve
from layerkv.scheduler.policy import decide
from layerkv.sim.engine import SimRequest
from tests.fakes.snapshots import cost, resident, snapshot
from tests.fakes.tiny_scheduler import BLOCK_TOKENS, TinyScheduler, job, profile

POOL = 20


def _load(rng: random.Random) -> list[SimRequest]:
    jobs: list[SimRequest] = []
    for index in range(24):
        num_prompt = rng.randint(1, POOL * BLOCK_TOKENS // 3)
        num_output = rng.randint(1, 20)
        objectives: dict[str, Any] = {"ttft_s": rng.choice((1.0, 5.0)), "tpot_s": rng.choice((0.2, 1.0, 4.0))}
        jobs.append(job(f"r{index}", num_prompt, num_output, rng.uniform(0.0, 20.0), **objectives))
    return jobs


@pytest.mark.parametrize("frees_are_deferred", [False, True], ids=["in turn", "ahead"])
def test_nobody_is_parked_for_another_before_it_made_a_token(frees_are_deferred: bool) -> None:
    """Each step fails the test if one is. A step of a second is longer than the least slice, so a request whose load
    had just ended was taken to have had its turn, though it had not run."""
    num_parks = 0
    for seed in range(12):
        rng = random.Random(seed)
        engine = {"slots": rng.choice((4, 16)), "frees_are_deferred": frees_are_deferred}
        costs = profile(step_s=rng.choice((0.3, 1.0)))
        scheduler = TinyScheduler(_load(rng), pool_blocks=POOL, num_host_blocks=200, costs=costs, **engine)
        num_parks += scheduler.run(max_steps=20_000).parks
        scheduler.check_is_empty()
    assert num_parks > 50


def test_a_profile_in_which_an_empty_step_takes_no_time_ends_no_engine() -> None:
    """A fit may find 0 for what every step takes. While all residents compute prompts, nothing is left of a step."""
    residents = [resident(f"r{i}") for i in range(4)]
    free = cost(step_s=0.0, tokens=Curve([(0, 0.0), (1, 1e-4)]))
    s = snapshot(policy="fluid", resident=residents, num_resident=4, free_blocks=20, cost=free)
    assert decide(s).store_ahead
