"""Runs a simulation of several models on one device: every way to divide its memory under every seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentLayout, layout_for_blocks
from layerkv.errors import ConfigError
from layerkv.sim.engine import SimRequest, VirtualEngine
from layerkv.sim.layered import LayeredEngine
from layerkv.sim.outcome import GapHistogram, SimOutcome
from layerkv.sim.run import STRIDE, check_room, geometry_of, medians, requests_of, setup_of
from layerkv.sim.sharing import Brokered, FirstCome, Member, Memory, SharedDevice, StaticPartition
from layerkv.sim.sharing_config import SharedModel, SharingConfig
from layerkv.sim.stock import StockEngine
from layerkv.units import format_bytes

SCHEMA = 1
GRANULE_BYTES = 2 << 20
"""What a device maps by. Derived: CUDA's granularity (``device/cuda_arena.py``), and a huge page."""
ALL_MODELS = "all models"
"""What their figures together are called."""


@dataclass(frozen=True, slots=True)
class SharingRun:
    """One way to divide the memory under one seed: the outcome of each model, and the most memory that it held."""

    arm: str
    seed: int
    outcomes: Mapping[str, SimOutcome]
    peak_bytes: Mapping[str, int]
    wall_s: float

    def figures(self) -> dict[str, dict[str, Any]]:
        """Figures by model, and those of all together."""
        by_model = {
            name: {**outcome.figures(), "kv_peak_bytes": self.peak_bytes[name]}
            for name, outcome in self.outcomes.items()
        }
        return {**by_model, ALL_MODELS: together(list(self.outcomes.values())).figures()}


def simulate_sharing(
    config: SharingConfig, *, stride: int = STRIDE, on_run: Callable[[SharingRun], None] | None = None
) -> list[SharingRun]:
    """Run everything that the file asks for; every arm gets the same requests.

    Raises:
        ConfigError: a model's longest request fits nowhere, or the floors of all do not fit together.
    """
    runs = []
    for seed in config.seeds:
        loads = {name: requests_of(model.config, model.config.rates[0], seed) for name, model in config.models.items()}
        for arm in config.arms:
            runs.append(run_arm(config, arm, seed, loads, stride=stride))
            if on_run is not None:
                on_run(runs[-1])
    return runs


def run_arm(
    config: SharingConfig, arm: str, seed: int, loads: Mapping[str, Sequence[SimRequest]], *, stride: int = STRIDE
) -> SharingRun:
    """One run."""
    begun_s = time.perf_counter()
    geometries = {
        name: geometry_of(model.config, zone_tokens=0 if arm.endswith("-stock") else model.config.zone_tokens)
        for name, model in config.models.items()
    }
    # Zones stay mapped: what is shared is the rest.
    capacity = config.kv_memory_bytes - sum(g.num_lanes * g.lane_bytes for g in geometries.values())
    members = [
        _member(model, name, geometries[name], capacity, loads[name], arm=arm, stride=stride)
        for name, model in config.models.items()
    ]
    SharedDevice(members, _memory(arm, members, capacity)).run()
    return SharingRun(
        arm,
        seed,
        {member.name: member.engine.whole_outcome() for member in members},
        {member.name: member.peak_bytes or member.held_bytes for member in members},
        time.perf_counter() - begun_s,
    )


def together(outcomes: Sequence[SimOutcome]) -> SimOutcome:
    """The loads of several engines as one."""
    gaps = GapHistogram()
    for outcome in outcomes:
        for at, count in outcome.gaps.counts.items():
            gaps.counts[at] = gaps.counts.get(at, 0) + count
        gaps.num += outcome.gaps.num
        gaps.total_s += outcome.gaps.total_s
    return SimOutcome(
        sorted((r for outcome in outcomes for r in outcome.requests), key=lambda r: r.arrival_s),
        gaps,
        max((outcome.end_s for outcome in outcomes), default=0.0),
        sum(outcome.num_steps for outcome in outcomes),
        preemptions=sum(outcome.preemptions for outcome in outcomes),
        parks=sum(outcome.parks for outcome in outcomes),
        fetches=sum(outcome.fetches for outcome in outcomes),
        stored_bytes=sum(outcome.stored_bytes for outcome in outcomes),
        loaded_bytes=sum(outcome.loaded_bytes for outcome in outcomes),
    )


def sharing_report(config: SharingConfig, runs: Sequence[SharingRun]) -> dict[str, Any]:
    """The figures as JSON-ready data: all runs, and each arm's by model (medians over seeds)."""
    figures = [(run, run.figures()) for run in runs]
    return {
        "schema": SCHEMA,
        "kv_memory_bytes": config.kv_memory_bytes,
        "profiles": {name: model.config.profile.name for name, model in config.models.items()},
        "rates_per_s": {name: model.config.rates[0] for name, model in config.models.items()},
        "arms": {
            arm: {
                name: medians([of_run[name] for run, of_run in figures if run.arm == arm])
                for name in (*config.models, ALL_MODELS)
            }
            for arm in config.arms
        },
        "runs": [
            {"arm": run.arm, "seed": run.seed, "wall_s": round(run.wall_s, 3), "models": of_run}
            for run, of_run in figures
        ],
    }


def _memory(arm: str, members: Sequence[Member], capacity: int) -> Memory:
    if arm.startswith("static"):
        return StaticPartition()
    floors = sum(member.floor_bytes for member in members)
    if floors > capacity:
        raise ConfigError(
            f"kv_memory: found room for {format_bytes(capacity)} beside the lane zones; expected "
            f"{format_bytes(floors)}, the floors of all; set a larger kv_memory, smaller kv_floor, or fewer models"
        )
    if arm.startswith("on-demand"):
        return FirstCome(members, capacity)
    return Brokered(members, capacity, is_weighted=arm == "shared")


def _member(
    model: SharedModel,
    name: str,
    geometry: KVGeometry,
    capacity: int,
    requests: Sequence[SimRequest],
    *,
    arm: str,
    stride: int,
) -> Member:
    is_static = arm.startswith("static")
    tpot_s = model.config.policy.classes[model.config.policy.default_class].tpot_s
    block_bytes = geometry.block_bytes
    ceiling_bytes = min(model.ceiling_bytes or capacity, capacity)
    layout = layout_for_blocks(
        ceiling_bytes // block_bytes, page_bytes=geometry.page_bytes, granule_bytes=GRANULE_BYTES
    )
    if not is_static:
        geometry = replace(geometry, pool_blocks=1 + layout.num_segments * layout.segment_blocks)
    try:
        check_room(geometry, requests)
    except ConfigError as error:
        raise ConfigError(f"models.{name}: {error}") from None
    floor_blocks = _floor_blocks(name, model, geometry, layout, requests)
    engine: VirtualEngine
    setup = setup_of(model.config, geometry, stride)
    if arm.endswith("-stock"):
        engine = StockEngine(setup, requests)
    else:
        engine = LayeredEngine(setup, requests, model.config.policy, least_pool=None if is_static else floor_blocks)
    return Member(
        name,
        engine,
        layout.segment_blocks,
        floor_bytes=floor_blocks * block_bytes,
        ceiling_bytes=layout.num_segments * layout.segment_blocks * block_bytes,
        tpot_s=tpot_s,
        weight=model.weight,
    )


def _floor_blocks(
    name: str, model: SharedModel, geometry: KVGeometry, layout: SegmentLayout, requests: Sequence[SimRequest]
) -> int:
    """In whole segments: what was asked for, or what the longest request needs."""
    longest = max((-(-(r.prompt_tokens + r.output_tokens) // geometry.block_tokens) for r in requests), default=1)
    asked = longest if model.floor_bytes is None else model.floor_bytes // geometry.block_bytes
    if asked < longest:
        raise ConfigError(
            f"models.{name}.kv_floor: found {format_bytes(model.floor_bytes or 0)}; expected at least "
            f"{format_bytes(longest * geometry.block_bytes)}, which the longest request needs; set a larger kv_floor"
        )
    return layout.num_segments_for(asked) * layout.segment_blocks
