"""What ``/metrics`` shows, in the text form of Prometheus."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mquant_jax.runtime.engine import Engine, EngineStats
from mquant_jax.runtime.requests import Answer

_GAUGES = {
    "queued": "requests that wait for a slot",
    "running": "requests that hold a slot",
    "kept_bytes": "memory of features and cache entries that are kept for reuse",
}
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class _EngineCollector(Collector):
    """The engine's own counts, read when they are asked for."""

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
    """Counts of one server; several in one process do not meet."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self.responses = Counter(
            "mquant_responses", "responses of /v1/chat/completions", ["status"],
            registry=self.registry,
        )  # fmt: skip
        self.stages = Histogram(
            "mquant_seconds", "seconds of an answered request in each stage", ["stage"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip

    def answered(self, answer: Answer) -> None:
        """Note the times of a finished answer."""
        for stage in ("queue", "prefill", "decode"):
            self.stages.labels(stage).observe(getattr(answer, f"{stage}_seconds"))

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)
