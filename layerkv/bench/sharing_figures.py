"""What is made of the loads of `layerkv bench sharing`: the figures of its parts.

Pure functions. Invariant: latencies are those that clients saw; a ratio is taken within a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import NamedTuple, TypeAlias

import msgspec

from layerkv.bench.records import LoadRun, RequestRecord, ttft_s
from layerkv.bench.sharing_load import DONOR, PROBE, TAKER, policy
from layerkv.bench.suite.figures import engine_figures, over_seeds
from layerkv.bench.suite.result import Distribution, Figures, Spread
from layerkv.errors import LayerKVError

Runs: TypeAlias = Mapping[int, Mapping[int, LoadRun]]
"""By seed, then by engine."""

FREED_WITHIN_S = 2.5
"""An idle engine has given its memory back so long after its last token: its `idle_after` of 2 s, and a while."""


# Bursts ---------------------------------------------------------------------------------------------------------------


class SharingRatios(msgspec.Struct, frozen=True, kw_only=True):
    """The shared way beside the others, all engines together; each ratio is taken within a seed.

    `fluid_goodput_over_static` is None where no request of the static way was fluid in any seed; those seeds are left
    out of it.
    """

    ttft_mean_speedup_over_stock: Spread
    ttft_mean_over_static: Spread
    second_token_speedup_over_static: Spread
    fluid_goodput_over_static: Spread | None
    throughput_ratio: Spread


def sharing_ratios(runs: Mapping[str, Runs], by_way: Mapping[str, Mapping[str, Figures]]) -> SharingRatios:
    """Of the ways `static_stock`, `static` and `shared`; `by_way` has their figures by engine."""
    seeds = sorted(runs["shared"])

    def ttft(way: str, seed: int) -> float:
        return mean(first for run in runs[way][seed].values() for r in run.requests if (first := ttft_s(r)) is not None)

    def second(way: str, seed: int) -> float:
        return mean(gaps[0] for run in runs[way][seed].values() for r in run.requests if (gaps := r.gaps_s))

    def fluid(way: str, seed: int) -> float:
        at = seeds.index(seed)
        return sum(of.fluid_goodput_rps.values[at] for of in by_way[way].values() if of.fluid_goodput_rps)

    def tokens(way: str, seed: int) -> float:
        requests = [request for run in runs[way][seed].values() for request in run.requests]
        return sum(len(request.token_times_s) for request in requests) / last_token_s(requests)

    def ratio(figure: Callable[[str, int], float], above: str, below: str) -> Spread:
        return Spread.of([figure(above, seed) / figure(below, seed) for seed in seeds])

    fluid_ratios = [fluid("shared", seed) / rps for seed in seeds if (rps := fluid("static", seed))]
    return SharingRatios(
        ttft_mean_speedup_over_stock=ratio(ttft, "static_stock", "shared"),
        ttft_mean_over_static=ratio(ttft, "shared", "static"),
        second_token_speedup_over_static=ratio(second, "static", "shared"),
        fluid_goodput_over_static=Spread.of(fluid_ratios) if fluid_ratios else None,
        throughput_ratio=ratio(tokens, "shared", "static_stock"),
    )


def figures_of(runs: Runs) -> dict[str, Figures]:
    """Of each engine, as those of `layerkv bench run`."""
    engines = sorted(next(iter(runs.values())))
    return {f"{engine}": engine_figures([runs[seed][engine] for seed in sorted(runs)], policy()) for engine in engines}


def have_equal_tokens(by_way: Mapping[str, Runs]) -> bool:
    """Whether every request was answered the same tokens, whatever way."""
    first, *others = [
        {
            (seed, engine, request.request_id): request.token_digest
            for seed, of_seed in runs.items()
            for engine, run in of_seed.items()
            for request in run.requests
        }
        for runs in by_way.values()
    ]
    return all(other == first for other in others)


def last_token_s(requests: Sequence[RequestRecord]) -> float:
    """When the last token of all came."""
    return max((request.token_times_s[-1] for request in requests if request.token_times_s), default=0.0)


# Give -----------------------------------------------------------------------------------------------------------------


class GiveFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One way in which a donor gives memory.

    `donor` and `taker` are the engines' figures. `longest_gap_s`: of each stream of the bursts, the longest time
    between two tokens; `longest_gap_max_s` is the longest of all. `donor_end_s`: when the donor's last token came,
    after the start. `recomputed` and `parked`: how often a request's KV was given up, or parked, on both engines.
    `donor_was_there`: in every seed it had tokens to make when the last burst came; else the study says nothing.
    """

    donor: Figures
    taker: Figures
    longest_gap_s: Distribution
    longest_gap_max_s: Spread
    donor_end_s: Spread
    recomputed: Spread
    parked: Spread
    donor_was_there: bool


class GiveRatios(msgspec.Struct, frozen=True, kw_only=True):
    """Parking beside the other ways, of the 99th percentile of `longest_gap_s` and of `donor_end_s`, within a seed."""

    longest_gap_speedup_over_wait: Spread
    longest_gap_speedup_over_recompute: Spread
    longest_gap_over_nothing: Spread
    donor_end_over_nothing: Spread
    donor_end_over_recompute: Spread


def give_figures(runs: Runs) -> GiveFigures:
    """Of one way."""
    seeds = sorted(runs)
    both = figures_of(runs)
    gaps = [[max(request.gaps_s, default=0.0) for request in runs[seed][TAKER].requests] for seed in seeds]
    ends = [last_token_s(runs[seed][DONOR].requests) for seed in seeds]
    counters = [[run.counters for run in runs[seed].values()] for seed in seeds]
    last_bursts = [max(request.arrival_s for request in runs[seed][TAKER].requests) for seed in seeds]
    return GiveFigures(
        donor=both[f"{DONOR}"],
        taker=both[f"{TAKER}"],
        longest_gap_s=over_seeds(gaps),
        longest_gap_max_s=Spread.of([max(of) for of in gaps]),
        donor_end_s=Spread.of(ends),
        recomputed=Spread.of([sum(c.preemptions for c in of) for of in counters]),
        parked=Spread.of([sum(c.parks for c in of) for of in counters]),
        donor_was_there=all(end_s > burst_s for end_s, burst_s in zip(ends, last_bursts, strict=True)),
    )


def give_ratios(by_way: Mapping[str, GiveFigures]) -> GiveRatios:
    """Of the ways `nothing`, `wait`, `recompute` and `park`."""

    def gap(way: str) -> Sequence[float]:
        return by_way[way].longest_gap_s.p99.values

    def end(way: str) -> Sequence[float]:
        return by_way[way].donor_end_s.values

    return GiveRatios(
        longest_gap_speedup_over_wait=_ratio(gap("wait"), gap("park")),
        longest_gap_speedup_over_recompute=_ratio(gap("recompute"), gap("park")),
        longest_gap_over_nothing=_ratio(gap("park"), gap("nothing")),
        donor_end_over_nothing=_ratio(end("park"), end("nothing")),
        donor_end_over_recompute=_ratio(end("park"), end("recompute")),
    )


def _ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    return Spread.of([one / other for one, other in zip(above, below, strict=True)])


# Idle -----------------------------------------------------------------------------------------------------------------


class HeldSample(NamedTuple):
    """Bytes of KV memory that an engine holds, by the broker, and `MemAvailable` of the machine, at one moment."""

    at_s: float
    held_bytes: int
    available_bytes: int


class IdleFigures(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that nobody uses any more, and the first requests after that.

    `freed_fraction`: of the KV memory that it held at the last token of its load, lane zone included, what it has given
    back 2.5 s later; `held_bytes_before` and `held_bytes_after` are those two, and `available_bytes_rise` is what the
    machine's `MemAvailable` rose by meanwhile, which others' doings are in. `first_token_s`: the median TTFT of single
    requests after a pause, of an engine that had given its memory back and of a static one.
    """

    freed_fraction: Spread
    held_bytes_before: Spread
    held_bytes_after: Spread
    available_bytes_rise: Spread
    first_token_s: dict[str, Spread]
    first_token_over_static: Spread


class IdleSeen(NamedTuple):
    """One seed: the load through the static engine and through the elastic one, and what that one held meanwhile.

    Times of `held` count from the start of its load.
    """

    static: LoadRun
    elastic: LoadRun
    held: Sequence[HeldSample]


def idle_figures(by_seed: Sequence[IdleSeen]) -> IdleFigures:
    """Over seeds.

    Raises:
        LayerKVError: the load took so long that there was no pause before the first single request.
    """
    before: list[HeldSample] = []
    after: list[HeldSample] = []
    for seen in by_seed:
        burst = [request for request in seen.elastic.requests if not _is_probe(request)]
        end_s = last_token_s(burst)
        probed_s = min(request.arrival_s for request in seen.elastic.requests if _is_probe(request))
        if end_s + FREED_WITHIN_S > probed_s:
            raise LayerKVError(
                f"the burst's last token came {end_s:.1f} s after its start; expected {probed_s - FREED_WITHIN_S:g} s "
                "at the latest: this machine is too slow, or too busy, for --only idle"
            )
        before.append(_last_by(seen.held, end_s))
        after.append(_last_by(seen.held, end_s + FREED_WITHIN_S))
    pairs = list(zip(before, after, strict=True))
    first_s = {name: [_probe_ttft_s(getattr(seen, name)) for seen in by_seed] for name in ("static", "elastic")}
    return IdleFigures(
        freed_fraction=Spread.of([1 - late.held_bytes / early.held_bytes for early, late in pairs]),
        held_bytes_before=Spread.of([early.held_bytes for early in before]),
        held_bytes_after=Spread.of([late.held_bytes for late in after]),
        available_bytes_rise=Spread.of([late.available_bytes - early.available_bytes for early, late in pairs]),
        first_token_s={name: Spread.of(values) for name, values in first_s.items()},
        first_token_over_static=_ratio(first_s["elastic"], first_s["static"]),
    )


def _is_probe(request: RequestRecord) -> bool:
    return request.request_id.startswith(PROBE)


def _probe_ttft_s(run: LoadRun) -> float:
    return median(first for r in run.requests if _is_probe(r) and (first := ttft_s(r)) is not None)


def _last_by(samples: Sequence[HeldSample], at_s: float) -> HeldSample:
    """What was seen last by then.

    Raises:
        LayerKVError: nothing was.
    """
    seen = [sample for sample in samples if sample.at_s <= at_s]
    if not seen:
        raise LayerKVError(f"nobody looked at what the engine holds by {at_s:.1f} s after the start")
    return seen[-1]
