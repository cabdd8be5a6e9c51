"""From a finished simulation to the figures people compare: attainment, latencies, batch size, cache mix."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from apt_jax.cache import KINDS
from apt_jax.request import FinishReason
from apt_jax.run_figures import backlog_by_quarter, backlog_growth, by_quartile
from apt_jax.simulation.requests.columns import SimulatedRequest
from apt_jax.simulation.requests.surge import Surge
from apt_jax.simulation.simulator import Outcome

MEANS = (  # figures with a mean over seeds
    "strict_attainment", "attainment", "worst_class", "turned_away", "frozen", "kept_token_throughput",
    "backlog_growth", "p99_ttft_s", "p99_tbt_s", "longest_gap_s", "longest_wait_s", "mean_batch", "preemptions",
    "drain_s",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """One simulated point; attainment counts every request sent.

    Attributes:
        strict_attainment: share that attained their SLO with no gap longer than the stall limit.
        attainment: the same as the paper reads it: the 99th percentile of gaps.
        attainment_by_class: both, of each SLO class and each quartile of prompt and output length.
        worst_class: the lowest strict attainment of those.
        attainment_by_phase: both, of those that came before a surge, in it, within a minute after it and later.
        cached_share: of prompt tokens, those that came from the prefix cache when the request was first admitted.
        turned_away: share that was refused or abandoned.
        frozen: share whose stream, once begun, stood still for longer than its stall limit.
        kept_token_throughput: tokens per second of requests kept strictly, those that came while requests arrived.
        backlog: unfinished requests when the last one arrived; `backlog_by_quarter` after each quarter of the arrivals.
        sustained: whether the rate lasts; None if arrivals were too short to say (`apt_jax/run_figures.py`).
        backlog_growth: of unfinished requests over the arrivals' second half, as a share of the rate.
        drain_s: from the last arrival to the end of the last iteration.
        longest_gap_s: between two tokens of any request.
        longest_wait_s: longest that any request went without a token, its first one included.
        p50_tbt_s, p99_tbt_s: over all gaps of all requests.
        fluid_bound: highest rate that could last, whatever the policy; 0 if it is not known.
        mean_batch: of an instance.
        mean_token_latency_s: mean over answered requests of (arrival to end) / output tokens, as Orca and vLLM's paper.
        moved_bytes: of the cache, copied between device and host memory in both directions.
        mean_instances: over the makespan.
    """

    policy: str
    cache_mode: str
    hidden_attention: str
    rate: float
    seed: int
    num_requests: int
    strict_attainment: float
    attainment: float
    worst_class: float
    attainment_by_class: dict[str, list[dict[str, Any]]]
    attainment_by_phase: list[dict[str, Any]]
    turned_away: float
    frozen: float
    kept_token_throughput: float
    sustained: bool | None
    backlog_by_quarter: list[int]
    backlog_growth: float
    fluid_bound: float
    ttft_attainment: float
    tbt_attainment: float
    p50_ttft_s: float
    p99_ttft_s: float
    p50_tbt_s: float
    p99_tbt_s: float
    p50_queue_s: float
    p99_queue_s: float
    mean_token_latency_s: float
    preemptions: int
    moved_bytes: float
    conversions: int
    mean_batch: float
    cache_mix: dict[str, float]
    arrivals_s: float
    makespan_s: float
    iterations: int
    backlog: int
    drain_s: float
    longest_gap_s: float
    longest_wait_s: float
    instances: int = 1
    router: str = ""
    report_interval_s: float = 0.0
    mean_instances: float = 1.0
    cached_share: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, str, float, int]:
        """What distinguishes the points of one call."""
        return self.policy, self.cache_mode, self.hidden_attention, self.router, self.rate, self.seed

    def as_dict(self) -> dict[str, object]:
        """Plain data; figures rounded to 6 digits so that files compare well."""
        return {key: _rounded(value) for key, value in asdict(self).items()}


def summarise(
    outcome: Outcome, *, policy: str, cache_mode: str, hidden_attention: str, rate: float, num_blocks: int,
    instances: int = 1, router: str = "", report_interval_s: float = 0.0, seed: int = 0, fluid_bound: float = 0.0,
    surge: Surge | None = None,
) -> Report:  # fmt: skip
    """The report of a finished simulation."""
    requests = outcome.requests
    ttft = np.array([r.ttft_s for r in requests if r.ttft_s is not None], np.float64)
    gaps = np.concatenate([np.zeros(0), *(np.array(r.gaps_s) for r in requests)])
    queue = np.array([r.first_scheduled_s - r.arrival_s for r in requests if r.first_scheduled_s is not None])
    samples = outcome.samples
    seconds = np.array([s.end_s - s.start_s for s in samples])
    busy = max(float(seconds.sum()), 1e-12)
    cache_mix = {
        kind.spec.name: float((seconds * [s.held_blocks[kind.index] for s in samples]).sum()) / busy / num_blocks
        for kind in KINDS
    }
    cache_mix["free"] = 1 - sum(cache_mix.values())
    strictly, kept = [r.attained_strictly for r in requests], [r.attained for r in requests]
    arrivals, ends, window_s = [r.arrival_s for r in requests], outcome.ends_s, outcome.window_s
    classes = _classes(requests, strictly, kept)
    answered = [(r, r.finish_reason not in (FinishReason.ERROR, FinishReason.ABANDONED)) for r in requests]
    kept_tokens = sum(r.tokens_until(window_s) for r, is_kept in zip(requests, strictly, strict=True) if is_kept)
    over_s = max(window_s, 1e-12)
    return Report(
        policy=policy,
        cache_mode=cache_mode,
        hidden_attention=hidden_attention,
        rate=rate,
        seed=seed,
        num_requests=len(requests),
        strict_attainment=_share(strictly),
        attainment=_share(kept),
        worst_class=min(entry["strict_attainment"] for entries in classes.values() for entry in entries),
        attainment_by_class=classes,
        attainment_by_phase=surge.by_phase(arrivals, strictly, kept) if surge else [],
        turned_away=_share(not is_answered for _, is_answered in answered),
        frozen=_share(r.num_stalls > 0 for r in requests),
        kept_token_throughput=kept_tokens / over_s,
        sustained=outcome.is_sustained(),
        backlog_by_quarter=backlog_by_quarter(arrivals, ends, window_s),
        backlog_growth=backlog_growth(arrivals, ends, window_s)[0] / (len(requests) / over_s) if window_s else 0.0,
        fluid_bound=fluid_bound,
        ttft_attainment=_share(a and r.ttft_s is not None and r.ttft_s <= r.slo.ttft_s for r, a in answered),
        tbt_attainment=_share(a and r.p99_gap_s <= r.slo.tbt_s for r, a in answered),
        p50_ttft_s=_quantile(ttft, 50),
        p99_ttft_s=_quantile(ttft, 99),
        p50_tbt_s=_quantile(gaps, 50),
        p99_tbt_s=_quantile(gaps, 99),
        p50_queue_s=_quantile(queue, 50),
        p99_queue_s=_quantile(queue, 99),
        mean_token_latency_s=_token_latency_s(r for r, is_answered in answered if is_answered),
        preemptions=sum(r.num_preemptions for r in requests),
        moved_bytes=outcome.moved_bytes,
        conversions=sum(r.num_conversions for r in requests),
        mean_batch=float((seconds * [s.scheduled for s in samples]).sum()) / busy,
        cache_mix=cache_mix,
        arrivals_s=window_s,
        makespan_s=outcome.makespan_s,
        iterations=len(samples),
        backlog=outcome.backlog,
        drain_s=max(outcome.makespan_s - window_s, 0.0),
        longest_gap_s=max(r.longest_gap_s for r in requests),
        longest_wait_s=max(map(_longest_wait_s, requests)),
        instances=instances,
        router=router,
        report_interval_s=report_interval_s,
        mean_instances=outcome.instance_s / max(outcome.makespan_s, 1e-12),
        cached_share=sum(r.num_cached_tokens or 0 for r in requests) / sum(r.num_prompt_tokens for r in requests),
    )


def means_over_seeds(reports: Sequence[Report]) -> list[dict[str, object]]:
    """Mean and standard deviation of figures over the seeds of each configuration and rate, in order. Pure."""
    groups: dict[tuple[object, ...], list[Report]] = {}
    for report in reports:
        groups.setdefault(report.key[:-1], []).append(report)
    rows: list[dict[str, object]] = []
    for (policy, mode, attention, router, rate), group in groups.items():
        figures = {}
        for name in MEANS:
            values = np.array([getattr(report, name) for report in group])
            spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            figures[name] = {"mean": _rounded(float(values.mean())), "spread": _rounded(spread)}
        rows.append(
            {
                "policy": policy, "cache_mode": mode, "hidden_attention": attention, "router": router, "rate": rate,
                "seeds": [report.seed for report in group], "figures": figures,
            }
        )  # fmt: skip
    return rows


def _classes(
    requests: Sequence[SimulatedRequest], strictly: Sequence[bool], kept: Sequence[bool]
) -> dict[str, list[dict[str, Any]]]:
    """Attainment of each SLO class, and of each quartile of prompt and output length, shortest first."""
    names = [r.class_name for r in requests]
    by_name = []
    for name in dict.fromkeys(sorted(names)):
        members = [i for i, own in enumerate(names) if own == name]
        shares = {
            "strict_attainment": _share(strictly[i] for i in members),
            "attainment": _share(kept[i] for i in members),
        }
        by_name.append({"name": name, "requests": len(members), **shares})
    return {
        "slo_class": by_name,
        "prompt_quartile": [*by_quartile([r.num_prompt_tokens for r in requests], strictly, kept)],
        "output_quartile": [*by_quartile([r.target_tokens for r in requests], strictly, kept)],
    }


def _longest_wait_s(request: SimulatedRequest) -> float:
    """Longest time without a token; one that was turned away waited until then."""
    waits = [request.ttft_s or 0.0, request.longest_gap_s]
    if request.ended_s is not None:
        waits.append(request.pending_s(request.ended_s))
    return max(waits)


def _token_latency_s(answered: Iterable[SimulatedRequest]) -> float:
    """Mean seconds per output token from a request's arrival to its end; 0 of nothing."""
    found = [(r.ended_s - r.arrival_s) / r.num_generated_tokens for r in answered if r.ended_s is not None]
    return sum(found) / len(found) if found else 0.0


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)


def _quantile(values: np.ndarray, percent: float) -> float:
    """Nearest rank above, as `Request.p99_gap_s`; 0 of nothing."""
    return float(np.percentile(values, percent, method="higher")) if len(values) else 0.0


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
