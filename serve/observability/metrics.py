"""Prometheus metrics of one engine: vLLM's names where vLLM has the figure, else the prefix `apt:`."""

from apt_jax.serve.observability.engine_metrics import EngineMetrics
from apt_jax.serve.observability.request_metrics import RequestMetrics


class Metrics(RequestMetrics, EngineMetrics):
    """Those of its requests and its own, in one registry."""
