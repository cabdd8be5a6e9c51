"""Metrics of an engine: its queues and blocks, and what its scheduler does."""

from collections.abc import Callable, Mapping

from prometheus_client import Gauge

from apt_jax.engine.interface import EngineFigures
from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan, Reason
from apt_jax.serve.observability.instruments import Instruments
from apt_jax.serve.runtime.observer import Stepped

SCHEDULE_S = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
NOTHING = Plan()
WAITS = {  # label of each reason to wait
    reason: reason.name.removeprefix("WAITS_").removeprefix("FOR_").lower()
    for reason in Reason
    if reason.name.startswith("WAITS_")
}
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class EngineMetrics(Instruments):
    """Counts what the engine's thread reports."""

    def __init__(self, model_name: str, **labels: str):
        super().__init__(model_name, **labels)
        self._demoted: set[str] = set()
        self._late: tuple[Request, ...] = ()  # of those that waited in the last step
        self._waited = dict.fromkeys(WAITS, 0)
        self.last_blocks: Mapping[str, int] = {}
        self.counts = {"preemptions": 0, "conversions": 0}  # since the start, as plain numbers
        self._failures = self._recompiles = self._outside = 0  # of the engine, as counted last
        self._queried = self._hit = self._saved = self._restored = 0  # the same
        self.running = self._gauge("vllm:num_requests_running", "Requests that hold cache.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait to be scheduled.")
        self.waiting_by_reason = self._gauge(
            "vllm:num_requests_waiting_by_reason", "Those that waited in the last step, by reason.", "reason"
        )
        for reason in WAITS:
            self.waiting_by_reason.labels(**self._labels, reason=WAITS[reason]).set(0)
        self.usage = self._gauge("vllm:kv_cache_usage_perc", "Share of the cache blocks in use, 0 to 1.")
        self.preemptions = self._counter("vllm:num_preemptions", "Requests whose blocks were taken away.")
        self.blocks = self._gauge("apt:cache_blocks", "Cache blocks held as KV, as hidden, and free.", "kind")
        self.prefix_queries = self._counter(
            "vllm:prefix_cache_queries", "Tokens looked up in the prefix cache, at a request's first admission."
        )
        self.prefix_hits = self._counter("vllm:prefix_cache_hits", "Of these, tokens found there.")
        self.host_blocks = self._gauge("apt:host_cache_blocks", "Blocks of the cache in host memory.")
        self.copied = self._counter(
            "apt:host_cache_copied_blocks",
            "Blocks copied to host memory (out) and back (in).",
            "direction",
            ("out", "in"),
        )
        self.conversions = self._counter("apt:cache_conversions", "Requests converted from hidden to KV.")
        self.demotions = self._counter("apt:late_demotions", "Requests put behind because they are late already.")
        self.recompiles = self._counter("apt:recompiles_after_warmup", "Programs compiled while serving; should be 0.")
        self.schedule = self._histogram("apt:schedule_seconds", "Time that the policy takes per step.", SCHEDULE_S)
        self.iteration_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens per step.", TOKENS)
        self.batch = self._histogram("apt:batch_requests", "Requests per step.", BATCH)
        self.failures = self._counter("apt:failed_steps", "Steps that failed; the server went on.")
        self.healthy = self._gauge("apt:engine_healthy", "1 while /health of the engine is good, 0 while it is not.")
        self.healthy.set(1)
        self.outside = self._counter(
            "apt:cache_values_outside_range", "Numbers of hidden vectors outside their calibrated range (int8 cache)."
        )
        self.lost_blocks = self._gauge("apt:idle_lost_blocks", "Blocks not free when idle; should be 0.")

    def watch(self, is_healthy: Callable[[], bool]) -> None:
        """Ask `is_healthy` whenever the metrics are read: an engine that is stuck reports nothing."""
        self.healthy.set_function(is_healthy)

    def ready(self, figures: EngineFigures) -> None:
        """Show the empty cache, how it is set up, and what the weights are."""
        if figures.cache_config:
            labels = {**self._labels, **figures.cache_config}
            text = "How the cache is set up, in labels; always 1."
            Gauge("vllm:cache_config_info", text, [*labels], registry=self.registry).labels(**labels).set(1)
        if figures.weights:
            labels = {**self._labels, **figures.weights}
            text = "Number types of the weights, in labels; always 1."
            Gauge("apt:weights_info", text, [*labels], registry=self.registry).labels(**labels).set(1)
        self._levels(figures)

    def stepped(self, figures: EngineFigures, step: Stepped) -> None:
        """Count a step."""
        plan = figures.plan
        self.schedule.observe(figures.schedule_s)
        if plan.scheduled:
            self.batch.observe(len(plan.scheduled))
            self.iteration_tokens.observe(plan.num_tokens)
        if plan.preempted:
            self.preemptions.inc(len(plan.preempted))
            self.counts["preemptions"] += len(plan.preempted)
        if plan.converted:
            self.conversions.inc(len(plan.converted))
            self.counts["conversions"] += len(plan.converted)
        self._count_demotions(plan)
        self._count_waiting(plan if figures.num_waiting else NOTHING)
        for output in step.outputs:
            if output.finish_reason is not None:
                self._demoted.discard(output.request.request_id)
        self._levels(figures)

    def failed(self, figures: EngineFigures) -> None:
        """Count a step that raised."""
        self._demoted.clear()
        self.failures.inc()
        self._levels(figures)

    def idle(self, figures: EngineFigures, lost_blocks: int) -> None:
        """Show whether blocks are lost."""
        self.lost_blocks.set(lost_blocks)
        self._count_waiting(NOTHING)
        self._levels(figures)

    def _count_demotions(self, plan: Plan) -> None:
        late = [entry.request for entry in plan.preempted if entry.reason is Reason.PREEMPTED_LATE]
        for waited in plan.waited:
            if waited.reason is Reason.WAITS_LATE and waited.requests != self._late:
                self._late = waited.requests
                late.extend(waited.requests)
        for request in late:
            if request.request_id not in self._demoted:
                self._demoted.add(request.request_id)
                self.demotions.inc()

    def _count_waiting(self, plan: Plan) -> None:
        counts = dict.fromkeys(WAITS, 0)
        for waited in plan.waited:
            if waited.reason in counts:
                counts[waited.reason] += sum(request.table is None for request in waited.requests)
        for reason, count in counts.items():
            if count != self._waited[reason]:
                self.waiting_by_reason.labels(**self._labels, reason=WAITS[reason]).set(count)
        self._waited = counts

    def _levels(self, figures: EngineFigures) -> None:
        self.running.set(figures.num_running)
        self.waiting.set(figures.num_waiting)
        self.usage.set(figures.num_held_blocks / figures.num_blocks)
        self.last_blocks = figures.blocks
        for kind, count in figures.blocks.items():
            self.blocks.labels(**self._labels, kind=kind).set(count)
        if figures.num_failed_steps > self._failures:
            self.failures.inc(figures.num_failed_steps - self._failures)
            self._failures = figures.num_failed_steps
        if figures.prefix_queries > self._queried:
            self.prefix_queries.inc(figures.prefix_queries - self._queried)
            self.prefix_hits.inc(figures.prefix_hits - self._hit)
            self._queried, self._hit = figures.prefix_queries, figures.prefix_hits
        self.counts |= {"prefix_queries": figures.prefix_queries, "prefix_hits": figures.prefix_hits}
        self.counts["failed_steps"] = figures.num_failed_steps
        self.host_blocks.set(figures.host_blocks)
        self.copied.labels(**self._labels, direction="out").inc(max(figures.host_saved - self._saved, 0))
        self.copied.labels(**self._labels, direction="in").inc(max(figures.host_restored - self._restored, 0))
        self._saved, self._restored = figures.host_saved, figures.host_restored
        if figures.num_recompiles > self._recompiles:
            self.recompiles.inc(figures.num_recompiles - self._recompiles)
            self._recompiles = figures.num_recompiles
        if figures.num_outside_range > self._outside:
            self.outside.inc(figures.num_outside_range - self._outside)
            self._outside = figures.num_outside_range
