"""Prometheus metrics of one engine: vLLM's names where vLLM has the figure, `apt:` for ours.

Each engine has a registry of its own, so several can live in one process. Counters end in `_total` on the wire.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from apt_jax.output import Output
from apt_jax.request import FinishReason, Request
from apt_jax.scheduling.plan import Plan, Reason
from serve.observer import Observer, Stepped
from serve.samples import Sample

if TYPE_CHECKING:
    from apt_jax.engine import Engine

FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
SLOW_S = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0)
SCHEDULE_S = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MISSES = {"queue_full", "predicted_late", "not_ready", "timeout"}  # rejections that break a promise; bad input does not


class Metrics(Observer):
    """Counts what the engine's thread and the routes report."""

    def __init__(self, model_name: str):
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        self._demoted: set[str] = set()
        self.last_blocks: dict[str, int] = {}
        self._failures = self._recompiles = 0  # of the engine, as counted last
        running = "Requests that hold cache."
        self.running = self._gauge("vllm:num_requests_running", running)
        self.waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait to be scheduled.")
        self.usage = self._gauge("vllm:kv_cache_usage_perc", "Share of the cache blocks in use, 0 to 1.")
        self.preemptions = self._counter("vllm:num_preemptions", "Requests whose blocks were taken away.")
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that began to generate.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self.success = self._counter("vllm:request_success", "Requests ended, by reason.", "finished_reason")
        self.ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", SLOW_S)
        self.gap = self._histogram("vllm:inter_token_latency_seconds", "Gap between tokens of a request.", FAST_S)
        self.tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean gap of each finished request.", FAST_S
        )
        self.e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", SLOW_S)
        self.queue_time = self._histogram("vllm:request_queue_time_seconds", "Arrival to being scheduled.", SLOW_S)
        self.prompt_lengths = self._histogram("vllm:request_prompt_tokens", "Prompt tokens per request.", TOKENS)
        self.output_lengths = self._histogram("vllm:request_generation_tokens", "Tokens per finished request.", TOKENS)
        self.blocks = self._gauge("apt:cache_blocks", "Cache blocks held as KV, as hidden, and free.", "kind")
        self.conversions = self._counter("apt:cache_conversions", "Requests converted from hidden to KV.")
        self.attained = self._counter("apt:slo_attained", "Requests that kept their promise.", "slo")
        self.missed = self._counter("apt:slo_missed", "Requests that broke it; refused and failed ones too.", "slo")
        self.demotions = self._counter("apt:late_demotions", "Requests put behind because they are late already.")
        self.recompiles = self._counter("apt:recompiles_after_warmup", "Programs compiled while serving; should be 0.")
        self.schedule = self._histogram("apt:schedule_seconds", "Time that the policy takes per step.", SCHEDULE_S)
        self.batch = self._histogram("apt:batch_requests", "Requests per step.", BATCH)
        self.rejected = self._counter("apt:requests_rejected", "Requests refused, by reason.", "reason")
        self.failures = self._counter("apt:failed_steps", "Steps that failed; the server went on.")
        self.tasks = self._gauge("apt:event_loop_tasks", "Tasks of the server's event loop, this reading's own too.")
        self.lost_blocks = self._gauge("apt:idle_lost_blocks", "Blocks not free when idle; should be 0.")

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def reject(self, reason: str) -> None:
        """A route refused a request; from any thread."""
        self.rejected.labels(**self._labels, reason=reason).inc()
        if reason in MISSES:
            self._judge(ttft=False, tbt=False)

    def ready(self, engine: "Engine") -> None:
        """Show the empty cache."""
        self._levels(engine)

    def stepped(self, engine: "Engine", step: Stepped) -> None:
        """Count a step."""
        plan = engine.last_plan
        self.schedule.observe(engine.last_schedule_s)
        if plan.scheduled:
            self.batch.observe(len(plan.scheduled))
        if plan.preempted:
            self.preemptions.inc(len(plan.preempted))
        if plan.converted:
            self.conversions.inc(len(plan.converted))
        self._count_demotions(plan)
        tokens = 0
        for output in step.outputs:
            tokens += len(output.token_ids)
            self._take(output, output.request.request_id in step.abandoned)
        if tokens:
            self.generation_tokens.inc(tokens)
        self._levels(engine)

    def failed(self, engine: "Engine", samples: Sequence[Sample]) -> None:
        """Count a step that raised, and its requests as missed."""
        self.failures.inc()
        for _ in samples:
            self.success.labels(**self._labels, finished_reason=FinishReason.ERROR.value).inc()
            self._judge(ttft=False, tbt=False)
        self._levels(engine)

    def idle(self, engine: "Engine", lost_blocks: int) -> None:
        """Show whether blocks are lost."""
        self.lost_blocks.set(lost_blocks)
        self._levels(engine)

    def _take(self, output: Output, abandoned: bool) -> None:
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
        if output.finish_reason is not None:
            self._finish(request, output.finish_reason, abandoned)

    def _finish(self, request: Request, reason: FinishReason, abandoned: bool) -> None:
        self._demoted.discard(request.request_id)
        self.success.labels(**self._labels, finished_reason=reason.value).inc()
        by_itself = reason in (FinishReason.STOP, FinishReason.LENGTH)
        if by_itself and request.last_token_s is not None and request.ttft_s is not None:
            latency_s, tokens = request.last_token_s - request.arrival_s, len(request.output_token_ids)
            self.e2e.observe(latency_s)
            self.output_lengths.observe(tokens)
            if tokens > 1:
                self.tpot.observe((latency_s - request.ttft_s) / (tokens - 1))
            self._judge(request.ttft_s <= request.slo.ttft_s, request.p99_gap_s <= request.slo.tbt_s)
        elif not abandoned:  # one that its client gave up tells nothing
            self._judge(ttft=False, tbt=False)

    def _judge(self, ttft: bool, tbt: bool) -> None:
        for slo, kept in (("ttft", ttft), ("tbt", tbt), ("both", ttft and tbt)):
            (self.attained if kept else self.missed).labels(**self._labels, slo=slo).inc()

    def _count_demotions(self, plan: Plan) -> None:
        late = [entry.request for entry in plan.preempted if entry.reason is Reason.PREEMPTED_LATE]
        for waited in plan.waited:
            if waited.reason is Reason.WAITS_LATE:
                late.extend(waited.requests)
        for request in late:
            if request.request_id not in self._demoted:
                self._demoted.add(request.request_id)
                self.demotions.inc()

    def _levels(self, engine: "Engine") -> None:
        state = engine.state
        self.running.set(len(state.running))
        self.waiting.set(len(state.waiting))
        blocks = state.blocks_by_kind()
        self.usage.set(1 - blocks["free"] / state.pool.num_blocks)
        self.last_blocks = blocks
        for kind, count in blocks.items():
            self.blocks.labels(**self._labels, kind=kind).set(count)
        if engine.num_failed_steps > self._failures:
            self.failures.inc(engine.num_failed_steps - self._failures)
            self._failures = engine.num_failed_steps
        if engine.num_recompiles > self._recompiles:
            self.recompiles.inc(engine.num_recompiles - self._recompiles)
            self._recompiles = engine.num_recompiles

    def _counter(self, name: str, text: str, label: str | None = None) -> Any:
        return self._made(Counter(name, text, self._names(label), registry=self.registry), label)

    def _gauge(self, name: str, text: str, label: str | None = None) -> Any:
        return self._made(Gauge(name, text, self._names(label), registry=self.registry), label)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Any:
        return self._made(Histogram(name, text, self._names(None), registry=self.registry, buckets=buckets), None)

    def _names(self, label: str | None) -> list[str]:
        return [*self._labels, *([] if label is None else [label])]

    def _made(self, metric: Any, label: str | None) -> Any:
        """The metric itself where a label is to be given, else its only child."""
        return metric.labels(**self._labels) if label is None else metric
