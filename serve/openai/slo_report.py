"""What a response says of its SLO: the report, and the error of one that was abandoned; the terms are docs/api.md's."""

from collections.abc import Sequence
from typing import TypedDict

from apt_jax.output import Output
from apt_jax.request import FinishReason, Request
from apt_jax.serve.errors import SloAbandoned


class SloReport(TypedDict):
    """Of one sample, or the worst of several; `ttft_ms` is None if no token came."""

    attained_strict: bool
    attained: bool
    abandoned: bool
    ttft_ms: float | None
    p99_tbt_ms: float
    longest_gap_ms: float
    ttft_slo_ms: float
    tbt_slo_ms: float
    stall_slo_ms: float
    cache_kinds: list[str]
    queue_ms: float | None
    preemptions: int
    conversions: int


def slo_report(requests: Sequence[Request]) -> SloReport:
    """The report over the samples of one response, which share their SLO. Pure.

    Times are the worst sample's, counts are sums, `attained_strict` and `attained` (the paper's reading) are whether
    all did, `abandoned` is whether any was, and `cache_kinds` is the history of the first sample: the kind it was
    admitted with, and every change after (conversion, or admission again).
    """
    first = requests[0]
    ttfts = [request.ttft_s for request in requests]
    queued = [None if r.first_scheduled_s is None else r.first_scheduled_s - r.arrival_s for r in requests]
    return {
        "attained_strict": all(request.attained_strictly for request in requests),
        "attained": all(request.attained for request in requests),
        "abandoned": any(request.finish_reason is FinishReason.ABANDONED for request in requests),
        "ttft_ms": _worst_ms(ttfts),
        "p99_tbt_ms": _ms(max(request.p99_gap_s for request in requests)),
        "longest_gap_ms": _ms(max(request.longest_gap_s for request in requests)),
        "ttft_slo_ms": _ms(first.slo.ttft_s),
        "tbt_slo_ms": _ms(first.slo.tbt_s),
        "stall_slo_ms": _ms(first.slo.stall_limit_s),
        "cache_kinds": [kind.value for kind in first.cache_history],
        "queue_ms": _worst_ms(queued),
        "preemptions": sum(request.num_preemptions for request in requests),
        "conversions": sum(request.num_conversions for request in requests),
    }


def is_unanswered(output: Output) -> bool:
    """Whether a sample was abandoned before it had a token."""
    return output.finish_reason is FinishReason.ABANDONED and not output.request.output_token_ids


def slo_abandoned(request: Request) -> SloAbandoned:
    """The error of a response without any token."""
    return SloAbandoned(
        f"the first token did not come within its SLO of {request.slo.ttft_s:g} s and what --abandon-after adds; try "
        "again later, or send a longer slo.ttft_ms"
    )


def check_begun(outputs: Sequence[Output], num_samples: int) -> None:
    """Raises SloAbandoned if the first `outputs` of a response say that no token will come for any of its samples."""
    if len(outputs) == num_samples and all(is_unanswered(output) for output in outputs):
        raise slo_abandoned(outputs[0].request)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _worst_ms(seconds: Sequence[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return _ms(max(known)) if len(known) == len(seconds) else None
