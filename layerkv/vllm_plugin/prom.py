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
        for engine in per_engine_labelvalues:
            BACKLOG.expect(engine)
            for spec in METRICS:
                if spec.label is None:
                    self._child(spec.name, engine)  # so that an unlabelled metric shows as 0 from the start

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
