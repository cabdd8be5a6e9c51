"""From a finished simulation to the figures people compare: attainment, latencies, batch size, cache mix."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from apt_jax.cache import KINDS
from apt_jax.simulation.simulator import Outcome


@dataclass(frozen=True)
class Report:
    """One simulated point. Definitions: the docs' "Metrics" (attainment counts every request sent).

    `p50_tbt_s` and `p99_tbt_s` are over all gaps of all requests. `backlog` counts unfinished requests when the last
    one arrived; `longest_wait_s` is the longest any request went without a token. `mean_batch` is of an instance,
    `mean_instances` over the makespan.
    """

    policy: str
    cache_mode: str
    hidden_attention: str
    rate: float
    num_requests: int
    attainment: float
    ttft_attainment: float
    tbt_attainment: float
    p50_ttft_s: float
    p99_ttft_s: float
    p50_tbt_s: float
    p99_tbt_s: float
    p50_queue_s: float
    p99_queue_s: float
    preemptions: int
    conversions: int
    mean_batch: float
    cache_mix: dict[str, float]
    arrivals_s: float
    makespan_s: float
    iterations: int
    backlog: int
    longest_wait_s: float
    instances: int = 1
    router: str = ""
    report_interval_s: float = 0.0
    mean_instances: float = 1.0

    @property
    def key(self) -> tuple[str, str, str, str, float]:
        """What distinguishes the points of one call."""
        return self.policy, self.cache_mode, self.hidden_attention, self.router, self.rate

    def as_dict(self) -> dict[str, object]:
        """Plain data; figures rounded to 6 digits so that files compare well."""
        return {key: _rounded(value) for key, value in asdict(self).items()}


def summarise(
    outcome: Outcome, *, policy: str, cache_mode: str, hidden_attention: str, rate: float, num_blocks: int,
    instances: int = 1, router: str = "", report_interval_s: float = 0.0,
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
    return Report(
        policy=policy,
        cache_mode=cache_mode,
        hidden_attention=hidden_attention,
        rate=rate,
        num_requests=len(requests),
        attainment=_share(r.attained for r in requests),
        ttft_attainment=_share(r.ttft_s is not None and r.ttft_s <= r.slo.ttft_s for r in requests),
        tbt_attainment=_share(r.p99_gap_s <= r.slo.tbt_s for r in requests),
        p50_ttft_s=_quantile(ttft, 50),
        p99_ttft_s=_quantile(ttft, 99),
        p50_tbt_s=_quantile(gaps, 50),
        p99_tbt_s=_quantile(gaps, 99),
        p50_queue_s=_quantile(queue, 50),
        p99_queue_s=_quantile(queue, 99),
        preemptions=sum(r.num_preemptions for r in requests),
        conversions=sum(r.num_conversions for r in requests),
        mean_batch=float((seconds * [s.scheduled for s in samples]).sum()) / busy,
        cache_mix=cache_mix,
        arrivals_s=requests[-1].arrival_s,
        makespan_s=outcome.makespan_s,
        iterations=len(samples),
        backlog=outcome.backlog,
        longest_wait_s=max(max([r.ttft_s or 0.0, *r.gaps_s]) for r in requests),
        instances=instances,
        router=router,
        report_interval_s=report_interval_s,
        mean_instances=outcome.instance_s / max(outcome.makespan_s, 1e-12),
    )


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)


def _quantile(values: np.ndarray, percent: float) -> float:
    """Nearest rank above, as `Request.p99_gap_s`; 0 of nothing."""
    return float(np.percentile(values, percent, method="higher")) if len(values) else 0.0


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
