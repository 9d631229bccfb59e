"""What a case has measured so far, and the result that follows from it.

Invariant: `case_result` may be asked at any time; what is missing is missing in the result, which then says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from layerkv.bench.machine import measured_here, source_commit
from layerkv.bench.priorities import Priorities
from layerkv.bench.records import EngineFailure, LoadRun
from layerkv.bench.suite.case import Case, Point
from layerkv.bench.suite.engines import kv_memory_bytes, max_num_seqs
from layerkv.bench.suite.figures import engine_figures, engine_ratios, have_equal_tokens
from layerkv.bench.suite.result import CaseResult, PointResult, Ratios, Spread
from layerkv.config import SloPolicy


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
    required = set(case.engines) - set(case.expected_to_fail)
    num_expected = len(case.points) * case.num_seeds * len(required)
    seeds = list(range(case.num_seeds))
    points = [_without_figures(case, point, outcome) for point in case.points]
    checked = [point.tokens_equal for point in points if point.tokens_equal is not None]
    result = CaseResult(
        case=case.name,
        question=case.question,
        size=case.size,
        complete=sum(run.engine in required for run in outcome.runs) == num_expected
        and required.isdisjoint(outcome.failures),
        interrupted=outcome.interrupted,
        axis=case.axis,
        main_point=case.main_point,
        tokens_equal=all(checked) if checked else None,
        failures=outcome.failures,
        points=points,
        kv_cache_memory_bytes={engine: kv_memory_bytes(case, engine, seeds) for engine in case.engines},
        max_num_seqs={engine: max_num_seqs(case.settings, engine) for engine in case.engines},
        notes=list(case.notes),
        **measured_here(),
        load=load_digest(case),
        commit=source_commit(),
        priorities=outcome.priorities,
        seeds=seeds,
    )
    return with_figures(result, outcome.runs, case.policy)


def with_figures(result: CaseResult, runs: Sequence[LoadRun], policy: SloPolicy) -> CaseResult:
    """The result with the figures of `runs` in place of its own; all that it says beside them stays."""
    engines = list(result.kv_cache_memory_bytes)
    points = [_point_figures(point, engines, runs, policy) for point in result.points]
    main = next(point for point in points if point.name == result.main_point)
    rates = [f"{point.rate_per_s:g}" for point in points]
    keys = rates if len(set(rates)) == len(rates) else [point.name for point in points]

    def by_rate(figure: str) -> dict[str, dict[str, Spread]]:
        return {
            engine: {
                key: getattr(point.engines[engine], figure)
                for key, point in zip(keys, points, strict=True)
                if engine in point.engines
            }
            for engine in engines
        }

    return msgspec.structs.replace(
        result,
        engines=main.engines,
        ratios=main.ratios,
        fluid=by_rate("fluid"),
        goodput_rps=by_rate("goodput_rps"),
        slo_attainment=by_rate("slo_attainment"),
        points=points,
    )


def load_digest(case: Case) -> str:
    """The same for two cases that send the same requests, by the same policy, to engines with the same settings."""
    # In the words of older results, which stay comparable: without keys that say nothing, and with those of that time.
    said = repr((case.settings, case.policy, case.points))
    for nothing in (
        ", ends=None",
        ", history=True",
        ", oracle_max_num_seqs=None",
        ", max_lag_s=1.0",
        ", stream=True",
        ", smooth=False",
        ", layers='full'",
    ):
        said = said.replace(nothing, "")
    said = said.replace(", policy='fluid', ", ", slo_scheduling=True, ")
    said = said.replace(", policy='slo', ", ", slo_scheduling='slo', ")
    said = said.replace(", policy='arrival', ", ", slo_scheduling=False, ")
    said = said.replace(", length_prediction='quantile')", ", length_prediction='quantile', adapt_host_share=False)")
    said = said.replace(", length_prediction='none')", ", length_prediction='none', adapt_host_share=False)")
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _by_engine(runs: Sequence[LoadRun], point: str) -> dict[str, dict[int, LoadRun]]:
    found: dict[str, dict[int, LoadRun]] = {}
    for run in runs:
        if run.point == point:
            found.setdefault(run.engine, {})[run.seed] = run
    return found


def _without_figures(case: Case, point: Point, outcome: Outcome) -> PointResult:
    tokens_equal = None
    if case.can_compare_tokens:
        runs = _by_engine(outcome.runs, point.name)
        tokens_equal = have_equal_tokens(runs.get("layerkv", {}), runs.get("oracle", {}))
    return PointResult(
        name=point.name,
        x=point.x,
        rate_per_s=point.rate_per_s,
        has_sessions=point.sessions is not None,
        tokens_equal=tokens_equal,
        failures=outcome.failed_points.get(point.name, {}),
    )


def _point_figures(
    point: PointResult, engines: Sequence[str], of_case: Sequence[LoadRun], policy: SloPolicy
) -> PointResult:
    runs = _by_engine(of_case, point.name)
    return msgspec.structs.replace(
        point,
        engines={name: engine_figures(list(runs[name].values()), policy) for name in engines if name in runs},
        ratios=engine_ratios(runs, policy) if "layerkv" in runs else Ratios(),
    )
