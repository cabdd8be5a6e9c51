"""Tables that `bench serve` prints."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "gap between tokens",
    "e2el": "whole request",
    "client_queue_time": "wait in the client",
}
MAX_LAG_MS = 50.0  # of the client itself, beyond which its figures mislead
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
        f"attained {figures['attainment']:.1%} (first token within {figures['ttft_slo_ms']:g} ms: "
        f"{figures['ttft_attainment']:.1%}, gaps within {figures['tbt_slo_ms']:g} ms: {figures['tbt_attainment']:.1%})"
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


def print_points(points: Sequence[Mapping[str, Any]], found: Mapping[float, float]) -> None:
    """All runs in order of rate, and the effective throughput."""
    table = Table("requests/s", "answered", "failed", "attained", "TTFT ok", "TBT ok", "output tokens/s")
    for point in points:
        shares = (f"{point[name]:.1%}" for name in ("attainment", "ttft_attainment", "tbt_attainment"))
        row = (str(point["request_rate"]), str(point["completed"]), str(point["failed"]), *shares)
        table.add_row(*row, f"{point['output_throughput']:.1f}")
    console = _console()
    console.print(table)
    highest = max(float(point["request_rate"]) for point in points)
    for target, rate in found.items():
        reached = f"{'at least ' if rate >= highest else ''}{rate:.3g} requests/s" if rate else "not reached"
        console.print(f"effective throughput at {target:.0%} attainment: {reached}")


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


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _console() -> Console:
    return Console(width=UNCUT_COLUMNS)
