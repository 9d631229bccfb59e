"""layerkv's metrics in vLLM's ``/metrics``: the payload between processes, and its registration with Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from layerkv.metrics import METRICS, MetricSpec, Payload, merge_payloads, split_key
from layerkv.vllm_plugin.overload import BACKLOG, GAUGE
from layerkv.vllm_plugin.setup import engine_config

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
        classes = tuple(engine_config(vllm_config).policy.classes)
        for engine in per_engine_labelvalues:
            BACKLOG.expect(engine)
            for spec in METRICS:
                for key in _keys_at_start(spec, classes):
                    self._child(key, engine)
        first_engine = min(per_engine_labelvalues, default=0)
        BACKLOG.count_refusals_with(lambda name: self._child(f"layerkv_overload_refused|{name}", first_engine).inc())

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, value in transfer_stats_data.get("counters", {}).items():
            self._child(key, engine_idx).inc(value)
        for key, value in transfer_stats_data.get("gauges", {}).items():
            self._child(key, engine_idx).set(value)
            name, slo_class = split_key(key)
            if name == GAUGE and slo_class is not None:
                BACKLOG.note(slo_class, engine_idx, value, time.monotonic())
        for key, values in transfer_stats_data.get("histograms", {}).items():
            child = self._child(key, engine_idx)
            for value in values:
                child.observe(value)

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
    values = classes if spec.label == "slo_class" and spec.kind == "counter" else spec.label_values
    return [f"{spec.name}|{value}" for value in values]
