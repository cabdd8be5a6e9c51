"""Studies as Markdown tables."""

from collections.abc import Sequence
from typing import Any

from experiments.studies.catalogue import Study

_HEADS = {
    "strict_attainment": "strict", "attainment": "P99", "worst_class": "worst class",
    "ttft_attainment": "TTFT ok", "tbt_attainment": "TBT ok", "mean_batch": "mean batch",
    "p50_ttft_s": "TTFT p50, s", "p99_ttft_s": "TTFT p99, s", "p99_tbt_s": "TBT p99, s",
    "p50_queue_s": "queue p50, s", "p99_queue_s": "queue p99, s", "preemptions": "preemptions",
    "conversions": "conversions", "backlog": "backlog", "longest_wait_s": "longest wait, s",
}  # fmt: skip


def head(column: str) -> str:
    """A column's heading, with its unit."""
    return _HEADS[column]


def rates_table(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """One line per case and rate."""
    lines = [["", "requests/s", *map(head, study.columns)]]
    lines += [[row["case"], f"{row['rate']:g}", *(_cell(c, row[c]) for c in study.columns)] for row in rows]
    return f"{study.question}\n\n{_markdown(lines)}"


def throughput(row: dict[str, Any], reading: str, target: float) -> dict[str, Any]:
    """The entry of a searched row for one reading and target."""
    found = row["effective_throughput"]
    return next(each for each in found if (each["reading"], each["target"]) == (reading, target))


def targets_table(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """One line per case: effective throughput in both readings, times the first case of the experiment, and the bound.

    A rate in brackets is kept but does not last.
    """
    asked = [(reading, target) for target in study.targets for reading in ("strict", "paper")]
    heads = [f"{reading}, {target:.0%}" for reading, target in asked]
    lines = [["", *heads, *(f"ratio, {head}" for head in heads), "fluid bound"]]
    base: dict[str, Any] = {}
    experiment = None
    for case, row in zip(study.cases, rows, strict=True):
        if case.experiment != experiment:
            experiment, base = case.experiment, row
        cells, ratios = [], []
        for reading, target in asked:
            own, first = throughput(row, reading, target), throughput(base, reading, target)["rate"]
            passing = f" ({own['not_sustained']:.2f})" if own["not_sustained"] > own["rate"] else ""
            cells.append(f"{own['rate']:.2f}{passing}")
            ratios.append(f"{own['rate'] / first:.2f}" if first else "-")
        lines.append([row["case"], *cells, *ratios, f"{row['effective_throughput'][0]['fluid_bound']:.2f}"])
    return (
        f"{study.question} Effective throughput in requests/s that lasts; in brackets: kept, but not lasting. "
        f"Ratios are to the first line of the same experiment.\n\n{_markdown(lines)}"
    )


OVER = {"rate": "requests/s of an instance", "instances": "instances", "report_interval_s": "seconds between reports"}


def place(study: Study, row: dict[str, Any]) -> float:
    """Where a row of a study of routers stands on its axis."""
    return round(row["rate"] / row["instances"], 6) if study.over == "rate" else row[study.over]


def routing_table(study: Study, rows: Sequence[dict[str, Any]]) -> str:
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


def _cell(column: str, value: float) -> str:
    if column.endswith("attainment") or column == "worst_class":
        return f"{value:.1%}"
    return f"{value:.3g}" if isinstance(value, float) and value < 100 else f"{value:.0f}"


def _markdown(lines: list[list[str]]) -> str:
    first, *rest = lines
    rule = ["---", *["---:"] * (len(first) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [first, rule, *rest]) + "\n"
