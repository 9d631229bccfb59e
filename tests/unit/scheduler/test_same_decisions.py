"""The rules decide as the policy before them did, on snapshots of all kinds."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import pytest

from layerkv.core.cost import CostView
from layerkv.scheduler.limits import PolicyLimits
from layerkv.scheduler.policy import decide
from layerkv.scheduler.snapshot import (
    LayeredRequest,
    ParkedRequest,
    PrefixHit,
    ResidentRequest,
    Snapshot,
    WaitingRequest,
)
from tests.fakes import policy_before
from tests.fakes.snapshots import NOW_S, Flat, snapshot
from tests.fakes.tiny_scheduler import profile

NUM_SNAPSHOTS = 1_000


def made_up(rng: random.Random) -> Snapshot:
    """Any engine: busy or not, with few ranks or one, paused, with long contexts, with costs known or not."""
    ranks = rng.choice(([0], [0], [0, 1, 5]))
    pool = rng.choice((20, 60, 100))
    zone = rng.choice((0, 8, 40))
    host = rng.choice((10, 60, 200))
    long_contexts = rng.random() < 0.3

    def due() -> float:
        return NOW_S + rng.choice((-5.0, -0.1, 0.02, 0.3, 2.0, 30.0)) * rng.random()

    def common() -> dict[str, Any]:
        return {"weight": rng.choice((1.0, 1.0, 4.0)), "rank": rng.choice(ranks), "tokens_left": rng.randint(1, 300)}

    def waiting(i: int) -> WaitingRequest:
        blocks = rng.randint(1, pool if rng.random() < 0.2 else 20)
        most = pool + rng.randint(1, 30) if long_contexts and rng.random() < 0.2 else 0
        return WaitingRequest(
            f"w{i}",
            due(),
            blocks * 16 - rng.randint(0, 15),
            blocks,
            can_layer=rng.random() < 0.85,
            prefill_cost_s=blocks * 16 * 1e-4,
            may_refuse=rng.random() < 0.2,
            most_blocks=most,
            in_one_step=rng.random() < 0.1,
            **common(),
        )

    def resident(i: int) -> ResidentRequest:
        blocks = rng.randint(1, pool if rng.random() < 0.1 else 15)
        return ResidentRequest(
            f"r{i}",
            due(),
            blocks,
            rng.choice((0, 10, 40, 100)),
            can_park=rng.random() < 0.85,
            num_tokens=blocks * 16 - rng.randint(0, 15),
            num_stored=rng.choice((0, 0, blocks // 2)),
            **common(),
        )

    def layered(i: int) -> LayeredRequest:
        blocks = rng.randint(1, 20)
        return LayeredRequest(
            f"l{i}",
            rng.random() < 0.6,
            blocks,
            blocks,
            rng.random() < 0.3,
            rng.random() < 0.3,
            long_contexts and rng.random() < 0.3,
        )

    prompts = sorted((waiting(i) for i in range(rng.choice((0, 1, 5, 20)))), key=lambda w: (w.rank, w.deadline_s))
    parked = sorted(
        (ParkedRequest(f"p{i}", due(), rng.randint(1, 20), **common()) for i in range(rng.choice((0, 1, 4, 12)))),
        key=lambda p: (p.rank, p.deadline_s),
    )
    residents = [resident(i) for i in range(rng.choice((0, 1, 3, 10)))]
    num_decodes = rng.randint(0, len(residents) + 2)
    cost = CostView(profile(block_copy_s=rng.choice((1e-5, 5e-4, 1e-2))), 1.0, rng.choice((0.5, 1.0, 3.0)))
    return snapshot(
        mode=rng.choice(("auto", "auto", "resident", "layered")),
        pool_blocks=pool,
        free_blocks=rng.randint(0, pool),
        growth_blocks=rng.choice((0, 0, 1, 5, pool)),
        reserved_blocks=rng.choice((0, 0, 3)),
        zone_blocks=zone,
        free_zone_blocks=rng.randint(0, zone),
        host_blocks=host,
        free_host_blocks=rng.randint(0, host),
        free_slots=rng.choice((0, 1, 4, 16)),
        budget_tokens=rng.choice((64, 512, 2048)),
        streamed_decode=rng.random() < 0.3,
        long_contexts=long_contexts,
        slo_scheduling=rng.random() < 0.8,
        frees_are_deferred=rng.random() < 0.5,
        decode_tokens=num_decodes,
        decode_context=num_decodes * 100,
        prefilling_tokens=rng.choice((0, 0, 100)),
        decode_slack_s=rng.choice((float("inf"), 0.0, 0.02, 0.1)),
        tightest_tpot_s=rng.choice((float("inf"), 0.02, 0.2)),
        steps_without_prefill=rng.choice((0, 8)),
        is_paused=rng.random() < 0.1,
        can_exchange=rng.random() < 0.8,
        can_store_ahead=rng.random() < 0.8,
        cost=cost if rng.random() < 0.8 else None,
        num_resident=len(residents),
        waiting=prompts,
        parked=parked,
        resident=residents,
        layered=[layered(i) for i in range(rng.choice((0, 0, 1, 4)))],
        hits={
            w.request_id: PrefixHit(rng.randint(0, w.num_blocks - 1), 0, rng.randint(0, 2))
            for w in prompts
            if rng.random() < 0.3
        },
        overtaken={view.request_id: rng.choice((1, 2, 3)) for view in (*prompts, *parked) if rng.random() < 0.2},
    )


@pytest.mark.parametrize("part", range(4))
def test_decisions_are_those_of_the_policy_before(part: int) -> None:
    rng = random.Random(part)
    limits = PolicyLimits(max_overtakes=3)
    before = policy_before.PolicyLimits(max_overtakes=3)
    for _ in range(NUM_SNAPSHOTS):
        s = made_up(rng)
        assert asdict(decide(s, limits)) == asdict(policy_before.decide(Flat(s), before)), s
