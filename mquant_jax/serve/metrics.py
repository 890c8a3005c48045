"""The contents of ``/metrics``, in Prometheus' text format."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mquant_jax.runtime.engine import Engine, EngineStats
from mquant_jax.runtime.requests import Answer

_GAUGES = {
    "queued": "requests waiting for a slot",
    "running": "requests in a slot",
    "kept_bytes": "memory of features and cache entries kept for reuse",
}
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class _EngineCollector(Collector):
    """The engine's statistics, read on each scrape."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats()
        for field in dataclasses.fields(EngineStats):
            name, value = f"mquant_engine_{field.name}", getattr(stats, field.name)
            if field.name in _GAUGES:
                yield GaugeMetricFamily(name, _GAUGES[field.name], value)
            else:
                yield CounterMetricFamily(name, f"{field.name.replace('_', ' ')}, total", value)


class Metrics:
    """Metrics of one server, in a registry of its own."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self.responses = Counter(
            "mquant_responses", "responses of /v1/chat/completions", ["status"],
            registry=self.registry,
        )  # fmt: skip
        self.stages = Histogram(
            "mquant_seconds", "seconds that answered requests spent in each stage", ["stage"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip

    def answered(self, answer: Answer) -> None:
        """Record the times of a finished answer."""
        for stage in ("queue", "prefill", "decode"):
            self.stages.labels(stage).observe(getattr(answer, f"{stage}_seconds"))

    def text(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)
