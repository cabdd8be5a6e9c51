"""Tables that `bench serve` prints."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from apt_jax.run_figures import SUSTAINED_S

TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "gap between tokens",
    "e2el": "whole request",
    "client_queue_time": "wait in the client",
}
MAX_LAG_MS = 50.0  # of the client itself, beyond which its figures mislead
LASTS = {True: "yes", False: "no", None: "unknown"}
UNCUT_COLUMNS = 10_000  # on a narrow terminal lines wrap, and no figure is cut
MAX_CPU_SHARE = 0.7


def print_point(figures: Mapping[str, Any], metrics: Iterable[str], percentiles: Sequence[float]) -> None:
    """One run: throughput, attainment, and latencies in ms."""
    console = _console()
    goodput = figures["request_goodput"]
    console.print(
        f"{figures['request_rate']} requests/s offered: {figures['completed']} answered, {figures['failed']} failed in "
        f"{figures['duration']:.1f} s; {figures['request_throughput']:.3g} requests/s, "
        f"{figures['output_throughput']:.4g} output and {figures['total_token_throughput']:.4g} total tokens/s"
        + (f", goodput {goodput:.3g} requests/s" if goodput is not None else "")
    )
    console.print(
        f"attained {figures['strict_attainment']:.1%} strictly (no gap over {figures['stall_slo_ms']:g} ms), "
        f"{figures['attainment']:.1%} by the 99th percentile of gaps (first token within "
        f"{figures['ttft_slo_ms']:g} ms: {figures['ttft_attainment']:.1%}, gaps within {figures['tbt_slo_ms']:g} ms: "
        f"{figures['tbt_attainment']:.1%})"
    )
    console.print(
        f"longest gap {figures['longest_gap_ms']:.0f} ms, longest wait {figures['longest_wait_ms']:.0f} ms; "
        f"{figures['frozen']:.1%} froze; "
        f"{figures['turned_away']:.1%} refused or ended; {figures['kept_token_throughput']:.4g} tokens/s of kept "
        "requests"
    )
    console.print(f"{_classes(figures)}; {_backlog(figures)}")
    if len(figures["median_ttft_ms_by_turn"]) > 1 or figures["total_cached_tokens"]:
        share = figures["total_cached_tokens"] / max(figures["total_input_tokens"], 1)
        turns = ", ".join(f"{ms:.4g}" for ms in figures["median_ttft_ms_by_turn"])
        console.print(
            f"{share:.1%} of prompt tokens from the prefix cache; median time to first token by turn {turns} ms"
        )
    for reason, count in figures["errors_by_reason"].items():
        console.print(f"failed {count} times: {reason}", markup=False, highlight=False)
    shown = [*metrics, *(["client_queue_time"] if figures["max_concurrency"] is not None else [])]
    if figures["completed"] and shown:
        columns = ["mean", "median", "std", *(f"p{percent:g}" for percent in percentiles)]
        table = Table("ms", *columns)
        for name in shown:
            table.add_row(TITLES[name], *(_ms(figures[f"{column}_{name}_ms"]) for column in columns))
        console.print(table)


def print_points(points: Sequence[Mapping[str, Any]], found: Mapping[str, Mapping[float, float]]) -> None:
    """All runs in order of rate, and the effective throughput in each reading, strict first."""
    table = Table(
        *("requests/s", "answered", "failed", "turned away", "frozen", "strict", "P99", "TTFT ok", "TBT ok"),
        *("worst class", "longest gap, s", "kept tokens/s", "backlog by quarter", "sustained"),
    )
    for point in points:
        names = ("turned_away", "frozen", "strict_attainment", "attainment", "ttft_attainment", "tbt_attainment")
        shares = (f"{point[name]:.1%}" for name in names)
        row = (str(point["request_rate"]), str(point["completed"]), str(point["failed"]), *shares)
        quarters = point["backlog_by_quarter"]
        table.add_row(
            *row, f"{worst_class(point):.1%}", f"{point['longest_gap_ms'] / 1e3:.2f}",
            f"{point['kept_token_throughput']:.1f}",
            "-" if quarters is None else " ".join(map(str, quarters)), LASTS[point["sustained"]],
        )  # fmt: skip
    console = _console()
    console.print(table)
    highest = max(float(point["request_rate"]) for point in points)
    for target in next(iter(found.values())):
        reached = [
            f"{'at least ' if rate >= highest else ''}{rate:.3g} requests/s" if rate else "not reached"
            for rate in (found["strict"][target], found["paper"][target])
        ]
        both = f"{reached[0]} strictly, {reached[1]} by the 99th percentile"
        console.print(f"effective throughput at {target:.0%} attainment: {both}")
    if any(point["sustained"] is None for point in points):
        console.print(f"whether these rates last is unknown: that takes {SUSTAINED_S:g} s of arrivals")


def warnings_of(figures: Mapping[str, Any]) -> list[str]:
    """Sentences about conditions that make the figures doubtful."""
    lines = []
    lag = max(figures["max_client_lag_ms"], figures["client_loop_lag_ms"])
    if lag > MAX_LAG_MS or figures["client_cpu_share"] > MAX_CPU_SHARE:
        lines.append(
            f"this client was up to {lag:.0f} ms late and used {figures['client_cpu_share']:.0%} of a core; latencies "
            "are partly its own: lower --request-rate, or run it on a machine with idle cores"
        )
    if figures["short_answers"]:
        lines.append(
            f"{figures['short_answers']} answers had fewer tokens than asked for; the server may not know ignore_eos"
        )
    if (figures["tokens_per_piece"] or 1.0) > 1.05:
        lines.append(
            f"the server sends {figures['tokens_per_piece']:.2f} tokens in a piece; gaps are those between pieces"
        )
    return lines


def worst_class(figures: Mapping[str, Any]) -> float:
    """Strict attainment of the worst quartile of prompt or output length."""
    classes = figures["attainment_by_class"].values()
    return min((entry["strict_attainment"] for entries in classes for entry in entries), default=0.0)


def _classes(figures: Mapping[str, Any]) -> str:
    """Strict attainment of each quartile, shortest first."""
    shown = []
    for name, entries in figures["attainment_by_class"].items():
        shares = ", ".join(f"{entry['strict_attainment']:.1%}" for entry in entries)
        shown.append(f"{name.replace('_', ' ')}s {shares}")
    return "strictly by " + "; by ".join(shown)


def _backlog(figures: Mapping[str, Any]) -> str:
    quarters = figures["backlog_by_quarter"]
    if quarters is None:
        return "all arrived at once"
    return f"unfinished after each quarter {', '.join(map(str, quarters))}; sustained: {LASTS[figures['sustained']]}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _console() -> Console:
    return Console(width=UNCUT_COLUMNS)
