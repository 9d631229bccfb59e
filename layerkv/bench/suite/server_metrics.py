"""Reads what a benchmark needs out of a server's `/metrics`.

Invariant: a metric that a server does not have counts as 0. Reading costs well under a millisecond, for it happens
beside a load.
"""

from __future__ import annotations

import math
from collections import defaultdict

import msgspec

from layerkv.metrics_text import labels_in, samples

_QUEUE = "vllm:request_queue_time_seconds"


class ServerMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One reading, added up over engines. Counters count from the server's start; gauges are of this moment.

    `device_usage` is the share of KV memory in use, with layerkv that of its pool. `host_blocks` are layerkv's that
    hold KV, cached prefixes included. `waiting_for` counts layerkv's waiting and parked requests by the resource that
    they lack; empty while none does. vLLM counts parks among `preemptions`; `recomputes` are layerkv's own count of KV
    that was given up.
    """

    running: int = 0
    waiting: int = 0
    parked: int = 0
    waiting_for: dict[str, int] = {}
    device_usage: float = 0.0
    host_blocks: int = 0
    pool_blocks: int = 0
    zone_blocks: int = 0
    zone_blocks_used: int = 0
    preemptions: int = 0
    recomputes: int = 0
    parks: int = 0
    fetches: int = 0
    bytes_stored: int = 0
    bytes_loaded: int = 0
    blocks_onloaded: int = 0
    prompt_tokens: int = 0
    device_hit_tokens: int = 0
    host_hit_tokens: int = 0
    queue_count: int = 0
    queue_sum_s: float = 0.0
    queue_buckets: list[tuple[float, float]] = []


def read_metrics(text: str) -> ServerMetrics:
    """The reading that `text`, in Prometheus' text format, holds."""
    sums: dict[tuple[str, str], float] = defaultdict(float)
    buckets: dict[float, float] = defaultdict(float)
    for name, labels, value in samples(text, ("vllm:", "layerkv_")):
        if name == f"{_QUEUE}_bucket":
            bound = float(labels_in(labels)["le"])
            if math.isfinite(bound):  # JSON has no infinity; all observations are in the count
                buckets[bound] += value
        elif name in _LABELLED:
            sums[name, labels_in(labels).get(_LABELLED[name], "")] += value
        else:
            sums[name, ""] += value
    return ServerMetrics(
        running=int(sums["vllm:num_requests_running", ""]),
        waiting=int(sums["vllm:num_requests_waiting", ""]),
        parked=int(sums["layerkv_requests", "parked"]),
        waiting_for={
            label: int(value) for (name, label), value in sums.items() if name == "layerkv_waiting_requests" and value
        },
        device_usage=sums["vllm:kv_cache_usage_perc", ""],
        host_blocks=int(sums["layerkv_host_blocks_used", ""] + sums["layerkv_host_blocks_cached", ""]),
        pool_blocks=int(sums["layerkv_pool_blocks", ""]),
        zone_blocks=int(sums["layerkv_zone_blocks", ""]),
        zone_blocks_used=int(sums["layerkv_zone_blocks_used", ""]),
        preemptions=int(sums["vllm:num_preemptions_total", ""]),
        recomputes=int(sums["layerkv_recomputes_total", ""]),
        parks=int(sums["layerkv_parks_total", ""]),
        fetches=int(sums["layerkv_fetches_total", ""]),
        bytes_stored=int(sums["layerkv_bytes_total", "store"]),
        bytes_loaded=int(sums["layerkv_bytes_total", "load"]),
        blocks_onloaded=int(sums["vllm:simple_kv_offload_load_blocks_total", ""]),
        prompt_tokens=int(sums["vllm:prompt_tokens_total", ""]),
        device_hit_tokens=int(sums["vllm:prompt_tokens_cached_by_source_total", "device"]),
        host_hit_tokens=int(
            sums["vllm:prompt_tokens_cached_by_source_total", "host"]
            + sums["vllm:prompt_tokens_cached_by_source_total", "external_unspecified"]
        ),
        queue_count=int(sums[f"{_QUEUE}_count", ""]),
        queue_sum_s=sums[f"{_QUEUE}_sum", ""],
        queue_buckets=sorted(buckets.items()),
    )


# The label by which these are told apart; of all others only the sum counts.
_LABELLED = {
    "layerkv_requests": "residency",
    "layerkv_waiting_requests": "resource",
    "layerkv_bytes_total": "direction",
    "vllm:prompt_tokens_cached_by_source_total": "source",
}


def quantile(buckets: list[tuple[float, float]], total: float, share: float) -> float:
    """The value below which `share` of a histogram's `total` observations lie, interpolated within its bucket.

    `buckets` are (upper bound, cumulative count). 0 for an empty histogram; the last bound for what lies above it.
    """
    wanted = share * total
    below_bound, below_count = 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted:
            inside = (wanted - below_count) / (count - below_count) if count > below_count else 0.0
            return below_bound + inside * (bound - below_bound)
        below_bound, below_count = bound, count
    return below_bound
