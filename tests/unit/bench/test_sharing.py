"""Engines that share memory: what they are asked for, and what is made of what was seen."""

from __future__ import annotations

import pytest

from layerkv.bench import sharing
from layerkv.bench.records import Counters, LoadRun, RequestRecord
from layerkv.bench.sharing_load import NUM_BURSTS, PERIOD_S, WITHIN_S, Bursts, planned


def test_bursts_come_to_one_engine_after_the_other_and_are_the_same_for_every_arm() -> None:
    bursts = Bursts(num_engines=3, burst_requests=4)
    for engine in range(3):
        requests = planned(bursts, engine, seed=1)
        assert requests == planned(bursts, engine, seed=1)
        assert len(requests) == NUM_BURSTS * 4
        for index, request in enumerate(requests):
            begins_s = (index // 4 * 3 + engine) * PERIOD_S
            assert begins_s <= request.arrival_s <= begins_s + WITHIN_S
    assert planned(bursts, 0, seed=1) != planned(bursts, 0, seed=2)


def test_counters_of_layerkvs_arms_are_layerkvs() -> None:
    assert {arm: sharing._kind(arm) for arm in sharing.ARMS} == {
        "static_stock": "stock",
        "static": "layerkv",
        "shared": "layerkv",
    }


def made_run(arm: str, engine: int, *, ttft_s: float, second_s: float, digest: str = "same") -> LoadRun:
    times = [1.0 + ttft_s, 1.0 + ttft_s + second_s, 1.0 + ttft_s + second_s + 0.01]
    request = RequestRecord(
        request_id="r", arrival_s=1.0, prompt_tokens=3, output_tokens=3, token_times_s=times, token_digest=digest
    )
    counters = Counters()
    return LoadRun(engine=arm, point=f"{engine}", seed=0, requests=[request], samples=[], counters=counters, wall_s=9.0)


@pytest.mark.parametrize("digest", ["same", "other"])
def test_ratios_are_of_all_engines_together_within_a_seed(digest: str) -> None:
    seen = {"static_stock": (1.2, 0.1), "static": (0.3, 0.8), "shared": (0.3, 0.2)}
    runs = {
        arm: {0: {engine: made_run(arm, engine, ttft_s=ttft, second_s=second) for engine in range(2)}}
        for arm, (ttft, second) in seen.items()
    }
    runs["shared"][0][1] = made_run("shared", 1, ttft_s=0.3, second_s=0.2, digest=digest)
    result = sharing._result(Bursts(2, 1), runs)
    assert result.ratios.ttft_mean_speedup_over_stock.median == pytest.approx(4.0)
    assert result.ratios.ttft_mean_over_static.median == pytest.approx(1.0)
    assert result.ratios.second_token_speedup_over_static.median == pytest.approx(4.0)
    assert result.tokens_equal is (digest == "same")
    assert list(result.shared) == ["0", "1"]
