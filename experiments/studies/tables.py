"""Studies as Markdown tables."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments.studies.catalogue import Study

Row = dict[str, Any]

_HEADS = {
    "strict_attainment": "strict", "attainment": "P99", "worst_class": "worst class",
    "ttft_attainment": "TTFT ok", "tbt_attainment": "TBT ok", "mean_batch": "mean batch",
    "p50_ttft_s": "TTFT p50, s", "p99_ttft_s": "TTFT p99, s", "p99_tbt_s": "TBT p99, s",
    "p50_queue_s": "queue p50, s", "p99_queue_s": "queue p99, s", "preemptions": "preemptions",
    "moved_bytes": "moved, GB",
    "mean_token_latency_s": "latency per token, s",
    "conversions": "conversions", "backlog": "backlog", "longest_wait_s": "longest wait, s",
    "before": "before", "surge": "in the surge", "minute_after": "the minute after", "later": "later",
    "frozen": "frozen", "longest_gap_s": "longest gap, s", "backlog_growth": "growth",
    "kept_token_throughput": "kept tokens/s",
}  # fmt: skip


SHARES = ("worst_class", "frozen", "backlog_growth", "before", "surge", "minute_after", "later")


def head(column: str) -> str:
    """A column's heading, with its unit."""
    return _HEADS[column]


def seed_of(row: Row) -> int:
    """The seed of a row's simulations."""
    found = row.get("effective_throughput")
    return int(row["seed"] if found is None else found[0]["seeds"][0])


def by_point(rows: Sequence[Row]) -> dict[tuple[str, float | None], list[Row]]:
    """Rows of each case and rate, one for each seed, in order."""
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row.get("rate")), []).append(row)
    return groups


def mean(rows: Sequence[Row], column: str) -> float:
    """Mean of a column over seeds."""
    return statistics.fmean(row[column] for row in rows)


def rates_table(study: Study, rows: Sequence[Row]) -> str:
    """One line per case and rate."""
    lines = [["", "requests/s", *map(head, study.columns)]]
    for (case, rate), group in by_point(rows).items():
        lines.append([case, f"{rate:g}", *(_seeded_cell(c, [row[c] for row in group]) for c in study.columns)])
    return f"{study.question}{_seeds(study, 'standard error of the mean')}\n\n{_markdown(lines)}"


def throughput(rows: Sequence[Row], reading: str, target: float) -> dict[str, Any] | None:
    """What a case's searches found for one reading and target: means over seeds, the standard deviation of the rate.

    None if that was not asked of the case.
    """
    asked = (reading, target)
    entries = [e for row in rows for e in row["effective_throughput"] if (e["reading"], e["target"]) == asked]
    if not entries:
        return None
    rates = [each["rate"] for each in entries]
    return {
        "rate": statistics.fmean(rates),
        "spread": statistics.stdev(rates) if len(rates) > 1 else 0.0,
        "not_sustained": statistics.fmean(max(each["not_sustained"], each["rate"]) for each in entries),
    }


def targets_table(study: Study, rows: Sequence[Row]) -> str:
    """One line per case: effective throughput in both readings, times the first case of the experiment, and the bound.

    A rate in brackets is kept but does not last; "-" was not asked.
    """
    asked = [(reading, target) for target in study.targets for reading in ("strict", "paper")]
    heads = [f"{reading}, {target:.0%}" for reading, target in asked]
    lines = [["", *heads, *(f"ratio, {head}" for head in heads), "fluid bound"]]
    base: list[Row] = []
    experiment = None
    for case, row in zip(study.cases, by_point(rows).values(), strict=True):
        plain = replace(
            case.experiment, cache_dtype="auto", quantization="none", enable_prefix_caching=False, host_cache_bytes=0
        )
        if plain != experiment:
            experiment, base = plain, row
        cells, ratios = [], []
        for reading, target in asked:
            own, first = throughput(row, reading, target), throughput(base, reading, target)
            if own is None:
                cells.append("-")
                ratios.append("-")
                continue
            passing = f" ({own['not_sustained']:.2f})" if own["not_sustained"] > own["rate"] else ""
            spread = f" ± {own['spread']:.2f}" if len(study.seeds) > 1 else ""
            cells.append(f"{own['rate']:.2f}{spread}{passing}")
            ratios.append(f"{own['rate'] / first['rate']:.2f}" if first and first["rate"] else "-")
        bound = statistics.fmean(entry["fluid_bound"] for each in row for entry in each["effective_throughput"])
        lines.append([case.label, *cells, *ratios, f"{bound:.2f}"])
    return (
        f"{study.question} Effective throughput in requests/s that lasts; in brackets: kept, but not lasting. "
        f"Ratios are to the first line of the same experiment.{_seeds(study, 'standard deviation')}\n\n"
        f"{_markdown(lines)}"
    )


OVER = {"rate": "requests/s of an instance", "instances": "instances", "report_interval_s": "seconds between reports"}


def place(study: Study, row: Row) -> float:
    """Where a row of a study of routers stands on its axis."""
    return round(row["rate"] / row["instances"], 6) if study.over == "rate" else row[study.over]


def routing_table(study: Study, rows: Sequence[Row]) -> str:
    """Strict attainment, and longest waits, for each policy: a line per router, a column per place."""
    parts = [
        f"{study.question} Strict attainment, and the longest that a request went without a token, "
        f"over {OVER[study.over]}."
    ]
    for policy in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == policy]
        places = sorted({place(study, row) for row in own})
        for column, unit in (("strict_attainment", ""), ("longest_wait_s", ", s")):
            lines = [[f"{policy} inside: {head(column).removesuffix(', s')}{unit}", *(f"{x:g}" for x in places)]]
            for router in dict.fromkeys(row["router"] for row in own):
                found = {place(study, row): _cell(column, row[column]) for row in own if row["router"] == router}
                lines.append([router, *(found.get(x, "-") for x in places)])
            parts.append(_markdown(lines))
    return "\n".join([parts[0] + "\n", *parts[1:]])


def _seeds(study: Study, spread: str) -> str:
    return f" Means of {len(study.seeds)} seeds, ± {spread}." if len(study.seeds) > 1 else ""


def _seeded_cell(column: str, values: Sequence[float]) -> str:
    cell = _cell(column, statistics.fmean(values))
    if len(values) == 1:
        return cell
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{cell} ± {100 * error:.1f}" if cell.endswith("%") else f"{cell} ± {_cell(column, float(error))}"


def _cell(column: str, value: float) -> str:
    if column.endswith("attainment") or column in SHARES:
        return f"{value:.1%}"
    if column == "moved_bytes":
        value /= 1e9
    return f"{value:.3g}" if isinstance(value, float) and value < 100 else f"{value:.0f}"


def _markdown(lines: list[list[str]]) -> str:
    first, *rest = lines
    rule = ["---", *["---:"] * (len(first) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [first, rule, *rest]) + "\n"
