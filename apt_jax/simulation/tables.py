"""Tables that `apt-jax simulate` prints: strict figures first."""

from typing import Any, cast

from rich.console import Console
from rich.table import Table

from apt_jax.cache import CacheKind, CacheMode, keeps_hidden
from apt_jax.run_figures import SUSTAINED_S
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.report import Report

UNCUT_COLUMNS = 10_000  # on a narrow terminal lines wrap, and no figure is cut
LASTS = {True: "yes", False: "no", None: "unknown"}
RUN_COLUMNS = (
    "policy", "cache", "hidden", "rate", "strict", "P99", "worst class", "turned away", "frozen", "TTFT ok", "TBT ok",
    "TTFT p50/p99 s", "TBT p99 s", "longest gap s", "longest wait s", "kept tokens/s", "batch", "preempt", "convert",
    "backlog by quarter", "sustained", "drain s", "fluid bound", "of the bound",
)  # fmt: skip
FOUND_COLUMNS = (
    "policy", "cache", "hidden", "target", "reading", "effective throughput (requests/s)", "kept but not sustained",
    "fluid bound", "of the bound",
)  # fmt: skip


def print_result(experiment: Experiment, reports: list[Report], result: dict[str, Any], seeds: list[int]) -> None:
    """The pool, every run, the means of several seeds, and the effective throughputs."""
    console = Console(width=UNCUT_COLUMNS, markup=False)  # names of files and classes are the user's
    num_blocks = experiment.pool_blocks()
    tokens = num_blocks // CacheKind.KV.blocks_per_page * experiment.block_size
    console.print(
        f"{experiment.model} on {experiment.tensor_parallel_size} x {experiment.hardware}, {experiment.workload}: "
        f"{num_blocks} blocks, {tokens} tokens as KV{_instances(experiment)}"
    )
    if reports:
        console.print(_runs(experiment, reports, seeds))
        if any(len(report.attainment_by_class["slo_class"]) > 1 for report in reports):
            console.print(_classes(experiment, reports, seeds))
        if experiment.surge is not None:
            console.print(_phases(experiment, reports, seeds))
        if any(report.sustained is None for report in reports):
            console.print(f"whether a rate lasts is unknown: that takes {SUSTAINED_S:g} s of arrivals (--duration-s)")
    if reports and len(seeds) > 1:
        console.print(_means(experiment, result["means"]))
    if result["effective_throughput"]:
        console.print(_found(experiment, result["effective_throughput"]))


def _runs(experiment: Experiment, reports: list[Report], seeds: list[int]) -> Table:
    routed, seeded = _routed(experiment), ["seed"] if len(seeds) > 1 else []
    cached = ["cached"] if experiment.enable_prefix_caching else []
    table = Table(*routed, *(["instances"] if routed else []), *seeded, *RUN_COLUMNS, *cached)
    for r in reports:
        where = [r.router, f"{r.mean_instances:.1f}"] if routed else []
        table.add_row(
            *where, *([str(r.seed)] if seeded else []), r.policy, r.cache_mode,
            _attention(r.cache_mode, r.hidden_attention), f"{r.rate:g}", f"{r.strict_attainment:.1%}",
            f"{r.attainment:.1%}", f"{r.worst_class:.1%}", f"{r.turned_away:.1%}", f"{r.frozen:.1%}",
            f"{r.ttft_attainment:.1%}", f"{r.tbt_attainment:.1%}", f"{r.p50_ttft_s:.2f}/{r.p99_ttft_s:.2f}",
            f"{r.p99_tbt_s:.3f}", f"{r.longest_gap_s:.1f}", f"{r.longest_wait_s:.1f}", f"{r.kept_token_throughput:.0f}",
            f"{r.mean_batch:.0f}", str(r.preemptions), str(r.conversions), " ".join(map(str, r.backlog_by_quarter)),
            LASTS[r.sustained], f"{r.drain_s:.0f}", f"{r.fluid_bound:.2f}", f"{r.rate / r.fluid_bound:.0%}",
            *([f"{r.cached_share:.1%}"] if cached else []),
        )  # fmt: skip
    return table


def _classes(experiment: Experiment, reports: list[Report], seeds: list[int]) -> Table:
    """Strict attainment of each SLO class."""
    parts = [report.attainment_by_class["slo_class"] for report in reports]
    return _by_part(experiment, reports, seeds, parts, "strict attainment by class (requests)")


def _phases(experiment: Experiment, reports: list[Report], seeds: list[int]) -> Table:
    """Strict attainment of those that came before, in and after the surge."""
    parts = [report.attainment_by_phase for report in reports]
    return _by_part(experiment, reports, seeds, parts, "strict attainment by phase (requests)")


def _by_part(
    experiment: Experiment, reports: list[Report], seeds: list[int], parts: list[list[dict[str, Any]]], title: str
) -> Table:
    """Strict attainment of parts of each report's requests, a column for each name."""
    names = list(dict.fromkeys(part["name"] for of_report in parts for part in of_report))
    seeded = ["seed"] if len(seeds) > 1 else []
    columns = ("policy", "cache", "hidden", "rate")
    table = Table(*_routed(experiment), *seeded, *columns, *names, title=title)
    for r, of_report in zip(reports, parts, strict=True):
        found = {p["name"]: f"{p['strict_attainment']:.1%} ({p['requests']})" for p in of_report}
        where = [r.router] if _routed(experiment) else []
        table.add_row(
            *where, *([str(r.seed)] if seeded else []), r.policy, r.cache_mode,
            _attention(r.cache_mode, r.hidden_attention), f"{r.rate:g}", *(found.get(name, "-") for name in names),
        )  # fmt: skip
    return table


def _means(experiment: Experiment, means: list[dict[str, Any]]) -> Table:
    columns = ("policy", "cache", "hidden", "rate", "strict", "P99", "worst class", "kept tokens/s")
    table = Table(*_routed(experiment), *columns, title="mean and standard deviation over seeds")
    for row in means:
        shares = (row["figures"][name] for name in ("strict_attainment", "attainment", "worst_class"))
        tokens = row["figures"]["kept_token_throughput"]
        table.add_row(
            *_names(experiment, row), f"{row['rate']:g}", *(f"{f['mean']:.1%} ± {f['spread']:.1%}" for f in shares),
            f"{tokens['mean']:.0f} ± {tokens['spread']:.0f}",
        )  # fmt: skip
    return table


def _found(experiment: Experiment, rows: list[dict[str, Any]]) -> Table:
    table = Table(*_routed(experiment), *FOUND_COLUMNS)
    for row in rows:
        spread = f" ± {row['spread']:.2f}" if len(row["seeds"]) > 1 else ""
        unknown = " (unknown whether it lasts)" if row["rate"] and row["sustained"] is None else ""
        table.add_row(
            *_names(experiment, row), f"{row['target']:.0%}", row["reading"], f"{row['rate']:.2f}{spread}{unknown}",
            f"{row['not_sustained']:.2f}" if row["not_sustained"] else "-", f"{row['fluid_bound']:.2f}",
            f"{row['share_of_bound']:.0%}",
        )  # fmt: skip
    return table


def _routed(experiment: Experiment) -> list[str]:
    return ["router"] if experiment.is_routed else []


def _names(experiment: Experiment, row: dict[str, Any]) -> list[str]:
    hidden = _attention(row["cache_mode"], row["hidden_attention"])
    return [*(row[name] for name in (*_routed(experiment), "policy", "cache_mode")), hidden]


def _attention(mode: str, hidden_attention: str) -> str:
    return hidden_attention if keeps_hidden(cast(CacheMode, mode)) else "-"


def _instances(experiment: Experiment) -> str:
    if not experiment.is_routed:
        return ""
    most = "" if experiment.max_instances is None else f" to {experiment.max_instances}"
    age = f", reports up to {experiment.report_interval_s:g} s old" if experiment.report_interval_s else ""
    return f"; {experiment.instances}{most} instances{age}"
