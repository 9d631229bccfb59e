"""layerkv's metrics in vLLM's ``/metrics``: the payload between processes, and its registration with Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from layerkv.config import SloPolicy
from layerkv.metrics import METRICS, MetricSpec, Payload, merge_payloads, split_key
from layerkv.vllm_plugin.overload import BACKLOG, GAUGE
from layerkv.vllm_plugin.reload import follow_policy
from layerkv.vllm_plugin.setup import engine_config
from layerkv.vllm_plugin.words import word_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class LayerKVStats(KVConnectorStats):
    """One payload of :mod:`layerkv.metrics` on its way to the process that serves ``/metrics``."""

    data: Payload = field(default_factory=dict)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> LayerKVStats:
        self.data = merge_payloads(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's periodic log line: the counters of the interval, and the latest gauges."""
        values = {**self.data.get("counters", {}), **self.data.get("gauges", {})}
        return {key: round(value, 3) for key, value in values.items()}

    def is_empty(self) -> bool:
        """Whether vLLM may drop the payload: one with gauges only is often the last before the engine is idle."""
        return not any(self.data.values())


class LayerKVPromMetrics(KVConnectorPromMetrics):
    """Registers every metric of :data:`layerkv.metrics.METRICS` and records payloads into them."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make: dict[str, Callable[[MetricSpec, list[str]], Any]] = {
            "counter": lambda spec, labels: metric_types[Counter](spec.name, spec.help, labels),
            "gauge": lambda spec, labels: metric_types[Gauge](
                spec.name, spec.help, labels, multiprocess_mode="mostrecent"
            ),
            "histogram": lambda spec, labels: metric_types[Histogram](
                spec.name, spec.help, labels, buckets=spec.buckets
            ),
        }
        self._families = {
            spec.name: make[spec.kind](spec, [*labelnames, *([spec.label] if spec.label else [])]) for spec in METRICS
        }
        self._children: dict[tuple[str, int], Any] = {}
        config = engine_config(vllm_config)
        self._policy_source = follow_policy(config.policy_path, config.read_policy())
        self._policy = self._policy_source.policy
        for engine in per_engine_labelvalues:
            BACKLOG.expect(engine, vllm_config.parallel_config._api_process_count)
            for spec in METRICS:
                for key in _keys_at_start(spec, tuple(self._policy.classes)):
                    self._child(key, engine)
        first_engine = min(per_engine_labelvalues, default=0)
        BACKLOG.count_refusals_with(lambda name: self._child(f"layerkv_overload_refused|{name}", first_engine).inc())

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        if self._policy_source.policy is not self._policy:
            self._follow(self._policy_source.policy)
        if (word := word_of(transfer_stats_data)) is not None:
            BACKLOG.note(engine_idx, word, time.monotonic())
        for key, value in transfer_stats_data.get("counters", {}).items():
            self._child(key, engine_idx).inc(value)
        for key, value in transfer_stats_data.get("gauges", {}).items():
            if not self._is_past(key):  # an engine's last word of a class may come after the class has gone
                self._child(key, engine_idx).set(value)
        for key, values in transfer_stats_data.get("histograms", {}).items():
            child = self._child(key, engine_idx)
            for value in values:
                child.observe(value)

    def _follow(self, policy: SloPolicy) -> None:
        """Another policy is in force: what its new classes count begins at 0, and of others nothing waits any more."""
        self._policy = policy
        for engine in self.per_engine_labelvalues:
            for spec in METRICS:
                if spec.label == "slo_class":
                    for key in _keys_at_start(spec, tuple(policy.classes)):
                        self._child(key, engine)
        for (key, _), child in self._children.items():
            if self._is_past(key):
                child.set(0)

    def _is_past(self, key: str) -> bool:
        """Whether it is the backlog of a class that is not refused, or is no more."""
        name, label = split_key(key)
        slo = self._policy.classes.get(label or "")
        return name == GAUGE and (slo is None or slo.overload != "reject")

    def _child(self, key: str, engine_idx: int) -> Any:
        child = self._children.get((key, engine_idx))
        if child is None:
            name, label = split_key(key)
            values = [*self.per_engine_labelvalues[engine_idx], *([label] if label is not None else [])]
            child = self._children[key, engine_idx] = self._families[name].labels(*values)
        return child


def _keys_at_start(spec: MetricSpec, classes: tuple[str, ...]) -> list[str]:
    """What shows as 0 before anything has happened: a counter that appears with its first event hides that event."""
    if spec.label is None:
        return [spec.name]
    values = classes if spec.label == "slo_class" and spec.kind != "gauge" else spec.label_values
    return [f"{spec.name}|{value}" for value in values]
