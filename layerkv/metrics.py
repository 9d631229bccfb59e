"""The metrics as data: what each is called and means, and a payload that travels between processes.

vLLM carries the payload from workers and scheduler to the process that serves ``/metrics``; the adapter registers
there what :data:`METRICS` lists. A sample's key is ``name`` or ``name|label value``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["counter", "gauge", "histogram"]

_WAITS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
"""1 s is the built-in bound of a fluid request's lag."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric of ``/metrics``.

    Attributes:
        name: Without the ``_total`` that Prometheus clients add to counters.
        kind: Prometheus type.
        help: One sentence for the person who reads it.
        label: Its label besides vLLM's own, or None.
        label_values: That label's values, where they are always the same: they show as 0 from the start, so that a
            rate over Prometheus' first readings misses nothing.
        buckets: Upper bounds, for histograms.
    """

    name: str
    kind: Kind
    help: str
    label: str | None = None
    buckets: tuple[float, ...] = ()
    label_values: tuple[str, ...] = ()


_DIRECTIONS = ("store", "load")
_RESOURCES = ("pool", "zone", "slot", "link", "compute", "host_memory")
COPY_WAIT = "layerkv_copy_wait_seconds"
DECIDE_TIME = "layerkv_decide_seconds"

METRICS: tuple[MetricSpec, ...] = (
    MetricSpec("layerkv_requests", "gauge", "Requests by residency of their KV.", "residency"),
    MetricSpec("layerkv_paused_requests", "gauge", "Resident requests that steps leave out: others have their slots."),
    MetricSpec(
        "layerkv_waiting_requests",
        "gauge",
        "Requests at the heads of both lines that could not go on, by the resource that they wait for.",
        "resource",
        label_values=_RESOURCES,
    ),
    MetricSpec(
        "layerkv_bytes",
        "counter",
        "KV bytes copied, by direction (store: device to host).",
        "direction",
        label_values=_DIRECTIONS,
    ),
    MetricSpec(
        "layerkv_copy_seconds",
        "counter",
        "Seconds spent copying KV, by direction.",
        "direction",
        label_values=_DIRECTIONS,
    ),
    MetricSpec(COPY_WAIT, "counter", "Seconds that steps waited for copies (CPU; all workers)."),
    MetricSpec("layerkv_parks", "counter", "Requests parked: KV in host memory only."),
    MetricSpec("layerkv_fetches", "counter", "Parked requests fetched back into the pool."),
    MetricSpec("layerkv_layered_prefills", "counter", "Prompts admitted through the lane zone."),
    MetricSpec("layerkv_recomputes", "counter", "Requests whose KV was given up and is computed again."),
    MetricSpec("layerkv_stored_ahead_blocks", "counter", "Blocks stored in the background before a park."),
    MetricSpec("layerkv_prefix_stored_blocks", "counter", "Blocks of finished requests stored as cached prefixes."),
    MetricSpec("layerkv_prefix_hit_blocks", "counter", "Blocks of prompts loaded from cached prefixes, not computed."),
    MetricSpec("layerkv_decisions", "counter", "What was decided about requests, by reason.", "reason"),
    MetricSpec("layerkv_declined", "counter", "Decided starts that vLLM put off: a few are normal, many are a bug."),
    MetricSpec(
        "layerkv_refused",
        "counter",
        "Requests that the engine ended with an error: they cannot run here, or their copies go on failing.",
    ),
    MetricSpec("layerkv_overload_refused", "counter", "Requests refused with HTTP 429, by SLO class.", "slo_class"),
    MetricSpec("layerkv_host_blocks_used", "gauge", "Host blocks that requests hold."),
    MetricSpec("layerkv_host_blocks_cached", "gauge", "Host blocks that cache prefixes, and give way to requests."),
    MetricSpec("layerkv_host_blocks", "gauge", "Host blocks in all."),
    MetricSpec(
        "layerkv_host_bytes",
        "gauge",
        "Host memory that a broker divides, of each worker: held, needed by requests, and what may be held.",
        "amount",
    ),
    MetricSpec("layerkv_pool_blocks", "gauge", "Pool blocks in all."),
    MetricSpec(
        "layerkv_kv_bytes",
        "gauge",
        "Memory of a pool that grows and shrinks, of each worker: held, needed by requests, and what may be held.",
        "amount",
    ),
    MetricSpec("layerkv_zone_blocks_used", "gauge", "Lane-zone blocks in use."),
    MetricSpec("layerkv_zone_blocks", "gauge", "Lane-zone blocks in all."),
    MetricSpec("layerkv_admission_wait_seconds", "histogram", "Arrival to first compute.", None, _SECONDS),
    MetricSpec(DECIDE_TIME, "counter", "Seconds spent deciding and applying decisions, all steps."),
    MetricSpec(
        "layerkv_prefill_backlog_seconds",
        "gauge",
        "Predicted wait of a new request until its prefill begins, for classes refused under overload.",
        "slo_class",
    ),
    MetricSpec("layerkv_ttft_slo_met", "counter", "First tokens on time, by SLO class.", "slo_class"),
    MetricSpec("layerkv_ttft_slo_missed", "counter", "First tokens late, by SLO class.", "slo_class"),
    MetricSpec(
        "layerkv_tokens_on_time",
        "counter",
        "Tokens no later than arrival + ttft + k * tpot, by SLO class.",
        "slo_class",
    ),
    MetricSpec("layerkv_tokens_late", "counter", "Tokens later than that, by SLO class.", "slo_class"),
    MetricSpec(
        "layerkv_fluid_requests",
        "counter",
        "Requests over whose first token met ttft and whose reader waited max_lag in all at most, by SLO class.",
        "slo_class",
    ),
    MetricSpec(
        "layerkv_not_fluid_requests", "counter", "Requests over that were not fluid, by SLO class.", "slo_class"
    ),
    MetricSpec(
        "layerkv_lag_seconds",
        "histogram",
        "All waits of a request's reader together, by SLO class.",
        "slo_class",
        _WAITS_S,
    ),
    MetricSpec(
        "layerkv_longest_pause_seconds",
        "histogram",
        "The longest wait of a request's reader for a token, by SLO class.",
        "slo_class",
        _WAITS_S,
    ),
)

Payload = dict[str, dict[str, Any]]


@dataclass(slots=True)
class MetricSamples:
    """Samples since the last payload was taken. Counters hold increments, gauges the latest value."""

    counters: dict[str, float] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float, label: str | None = None) -> None:
        """Count ``value`` more."""
        key = _key(name, label)
        self.counters[key] = self.counters.get(key, 0) + value

    def set(self, name: str, value: float, label: str | None = None) -> None:
        """Set a gauge."""
        self.gauges[_key(name, label)] = value

    def observe(self, name: str, value: float, label: str | None = None) -> None:
        """Add one observation to a histogram."""
        self.histograms.setdefault(_key(name, label), []).append(value)

    def __bool__(self) -> bool:
        return bool(self.counters or self.gauges or self.histograms)

    def has_more_than(self, counter: str) -> bool:
        """Whether anything is here but that counter."""
        return bool(self.gauges or self.histograms) or len(self.counters) > (counter in self.counters)

    def take(self) -> Payload:
        """The samples as a payload; this object is empty afterwards."""
        payload: Payload = {"counters": self.counters, "gauges": self.gauges, "histograms": self.histograms}
        self.counters, self.gauges, self.histograms = {}, {}, {}
        return payload


def merge_payloads(first: Payload, second: Payload) -> Payload:
    """Both payloads in one: counters add up, histograms join, of gauges the second's count."""
    counters = dict(first.get("counters", {}))
    for key, value in second.get("counters", {}).items():
        counters[key] = counters.get(key, 0) + value
    histograms = {key: list(values) for key, values in first.get("histograms", {}).items()}
    for key, values in second.get("histograms", {}).items():
        histograms.setdefault(key, []).extend(values)
    gauges = {**first.get("gauges", {}), **second.get("gauges", {})}
    return {"counters": counters, "gauges": gauges, "histograms": histograms}


def split_key(key: str) -> tuple[str, str | None]:
    """Name and label value of a sample's key."""
    name, _, label = key.partition("|")
    return name, label or None


def _key(name: str, label: str | None) -> str:
    return name if label is None else f"{name}|{label}"
