"""From the records of engine runs to the figures of `result.json`.

Pure functions. Invariant: figures are computed from request records only; what an engine says of its own
latencies is not used. `DemoResult` is the form of the file, which other tools read: `SCHEMA_VERSION` goes up
when a key changes its meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from layerkv.bench.load import LoadSpec
from layerkv.bench.machine import Machine
from layerkv.bench.priorities import Priorities
from layerkv.bench.records import Counters, EngineFailure, EngineRun, LoadRun, RequestRecord
from layerkv.bench.suite import figures, result
from layerkv.config import SloPolicy, default_policy
from layerkv.figures import distribution

SCHEMA_VERSION = 1


class Distribution(msgspec.Struct, frozen=True):
    """Mean and percentiles (:mod:`layerkv.figures`); all 0 when there is no sample."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Distribution:
        """The distribution of `samples`, in their unit."""
        return cls(**(distribution(map(float, samples)) or {"mean": 0.0, "p50": 0.0, "p90": 0.0, "p99": 0.0}))


class EngineFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's figures, as :class:`layerkv.bench.suite.result.Figures` has them, of one seed; None: not known.
    Those with a default are not in results of before 2026-11-28.

    Latencies count from the request's scheduled arrival, or its own tokens. `num_steps` counts steps that ran the
    model; `step_s` and `host_s_per_step` are means over them.
    """

    ttft_s: Distribution
    tpot_s: Distribution
    time_between_tokens_s: Distribution
    second_token_s: Distribution
    end_to_end_s: Distribution | None = None
    lag_s: Distribution | None = None
    longest_pause_s: Distribution | None = None
    queue_s: Distribution
    output_tokens_per_s: float
    fluid: float | None = None
    fluid_goodput_rps: float | None = None
    tokens_on_time: float | None = None
    fluidity_index: float | None = None
    goodput_rps: float | None = None
    slo_attainment: float | None = None
    preemptions: int
    bytes_stored: int
    bytes_loaded: int
    wall_s: float
    parks: int
    fetches: int
    num_steps: int
    step_s: float
    host_s_per_step: float


class Ratios(msgspec.Struct, frozen=True, kw_only=True):
    """Comparisons of engines; None where an engine is missing. Speed-ups are stock / layerkv.

    `fluid_gain` is layerkv's share of fluid requests less stock's.
    """

    ttft_mean_speedup: float | None
    ttft_p99_speedup: float | None
    throughput_ratio: float | None
    ttft_mean_over_oracle: float | None
    fluid_gain: float | None = None


class DemoResult(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of `result.json`.

    `complete` is False when an engine failed or the demo was interrupted. `tokens_equal` is None when layerkv
    or the oracle has no run to compare. `priorities` is always "none": an engine runs in the process that hands it the
    requests, so nobody waits for a CPU that a busy wait of another process holds.
    """

    schema: int = SCHEMA_VERSION
    complete: bool
    interrupted: bool
    engines: dict[str, EngineFigures]
    ratios: Ratios
    tokens_equal: bool | None
    failures: dict[str, EngineFailure]
    load: LoadSpec
    kv_cache_memory_bytes: dict[str, int]
    command: str
    machine: Machine
    versions: dict[str, str]
    seed: int
    date: str
    priorities: Priorities = "none"


def as_load(run: EngineRun, *, point: str = "", seed: int = 0) -> LoadRun:
    """An in-process run in the suite's terms. What only a server tells is 0, or None where that can be said."""
    counters = Counters(
        preemptions=run.preemptions,
        parks=run.parks,
        fetches=run.fetches,
        bytes_stored=run.bytes_stored,
        bytes_loaded=run.bytes_loaded,
    )
    return LoadRun(
        engine=run.name,
        point=point,
        seed=seed,
        requests=run.requests,
        samples=[],
        counters=counters,
        wall_s=run.wall_s,
    )


def engine_figures(run: EngineRun, policy: SloPolicy | None = None) -> EngineFigures:
    """The figures of one run. A request without the tokens that a figure needs is left out of that figure."""
    found = figures.engine_figures([as_load(run)], policy or default_policy())
    return EngineFigures(
        **{
            name: getattr(run, name) if hasattr(run, name) else _of_one_seed(getattr(found, name))
            for name in EngineFigures.__struct_fields__
        }
    )


def engine_ratios(runs: Mapping[str, EngineRun]) -> Ratios:
    """Compares the engines named stock, layerkv and oracle, as far as they are there."""
    found = figures.engine_ratios({name: {0: as_load(run)} for name, run in runs.items()}, default_policy())
    return Ratios(**{name: _of_one_seed(getattr(found, name)) for name in Ratios.__struct_fields__})


def _of_one_seed(over_seeds: result.Spread | result.Distribution | None) -> Any:
    if isinstance(over_seeds, result.Distribution):
        return Distribution(*(getattr(over_seeds, part).median for part in Distribution.__struct_fields__))
    return None if over_seeds is None else over_seeds.median


def differing_requests(left: EngineRun, right: EngineRun) -> list[str]:
    """Ids of the requests whose tokens differ between two runs, or that only one of them has, in order."""
    left_tokens, right_tokens = _tokens_by_request(left.requests), _tokens_by_request(right.requests)
    every_id = sorted(left_tokens.keys() | right_tokens.keys())
    return [request_id for request_id in every_id if left_tokens.get(request_id) != right_tokens.get(request_id)]


def _tokens_by_request(requests: Sequence[RequestRecord]) -> dict[str, list[int]]:
    return {request.request_id: request.token_ids for request in requests}
