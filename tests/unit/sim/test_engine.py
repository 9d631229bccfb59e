"""The virtual engines in cases small enough to reckon by hand."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest

from layerkv.config import SloClass, SloPolicy
from layerkv.core.cost import CostProfile, CostView, Curve, StepWork, chunk_pairs
from layerkv.core.geometry import KVGeometry
from layerkv.figures import fluidity_index, num_on_time, reader_of
from layerkv.sim.engine import EngineSetup, SimRequest, VirtualEngine
from layerkv.sim.layered import LayeredEngine
from layerkv.sim.outcome import SimOutcome
from layerkv.sim.stock import StockEngine

CHAT = SloClass(name="chat", ttft_s=1.0, tpot_s=0.1)
POLICY = SloPolicy(classes={"chat": CHAT}, default_class="chat")
BLOCK_BYTES = 4096
# A step takes 10 ms and 1 ms per token; a block is loaded in 1 ms and stored in half of that.
PLAIN = CostProfile(
    name="by hand",
    step_s=0.01,
    request_s=0.0,
    tokens=Curve([(1000, 1.0)]),
    decode_context=Curve([]),
    pair_s=0.0,
    store=Curve([(BLOCK_BYTES, 0.0005)]),
    load=Curve([(BLOCK_BYTES, 0.001)]),
)
DECODE_S = 0.011
# Attention costs something too: a microsecond per token read, and a tenth of one per pair of a prompt.
ROUGH = replace(PLAIN, request_s=1e-4, decode_context=Curve([(1000, 0.001)]), pair_s=1e-7)

MakeEngine = Callable[..., VirtualEngine]


def setup(
    *, pool: int = 100, zone: int = 0, host: int = 1000, tokens: int = 2048, seqs: int = 256, stride: int = 1, **changes
) -> EngineSetup:
    """Return an engine with so many usable pool blocks of 16 tokens."""
    geometry = KVGeometry(
        num_layers=4, page_bytes=BLOCK_BYTES // 4, block_tokens=16, pool_blocks=pool + 1, zone_blocks=zone, lanes=2
    )
    return EngineSetup(geometry, host, tokens, seqs, **{"profile": PLAIN, "stride": stride, **changes})


def stock(made: EngineSetup, requests: Sequence[SimRequest], **options) -> StockEngine:
    return StockEngine(made, requests, **options)


def layered(made: EngineSetup, requests: Sequence[SimRequest], **options) -> LayeredEngine:
    return LayeredEngine(made, requests, POLICY, **options)


def request(name: str, *, at: float = 0.0, prompt: int = 100, output: int = 10, slo: SloClass = CHAT) -> SimRequest:
    return SimRequest(name, at, prompt, output, output, slo)


def mixed_load(num: int, rate: float, seed: int = 0) -> list[SimRequest]:
    rng, at = Random(seed), 0.0
    load = []
    for i in range(num):
        at += rng.expovariate(rate)
        load.append(request(f"r{i:04d}", at=at, prompt=rng.randint(20, 400), output=rng.randint(5, 80)))
    return load


def times(outcome: SimOutcome) -> list[tuple[float | None, float | None]]:
    return [(r.first_token_s, r.finish_s) for r in outcome.requests]


both = pytest.mark.parametrize("make", [stock, layered])


@both
def test_a_request_alone_takes_the_time_of_its_prefill_and_its_decode_steps(make: MakeEngine) -> None:
    outcome = make(setup(zone=20), [request("a", at=3.0, output=5)]).run(100)
    (alone,) = outcome.requests
    assert alone.ttft_s == pytest.approx(0.11)
    assert alone.finish_s == pytest.approx(3.11 + 4 * DECODE_S)
    assert alone.tpot_s == pytest.approx(DECODE_S)
    assert outcome.num_steps == 1 + 1 + 4  # one of them finds nothing to do before the request comes
    assert (outcome.preemptions, outcome.parks) == (0, 0)


@both
def test_the_time_of_a_request_alone_is_the_sum_of_what_the_profile_says_of_its_steps(make: MakeEngine) -> None:
    (alone,) = make(setup(profile=ROUGH, zone=20), [request("a", output=6)]).run(100).requests
    cost = CostView(ROUGH)
    prefill = StepWork(prefill_tokens=100, prefill_pairs=chunk_pairs(100, 0), num_prefills=1)
    decodes = [StepWork(num_decodes=1, decode_context=100 + made) for made in range(1, 6)]
    assert alone.ttft_s == pytest.approx(cost.step_s(prefill))
    assert alone.finish_s == pytest.approx(cost.step_s(prefill) + sum(map(cost.step_s, decodes)))


@both
def test_a_prompt_longer_than_a_step_is_computed_in_chunks(make: MakeEngine) -> None:
    (alone,) = make(setup(tokens=40, profile=ROUGH, zone=20), [request("a", output=1)]).run(100).requests
    cost = CostView(ROUGH)
    chunks = [(40, 0), (40, 40), (20, 80)]
    steps = [StepWork(prefill_tokens=c, prefill_pairs=chunk_pairs(c, before), num_prefills=1) for c, before in chunks]
    assert alone.ttft_s == alone.finish_s == pytest.approx(sum(map(cost.step_s, steps)))


@both
def test_requests_that_fit_together_share_their_steps(make: MakeEngine) -> None:
    outcome = make(setup(zone=20), [request("a", output=3), request("b", prompt=50, output=5)]).run(100)
    prefill_s = 0.01 + 0.15
    a, b = outcome.requests
    assert a.ttft_s == b.ttft_s == pytest.approx(prefill_s)
    assert a.finish_s == pytest.approx(prefill_s + 2 * 0.012)
    assert b.finish_s == pytest.approx(prefill_s + 2 * 0.012 + 2 * 0.011)


@both
def test_a_prompt_that_comes_between_two_steps_begins_with_the_next_one(make: MakeEngine) -> None:
    comes_s = 1.0
    load = [request("a", prompt=20, output=500), request("b", at=comes_s, prompt=30, output=1)]
    a, b = make(setup(profile=ROUGH, zone=20), load).run().requests
    cost, now_s, made = CostView(ROUGH), 0.0, 0
    while now_s < comes_s:
        work = StepWork(num_decodes=1, decode_context=20 + made)
        if not made:
            work = StepWork(prefill_tokens=20, prefill_pairs=chunk_pairs(20, 0), num_prefills=1)
        now_s += cost.step_s(work)
        made += 1
    joined = StepWork(1, 20 + made, prefill_tokens=30, prefill_pairs=chunk_pairs(30, 0), num_prefills=1)
    assert b.first_token_s == pytest.approx(now_s + cost.step_s(joined), abs=1e-4)
    assert a.longest_gap_s == pytest.approx(cost.step_s(joined), abs=1e-4)


def test_stock_lets_the_second_wait_until_the_first_ends_where_kv_memory_is_for_one() -> None:
    first, second = stock(setup(pool=8), [request("a"), request("b")]).run(100).requests
    end_s = 0.11 + 9 * DECODE_S
    assert first.finish_s == pytest.approx(end_s)
    assert second.first_token_s == pytest.approx(end_s + 0.11)
    assert second.finish_s == pytest.approx(2 * end_s)


def test_stock_computes_again_what_it_preempted_when_decodes_run_out_of_blocks() -> None:
    # 7 blocks each at first, 10 in the end, and 16 in all: at 129 tokens the second has to go.
    outcome = stock(setup(pool=16), [request("a", output=60), request("b", output=60)]).run(1000)
    a, b = outcome.requests
    assert outcome.preemptions == 1
    assert (a.num_recomputes, b.num_recomputes) == (0, 1)
    assert (a.output_tokens, b.output_tokens) == (60, 60)
    # Together they make a token each for prompts of 100 and 28 more: then both blocks are full, and no third is free.
    together_s = 0.01 + 0.2 + 28 * 0.012
    a_ends_s = together_s + 31 * DECODE_S
    assert a.finish_s == pytest.approx(a_ends_s)
    assert b.longest_gap_s == pytest.approx(a_ends_s - together_s + 0.01 + 0.129)
    assert b.finish_s == pytest.approx(a_ends_s + 0.139 + 30 * DECODE_S)


def test_a_watermark_keeps_blocks_free_beside_those_that_run() -> None:
    load = [request("a"), request("b", at=0.05)]
    (_, b), (_, kept_out) = (stock(setup(pool=14), load, watermark=w).run(100).requests for w in (0.0, 0.1))
    assert b.first_token_s == pytest.approx(0.11 + 0.01 + 0.101)
    assert kept_out.first_token_s == pytest.approx(0.11 + 9 * DECODE_S + 0.11)


def test_layerkv_gives_the_second_its_first_token_at_once_and_parks_it() -> None:
    outcome = layered(setup(pool=8, zone=8), [request("a"), request("b")]).run(100)
    first, second = outcome.requests
    prefill_s = 0.01 + 0.2
    assert first.first_token_s == second.first_token_s == pytest.approx(prefill_s)
    assert first.finish_s == pytest.approx(prefill_s + 9 * DECODE_S)
    assert (outcome.parks, outcome.fetches, second.num_parks) == (1, 1, 1)
    assert (outcome.preemptions, second.num_recomputes) == (0, 0)


def test_a_fetch_takes_the_time_of_the_link_and_then_decoding_goes_on() -> None:
    outcome = layered(setup(pool=8, zone=8), [request("a"), request("b")]).run(100)
    first, second = outcome.requests
    assert first.finish_s is not None
    load_s = 7 * 0.001  # the prompt's 100 tokens
    assert second.finish_s == pytest.approx(first.finish_s + load_s + 9 * DECODE_S)
    assert outcome.stored_bytes == outcome.loaded_bytes == 7 * BLOCK_BYTES


def test_fetches_queue_on_one_link() -> None:
    # Two are parked; when the large one ends, both are fetched, one behind the other.
    load = [request("a", prompt=250, output=10), request("b"), request("c")]
    outcome = layered(setup(pool=17, zone=20), load).run(100)
    a, b, c = outcome.requests
    assert a.finish_s is not None
    assert outcome.fetches == 2
    # The first decodes beside the load of the second: 7 ms of link each, and a step under way when a load ends.
    assert b.longest_gap_s == pytest.approx(a.finish_s - 0.46 + 0.007 + DECODE_S)
    assert c.longest_gap_s >= a.finish_s - 0.46 + 0.014 + DECODE_S


def test_copies_longer_than_compute_make_a_layered_step_longer() -> None:
    slow = replace(PLAIN, store=Curve([(BLOCK_BYTES, 0.05)]))
    outcome = layered(setup(pool=8, zone=8, profile=slow), [request("a"), request("b")]).run(100)
    assert outcome.requests[1].first_token_s == pytest.approx(7 * 0.05)


def test_layerkv_parks_where_stock_recomputes() -> None:
    outcome = layered(setup(pool=16, zone=16), [request("a", output=60), request("b", output=60)]).run(1000)
    assert outcome.parks >= 1
    assert outcome.preemptions == 0
    assert [r.output_tokens for r in outcome.requests] == [60, 60]


def test_freed_blocks_come_back_a_step_later_when_frees_are_deferred() -> None:
    at_once, deferred = (
        layered(setup(pool=8, zone=8, frees_are_deferred=late), [request("a"), request("b")]).run(200)
        for late in (False, True)
    )
    assert [r.output_tokens for r in deferred.requests] == [10, 10]
    assert deferred.end_s >= at_once.end_s


@both
@pytest.mark.parametrize("seed", range(4))
def test_all_blocks_come_back_and_every_token_is_made(make: MakeEngine, seed: int) -> None:
    load = mixed_load(60, 8.0, seed)
    made = setup(pool=60, zone=30, host=200)
    engine = make(made, load)
    outcome = engine.run(20_000)
    assert sorted(engine.free_ids) == list(range(1, 61))
    assert [r.output_tokens for r in outcome.requests] == [r.output_tokens for r in load]
    assert outcome.gaps.num == sum(r.output_tokens - 1 for r in load)
    if isinstance(engine, LayeredEngine):
        engine.ledger.check()
        assert engine.ledger.num_host_blocks_used == 0


@both
def test_no_more_requests_run_than_may(make: MakeEngine) -> None:
    load = [request(f"r{i}", prompt=20, output=4) for i in range(6)]
    outcome = make(setup(seqs=2, zone=20), load).run(100)
    firsts = sorted(round(r.first_token_s or 0.0, 6) for r in outcome.requests)
    assert len(set(firsts)) >= 3
    assert all(firsts.count(first) <= 2 for first in firsts)


@both
def test_deciding_seldom_changes_nothing_when_nobody_waits(make: MakeEngine) -> None:
    load = mixed_load(80, 2.0)
    often, seldom = (make(setup(pool=400, zone=30, stride=stride), load).run() for stride in (1, 8))
    assert often.parks == often.preemptions == 0
    assert times(often) == times(seldom)
    assert often.figures() == seldom.figures()


def test_deciding_seldom_changes_throughput_by_less_than_a_per_cent_and_no_figure_by_much() -> None:
    load = mixed_load(600, 3.0)
    often, seldom = (layered(setup(pool=150, zone=30, profile=ROUGH, stride=s), load).run().figures() for s in (1, 8))
    assert often["parks"] > 50
    assert seldom["output_tokens_per_s"] == pytest.approx(often["output_tokens_per_s"], rel=0.01)
    # A decision that comes a few steps later changes all those after it: what is left is as large as between seeds.
    assert seldom["ttft_s"]["p50"] == pytest.approx(often["ttft_s"]["p50"], rel=0.1)
    assert seldom["slo_attainment"] == pytest.approx(often["slo_attainment"], abs=0.05)


@both
def test_the_same_load_comes_to_the_same_figures(make: MakeEngine) -> None:
    load = mixed_load(100, 5.0)
    first, again = (make(setup(pool=60, zone=30, stride=8), load).run() for _ in range(2))
    assert first.figures() == again.figures()
    assert first.requests == again.requests


def test_figures_do_not_depend_on_how_this_process_hashes_names() -> None:
    script = (
        "from tests.unit.sim.test_engine import *\n"
        "print(layered(setup(pool=60, zone=30, stride=8), mixed_load(100, 5.0)).run().figures())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_a_load_that_takes_too_many_steps_is_a_failed_assertion() -> None:
    with pytest.raises(AssertionError, match="still 1 requests under way after 3 steps"):
        stock(setup(tokens=10), [request("a")]).run(3)


@pytest.mark.parametrize("kind", [StockEngine, LayeredEngine])
@pytest.mark.parametrize("tpot_s", [0.012, 0.03, 0.2])
def test_figures_of_steps_taken_together_are_those_of_the_tokens_times(kind: type, tpot_s: float) -> None:
    slo = SloClass(name="chat", ttft_s=0.3, tpot_s=tpot_s)
    times_s: dict[str, list[float]] = {}

    class Recording(kind):  # type: ignore[misc, valid-type]
        def made_tokens(self, live, at_s, num_tokens, every_s) -> None:
            times_s.setdefault(live.request_id, []).extend(at_s + k * every_s for k in range(num_tokens))
            super().made_tokens(live, at_s, num_tokens, every_s)

    load = [replace(each, slo=slo) for each in mixed_load(100, 5.0)]
    options = [] if kind is StockEngine else [SloPolicy(classes={"chat": slo}, default_class="chat")]
    outcome = Recording(setup(pool=60, zone=30, stride=8, profile=ROUGH), load, *options).run()
    assert outcome.num_steps > 0.9 * max(map(len, times_s.values()))
    for found in outcome.requests:
        times = times_s[found.request_id]
        reader = reader_of(slo, times)
        assert len(times) == found.output_tokens
        assert found.lag_s == pytest.approx(reader.lag_s, abs=1e-9)
        assert found.longest_pause_s == pytest.approx(reader.longest_pause_s, abs=1e-9)
        assert found.tally.num_on_time == num_on_time(slo, found.arrival_s, times)
        assert found.tally.fluidity_index == pytest.approx(fluidity_index(slo, found.arrival_s, times))
        assert found.tally.second_token_s == pytest.approx(times[1] - times[0])
    figures = outcome.figures()
    assert figures["tokens_on_time"] == sum(
        num_on_time(slo, r.arrival_s, times_s[r.request_id]) for r in outcome.requests
    ) / sum(map(len, times_s.values()))


def test_the_share_of_the_link_that_copies_take_is_told_for_each_direction() -> None:
    outcome = layered(setup(pool=8, zone=8), [request("a"), request("b")]).run(100)
    used = outcome.figures()["link_utilisation"]
    assert outcome.stored_bytes > 0
    assert outcome.loaded_bytes > 0
    # A block is stored in 0.5 ms and loaded in 1 ms.
    span_s = outcome.figures()["span_s"]
    assert used["store"] == pytest.approx(outcome.stored_bytes / BLOCK_BYTES * 0.0005 / span_s)
    assert used["load"] == pytest.approx(outcome.loaded_bytes / BLOCK_BYTES * 0.001 / span_s)
    assert stock(setup(pool=8), [request("a")]).run().figures()["link_utilisation"] == {"store": 0, "load": 0}


def test_with_a_full_pool_most_steps_decide_nothing_and_nobody_is_in_want_of_a_block() -> None:
    rng = Random(3)
    requests = [
        request(str(i), at=i * 0.01, prompt=rng.randint(20, 90), output=rng.randint(30, 120)) for i in range(60)
    ]
    engine = LayeredEngine(setup(pool=40, zone=12), requests, POLICY)
    decided: list[int] = []
    decide = engine.controller.decide
    engine.controller.decide = lambda state, now_s: decided.append(state.step) or decide(state, now_s)  # type: ignore[method-assign, func-returns-value]
    outcome = engine.run()
    assert outcome.parks > 20, "the pool is full"
    assert len(decided) < 0.7 * outcome.num_steps
    assert outcome.preemptions == 0, "a step that did not decide found no block"
