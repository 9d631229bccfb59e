"""From the records of engine runs to the figures of `result.json`.

Pure functions. Invariant: figures are computed from request records only; what an engine says of its own
latencies is not used. `DemoResult` is the form of the file, which other tools read: `SCHEMA_VERSION` goes up
when a key changes its meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from layerkv.bench.load import LoadSpec
from layerkv.bench.machine import Machine
from layerkv.bench.priorities import Priorities
from layerkv.bench.records import Counters, EngineFailure, EngineRun, LoadRun, RequestRecord
from layerkv.bench.suite import figures, result
from layerkv.config import default_policy
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
    """One engine's figures; every latency is counted from the request's scheduled arrival or its own tokens.

    ttft_s: arrival to first token. tpot_s: per request, mean gap between its tokens. time_between_tokens_s:
    all gaps of all requests pooled, so that one long stall shows in p99. second_token_s: first to second
    token. queue_s: arrival to first scheduling. output_tokens_per_s: all output tokens over (last token -
    first arrival). preemptions: requests whose KV was thrown away and recomputed.
    """

    ttft_s: Distribution
    tpot_s: Distribution
    time_between_tokens_s: Distribution
    second_token_s: Distribution
    queue_s: Distribution
    output_tokens_per_s: float
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
    """Comparisons of engines; None where an engine is missing. Speed-ups are stock / layerkv."""

    ttft_mean_speedup: float | None
    ttft_p99_speedup: float | None
    throughput_ratio: float | None
    ttft_mean_over_oracle: float | None


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


def engine_figures(run: EngineRun) -> EngineFigures:
    """The figures of one run. A request without the tokens that a figure needs is left out of that figure."""
    found = figures.engine_figures([as_load(run)], default_policy())
    return EngineFigures(
        ttft_s=_of_one_seed(found.ttft_s),
        tpot_s=_of_one_seed(found.tpot_s),
        time_between_tokens_s=_of_one_seed(found.time_between_tokens_s),
        second_token_s=_of_one_seed(found.second_token_s),
        queue_s=_of_one_seed(found.queue_s),
        output_tokens_per_s=found.output_tokens_per_s.median,
        preemptions=run.preemptions,
        bytes_stored=run.bytes_stored,
        bytes_loaded=run.bytes_loaded,
        wall_s=run.wall_s,
        parks=run.parks,
        fetches=run.fetches,
        num_steps=run.num_steps,
        step_s=run.step_s,
        host_s_per_step=run.host_s_per_step,
    )


def _of_one_seed(over_seeds: result.Distribution) -> Distribution:
    return Distribution(over_seeds.mean.median, over_seeds.p50.median, over_seeds.p90.median, over_seeds.p99.median)


def engine_ratios(engines: Mapping[str, EngineFigures]) -> Ratios:
    """Compares the engines named stock, layerkv and oracle, as far as they are there."""
    stock, layerkv, oracle = (engines.get(name) for name in ("stock", "layerkv", "oracle"))
    return Ratios(
        ttft_mean_speedup=_ratio(stock.ttft_s.mean, layerkv.ttft_s.mean) if stock and layerkv else None,
        ttft_p99_speedup=_ratio(stock.ttft_s.p99, layerkv.ttft_s.p99) if stock and layerkv else None,
        throughput_ratio=_ratio(layerkv.output_tokens_per_s, stock.output_tokens_per_s) if stock and layerkv else None,
        ttft_mean_over_oracle=_ratio(layerkv.ttft_s.mean, oracle.ttft_s.mean) if layerkv and oracle else None,
    )


def differing_requests(left: EngineRun, right: EngineRun) -> list[str]:
    """Ids of the requests whose tokens differ between two runs, or that only one of them has, in order."""
    left_tokens, right_tokens = _tokens_by_request(left.requests), _tokens_by_request(right.requests)
    every_id = sorted(left_tokens.keys() | right_tokens.keys())
    return [request_id for request_id in every_id if left_tokens.get(request_id) != right_tokens.get(request_id)]


def _tokens_by_request(requests: Sequence[RequestRecord]) -> dict[str, list[int]]:
    return {request.request_id: request.token_ids for request in requests}


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
