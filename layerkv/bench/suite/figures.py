"""From raw runs to the figures of a case's JSON.

Pure functions. Invariant: latencies are computed from what the client saw, never from what a server says of itself;
only the time in the queue, which no client can see, is the engine's: of each request where it is in the records, else
the server's histogram.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from layerkv import figures
from layerkv.bench.records import Counters, LoadRun, RequestRecord, tpot_s, ttft_s
from layerkv.bench.suite.readers import Reading, reading_of
from layerkv.bench.suite.result import Distribution, Figures, Ratios, Spread
from layerkv.bench.suite.server_metrics import quantile
from layerkv.config import SloPolicy


def engine_figures(runs: Sequence[LoadRun], policy: SloPolicy) -> Figures:
    """The figures of one engine at one point, from its runs: one for each seed."""
    assert runs
    spans = [_span_s(run.requests) for run in runs]
    readings = [[reading_of(request, policy) for request in run.requests] for run in runs]
    met = [sum(reading.met_slo for reading in of) for of in readings]
    fluid = [sum(reading.is_fluid for reading in of) for of in readings]

    def counted(read: Callable[[Counters], float]) -> Spread:
        return Spread.of([read(run.counters) for run in runs])

    def share(counts: Sequence[int]) -> Spread:
        return Spread.of([count / len(run.requests) for count, run in zip(counts, runs, strict=True)])

    def per_second(counts: Iterable[float]) -> Spread:
        return Spread.of([count / span if span else 0.0 for count, span in zip(counts, spans, strict=True)])

    return Figures(
        ttft_s=over_seeds([_some(map(ttft_s, run.requests)) for run in runs]),
        tpot_s=over_seeds([_some(map(tpot_s, run.requests)) for run in runs]),
        time_between_tokens_s=over_seeds([[gap for r in run.requests for gap in r.gaps_s] for run in runs]),
        second_token_s=over_seeds([[gaps[0] for r in run.requests if (gaps := r.gaps_s)] for run in runs]),
        end_to_end_s=over_seeds([[r.token_times_s[-1] - r.arrival_s for r in _answered(run)] for run in runs]),
        lag_s=_where_read([_some(reading.lag_s for reading in of) for of in readings]),
        longest_pause_s=_where_read([_some(reading.longest_pause_s for reading in of) for of in readings]),
        queue_s=_queue(runs),
        arrival_error_s=over_seeds(
            [[r.sent_s - r.arrival_s for r in run.requests if r.sent_s is not None] for run in runs]
        ),
        output_tokens_per_s=per_second(sum(len(r.token_times_s) for r in run.requests) for run in runs),
        requests_per_s=per_second(sum(r.error is None for r in run.requests) for run in runs),
        fluid=share(fluid),
        fluid_goodput_rps=per_second(fluid),
        tokens_on_time=_any_seed([_on_time(run, of) for run, of in zip(runs, readings, strict=True)]),
        fluidity_index=_any_seed([_mean_of(_some(reading.fluidity_index for reading in of)) for of in readings]),
        goodput_rps=per_second(met),
        slo_attainment=share(met),
        slo_attainment_by_class=_by_class(
            runs, policy, lambda requests: sum(reading_of(r, policy).met_slo for r in requests) / len(requests)
        ),
        ttft_mean_s_by_class=_by_class(runs, policy, lambda requests: _mean(_some(map(ttft_s, requests)))),
        num_requests=Spread.of([len(run.requests) for run in runs]),
        num_failed=Spread.of([sum(r.error is not None for r in run.requests) for run in runs]),
        preemptions=counted(lambda c: c.preemptions),
        parks=counted(lambda c: c.parks),
        fetches=counted(lambda c: c.fetches),
        bytes_stored=_where_known([run.counters.bytes_stored for run in runs]),
        bytes_loaded=_where_known([run.counters.bytes_loaded for run in runs]),
        prompt_tokens=counted(lambda c: c.prompt_tokens),
        device_hit_tokens=counted(lambda c: c.device_hit_tokens),
        host_hit_tokens=counted(lambda c: c.host_hit_tokens),
        peak_device_kv_bytes=Spread.of([max((s.device_kv_bytes for s in run.samples), default=0) for run in runs]),
        peak_host_kv_bytes=_where_known([_peak_host(run) for run in runs]),
        peak_rss_bytes=counted(lambda c: c.peak_rss_bytes),
        engine_cpu_s=counted(lambda c: c.engine_cpu_s),
        front_end_cpu_s=counted(lambda c: c.front_end_cpu_s),
        scheduler_s_per_step=_scheduler([run.counters for run in runs]),
        wall_s=Spread.of([run.wall_s for run in runs]),
        ends=_ends(runs),
        waited_for=_waited_for(runs),
        output_tokens=_where_known([_mean_output_tokens(run) for run in runs]),
        longest_probe_s=max(_some(run.longest_probe_s for run in runs), default=None),
        disturbed=any(run.is_disturbed for run in runs),
    )


def engine_ratios(runs: Mapping[str, Mapping[int, LoadRun]], policy: SloPolicy) -> Ratios:
    """layerkv beside the others at one point; `runs` by engine, then by seed. Ratios are taken within a seed.

    Of first tokens only where both engines finished every request: one that drops its slowest would look better.
    """
    ours = {seed: _Totals(run, policy) for seed, run in runs.get("layerkv", {}).items()}
    others = {
        name: {seed: _Totals(run, policy) for seed, run in by_seed.items() if seed in ours}
        for name, by_seed in runs.items()
        if name != "layerkv"
    }

    def against(name: str, ratio: Callable[[_Totals, _Totals], float | None]) -> Spread | None:
        return _any_seed([ratio(ours[seed], other) for seed, other in others.get(name, {}).items()])

    def all_against(ratio: Callable[[_Totals, _Totals], float | None]) -> dict[str, Spread]:
        return {name: spread for name in others if (spread := against(name, ratio)) is not None}

    return Ratios(
        ttft_mean_speedup=against("stock", _ttft_speedup),
        ttft_p99_speedup=against("stock", lambda our, other: _ttft_ratio(other, our, "ttft_p99_s")),
        throughput_ratio=against("stock", lambda our, other: _ratio(our.tokens_per_s, other.tokens_per_s)),
        ttft_mean_over_oracle=against("oracle", lambda our, other: _ttft_ratio(our, other, "ttft_mean_s")),
        goodput_ratio=against("stock", lambda our, other: _ratio(our.goodput_rps, other.goodput_rps)),
        fluid_gain=against("stock", lambda our, other: our.fluid - other.fluid),
        ttft_mean_speedup_over=all_against(_ttft_speedup),
        goodput_ratio_over=all_against(lambda our, other: _ratio(our.goodput_rps, other.goodput_rps)),
        throughput_ratio_over=all_against(lambda our, other: _ratio(our.tokens_per_s, other.tokens_per_s)),
    )


def have_equal_tokens(left: Mapping[int, LoadRun], right: Mapping[int, LoadRun]) -> bool | None:
    """Whether two engines gave the same tokens to every request that both finished; None if there is none."""
    equal = [
        digest == theirs
        for seed in left.keys() & right.keys()
        for request_id, digest in _digests(left[seed]).items()
        if digest is not None and (theirs := _digests(right[seed]).get(request_id)) is not None
    ]
    return all(equal) if equal else None


class _Totals:
    """What ratios are made of, from one run."""

    def __init__(self, run: LoadRun, policy: SloPolicy) -> None:
        first_tokens = _some(map(ttft_s, run.requests))
        self.has_finished_all = all(request.error is None for request in run.requests)
        span_s = _span_s(run.requests) or math.inf
        self.ttft_mean_s = _mean(first_tokens)
        self.ttft_p99_s = figures.percentile(sorted(first_tokens), 0.99) if first_tokens else 0.0
        self.tokens_per_s = sum(len(r.token_times_s) for r in run.requests) / span_s
        readings = [reading_of(request, policy) for request in run.requests]
        self.goodput_rps = sum(reading.met_slo for reading in readings) / span_s
        self.fluid = _mean([reading.is_fluid for reading in readings])


def _ttft_speedup(our: _Totals, other: _Totals) -> float | None:
    return _ttft_ratio(other, our, "ttft_mean_s")


def _ttft_ratio(numerator: _Totals, denominator: _Totals, figure: str) -> float | None:
    if not (numerator.has_finished_all and denominator.has_finished_all):
        return None
    return _ratio(getattr(numerator, figure), getattr(denominator, figure))


def _digests(run: LoadRun) -> dict[str, str | None]:
    return {request.request_id: request.token_digest for request in run.requests}


def _span_s(requests: Sequence[RequestRecord]) -> float:
    """From the first arrival to the last token, or to the last arrival, if nothing came of that."""
    last_s = max((r.token_times_s[-1] if r.token_times_s else r.arrival_s for r in requests), default=0.0)
    return last_s - min((r.arrival_s for r in requests), default=0.0)


def _peak_host(run: LoadRun) -> int | None:
    known = [sample.host_kv_bytes for sample in run.samples if sample.host_kv_bytes is not None]
    return max(known, default=0) if known or not run.samples else None


def _where_known(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread.of(known) if len(known) == len(values) else None


def _any_seed(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread.of(known) if known else None


def _on_time(run: LoadRun, readings: Sequence[Reading]) -> float | None:
    num_tokens = sum(len(request.token_times_s) for request in run.requests)
    return sum(reading.num_on_time for reading in readings) / num_tokens if num_tokens else None


def _where_read(samples_by_seed: Sequence[Sequence[float]]) -> Distribution | None:
    """None where nobody had anything to read: a lag of 0 s would be the best of all."""
    return over_seeds(samples_by_seed) if any(samples_by_seed) else None


def _answered(run: LoadRun) -> list[RequestRecord]:
    return [request for request in run.requests if request.error is None and request.token_times_s]


def _ends(runs: Sequence[LoadRun]) -> dict[str, Spread]:
    known = sorted({request.end for run in runs for request in run.requests if request.end is not None})
    return {end: Spread.of([sum(r.end == end for r in run.requests) for run in runs]) for end in known}


def _waited_for(runs: Sequence[LoadRun]) -> dict[str, Spread]:
    """Each resource's share of all that was waited for, by samples: they come evenly, so each counts for as long."""
    seen = [
        total for run in runs if (total := sum((Counter(sample.waiting_for) for sample in run.samples), Counter[str]()))
    ]
    resources = sorted({resource for total in seen for resource in total})
    return {resource: Spread.of([of[resource] / of.total() for of in seen]) for resource in resources}


def _mean_output_tokens(run: LoadRun) -> float | None:
    return _mean_of([len(request.token_times_s) for request in _answered(run)])


def _some(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean_of(values: Sequence[float]) -> float | None:
    return _mean(values) if values else None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def over_seeds(samples_by_seed: Sequence[Sequence[float]]) -> Distribution:
    """Mean and percentiles of each seed's samples, each over seeds; those of 0 where no seed has a sample."""
    # A seed without a sample knows no latency; 0 s would be the best of all.
    each = [found for samples in samples_by_seed if (found := figures.distribution(samples)) is not None]
    names = ("mean", *(name for name, _ in figures.PERCENTILES))
    return Distribution(**{name: Spread.of([found[name] for found in each] or [0.0]) for name in names})


def _queue(runs: Sequence[LoadRun]) -> Distribution:
    told = [
        [r.first_scheduled_s - r.arrival_s for r in run.requests if r.first_scheduled_s is not None] for run in runs
    ]
    if any(told):
        return over_seeds(told)
    counters = [run.counters for run in runs]
    means = [c.queue_sum_s / c.queue_count if c.queue_count else 0.0 for c in counters]
    percentiles = {
        name: Spread.of([quantile(c.queue_buckets, c.queue_count, share) for c in counters])
        for name, share in figures.PERCENTILES
    }
    return Distribution(mean=Spread.of(means), **percentiles)


def _scheduler(counters: Sequence[Counters]) -> Spread | None:
    values = [c.scheduler_cpu_s / c.num_steps for c in counters if c.scheduler_cpu_s is not None and c.num_steps]
    return Spread.of(values) if values else None


def _by_class(
    runs: Sequence[LoadRun], policy: SloPolicy, figure: Callable[[Sequence[RequestRecord]], float]
) -> dict[str, Spread]:
    """A figure of each class that has requests in every run."""
    by_class: dict[str, list[float]] = {}
    for run in runs:
        for name in policy.classes:
            chosen = [r for r in run.requests if (r.slo_class or policy.default_class) == name]
            if chosen:
                by_class.setdefault(name, []).append(figure(chosen))
    return {name: Spread.of(values) for name, values in by_class.items()}
