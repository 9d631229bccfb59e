"""Runs a simulation file: every policy under every rate and seed, and the figures of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import msgspec

from layerkv.config import SloPolicy
from layerkv.core.geometry import GeometryRequest, KVGeometry, geometry_for_memory
from layerkv.errors import ConfigError
from layerkv.scheduler.reasons import LogEntry
from layerkv.sim.config import SimConfig
from layerkv.sim.engine import EngineSetup, SimRequest, VirtualEngine
from layerkv.sim.layered import LayeredEngine
from layerkv.sim.outcome import SimOutcome
from layerkv.sim.stock import StockEngine
from layerkv.sim.workload import make_workload
from layerkv.units import format_bytes

SCHEMA = 1
WATERMARK = 0.02
"""Share of the pool that `stock-watermark` keeps free when it admits. Not measured: chosen by judgement."""
STOCK_POLICIES = ("stock", "stock-watermark", "oracle")
"""Those that are vLLM's own scheduling."""
STRIDE = 4
"""Steps between decisions while nothing changes. Throughput is that of deciding before every step to within a per cent;
in overload, where one decision changes all later ones, other figures move about as much as from seed to seed. Not
measured: chosen by comparison with a decision before every step, in the simulator (2026-11-21, no result file)."""


@dataclass(frozen=True, slots=True)
class SimRun:
    """One policy under one rate and seed; ``wall_s`` is how long simulating it took."""

    policy: str
    rate_per_s: float
    seed: int
    outcome: SimOutcome
    wall_s: float


def simulate(
    config: SimConfig,
    *,
    stride: int = STRIDE,
    on_run: Callable[[SimRun], None] | None = None,
    on_log: Callable[[Iterable[LogEntry]], None] | None = None,
) -> list[SimRun]:
    """Run everything that the file asks for.

    Args:
        config: The file.
        stride: See ``EngineSetup.stride``.
        on_run: Told of each run when it is over.
        on_log: Given the decision log of the first run of the ``layerkv`` policy.
    """
    runs: list[SimRun] = []
    for rate in config.rates:
        for seed in config.seeds:
            requests = requests_of(config, rate, seed)
            for name in config.policies:
                wants_log = on_log is not None and name == "layerkv" and all(run.policy != name for run in runs)
                engine = make_engine(config, name, requests, stride=stride, keep_log=wants_log)
                begun_s = time.perf_counter()
                outcome = engine.run()
                runs.append(SimRun(name, rate, seed, outcome, time.perf_counter() - begun_s))
                if wants_log and on_log is not None and isinstance(engine, LayeredEngine):
                    on_log(engine.controller.take_log())
                if on_run is not None:
                    on_run(runs[-1])
    return runs


def requests_of(config: SimConfig, rate_per_s: float, seed: int) -> list[SimRequest]:
    """The load of one rate and seed, the same for every policy."""
    policy = config.policy
    return [
        SimRequest(
            request_id=r.request_id,
            arrival_s=r.arrival_s,
            prompt_tokens=r.prompt_tokens,
            output_tokens=r.output_tokens,
            max_tokens=r.max_tokens,
            slo=policy.classes[r.slo_class or policy.default_class],
        )
        for r in make_workload(config.workload, rate_per_s=rate_per_s, seed=seed)
    ]


def make_engine(
    config: SimConfig, name: str, requests: Sequence[SimRequest], *, stride: int = STRIDE, keep_log: bool = False
) -> VirtualEngine:
    """The virtual engine of a policy: stock vLLM with all memory as pool, or layerkv with its zone out of it.

    Raises:
        ConfigError: KV memory holds no lane zone beside a pool, or the pool holds not all of the longest request.
    """
    config = with_memory_of(config, name, requests)
    is_stock = name in STOCK_POLICIES
    geometry = geometry_of(config, zone_tokens=0 if is_stock else config.zone_tokens)
    check_room(geometry, requests)
    setup = setup_of(config, geometry, stride)
    if is_stock:
        return StockEngine(setup, requests, watermark=WATERMARK if name == "stock-watermark" else 0.0)
    return LayeredEngine(setup, requests, policy_of(config.policy, name), keep_log=keep_log)


def with_memory_of(config: SimConfig, name: str, requests: Sequence[SimRequest]) -> SimConfig:
    """The configuration with the KV memory that a policy has: the oracle's holds all of as many requests as run."""
    if name != "oracle":
        return config
    blocks = sorted((-(-(r.prompt_tokens + r.output_tokens) // config.block_tokens) for r in requests), reverse=True)
    needed = 2 + sum(blocks[: config.max_num_seqs])  # one is vLLM's null block, one is lost to rounding
    block_bytes = config.profile.kv_bytes_per_token * config.block_tokens
    return replace(config, kv_memory_bytes=max(config.kv_memory_bytes, needed * block_bytes))


def policy_of(policy: SloPolicy, name: str) -> SloPolicy:
    """The SLO policy of one of layerkv's variants."""
    change: dict[str, dict[str, Any]] = {
        "layerkv": {},
        "layerkv-slo": {"policy": "slo"},
        "layerkv-no-slo": {"policy": "arrival"},
        "layerkv-no-length-prediction": {"length_prediction": "none"},
        "layerkv-streamed": {"streamed_decode": True},
    }
    return msgspec.structs.replace(policy, **change[name])


def geometry_of(config: SimConfig, *, zone_tokens: int | None) -> KVGeometry:
    """How the KV memory is divided, as the engine would."""
    page_bytes = config.profile.kv_bytes_per_token * config.block_tokens // config.num_layers
    request = GeometryRequest(
        num_layers=config.num_layers,
        page_bytes=page_bytes,
        block_tokens=config.block_tokens,
        lanes=config.lanes,
        step_tokens=config.max_num_batched_tokens,
        zone_tokens=zone_tokens,
        alignment_bytes=page_bytes,
        longest_tokens=config.max_model_len,
    )
    try:
        return geometry_for_memory(request, config.kv_memory_bytes)
    except ConfigError:
        zone = "the default lane zone" if zone_tokens is None else f"a lane zone of {zone_tokens} tokens"
        raise ConfigError(
            f"engine.kv_memory: found {format_bytes(config.kv_memory_bytes)}, which holds no pool beside {zone}; set "
            "a larger kv_memory, or a smaller zone_tokens"
        ) from None


def report(config: SimConfig, runs: Sequence[SimRun]) -> dict[str, Any]:
    """The figures as JSON-ready data: all runs, and each policy's at the last rate (medians over seeds)."""
    last_rate = config.rates[-1]
    return {
        "schema": SCHEMA,
        "profile": config.profile.name,
        "rate_per_s": last_rate,
        "policies": {
            name: medians([r.outcome.figures() for r in runs if r.policy == name and r.rate_per_s == last_rate])
            for name in config.policies
        },
        "runs": [
            {
                "policy": run.policy,
                "rate_per_s": run.rate_per_s,
                "seed": run.seed,
                "wall_s": round(run.wall_s, 3),
                **run.outcome.figures(),
            }
            for run in runs
        ],
    }


def check_room(geometry: KVGeometry, requests: Sequence[SimRequest]) -> None:
    """As vLLM does at its start: a request that the pool cannot hold by itself would never end."""
    room = (geometry.pool_blocks - 1) * geometry.block_tokens
    longest = max((r.prompt_tokens + r.output_tokens - 1 for r in requests), default=0)
    if longest > room:
        raise ConfigError(
            f"engine.kv_memory: found room for {room} tokens beside the lane zone; expected {longest}, the longest "
            f"request's; set a larger kv_memory, a smaller zone_tokens, or shorter requests"
        )


def setup_of(config: SimConfig, geometry: KVGeometry, stride: int) -> EngineSetup:
    """The virtual engine's limits."""
    return EngineSetup(
        geometry=geometry,
        num_host_blocks=config.host_memory_bytes // geometry.block_bytes,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        profile=config.profile,
        frees_are_deferred=config.async_scheduling,
        stride=stride,
    )


def medians(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each figure's median over the seeds; a figure that one of them lacks is None."""
    merged: dict[str, Any] = {}
    for key in {key: None for each in figures for key in each}:
        values = [each.get(key) for each in figures]
        if any(isinstance(value, dict) for value in values):
            merged[key] = medians([value for value in values if isinstance(value, dict)])
        elif any(value is None for value in values):
            merged[key] = None
        else:
            merged[key] = median(value for value in values if value is not None)
    return merged
