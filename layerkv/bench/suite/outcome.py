"""What a case has measured so far, and the result that follows from it.

Invariant: `case_result` may be asked at any time; what is missing is missing in the result, which then says so.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from layerkv.bench.machine import measured_here, source_commit
from layerkv.bench.priorities import Priorities
from layerkv.bench.records import EngineFailure, LoadRun
from layerkv.bench.suite.case import Case, Point
from layerkv.bench.suite.engines import kv_memory_bytes
from layerkv.bench.suite.figures import engine_figures, engine_ratios, have_equal_tokens
from layerkv.bench.suite.result import CaseResult, Figures, PointResult, Ratios


@dataclass(slots=True)
class Outcome:
    """What has been measured so far. An engine that failed is not started again."""

    runs: list[LoadRun] = field(default_factory=list)
    failures: dict[str, EngineFailure] = field(default_factory=dict)
    failed_points: dict[str, dict[str, EngineFailure]] = field(default_factory=dict)
    interrupted: bool = False
    priorities: Priorities = "none"

    def fail(self, engine: str, failure: EngineFailure, point: str | None) -> None:
        """Notes why an engine, at a point or before any, has nothing more to say."""
        self.failures.setdefault(engine, failure)
        if point is not None:
            self.failed_points.setdefault(point, {}).setdefault(engine, failure)


def case_result(case: Case, outcome: Outcome) -> CaseResult:
    """The figures of what has been measured so far, side by side."""
    points = [_point_result(case, point, outcome) for point in case.points]
    main = next(point for point in points if point.name == case.main_point)
    checked = [point.tokens_equal for point in points if point.tokens_equal is not None]
    required = set(case.engines) - set(case.expected_to_fail)
    num_expected = len(case.points) * case.num_seeds * len(required)
    seeds = list(range(case.num_seeds))
    rates = [f"{point.rate_per_s:g}" for point in points]
    keys = rates if len(set(rates)) == len(rates) else [point.name for point in points]
    by_rate = dict(zip(keys, points, strict=True))
    return CaseResult(
        case=case.name,
        question=case.question,
        size=case.size,
        complete=sum(run.engine in required for run in outcome.runs) == num_expected
        and required.isdisjoint(outcome.failures),
        interrupted=outcome.interrupted,
        axis=case.axis,
        main_point=case.main_point,
        engines=main.engines,
        ratios=main.ratios,
        tokens_equal=all(checked) if checked else None,
        failures=outcome.failures,
        goodput_rps={
            engine: {key: p.engines[engine].goodput_rps for key, p in by_rate.items() if engine in p.engines}
            for engine in case.engines
        },
        slo_attainment={
            engine: {key: p.engines[engine].slo_attainment for key, p in by_rate.items() if engine in p.engines}
            for engine in case.engines
        },
        points=points,
        kv_cache_memory_bytes={engine: kv_memory_bytes(case, engine, seeds) for engine in case.engines},
        notes=list(case.notes),
        **measured_here(),
        load=load_digest(case),
        commit=source_commit(),
        priorities=outcome.priorities,
        seeds=seeds,
    )


def load_digest(case: Case) -> str:
    """The same for two cases that send the same requests, by the same policy, to engines with the same settings."""
    # In the words of older results, which stay comparable: without keys that say nothing, and with those of that time.
    said = repr((case.settings, case.policy, case.points)).replace(", ends=None", "")
    said = said.replace(", policy='slo', ", ", slo_scheduling=True, ")
    said = said.replace(", policy='arrival', ", ", slo_scheduling=False, ")
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _point_result(case: Case, point: Point, outcome: Outcome) -> PointResult:
    runs: dict[str, dict[int, LoadRun]] = {}
    for run in outcome.runs:
        if run.point == point.name:
            runs.setdefault(run.engine, {})[run.seed] = run
    figures: dict[str, Figures] = {
        engine: engine_figures(list(runs[engine].values()), case.policy) for engine in case.engines if engine in runs
    }
    tokens_equal = None
    if case.can_compare_tokens:
        tokens_equal = have_equal_tokens(runs.get("layerkv", {}), runs.get("oracle", {}))
    return PointResult(
        name=point.name,
        x=point.x,
        rate_per_s=point.rate_per_s,
        has_sessions=point.sessions is not None,
        engines=figures,
        ratios=engine_ratios(runs, case.policy) if "layerkv" in runs else Ratios(),
        tokens_equal=tokens_equal,
        failures=outcome.failed_points.get(point.name, {}),
    )
