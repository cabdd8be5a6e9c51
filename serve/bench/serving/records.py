"""What a client saw of each request, and the figures derived from it, in the names of vLLM's benchmark.

Seconds count from the start of the run. Latencies count from the planned arrival, whenever the request was sent.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from apt_jax.request import Slo
from apt_jax.run_figures import backlog_by_quarter, by_quartile, is_sustained


@dataclass
class Record:
    """One request: when it was due, sent and answered; `error` says why it failed."""

    planned_s: float
    prompt_tokens: int
    asked_tokens: int
    started_s: float | None = None  # when the client came to it
    sent_s: float | None = None  # when it was allowed to send it
    piece_s: list[float] = field(default_factory=list)  # arrival of each piece of the answer
    output_tokens: int = 0
    first_tokens: int = 1  # of them, in the first piece
    error: str | None = None
    ended_s: float | None = None  # when the answer was complete, or it failed
    was_turned_away: bool = False  # refused by the server, or ended before it was done
    cached_tokens: int = 0  # of its prompt, from the server's prefix cache
    turn: int = 1  # of its conversation

    @property
    def has_failed(self) -> bool:
        """Whether it got no complete answer."""
        return self.error is not None

    @property
    def ttft_s(self) -> float:
        """Planned arrival to first token."""
        return self.piece_s[0] - self.planned_s

    @property
    def e2el_s(self) -> float:
        """Planned arrival to last token."""
        return self.piece_s[-1] - self.planned_s

    @property
    def gaps_s(self) -> list[float]:
        """Between pieces; a piece is one token unless the server sends several together."""
        return [later - earlier for earlier, later in pairwise(self.piece_s)]

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first piece's; 0 of one piece."""
        further = self.output_tokens - self.first_tokens
        return (self.e2el_s - self.ttft_s) / further if further > 0 else 0.0

    @property
    def has_tpot(self) -> bool:
        """Whether tokens came after the first piece."""
        return len(self.piece_s) > 1 and self.output_tokens > self.first_tokens

    @property
    def queue_s(self) -> float:
        """Planned arrival to sending: late clients, and waiting for --max-concurrency."""
        return (self.planned_s if self.sent_s is None else self.sent_s) - self.planned_s

    @property
    def longest_gap_s(self) -> float:
        """The longest gap between pieces; 0 without one."""
        return max(self.gaps_s, default=0.0)

    @property
    def longest_wait_s(self) -> float:
        """Longest time without a token, its first one included; one without a whole answer waited until it ended."""
        waits = [self.ttft_s, self.longest_gap_s] if self.piece_s else [0.0]
        if self.has_failed and self.ended_s is not None:
            waits.append(self.ended_s - (self.piece_s[-1] if self.piece_s else self.planned_s))
        return max(waits)

    def attains(self, slo: Slo) -> bool:
        """Whether it attained its SLO as the paper reads it; a failed one did not."""
        return not self.has_failed and slo.is_kept(self.ttft_s, self.gaps_s)

    def attains_strictly(self, slo: Slo) -> bool:
        """Whether it attained its SLO without any gap longer than the stall limit."""
        return not self.has_failed and slo.is_kept_strictly(self.ttft_s, self.gaps_s)

    def tokens_until(self, time_s: float) -> float:
        """Output tokens that had come by `time_s`, each piece after the first taken for equally many."""
        pieces = sum(at_s <= time_s for at_s in self.piece_s)
        further = (self.output_tokens - self.first_tokens) / max(len(self.piece_s) - 1, 1)
        return self.first_tokens + further * (pieces - 1) if pieces else 0.0


@dataclass(frozen=True)
class Run:
    """All requests of one rate, and how well the client kept up.

    `duration_s` ends with the last answer; `begins_s` is when the last conversation was due to begin, None without
    any. `loop_lag_s` is the 99th percentile of how late the client's own timer
    was, `cpu_share` the share of one core that the client used.
    """

    records: list[Record]
    duration_s: float
    loop_lag_s: float = 0.0
    cpu_share: float = 0.0
    begins_s: float | None = None

    @property
    def max_lag_s(self) -> float:
        """How late the client came to a request at worst, waiting for --max-concurrency not counted."""
        return max((r.started_s - r.planned_s for r in self.records if r.started_s is not None), default=0.0)

    @property
    def window_s(self) -> float:
        """Seconds in which requests were due to arrive; 0 if all were at once. Of conversations, their first turns."""
        if self.begins_s is not None:
            return self.begins_s
        return max((record.planned_s for record in self.records), default=0.0)

    def attainment(self, slo: Slo) -> float:
        """Share of all requests sent that attained their SLO as the paper reads it."""
        return _share(record.attains(slo) for record in self.records)

    def strict_attainment(self, slo: Slo) -> float:
        """Share of all requests sent that attained their SLO strictly."""
        return _share(record.attains_strictly(slo) for record in self.records)


def summarise(
    run: Run, *, slo: Slo, goodput: Mapping[str, float], metrics: Iterable[str], percentiles: Sequence[float]
) -> dict[str, Any]:
    """The figures of a run as plain data; `goodput` maps ttft, tpot and e2el to limits in ms. Pure."""
    done = [record for record in run.records if not record.has_failed]
    input_tokens, output_tokens = (sum(getattr(r, name) for r in done) for name in ("prompt_tokens", "output_tokens"))
    pieces = sum(len(record.piece_s) for record in done)
    duration = max(run.duration_s, 1e-9)
    result: dict[str, Any] = {
        "duration": run.duration_s,
        "completed": len(done),
        "failed": len(run.records) - len(done),
        "errors_by_reason": dict(Counter(r.error for r in run.records if r.error is not None).most_common()),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "total_cached_tokens": sum(record.cached_tokens for record in done),
        "median_ttft_ms_by_turn": _ttft_by_turn(done),
        "request_throughput": len(done) / duration,
        "request_goodput": sum(_is_good(r, goodput) for r in done) / duration if goodput else None,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (input_tokens + output_tokens) / duration,
        "max_concurrent_requests": _most_at_once(done),
        "strict_attainment": run.strict_attainment(slo),
        "attainment": run.attainment(slo),
        "ttft_attainment": _share(not r.has_failed and r.ttft_s <= slo.ttft_s for r in run.records),
        "tbt_attainment": _share(not r.has_failed and slo.is_kept(0.0, r.gaps_s) for r in run.records),
        **who_pays(run, slo),
        "tokens_per_piece": output_tokens / pieces if pieces else None,
        "short_answers": sum(r.output_tokens < r.asked_tokens for r in done),
        "max_client_lag_ms": run.max_lag_s * 1e3,
        "client_loop_lag_ms": run.loop_lag_s * 1e3,
        "client_cpu_share": run.cpu_share,
    }
    for name in metrics:
        result |= _statistics(name, _values(name, done), percentiles)
    return result | _statistics("client_queue_time", [r.queue_s for r in done], percentiles)


def who_pays(run: Run, slo: Slo) -> dict[str, Any]:
    """What the shares of attainment hide: freezes, classes, requests turned away, and whether the rate lasts. Pure."""
    records, window_s = run.records, run.window_s
    strictly, kept = [r.attains_strictly(slo) for r in records], [r.attains(slo) for r in records]
    arrivals = [r.planned_s for r in records]
    ends = [math.inf if r.ended_s is None else r.ended_s for r in records]
    over_s = window_s or run.duration_s
    tokens = sum(r.tokens_until(over_s) for r, is_kept in zip(records, strictly, strict=True) if is_kept)
    return {
        "longest_gap_ms": max((r.longest_gap_s for r in records), default=0.0) * 1e3,
        "longest_wait_ms": max((r.longest_wait_s for r in records), default=0.0) * 1e3,
        "attainment_by_class": {
            "prompt_quartile": by_quartile([r.prompt_tokens for r in records], strictly, kept),
            "output_quartile": by_quartile([r.asked_tokens for r in records], strictly, kept),
        },
        "kept_token_throughput": tokens / max(over_s, 1e-9),
        "turned_away": _share(r.was_turned_away for r in records),
        "frozen": _share(r.longest_gap_s > slo.stall_limit_s for r in records),
        "arrivals_s": window_s,
        "backlog_by_quarter": backlog_by_quarter(arrivals, ends, window_s) if window_s else None,
        "sustained": is_sustained(arrivals, ends, window_s),
    }


def details(run: Run) -> dict[str, list[Any]]:
    """Every request's figures, in order of arrival; seconds, null where a request failed before."""
    return {
        "input_lens": [r.prompt_tokens for r in run.records],
        "output_lens": [r.output_tokens for r in run.records],
        "planned_times": [r.planned_s for r in run.records],
        "start_times": [r.sent_s for r in run.records],
        "ttfts": [r.ttft_s if r.piece_s else None for r in run.records],
        "itls": [r.gaps_s for r in run.records],
        "latencies": [r.e2el_s if r.piece_s else None for r in run.records],
        "errors": [r.error for r in run.records],
        "cached_lens": [r.cached_tokens for r in run.records],
        "turns": [r.turn for r in run.records],
    }


def _ttft_by_turn(done: Sequence[Record]) -> list[float]:
    """Of the first turns of conversations, of the second ones, ... as far as any was answered; in ms."""
    by_turn: dict[int, list[float]] = {}
    for record in done:
        by_turn.setdefault(record.turn, []).append(record.ttft_s * 1e3)
    return [float(np.median(by_turn[turn])) for turn in sorted(by_turn)]


def _values(metric: str, done: Sequence[Record]) -> list[float]:
    """Seconds of ttft, tpot, itl or e2el; a request whose tokens all came at once has no tpot."""
    if metric == "itl":
        return [gap for record in done for gap in record.gaps_s]
    return [getattr(record, f"{metric}_s") for record in done if metric != "tpot" or record.has_tpot]


def _statistics(metric: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, standard deviation and percentiles in ms; None of nothing."""
    of = np.asarray(values, np.float64) * 1e3
    names = ["mean", "median", "std", *(f"p{percent:g}" for percent in percentiles)]
    found = [of.mean(), np.median(of), of.std(), *np.percentile(of, percentiles)] if len(of) else [None] * len(names)
    return {
        f"{name}_{metric}_ms": None if value is None else float(value) for name, value in zip(names, found, strict=True)
    }


def _is_good(record: Record, goodput: Mapping[str, float]) -> bool:
    return all(getattr(record, f"{metric}_s") * 1e3 <= limit for metric, limit in goodput.items())


def _most_at_once(done: Sequence[Record]) -> int:
    """Maximum number of concurrent requests; at equal times an end counts before a start."""
    sent = [(r.planned_s if r.sent_s is None else r.sent_s, 1) for r in done]
    ended = [(r.piece_s[-1], -1) for r in done]
    most = now = 0
    for _, change in sorted(sent + ended):
        now += change
        most = max(most, now)
    return most


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else 0.0
