"""The SLO report of a finished request, for its response; the terms are those of docs/api.md."""

from collections.abc import Sequence
from typing import TypedDict

from apt_jax.request import Request


class SloReport(TypedDict):
    """Of one sample, or the worst of several; `ttft_ms` is None if no token came."""

    ttft_ms: float | None
    p99_tbt_ms: float
    ttft_slo_ms: float
    tbt_slo_ms: float
    attained: bool
    cache_kinds: list[str]
    queue_ms: float | None
    preemptions: int
    conversions: int


def slo_report(requests: Sequence[Request]) -> SloReport:
    """The report over the samples of one response, which share their SLO. Pure.

    Times are the worst sample's, counts are sums, `attained` is whether all did, and `cache_kinds` is the history of
    the first sample: the kind it was admitted with, and every change after (conversion, or admission again).
    """
    first = requests[0]
    ttfts = [request.ttft_s for request in requests]
    queued = [None if r.first_scheduled_s is None else r.first_scheduled_s - r.arrival_s for r in requests]
    return {
        "ttft_ms": _worst_ms(ttfts),
        "p99_tbt_ms": _ms(max(request.p99_gap_s for request in requests)),
        "ttft_slo_ms": _ms(first.slo.ttft_s),
        "tbt_slo_ms": _ms(first.slo.tbt_s),
        "attained": all(request.attained for request in requests),
        "cache_kinds": [kind.value for kind in first.cache_history],
        "queue_ms": _worst_ms(queued),
        "preemptions": sum(request.num_preemptions for request in requests),
        "conversions": sum(request.num_conversions for request in requests),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _worst_ms(seconds: Sequence[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return _ms(max(known)) if len(known) == len(seconds) else None
