"""A registry of Prometheus metrics, and how they are made: each with the same labels. Counters end in `_total`.

A counter exists from the start with every value of its label that is known beforehand: a rate of what does not exist
yet is nothing, not 0, and an alert on it would never fire.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from apt_jax.serve.runtime.observer import Observer

disable_created_metrics()  # a time beside every counter and bucket, which nobody asks for and everybody stores


class Instruments(Observer):
    """Each has a registry of its own, so several can live in one process. `labels` are those of every metric."""

    def __init__(self, model_name: str, **labels: str):
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, **labels}

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, label: str | None = None, values: Iterable[str] = ()) -> Any:
        made = self._made(Counter(name, text, self._names(label), registry=self.registry), label)
        for value in values:
            assert label is not None
            made.labels(**self._labels, **{label: value})
        return made

    def _gauge(self, name: str, text: str, label: str | None = None) -> Any:
        return self._made(Gauge(name, text, self._names(label), registry=self.registry), label)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Any:
        return self._made(Histogram(name, text, self._names(None), registry=self.registry, buckets=buckets), None)

    def _names(self, label: str | None) -> list[str]:
        return [*self._labels, *([] if label is None else [label])]

    def _made(self, metric: Any, label: str | None) -> Any:
        """The metric itself where a label is to be given, else its only child."""
        return metric.labels(**self._labels) if label is None else metric
