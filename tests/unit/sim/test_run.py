"""Whole simulations: what each policy makes of one load, and what the report says of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from layerkv.config import PolicyName, SloClass, SloPolicy
from layerkv.core.cost import CostProfile, Curve
from layerkv.errors import ConfigError
from layerkv.scheduler.reasons import Event, LogEntry
from layerkv.sim.config import POLICIES, SimConfig
from layerkv.sim.engine import SimRequest
from layerkv.sim.layered import LayeredEngine
from layerkv.sim.outcome import SimOutcome
from layerkv.sim.run import make_engine, medians, policy_of, report, requests_of, simulate
from layerkv.sim.stock import StockEngine
from layerkv.sim.workload import ClassMix, FixedLength, UniformLength, WorkloadSpec

LINK = Curve([(1 << 20, 0.001)])
PROFILE = CostProfile("made up", 0.01, 1e-4, Curve([(1000, 0.1)]), Curve([(10_000, 0.005)]), 1e-8, LINK, LINK)
LAYERS, TOKEN_BYTES = 4, 4096
CHAT = SloClass(name="chat", ttft_s=1.0, tpot_s=0.1)
SUMMARY = {"mean", "p50", "p90", "p99"}


def simulation(
    *classes: SloClass, rate: float = 8.0, requests: int = 120, kv_tokens: int = 3000, **changes: Any
) -> SimConfig:
    """Return a simulation whose KV memory is short of what its load would take; one mix for each class."""
    classes = classes or (CHAT,)
    mixes = tuple(ClassMix(slo.name, 1.0, UniformLength(50, 600), UniformLength(20, 120)) for slo in classes)
    return replace(
        SimConfig(
            profile=replace(PROFILE, kv_bytes_per_token=TOKEN_BYTES),
            num_layers=LAYERS,
            kv_memory_bytes=kv_tokens * TOKEN_BYTES,
            host_memory_bytes=4 * kv_tokens * TOKEN_BYTES,
            block_tokens=16,
            max_num_batched_tokens=1024,
            max_num_seqs=64,
            max_model_len=2048,
            lanes=2,
            zone_tokens=800,
            async_scheduling=False,
            policy=SloPolicy(classes={slo.name: slo for slo in classes}, default_class=classes[0].name),
            policies=("stock", "layerkv"),
            seeds=(0,),
            workload=WorkloadSpec(requests, classes=mixes, max_model_len=2048),
            rates=(rate,),
        ),
        **changes,
    )


def outcomes(config: SimConfig, **options: Any) -> dict[str, SimOutcome]:
    return {run.policy: run.outcome for run in simulate(config, **options)}


def tokens_made(outcome: SimOutcome) -> list[int]:
    return [request.output_tokens for request in outcome.requests]


def test_every_policy_serves_every_token_of_the_same_load() -> None:
    config = simulation(policies=POLICIES)
    asked = [request.output_tokens for request in requests_of(config, 8.0, 0)]
    found = outcomes(config)
    assert tuple(found) == POLICIES
    for outcome in found.values():
        assert tokens_made(outcome) == asked


def test_first_tokens_come_sooner_under_layerkv_when_kv_memory_is_short() -> None:
    found = {name: outcome.figures() for name, outcome in outcomes(simulation(policies=POLICIES)).items()}
    assert found["layerkv"]["ttft_s"]["mean"] < 0.5 * found["stock"]["ttft_s"]["mean"]
    assert found["layerkv"]["slo_attainment"] > found["stock"]["slo_attainment"]
    assert found["layerkv"]["parks"] > 0
    assert found["stock"]["parks"] == found["stock-watermark"]["parks"] == 0
    assert found["stock-watermark"]["preemptions"] <= found["stock"]["preemptions"]


@pytest.mark.parametrize(
    ("name", "kind", "key", "value"),
    [
        ("layerkv", LayeredEngine, "policy", "fluid"),
        ("layerkv-no-slo", LayeredEngine, "policy", "arrival"),
        ("layerkv-no-length-prediction", LayeredEngine, "length_prediction", "none"),
        ("layerkv-streamed", LayeredEngine, "streamed_decode", True),
    ],
)
def test_a_variant_differs_from_layerkv_in_one_switch(name: str, kind: type, key: str, value: object) -> None:
    engine = make_engine(simulation(), name, [])
    assert isinstance(engine, kind)
    assert isinstance(engine, LayeredEngine)
    assert getattr(engine.controller.policy, key) == value


def test_the_oracle_is_stock_with_room_for_everybody() -> None:
    config = simulation(policies=("stock", "oracle"), rate=50.0)
    requests = requests_of(config, 50.0, 0)
    oracle = make_engine(config, "oracle", requests)
    assert isinstance(oracle, StockEngine)
    held = sorted((-(-(r.prompt_tokens + r.output_tokens) // 16) for r in requests), reverse=True)
    assert oracle.geometry.pool_blocks > sum(held[: config.max_num_seqs])
    assert oracle.geometry.zone_blocks == 0
    found = outcomes(config)
    assert found["oracle"].preemptions == 0 < found["stock"].preemptions
    assert found["oracle"].figures()["fluid"] > found["stock"].figures()["fluid"]
    few = make_engine(config, "oracle", requests[:1])  # never less than the others have
    assert few.geometry.pool_blocks == make_engine(config, "stock", requests).geometry.pool_blocks


def test_layerkv_slo_is_a_policy_of_its_own_to_compare_with() -> None:
    config = simulation(policies=("layerkv", "layerkv-slo"), requests=80)
    found = outcomes(config)
    assert policy_of(config.policy, "layerkv-slo").policy == "slo"
    assert found["layerkv-slo"].figures() != found["layerkv"].figures()


def test_layerkv_pays_for_its_zone_out_of_the_same_memory() -> None:
    config = simulation()
    stock, layerkv = (make_engine(config, name, []) for name in ("stock", "layerkv"))
    assert isinstance(stock, StockEngine)
    assert stock.geometry.zone_blocks == 0
    assert layerkv.geometry.zone_blocks * 16 == 800
    assert stock.geometry.physical_bytes <= config.kv_memory_bytes
    assert layerkv.geometry.physical_bytes <= config.kv_memory_bytes
    assert layerkv.geometry.pool_blocks < stock.geometry.pool_blocks


def test_without_host_memory_layerkv_behaves_like_stock_and_loses_nothing() -> None:
    config = simulation(host_memory_bytes=0)
    found = outcomes(config)
    stock, layerkv = found["stock"], found["layerkv"]
    assert tokens_made(layerkv) == tokens_made(stock)
    assert layerkv.parks == layerkv.fetches == layerkv.stored_bytes == 0
    ratio = layerkv.figures()["output_tokens_per_s"] / stock.figures()["output_tokens_per_s"]
    assert ratio == pytest.approx(1.0, abs=0.15)  # the zone's memory is paid for and of no use


def test_a_class_without_traffic_is_no_part_of_the_report() -> None:
    idle = SloClass(name="idle", ttft_s=1.0, tpot_s=0.1)
    config = simulation(requests=20)
    config = replace(config, policy=SloPolicy(classes={"chat": CHAT, "idle": idle}, default_class="chat"))
    for outcome in outcomes(config).values():
        assert set(outcome.figures()["slo_attainment_by_class"]) == {"chat"}


def test_a_class_with_one_request_in_some_seeds_only_has_no_median() -> None:
    merged = medians([{"by_class": {"a": 1.0, "b": 0.5}}, {"by_class": {"a": 0.5}}, {"by_class": {"a": 0.7}}])
    assert merged == {"by_class": {"a": 0.7, "b": None}}


def test_when_all_deadlines_have_passed_everybody_is_served_all_the_same() -> None:
    hopeless = SloClass(name="chat", ttft_s=1e-6, tpot_s=1e-6)
    found = outcomes(simulation(hopeless))
    for outcome in found.values():
        assert outcome.figures()["slo_attainment"] == 0
    assert tokens_made(found["layerkv"]) == tokens_made(found["stock"])


def test_a_class_that_asks_to_be_refused_in_overload_is_and_the_rest_are_on_time() -> None:
    picky = SloClass(name="chat", ttft_s=0.5, tpot_s=10.0, overload="reject")
    outcome = outcomes(simulation(picky, rate=60.0, policies=("layerkv",)), stride=1)["layerkv"]
    served = [request.ttft_s for request in outcome.requests if request.ttft_s is not None]
    assert 0 < outcome.figures()["refused"] == len(outcome.requests) - len(served)
    assert len(served) >= 20
    # Who is let in is predicted to be just in time, and the last step takes a little longer than that.
    assert max(served) <= 0.5 * 1.1
    assert sum(ttft_s <= 0.5 for ttft_s in served) >= 0.8 * len(served)


def test_without_that_wish_nobody_is_refused_in_overload() -> None:
    patient = SloClass(name="chat", ttft_s=0.5, tpot_s=10.0)
    outcome = outcomes(simulation(patient, rate=60.0, policies=("layerkv",)))["layerkv"]
    assert outcome.figures()["refused"] == 0
    assert all(request.finish_s is not None for request in outcome.requests)


@pytest.mark.parametrize(("name", "share"), [("slo", 0.6), ("fluid", 0.95)])
def test_max_stall_bounds_the_longest_gap_better_than_none(name: PolicyName, share: float) -> None:
    """By slices nobody waits for long anyway."""
    patient = SloClass(name="chat", ttft_s=2.0, tpot_s=2.0)
    gaps = {}
    for slo in (patient, replace_class(patient, max_stall_s=1.0)):
        config = simulation(slo, requests=200, policies=("layerkv",))
        config = replace(config, policy=structs.replace(config.policy, policy=name))
        found = outcomes(config, stride=1)["layerkv"]
        gaps[slo.max_stall_s] = sorted(request.longest_gap_s for request in found.requests)
    without, limited = gaps[None], gaps[1.0]
    assert sum(gap > 1.0 for gap in without) > 50
    assert sum(gap > 1.0 for gap in limited) < share * sum(gap > 1.0 for gap in without)
    assert limited[100] < 0.85 * without[100]
    assert limited[150] < 0.85 * without[150]


def replace_class(slo: SloClass, **changes: Any) -> SloClass:
    keys = {name: getattr(slo, name) for name in slo.__struct_fields__}
    return SloClass(**{**keys, **changes})


def test_the_report_has_every_figure_of_every_policy_at_the_last_rate() -> None:
    config = simulation(rates=(2.0, 4.0), seeds=(0, 1, 2), requests=40)
    runs = simulate(config)
    result = json.loads(json.dumps(report(config, runs), allow_nan=False))
    assert (result["schema"], result["profile"], result["rate_per_s"]) == (1, "made up", 4.0)
    assert list(result["policies"]) == ["stock", "layerkv"]
    for figures in result["policies"].values():
        for name in ("ttft_s", "tpot_s", "time_between_tokens_s"):
            assert set(figures[name]) == SUMMARY
            assert all(isinstance(value, float) for value in figures[name].values())
        for name in ("slo_attainment", "goodput_rps", "output_tokens_per_s", "preemptions"):
            assert isinstance(figures[name], int | float)
    keys = [(run["rate_per_s"], run["seed"], run["policy"]) for run in result["runs"]]
    assert keys == [(r, s, p) for r in (2.0, 4.0) for s in (0, 1, 2) for p in ("stock", "layerkv")]


def test_the_report_is_the_median_over_seeds() -> None:
    config = simulation(seeds=(0, 1, 2), requests=40)
    runs = simulate(config)
    of_stock = [run.outcome.figures()["ttft_s"]["mean"] for run in runs if run.policy == "stock"]
    assert len(set(of_stock)) == 3
    assert report(config, runs)["policies"]["stock"]["ttft_s"]["mean"] == sorted(of_stock)[1]


def test_a_figure_that_one_seed_lacks_has_no_median() -> None:
    assert medians([{"a": 1, "b": None}, {"a": 3, "b": 2}]) == {"a": 2, "b": None}
    assert medians([{"a": {"x": 1.0}}, {"a": {"x": 2.0}}]) == {"a": {"x": 1.5}}


def test_each_run_is_told_of_when_it_is_over_and_the_first_of_layerkv_is_logged() -> None:
    told: list[str] = []
    logs: list[list[LogEntry]] = []
    on_log: Callable[..., None] = lambda entries: logs.append(list(entries))  # noqa: E731
    simulate(simulation(seeds=(0, 1), requests=20), on_run=lambda run: told.append(run.policy), on_log=on_log)
    assert told == ["stock", "layerkv", "stock", "layerkv"]
    assert len(logs) == 1
    events = [entry.event for entry in logs[0]]
    assert events.count(Event.ARRIVED) == events.count(Event.FIRST_TOKEN) == events.count(Event.FINISHED) == 20


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "oracle"])
def test_a_request_that_kv_memory_cannot_hold_is_refused_before_anything_runs(name: str) -> None:
    mix = ClassMix("chat", 1.0, FixedLength(1200), FixedLength(100))
    config = simulation(kv_tokens=1200)
    config = replace(config, policies=(name,), workload=replace(config.workload, classes=(mix,)))
    with pytest.raises(
        ConfigError, match=r"engine\.kv_memory: found room for \d+ tokens .* expected 1299, the longest"
    ):
        simulate(config)


@pytest.mark.parametrize("name", POLICIES)
def test_the_longest_request_that_fits_the_pool_is_served(name: str) -> None:
    room = (make_engine(simulation(), "layerkv", []).geometry.pool_blocks - 1) * 16
    mix = ClassMix("chat", 1.0, FixedLength(room - 99), FixedLength(100))
    config = simulation(requests=3)
    config = replace(config, policies=(name,), workload=replace(config.workload, classes=(mix,), max_model_len=None))
    assert tokens_made(outcomes(config)[name]) == [100] * 3


def test_a_short_prompt_behind_long_ones_is_on_time_where_stock_is_late() -> None:
    """Twenty long prompts fill KV memory; a short one that comes after them is due within a second."""
    patient = SloClass(name="patient", ttft_s=120.0, tpot_s=1.0)
    urgent = SloClass(name="urgent", ttft_s=1.0, tpot_s=0.5, weight=4.0)
    config = simulation(patient, urgent)
    load = [SimRequest(f"long{i}", 0.01 * i, 700, 100, 100, patient) for i in range(20)]
    load.append(SimRequest("short", 0.5, 50, 20, 20, urgent))
    ttft_s = {}
    for name in ("stock", "layerkv"):
        outcome = make_engine(config, name, load, stride=1).run()
        ttft_s[name] = next(r.ttft_s for r in outcome.requests if r.request_id == "short")
    assert ttft_s["layerkv"] <= urgent.ttft_s < ttft_s["stock"]
