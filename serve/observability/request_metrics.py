"""Metrics of requests: latencies, tokens, SLO attainment, rejections. They need only outputs, no engine."""

import platform
from collections.abc import Sequence
from importlib.metadata import version

from prometheus_client import Gauge, ProcessCollector

from apt_jax.output import Output
from apt_jax.request import OFFLINE_SLO, FinishReason, Request
from apt_jax.serve.errors import ERROR_REPLIES
from apt_jax.serve.observability.instruments import Instruments
from apt_jax.serve.runtime.observer import Stepped
from apt_jax.serve.runtime.samples import Sample

FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
SLOW_S = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
REJECTIONS = tuple(sorted({reply.reason for _, reply in ERROR_REPLIES if reply.reason is not None}))
MISSES = {"queue_full", "predicted_late", "not_ready", "timeout"}  # rejections that miss an SLO; bad input does not

STAGES = ("waiting", "running")  # for the first token; with tokens already
REASONS = tuple(reason.value for reason in FinishReason)
SLOS = ("strict", "both", "ttft", "tbt")  # "both" is the paper's reading: the 99th percentile of gaps


class RequestMetrics(Instruments):
    """Counts what steps brought and what the routes refused."""

    def __init__(self, model_name: str, **labels: str):
        super().__init__(model_name, **labels)
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that began to generate.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self.success = self._counter("vllm:request_success", "Requests ended, by reason.", "finished_reason", REASONS)
        self.kept_tokens = self._counter(
            "apt:kept_generation_tokens", "Tokens of ended requests that attained their SLO strictly."
        )
        self.ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", SLOW_S)
        self.gap = self._histogram("vllm:inter_token_latency_seconds", "Gap between tokens of a request.", FAST_S)
        self.tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean gap of each finished request.", FAST_S
        )
        self.e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", SLOW_S)
        self.queue_time = self._histogram("vllm:request_queue_time_seconds", "Arrival to being scheduled.", SLOW_S)
        self.prefill_time = self._histogram(
            "vllm:request_prefill_time_seconds", "Being scheduled to first token.", SLOW_S
        )
        self.decode_time = self._histogram("vllm:request_decode_time_seconds", "First token to last token.", SLOW_S)
        self.inference_time = self._histogram(
            "vllm:request_inference_time_seconds", "Being scheduled to last token.", SLOW_S
        )
        self.max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "Tokens that each finished request could have had.", TOKENS
        )
        self.prompt_lengths = self._histogram("vllm:request_prompt_tokens", "Prompt tokens per request.", TOKENS)
        self.output_lengths = self._histogram("vllm:request_generation_tokens", "Tokens per finished request.", TOKENS)
        self.longest_gap = self._histogram(
            "apt:request_longest_gap_seconds", "Longest gap between tokens of each ended request.", SLOW_S
        )
        self.attained = self._counter("apt:slo_attained", "Requests that attained their SLO.", "slo", SLOS)
        self.missed = self._counter(
            *("apt:slo_missed", "Requests that broke it; refused and failed ones too.", "slo", SLOS)
        )
        self.abandoned = self._counter(
            "apt:requests_abandoned", "Requests ended by --abandon-after, before and after a token.", "stage", STAGES
        )
        self.rejected = self._counter("apt:requests_rejected", "Requests refused, by reason.", "reason", REJECTIONS)
        ProcessCollector(registry=self.registry)
        found = {"version": version("apt-jax"), "jax": version("jax"), "python": platform.python_version()}
        labels = {**self._labels, **found}
        text = "What runs here, in labels; always 1."
        Gauge("apt:build_info", text, [*labels], registry=self.registry).labels(**labels).set(1)
        self.tasks = self._gauge("apt:event_loop_tasks", "Tasks of the server's event loop, this reading's own too.")

    def reject(self, reason: str) -> None:
        """A route refused a request; from any thread."""
        self.rejected.labels(**self._labels, reason=reason).inc()
        if reason in MISSES:
            self._missed()

    def brought(self, step: Stepped) -> None:
        """Count a step's outputs."""
        tokens = 0
        for output in step.outputs:
            tokens += len(output.token_ids)
            self._take(output, step.counts(output))
        if tokens:
            self.generation_tokens.inc(tokens)

    def lost(self, samples: Sequence[Sample]) -> None:
        """Count them as missed."""
        for _ in samples:
            self.success.labels(**self._labels, finished_reason=FinishReason.ERROR.value).inc()
            self._missed()

    def _take(self, output: Output, counts: bool) -> None:
        request = output.request
        if output.token_ids:
            if len(request.gaps_s) > 0:
                self.gap.observe(request.gaps_s[-1])
            else:
                self.prompt_tokens.inc(request.num_prompt_tokens)
                self.prompt_lengths.observe(request.num_prompt_tokens)
                if request.ttft_s is not None:
                    self.ttft.observe(request.ttft_s)
                if request.first_scheduled_s is not None:
                    self.queue_time.observe(request.first_scheduled_s - request.arrival_s)
                    if request.first_token_s is not None:
                        self.prefill_time.observe(request.first_token_s - request.first_scheduled_s)
        if output.finish_reason is not None:
            self._finish(request, output.finish_reason, counts)

    def _finish(self, request: Request, reason: FinishReason, counts: bool) -> None:
        self.success.labels(**self._labels, finished_reason=reason.value).inc()
        if reason is FinishReason.ABANDONED:
            stage = "running" if request.output_token_ids else "waiting"
            self.abandoned.labels(**self._labels, stage=stage).inc()
        if request.gaps_s:
            self.longest_gap.observe(request.longest_gap_s)
        by_itself = reason in (FinishReason.STOP, FinishReason.LENGTH)
        if by_itself and request.last_token_s is not None and request.ttft_s is not None:
            latency_s, tokens = request.last_token_s - request.arrival_s, len(request.output_token_ids)
            self.e2e.observe(latency_s)
            self.output_lengths.observe(tokens)
            self.max_tokens.observe(request.max_new_tokens)
            if request.first_token_s is not None and request.first_scheduled_s is not None:
                self.decode_time.observe(request.last_token_s - request.first_token_s)
                self.inference_time.observe(request.last_token_s - request.first_scheduled_s)
            if request.attained_strictly:
                self.kept_tokens.inc(tokens)
            if tokens > 1:
                self.tpot.observe((latency_s - request.ttft_s) / (tokens - 1))
            kept = {
                "strict": request.attained_strictly,
                "both": request.attained,
                "ttft": request.ttft_s <= request.slo.ttft_s,
                "tbt": request.p99_gap_s <= request.slo.tbt_s,
            }
            for slo in SLOS if request.slo != OFFLINE_SLO else ():  # nobody was promised anything
                (self.attained if kept[slo] else self.missed).labels(**self._labels, slo=slo).inc()
        elif counts and request.slo != OFFLINE_SLO:  # a request that its client cancelled says nothing
            self._missed()

    def _missed(self) -> None:
        for slo in SLOS:
            self.missed.labels(**self._labels, slo=slo).inc()
