"""OpenTelemetry traces, an extra (`pip install 'apt-jax[otel]'`): one span per request, in vLLM's attribute names."""

import time
from typing import Any

from apt_jax.request import FinishReason
from apt_jax.serve.runtime.observer import Observer, Stepped


class Tracing(Observer):
    """Sends a span for each finished request; `exporter` is where to, for tests another one than OTLP over HTTP.

    Raises:
        ValueError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, model_name: str, exporter: Any = None):
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import StatusCode

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(endpoint=endpoint)
        except ImportError as error:
            raise ValueError(
                f"--otlp-traces-endpoint needs OpenTelemetry ({error}); pip install 'apt-jax[otel]'"
            ) from error
        self._error = StatusCode.ERROR
        self._model_name = model_name
        self._provider = TracerProvider(resource=Resource.create({"service.name": "apt-jax"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("apt_jax.serve")

    def brought(self, step: Stepped) -> None:
        """Send what the step finished."""
        offset_s = time.time() - time.monotonic()

        def wall_ns(clock_s: float) -> int:
            return int(1e9 * (clock_s + offset_s))

        for output in step.outputs:
            request, reason = output.request, output.finish_reason
            if reason is None:
                continue
            span = self._tracer.start_span("llm_request", start_time=wall_ns(request.arrival_s))
            if request.first_scheduled_s is not None:
                span.add_event("scheduled", timestamp=wall_ns(request.first_scheduled_s))
                queued_s = request.first_scheduled_s - request.arrival_s
                span.set_attribute("gen_ai.latency.time_in_queue", queued_s)
            if request.first_token_s is not None and request.ttft_s is not None:
                span.add_event("first token", timestamp=wall_ns(request.first_token_s))
                span.set_attribute("gen_ai.latency.time_to_first_token", request.ttft_s)
            span.set_attributes(
                {
                    "gen_ai.request.id": request.request_id,
                    "gen_ai.response.model": self._model_name,
                    "gen_ai.usage.prompt_tokens": request.num_prompt_tokens,
                    "gen_ai.usage.completion_tokens": len(request.output_token_ids),
                    "gen_ai.response.finish_reasons": [reason.value],
                    "apt.slo_attained_strict": request.attained_strictly,
                    "apt.slo_attained": request.attained,
                    "apt.longest_gap": request.longest_gap_s,
                    "apt.cache_kinds": [kind.value for kind in request.cache_history],
                    "apt.preemptions": request.num_preemptions,
                }
            )
            if reason is FinishReason.ERROR:
                span.set_status(self._error, output.error)
            span.end()

    def close(self) -> None:
        """Send the remaining spans."""
        self._provider.shutdown()
