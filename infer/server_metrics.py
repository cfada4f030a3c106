"""What the server tells Prometheus. Labels never hold a prompt, an id or a key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from infer.tickets import OUTCOMES

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
COMPILED = "/jax/core/compile/backend_compile_duration"


class _Kept(Collector):
    def __init__(self, name: str, what: str, value: Callable[[], int]):
        self.name, self.what, self.value = name, what, value

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self.name, self.what, self.value())


class ServerMetrics:
    """Counters of one server; `text()` is what `/metrics` answers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.stages = Histogram(
            "dit_stage_seconds", "Seconds that a sample spends in a stage", ["stage"], buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.batches = Histogram(
            "dit_batch_samples", "Samples that begin together", buckets=(1, 2, 4, 8, 16, 32), registry=self.registry
        )
        self.answers = Counter("dit_requests", "Answered requests", ["route", "status"], registry=self.registry)
        self.ended = Counter("dit_samples", "Samples that have ended", ["outcome"], registry=self.registry)
        self.compilations = Counter("dit_compilations", "Programs compiled", registry=self.registry)
        jax.monitoring.register_event_duration_secs_listener(self._compiled)

    def observe(self, name: str, value: float) -> None:
        """Takes what the engine tells of: seconds of a stage, the size of a batch, how a sample ended."""
        if name == "batch":
            self.batches.observe(value)
        elif name in (*OUTCOMES.values(), "failed"):
            self.ended.labels(outcome=name).inc(value)
        else:
            self.stages.labels(stage=name).observe(value)

    def gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        """A number that is asked for whenever metrics are."""
        gauge = Gauge(name, what, registry=self.registry)
        gauge.set_function(value)

    def count(self, name: str, what: str, value: Callable[[], int]) -> None:
        """A count that somebody else keeps."""
        self.registry.register(_Kept(name, what, value))

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return generate_latest(self.registry)

    def _compiled(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            self.compilations.inc()
