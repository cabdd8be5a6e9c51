"""Studies as Markdown tables."""

from collections.abc import Sequence
from typing import Any

from experiments.studies.catalogue import Study

_HEADS = {
    "attainment": "attained", "ttft_attainment": "TTFT ok", "tbt_attainment": "TBT ok", "mean_batch": "mean batch",
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


def targets_table(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """One line per case: effective throughput at each target, and times the first case of the same experiment."""
    targets = [f"{target:g}" for target in study.targets]
    lines = [["", *(f"at {float(t):.0%}" for t in targets), *(f"ratio at {float(t):.0%}" for t in targets)]]
    base: dict[str, float] = {}
    experiment = None
    for case, row in zip(study.cases, rows, strict=True):
        if case.experiment != experiment:
            experiment, base = case.experiment, row["rates"]
        rates = row["rates"]
        ratios = [f"{rates[t] / base[t]:.2f}" if base[t] else "-" for t in targets]
        lines.append([row["case"], *(f"{rates[t]:.2f}" for t in targets), *ratios])
    return f"{study.question} Effective throughput in requests/s; ratios to fcfs with KV.\n\n{_markdown(lines)}"


OVER = {"rate": "requests/s of an instance", "instances": "instances", "report_interval_s": "seconds between reports"}


def place(study: Study, row: dict[str, Any]) -> float:
    """Where a row of a study of routers stands on its axis."""
    return round(row["rate"] / row["instances"], 6) if study.over == "rate" else row[study.over]


def routing_table(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """Attainment, and longest waits of requests that miss, for each policy: a line per router, a column per place."""
    parts = [
        f"{study.question} Attainment, and the longest that a request went without a token, over {OVER[study.over]}."
    ]
    for policy in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == policy]
        places = sorted({place(study, row) for row in own})
        for column, unit in (("attainment", ""), ("longest_wait_s", ", s")):
            lines = [[f"{policy} inside: {head(column).removesuffix(', s')}{unit}", *(f"{x:g}" for x in places)]]
            for router in dict.fromkeys(row["router"] for row in own):
                found = {place(study, row): _cell(column, row[column]) for row in own if row["router"] == router}
                lines.append([router, *(found.get(x, "-") for x in places)])
            parts.append(_markdown(lines))
    return "\n".join([parts[0] + "\n", *parts[1:]])


def _cell(column: str, value: float) -> str:
    if column.endswith("attainment"):
        return f"{value:.1%}"
    return f"{value:.3g}" if isinstance(value, float) and value < 100 else f"{value:.0f}"


def _markdown(lines: list[list[str]]) -> str:
    first, *rest = lines
    rule = ["---", *["---:"] * (len(first) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [first, rule, *rest]) + "\n"
