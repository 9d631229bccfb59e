"""Made loads through a toy server, and the case results that follow from them, for the tests of this folder and others.

The toy computes one prompt at a time and has room for a number of requests. Stock lets the first token wait for room;
layerkv lets the second one wait; the oracle has room for all. Everything follows from the seed.
"""

from __future__ import annotations

import functools
import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence

from layerkv.bench.machine import Machine
from layerkv.bench.records import Counters, EngineFailure, LoadRun, RequestRecord, Sample
from layerkv.bench.suite.figures import engine_figures, engine_ratios
from layerkv.bench.suite.result import CaseResult, Figures, PointResult, Spread
from layerkv.config import SloClass, SloPolicy

KEEPERS = ("vllm-cpu-offload", "lmcache")
ENGINES = ("stock", "stock-watermark", *KEEPERS, "layerkv", "layerkv-no-slo", "oracle")
ROOM = {**dict.fromkeys(ENGINES, 6), "stock-watermark": 5, "oracle": 1000}
PREFILL_S, TOKEN_S, WAIT_S = 0.09, 0.03, 0.002
POLICY = SloPolicy(classes={"chat": SloClass(name="chat", ttft_s=1.0, tpot_s=0.08)}, default_class="chat")
REQUEST_BYTES = 40 * 2**20
FAILURE = EngineFailure(reason="ended with exit status 1", log_tail=["ValueError: <script>alert(1)</script>"])
MACHINE = Machine(cpu="Made CPU 9000 (family 6, model 1)", num_cpus=8, memory_bytes=32 * 2**30, system="Linux 6.1 x86")


@functools.cache
def load_run(engine: str, rate_per_s: float, seed: int, num_requests: int = 80, num_failed: int = 0) -> LoadRun:
    """One load of Poisson arrivals through one engine; the last `num_failed` requests fail, by turns early and late."""
    rng = random.Random(f"{rate_per_s} {seed}")
    splits = engine.startswith("layerkv")
    free_at_s = [0.0] * ROOM[engine]
    prompt_done_s = arrival_s = 0.0
    requests, held = [], []
    for index in range(num_requests):
        arrival_s += rng.expovariate(rate_per_s)
        output_tokens = rng.randint(20, 60)
        room_s = heapq.heappop(free_at_s)
        first_s = max(arrival_s, prompt_done_s, 0.0 if splits else room_s) + PREFILL_S * rng.uniform(0.8, 1.2)
        if engine == "layerkv-no-slo" and index % 4 == 0:
            first_s += 0.3
        prompt_done_s = first_s
        go_on_s = max(first_s, room_s)
        token_s = TOKEN_S * (1.12 if splits else 1.3 if engine in KEEPERS else 1.0)
        times_s = [first_s, *(go_on_s + token_s * (1 + n) * rng.uniform(0.99, 1.0) for n in range(output_tokens - 1))]
        heapq.heappush(free_at_s, times_s[-1])
        fails = index >= num_requests - num_failed
        times_s = times_s[: len(times_s) // 2 * (index % 2)] if fails else times_s
        held.append((first_s, go_on_s, times_s[-1] if times_s else first_s))
        requests.append(
            RequestRecord(
                request_id=f"request-{index:03d}",
                arrival_s=arrival_s,
                sent_s=arrival_s + WAIT_S,
                prompt_tokens=512,
                output_tokens=output_tokens,
                token_times_s=sorted(times_s),
                token_digest=None if fails else f"digest-{index}",
                error="the connection was closed" if fails else None,
            )
        )
    return _with_server(engine, f"rate-{rate_per_s:g}", seed, requests, held)


def _with_server(
    engine: str, point: str, seed: int, requests: list[RequestRecord], held: Sequence[tuple[float, float, float]]
) -> LoadRun:
    wall_s = max((r.token_times_s[-1] for r in requests if r.token_times_s), default=5.0)
    samples = []
    for time_s in (0.2 * i for i in range(math.ceil(wall_s / 0.2))):
        on_device = sum(go_on_s <= time_s < end_s for _, go_on_s, end_s in held)
        parked = sum(first_s <= time_s < go_on_s for first_s, go_on_s, _ in held)
        waiting = sum(r.arrival_s <= time_s for r in requests) - sum(first_s <= time_s for first_s, _, _ in held)
        samples.append(
            Sample(
                time_s=time_s,
                device_kv_bytes=on_device * REQUEST_BYTES,
                host_kv_bytes=parked * REQUEST_BYTES,
                running=on_device,
                waiting=max(waiting, 0),
                parked=parked,
                waiting_for={"compute": max(waiting, 0), "pool": parked} if engine.startswith("layerkv") else {},
            )
        )
    parks = sum(go_on_s > first_s for first_s, go_on_s, _ in held)
    counters = Counters(
        preemptions=4 if engine == "stock" else 0,
        parks=parks,
        fetches=parks,
        bytes_stored=parks * REQUEST_BYTES,
        bytes_loaded=parks * REQUEST_BYTES,
        prompt_tokens=512 * len(requests),
        device_hit_tokens=48 * len(requests),
        host_hit_tokens=64 * parks,
        queue_count=len(requests),
        queue_sum_s=sum(max(first_s - r.arrival_s, 0.0) for r, (first_s, _, _) in zip(requests, held, strict=True)),
        engine_cpu_s=wall_s * (1.02 if parks else 0.9),
        front_end_cpu_s=wall_s * 0.1,
        scheduler_cpu_s=None if engine in KEEPERS else 0.4 if parks else 0.2,
        num_steps=2000,
        peak_rss_bytes=(5 if parks else 4) * 2**30 + seed * 2**20,
    )
    return LoadRun(
        engine=engine, point=point, seed=seed, requests=requests, samples=samples, counters=counters, wall_s=wall_s
    )


def load_runs(
    rates: Sequence[float] = (1.0, 2.0, 4.0, 6.0, 8.0),
    engines: Sequence[str] = ENGINES,
    seeds: Sequence[int] = (0, 1, 2),
    num_requests: int = 80,
) -> list[LoadRun]:
    """Every engine at every rate with every seed."""
    return [load_run(name, rate, seed, num_requests) for rate in rates for name in engines for seed in seeds]


def case_result(
    runs: Sequence[LoadRun],
    failures: Mapping[str, EngineFailure] | None = None,
    *,
    main: str | None = None,
    interrupted: bool = False,
    tokens_equal: bool | None = True,
) -> CaseResult:
    """The result of `runs`; `main` names the main point, by default the middle one, where `failures` happened."""
    failures = dict(failures or {})
    names = list(dict.fromkeys(run.point for run in runs))
    main = main or (names[len(names) // 2] if names else "rate-4")
    points = []
    for name in names or [main]:
        by_engine: dict[str, dict[int, LoadRun]] = {}
        for run in runs:
            if run.point == name:
                by_engine.setdefault(run.engine, {})[run.seed] = run
        points.append(
            PointResult(
                name=name,
                x=float(name.removeprefix("rate-")),
                rate_per_s=float(name.removeprefix("rate-")),
                engines={engine: engine_figures(list(of.values()), POLICY) for engine, of in by_engine.items()},
                ratios=engine_ratios(by_engine, POLICY),
                tokens_equal=tokens_equal,
                failures=failures if name == main else {},
            )
        )
    main_point = next(point for point in points if point.name == main)
    known = [name for name in ENGINES if any(name in point.engines for point in points)]

    def by_rate(pick: Callable[[Figures], Spread]) -> dict[str, dict[str, Spread]]:
        return {e: {f"{p.rate_per_s:g}": pick(p.engines[e]) for p in points if e in p.engines} for e in known}

    return CaseResult(
        case="overload",
        question="How long do first tokens wait when requests come faster than KV memory allows?",
        size="made",
        complete=not failures and not interrupted,
        interrupted=interrupted,
        axis="requests per second",
        main_point=main,
        engines=main_point.engines,
        ratios=main_point.ratios,
        tokens_equal=tokens_equal,
        failures=failures,
        goodput_rps=by_rate(lambda f: f.goodput_rps),
        slo_attainment=by_rate(lambda f: f.slo_attainment),
        points=points,
        kv_cache_memory_bytes={name: min(ROOM[name], 80) * REQUEST_BYTES for name in known},
        notes=["Made figures: no server ran."],
        command="layerkv bench run overload --json",
        machine=MACHINE,
        versions={"python": "3.12.1", "layerkv": "0.1.0", "vllm": "0.32.0", "torch": "2.13.0"},
        seeds=sorted({run.seed for run in runs}),
        date="2026-01-02T03:04:05+00:00",
    )
