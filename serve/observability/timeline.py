"""What happened in the last ten minutes, hour and day, and since the start, for the lines of the dashboard.

Time is cut into spans; the newest of each width are kept, so memory does not grow with time or traffic. What happens
is counted in the narrowest span alone, which is added to those of every width when it is over.
"""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from apt_jax.request import OFFLINE_SLO, FinishReason, Request, Slo
from apt_jax.serve.observability.request_metrics import MISSES
from apt_jax.serve.runtime.observer import Observer, Stepped
from apt_jax.serve.runtime.samples import Sample

WIDTHS_S = {"10m": 5.0, "1h": 30.0, "1d": 720.0}  # of the spans of each range
NUM_SPANS = 120  # of each range
LEAST_PART = 0.2  # of a span that has just begun, which its rates are taken over at least
MOST_CLASSES = 12  # SLOs that are told apart in a span; the requests of more are counted together
BIN = math.log(1.1)  # width of a bin of the histograms: percentiles are right within 5%
SHORTEST_S = 1e-5  # that they tell apart from nothing
COUNTED = ("preemptions", "conversions", "prefix_queries", "prefix_hits", "failed_steps")  # by the engines, since start

type ClassKey = tuple[float, float, float] | None  # limits in seconds; None: too many different ones


@dataclass(slots=True)
class ClassSums:
    """Of the requests with one SLO."""

    requests: int = 0
    kept: int = 0  # strictly
    longest_gap_s: float = 0.0
    ttfts: Counter[int] = field(default_factory=Counter)

    def add(self, other: "ClassSums") -> None:
        """Count another span's."""
        self.requests += other.requests
        self.kept += other.kept
        self.longest_gap_s = max(self.longest_gap_s, other.longest_gap_s)
        self.ttfts.update(other.ttfts)


@dataclass(slots=True)
class Span:
    """Sums of what happened in a span; `sums` also has those of the levels at `looks` moments."""

    start_s: float
    sums: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)  # requests, by reason
    ttfts: Counter[int] = field(default_factory=Counter)  # first tokens and gaps, by bin
    gaps: Counter[int] = field(default_factory=Counter)
    longest_gap_s: float = 0.0
    most_waiting: int = 0
    classes: dict[ClassKey, ClassSums] = field(default_factory=dict)

    def add(self, other: "Span") -> None:
        """Count another span's."""
        self.sums.update(other.sums)
        self.refused.update(other.refused)
        self.ttfts.update(other.ttfts)
        self.gaps.update(other.gaps)
        self.longest_gap_s = max(self.longest_gap_s, other.longest_gap_s)
        self.most_waiting = max(self.most_waiting, other.most_waiting)
        for key, sums in other.classes.items():
            self.of_class(key).add(sums)

    def of_class(self, key: ClassKey) -> ClassSums:
        """The sums of a class, or of those that are not told apart."""
        if key not in self.classes and len(self.classes) >= MOST_CLASSES:
            key = None
        return self.classes.setdefault(key, ClassSums())


class _Range:
    """The newest spans of one width."""

    def __init__(self, width_s: float):
        self.width_s = width_s
        self.spans: deque[Span] = deque(maxlen=NUM_SPANS)

    def at(self, now: float) -> Span:
        """The span that is under way."""
        start_s = now // self.width_s * self.width_s
        if not self.spans or self.spans[-1].start_s < start_s:
            self.spans.append(Span(start_s))
        return self.spans[-1]


class Timeline(Observer):
    """Keeps the spans. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.began_s = time.monotonic()
        self._ranges = {name: _Range(width_s) for name, width_s in WIDTHS_S.items()}
        self._whole = Span(self.began_s)  # all spans that are over
        self._current = Span(-math.inf)
        self._counted = dict.fromkeys(COUNTED, 0)  # at the last look

    def brought(self, step: Stepped) -> None:
        """Take in a step's outputs."""
        with self._lock:
            span = self._now()
            tokens, gaps = 0, []
            for output in step.outputs:
                request, count = output.request, len(output.token_ids)
                tokens += count
                if count and request.gaps_s:
                    gaps.append(request.gaps_s[-1])
                elif count and request.ttft_s is not None:
                    span.ttfts[_bin(request.ttft_s)] += 1
                if output.finish_reason is not None and step.counts(output):
                    self._ended(span, request)
            span.sums["tokens"] += tokens
            if gaps:
                span.gaps.update(map(_bin, gaps))
                span.longest_gap_s = max(span.longest_gap_s, *gaps)

    def lost(self, samples: Sequence[Sample]) -> None:
        """They ended with an error."""
        with self._lock:
            span = self._now()
            for sample in samples:
                span.sums.update(finished=1, errors=1)
                if sample.slo != OFFLINE_SLO:
                    span.sums["promised"] += 1
                    if sample.slo is not None:
                        span.of_class(_key(sample.slo)).requests += 1

    def refused(self, reason: str) -> None:
        """A request was refused."""
        with self._lock:
            span = self._now()
            span.refused[reason] += 1
            if reason in MISSES:
                span.sums["promised"] += 1

    def looked(self, levels: Mapping[str, Any]) -> None:
        """The levels of a `View`, now."""
        with self._lock:
            span, blocks = self._now(), levels["blocks"]
            total = sum(blocks.values())
            span.sums.update(looks=1, waiting=levels["waiting"], running=levels["running"])
            span.most_waiting = max(span.most_waiting, levels["waiting"])
            if total:
                span.sums.update(block_looks=1, **{kind: count / total for kind, count in blocks.items()})
            for name in COUNTED:  # a replica that has gone takes its count with it
                count = levels["counts"].get(name, 0)
                span.sums[name] += max(count - self._counted[name], 0)
                self._counted[name] = count

    def figures(self, name: str) -> dict[str, Any]:
        """Lines over a range of WIDTHS_S, sums of it and since the start, and each SLO's; None: nothing happened."""
        width_s, newest, whole = WIDTHS_S[name], Span(0.0), Span(0.0)
        with self._lock:  # not for long: the spans that are over stay as they are
            now = time.monotonic()
            newest.start_s = last_s = now // width_s * width_s
            current = self._now()
            spans = {span.start_s: span for span in self._ranges[name].spans}
            for part in (spans.pop(last_s, None), current):
                if part is not None:
                    newest.add(part)
            whole.add(self._whole)
            whole.add(current)
        spans[last_s] = newest
        all_over, points = Span(0.0), []
        for number in range(NUM_SPANS):
            start_s = last_s - width_s * (NUM_SPANS - 1 - number)
            span = spans.get(start_s, Span(start_s))
            passed_s = min(now, start_s + width_s) - max(start_s, self.began_s)
            is_known = start_s + width_s > self.began_s
            points.append(_point(span, max(passed_s, LEAST_PART * width_s)) if is_known else dict.fromkeys(LINES))
            all_over.add(span)
        return {
            "range": name,
            "span_s": width_s,
            "ends_at": round(time.time() - now + last_s + width_s, 3),
            "lines": {line: [point[line] for point in points] for line in LINES},
            "sums": _sums(all_over),
            "since_start": _sums(whole),
            "classes": _classes(all_over.classes),
        }

    def _now(self) -> Span:
        """The narrowest span that is under way; those that are over are handed on."""
        now = time.monotonic()
        narrowest = min(WIDTHS_S.values())
        start_s = now // narrowest * narrowest
        if start_s > self._current.start_s:
            over, self._current = self._current, Span(start_s)
            if over.start_s > -math.inf:
                for found in self._ranges.values():
                    found.at(over.start_s).add(over)
                self._whole.add(over)
                self._whole.classes.clear()  # which nobody asks for
        return self._current

    @staticmethod
    def _ended(span: Span, request: Request) -> None:
        """A request ended, not by its client's wish."""
        kept = request.attained_strictly
        span.sums["finished"] += 1
        span.sums["errors"] += request.finish_reason is FinishReason.ERROR
        span.sums["abandoned"] += request.finish_reason is FinishReason.ABANDONED
        if request.slo == OFFLINE_SLO:
            return  # nobody was promised anything
        span.sums.update(promised=1, kept=int(kept), kept_tokens=len(request.output_token_ids) if kept else 0)
        sums = span.of_class(_key(request.slo))
        sums.requests += 1
        sums.kept += kept
        sums.longest_gap_s = max(sums.longest_gap_s, request.longest_gap_s)
        if request.ttft_s is not None:
            sums.ttfts[_bin(request.ttft_s)] += 1


def _point(span: Span, seconds: float) -> dict[str, float | None]:
    """The figures of a span of which so many seconds have passed, a value of each line."""
    sums = span.sums
    return {
        "waiting": _share(sums["waiting"], sums["looks"]),
        "most_waiting": span.most_waiting if sums["looks"] else None,
        "running": _share(sums["running"], sums["looks"]),
        **{kind: _share(sums[kind], sums["block_looks"]) for kind in ("kv", "hidden")},
        "tokens_per_s": _rounded(sums["tokens"] / seconds),
        "kept_tokens_per_s": _rounded(sums["kept_tokens"] / seconds),
        "finished_per_s": _rounded(sums["finished"] / seconds),
        "strict_attainment": _share(sums["kept"], sums["promised"]),
        "ttft_p50_ms": _percentile_ms(span.ttfts, 50),
        "ttft_p99_ms": _percentile_ms(span.ttfts, 99),
        "tbt_p50_ms": _percentile_ms(span.gaps, 50),
        "tbt_p99_ms": _percentile_ms(span.gaps, 99),
        "longest_gap_ms": round(1000 * span.longest_gap_s, 3) if span.gaps else None,
        "refused": span.refused.total(),
        "errors": sums["errors"],
        "preemptions": sums["preemptions"],
        "prefix_hits": _share(sums["prefix_hits"], sums["prefix_queries"]),
    }


def _sums(span: Span) -> dict[str, Any]:
    sums = span.sums
    counts = ("finished", "promised", "kept", "errors", "abandoned", "tokens", *COUNTED)
    return {
        **{name: int(sums[name]) for name in counts},
        "strict_attainment": _share(sums["kept"], sums["promised"]),
        "refused": dict(span.refused.most_common()),
        "longest_gap_ms": round(1000 * span.longest_gap_s, 3) if span.gaps else None,
        "prefix_hit_share": _share(sums["prefix_hits"], sums["prefix_queries"]),
    }


def _classes(classes: Mapping[ClassKey, ClassSums]) -> list[dict[str, Any]]:
    """An entry for each SLO, the one that is kept least first."""
    shown = [
        {
            "slo": None
            if key is None
            else {part: round(1000 * limit_s, 3) for part, limit_s in zip(SLO_PARTS, key, strict=True)},
            "requests": sums.requests,
            "strict_attainment": _share(sums.kept, sums.requests),
            "longest_gap_ms": round(1000 * sums.longest_gap_s, 3),
            "ttft_p99_ms": _percentile_ms(sums.ttfts, 99),
        }
        for key, sums in classes.items()
        if sums.requests
    ]
    return sorted(shown, key=lambda entry: (entry["strict_attainment"], -entry["requests"]))


SLO_PARTS = ("ttft_ms", "tbt_ms", "stall_ms")


def _key(slo: Slo) -> ClassKey:
    return slo.ttft_s, slo.tbt_s, slo.stall_limit_s


def _bin(seconds: float) -> int:
    return round(math.log(seconds if seconds > SHORTEST_S else SHORTEST_S) / BIN)


def _percentile_ms(bins: Mapping[int, int], percent: int) -> float | None:
    """The percentile of what a histogram counts, in the middle of its bin; None if it is empty."""
    left = sum(bins.values()) * percent // 100
    for number in sorted(bins):
        left -= bins[number]
        if left < 0:
            return _rounded(1000 * math.exp(number * BIN))
    return None


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 5) if whole else None


def _rounded(value: float) -> float:
    """To four digits, or to one thousandth if it is small."""
    return round(value, 3 if abs(value) < 1000 else 0)


LINES = tuple(_point(Span(0.0), 1.0))
