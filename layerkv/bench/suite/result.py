"""The form of a case's JSON: what `layerkv bench run --json` writes and `layerkv bench compare` reads.

Invariant: every figure is a :class:`Spread` over seeds, and says no more than its `values` do (but for
`longest_probe_s`, which is about the measurement). Other tools read this file: `SCHEMA_VERSION` goes up when a key
changes its meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import msgspec

from layerkv.bench.machine import Machine
from layerkv.bench.priorities import Priorities
from layerkv.bench.records import EngineFailure

SCHEMA_VERSION = 1


class Spread(msgspec.Struct, frozen=True):
    """A figure over seeds: its median, the greatest difference between two seeds, and the value of each seed."""

    median: float
    spread: float
    values: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(median(values), max(values) - min(values), list(values))


class Distribution(msgspec.Struct, frozen=True):
    """Mean and percentiles of a latency within a seed's run, each over seeds."""

    mean: Spread
    p50: Spread
    p90: Spread
    p99: Spread


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's figures at one point.

    Latencies count from the time a request was due; a seed in which no request got so far is left out of them.
    `end_to_end_s`: to its last token. `queue_s` is what the server says (its percentiles are read off a histogram).
    `goodput_rps`: requests per second that met both the TTFT and the mean TPOT of their class; `slo_attainment`: their
    share of all requests, a failed request being one that missed. `arrival_error_s`: how late the generator sent.
    `fluid`: share of all requests that were fluid; `fluid_goodput_rps`: how many per second. `tokens_on_time`: share of
    the tokens that came; `fluidity_index`: the mean of Etalon's; `lag_s` and `longest_pause_s`: waits of readers, where
    requests have one (all as :mod:`layerkv.figures` has them). These are None in results from before there was that,
    and, but for the first two, where nothing came to be read.
    Peaks are in bytes: KV in use at most on the device, KV held at most on the host (cached prefixes included, which
    give way to requests), and resident memory of all processes.
    `scheduler_s_per_step` is CPU time. `ends`: how many requests finished in each way (`length`, `stop`, `hang_up`), as
    far as that is known; `output_tokens`: mean length of the answers that did. What an engine does not tell is None:
    vLLM's offload neither counts what it stores nor says how much of its host memory is in use.
    `waited_for`: of the time that requests waited for anything, before their first token and parked, the share for each
    resource, of seeds in which any was seen to wait; empty where an engine does not tell.
    `longest_probe_s`: the longest that the server took to answer `/health` while the load ran, of all seeds; None where
    nobody asked. `disturbed`: in some seed that was above 0.3 s, in each of three tries, so that times and throughput
    say little about the engine.
    """

    ttft_s: Distribution
    tpot_s: Distribution
    time_between_tokens_s: Distribution
    second_token_s: Distribution
    end_to_end_s: Distribution
    lag_s: Distribution | None = None
    longest_pause_s: Distribution | None = None
    queue_s: Distribution
    arrival_error_s: Distribution
    output_tokens_per_s: Spread
    requests_per_s: Spread
    fluid: Spread | None = None
    fluid_goodput_rps: Spread | None = None
    tokens_on_time: Spread | None = None
    fluidity_index: Spread | None = None
    goodput_rps: Spread
    slo_attainment: Spread
    slo_attainment_by_class: dict[str, Spread]
    ttft_mean_s_by_class: dict[str, Spread]
    num_requests: Spread
    num_failed: Spread
    preemptions: Spread
    parks: Spread
    fetches: Spread
    bytes_stored: Spread | None
    bytes_loaded: Spread | None
    prompt_tokens: Spread
    device_hit_tokens: Spread
    host_hit_tokens: Spread
    peak_device_kv_bytes: Spread
    peak_host_kv_bytes: Spread | None
    peak_rss_bytes: Spread
    engine_cpu_s: Spread
    front_end_cpu_s: Spread
    scheduler_s_per_step: Spread | None
    wall_s: Spread
    ends: dict[str, Spread] = {}
    waited_for: dict[str, Spread] = {}
    output_tokens: Spread | None = None
    longest_probe_s: float | None = None
    disturbed: bool = False


class Ratios(msgspec.Struct, frozen=True, kw_only=True):
    """layerkv beside the others, each ratio taken within a seed; None where an engine is missing.

    Speed-ups are the other's time / layerkv's; `throughput_ratio` and `goodput_ratio` are layerkv's / stock's, those
    `_over` others layerkv's / theirs.
    `goodput_ratio` is None for a seed in which stock has no goodput at all. `fluid_gain` is layerkv's share of fluid
    requests less stock's.
    """

    ttft_mean_speedup: Spread | None = None
    ttft_p99_speedup: Spread | None = None
    throughput_ratio: Spread | None = None
    ttft_mean_over_oracle: Spread | None = None
    goodput_ratio: Spread | None = None
    fluid_gain: Spread | None = None
    ttft_mean_speedup_over: dict[str, Spread] = {}
    goodput_ratio_over: dict[str, Spread] = {}
    throughput_ratio_over: dict[str, Spread] = {}


class PointResult(msgspec.Struct, frozen=True, kw_only=True):
    """All engines at one point of the case's axis.

    `tokens_equal` compares greedy tokens of layerkv and the oracle, request by request; None where one is missing or
    the case's outputs cannot be equal. With `has_sessions`, `rate_per_s` is that of sessions. An engine may have
    figures of some seeds and a failure in another.
    """

    name: str
    x: float
    rate_per_s: float
    has_sessions: bool = False
    engines: dict[str, Figures] = {}
    ratios: Ratios = Ratios()
    tokens_equal: bool | None
    failures: dict[str, EngineFailure]


class CaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file.

    `engines`, `ratios` and `tokens_equal` are those of the case's main point, `main_point`; `tokens_equal` there is
    about all points. `failures` holds each engine's first failure anywhere. `complete` is False when an engine failed
    that the case does not expect to, or the run was interrupted. `fluid`, `goodput_rps` and `slo_attainment` are by
    engine, then by the point's rate per second (by its name, where points have the same rate). `load` is a digest of
    requests, policy and settings: two results are comparable where it is equal. `commit` is layerkv's, if it ran from a
    checkout.
    `max_num_seqs` is how many requests each engine may compute in a step; empty in older results.
    `priorities` says what kept engines from starving servers and clients: see :mod:`layerkv.bench.priorities`; None in
    results from before there was that.
    """

    schema: int = SCHEMA_VERSION
    case: str
    question: str
    size: str
    complete: bool
    interrupted: bool
    axis: str
    main_point: str
    engines: dict[str, Figures] = {}
    ratios: Ratios = Ratios()
    tokens_equal: bool | None
    failures: dict[str, EngineFailure]
    fluid: dict[str, dict[str, Spread]] = {}
    goodput_rps: dict[str, dict[str, Spread]] = {}
    slo_attainment: dict[str, dict[str, Spread]] = {}
    points: list[PointResult]
    kv_cache_memory_bytes: dict[str, int]
    max_num_seqs: dict[str, int] = {}
    notes: list[str]
    command: str
    machine: Machine
    versions: dict[str, str]
    load: str = ""
    commit: str | None = None
    priorities: Priorities | None = None
    seeds: list[int]
    date: str
