"""Prometheus metrics of one engine: vLLM's names where vLLM has the figure, `apt:` for ours."""

from serve.engine_metrics import EngineMetrics
from serve.request_metrics import RequestMetrics


class Metrics(RequestMetrics, EngineMetrics):
    """Those of its requests and its own, in one registry."""
