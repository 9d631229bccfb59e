"""`layerkv bench decide`: how long one scheduling decision takes with many requests waiting and running.

Timed are the policy's :func:`~layerkv.scheduler.policy.decide`, and all that a step does for it (heads of the queues,
one pass over the running requests, the policy, the bookkeeping after it), on made-up requests, in states in which there
is something to decide: the pool is full, some requests are parked, prompts of all lengths wait, some of them late.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from layerkv.bench.machine import measured_here
from layerkv.config import SloClass, SloPolicy
from layerkv.core.cost import CostProfile, Curve, StepWork
from layerkv.figures import percentile
from layerkv.scheduler.controller import Controller
from layerkv.scheduler.engine import EngineShape, EngineState, Running
from layerkv.scheduler.policy import decide
from layerkv.scheduler.reasons import Reason

WAITING, RUNNING = 1000, 256
FEW_WAITING, MANY_WAITING = 100, 10_000
PARKED = 64
BLOCK_TOKENS = 16
ROUNDS = 300
WARM_UP_ROUNDS = 30


def run_decide(json_path: Path | None, *, seed: int = 0, console: Console | None = None) -> int:
    """Measure, print, and write the JSON file if one is named; returns the exit status."""
    console = console or Console()
    by_waiting = {n: measure(n, RUNNING, seed=seed) for n in (FEW_WAITING, WAITING, MANY_WAITING)}
    for n, (decide_ms, step_ms) in by_waiting.items():
        console.print(
            f"{n} waiting, {RUNNING} running, {PARKED} parked: decide() p50 {decide_ms['p50']:.3f} ms, "
            f"p99 {decide_ms['p99']:.3f} ms; with snapshot and books p50 {step_ms['p50']:.3f} ms"
        )
    result: dict[str, Any] = {
        "schema": 1,
        **msgspec.to_builtins(measured_here()),
        "seed": seed,
        "waiting": WAITING,
        "running": RUNNING,
        "parked": PARKED,
        "rounds": ROUNDS,
        "decide_ms": by_waiting[WAITING][0],
        "decide_ms_at_100_waiting": by_waiting[FEW_WAITING][0],
        "decide_ms_at_10000_waiting": by_waiting[MANY_WAITING][0],
        "whole_ms": by_waiting[WAITING][1],
        "whole_ms_at_100_waiting": by_waiting[FEW_WAITING][1],
        "whole_ms_at_10000_waiting": by_waiting[MANY_WAITING][1],
    }
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(
    num_waiting: int, num_running: int, *, seed: int = 0, rounds: int = ROUNDS
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of `decide()`, and of all that a step does for it: p50 and p99 over ``rounds`` states."""
    decide_ms: list[float] = []
    step_ms: list[float] = []
    rng = random.Random(seed)
    controller = crowded_controller(num_waiting, num_running, rng)
    for index in range(WARM_UP_ROUNDS + rounds):
        engine = crowded_engine(num_running, rng, step=index)
        begun_s = time.perf_counter()
        snapshot, _ = controller.decide(engine, now_s=100.0 + index * 1e-3)
        taken_s = time.perf_counter() - begun_s
        decide_begun_s = time.perf_counter()
        decide(snapshot)
        decide_s = time.perf_counter() - decide_begun_s
        if index >= WARM_UP_ROUNDS:
            step_ms.append(taken_s * 1e3)
            decide_ms.append(decide_s * 1e3)
    return _percentiles(decide_ms), _percentiles(step_ms)


def _percentiles(samples: list[float]) -> dict[str, float]:
    samples.sort()
    return {name: percentile(samples, share) for name, share in (("p50", 0.5), ("p99", 0.99))}


def crowded_controller(num_waiting: int, num_running: int, rng: random.Random) -> Controller:
    """A controller with so many waiting and running requests of two classes, and :data:`PARKED` parked ones."""
    chat = SloClass(name="chat", ttft_s=2.0, tpot_s=0.1, weight=4.0)
    batch = SloClass(name="batch", ttft_s=30.0, tpot_s=0.3)
    policy = SloPolicy(classes={"chat": chat, "batch": batch}, default_class="chat")
    shape = EngineShape("auto", BLOCK_TOKENS, 2 << 20, pool_blocks=20_000, zone_blocks=1024, host_blocks=100_000)
    link = Curve([(1 << 30, 0.04)])
    profile = CostProfile("made up", 0.01, 2e-5, Curve([(1000, 0.1)]), Curve([(100_000, 0.005)]), 1e-9, link, link)
    controller = Controller(policy, shape, profile, is_measured=True)
    for index in range(num_waiting + num_running + PARKED):
        slo = chat if rng.random() < 0.7 else batch
        arrival_s = 100.0 - rng.random() * slo.ttft_s * 1.2
        controller.arrive(
            str(index), slo, now_s=arrival_s, arrival_s=arrival_s, num_tokens=rng.randint(100, 4000), max_tokens=500
        )
    for index in range(num_running + PARKED):
        controller.admitted(str(index), layered=False, reason=Reason.FITS, step=0, now_s=90.0)
        controller.first_token(str(index), 95.0)
    for index in range(num_running, num_running + PARKED):
        num_tokens = rng.randint(200, 4000)
        controller.park(
            str(index),
            num_computed=num_tokens - 1,
            num_tokens=num_tokens,
            num_output=10,
            reason=Reason.POOL_SHORT,
            now_s=99.0,
        )
    controller.step_done(StepWork(num_decodes=256, decode_context=400_000), 0.03)
    return controller


def crowded_engine(num_running: int, rng: random.Random, *, step: int) -> EngineState:
    """An engine whose pool is nearly full."""
    running = []
    for index in range(num_running):
        num_tokens = rng.randint(200, 2000)
        num_blocks = -(-num_tokens // BLOCK_TOKENS)
        running.append(Running(str(index), num_tokens, num_tokens - 1, 60 + step % 300, False, num_blocks))
    return EngineState(
        step=step + 1000,
        running=running,
        arriving=(),
        free_blocks=rng.randint(300, 700),
        reserved_blocks=0,
        free_zone_blocks=1024,
        free_host_blocks=50_000,
        free_slots=100,
        budget_tokens=8192,
    )
