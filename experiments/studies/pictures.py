"""Studies as plots: lines over the rate, or bars of effective throughput."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.studies.catalogue import Study
from experiments.studies.tables import OVER, by_point, head, mean, place, throughput

Rows = Sequence[dict[str, Any]]


def draw_rates(study: Study, rows: Rows, path: Path) -> None:
    """The study's first two columns over the rate, a line per case."""
    figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=90)
    FigureCanvasAgg(figure)
    for axes, column in zip(figure.subplots(1, 2).flat, study.columns[:2], strict=True):
        for case in study.cases:
            groups = {rate: group for (label, rate), group in by_point(rows).items() if label == case.label}
            points = [(rate, mean(group, column)) for rate, group in groups.items() if rate is not None]
            scale = 100 if column.endswith("attainment") else 1
            axes.plot([x for x, _ in points], [scale * y for _, y in points], "o-", ms=3, label=case.label)
        axes.set(xlabel="requests/s", ylabel=head(column) + (", %" if column.endswith("attainment") else ""))
        if column.endswith("attainment"):
            axes.set_ylim(0, 102)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    _save(figure, path)


def draw_routing(study: Study, rows: Rows, path: Path) -> None:
    """Attainment, a panel per policy and a line per router."""
    figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=90)
    FigureCanvasAgg(figure)
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    for axes, policy in zip(figure.subplots(1, len(policies), squeeze=False).flat, policies, strict=True):
        own = [row for row in rows if row["policy"] == policy]
        for router in dict.fromkeys(row["router"] for row in own):
            points = sorted(
                (place(study, row), 100 * row["strict_attainment"]) for row in own if row["router"] == router
            )
            axes.plot([x for x, _ in points], [y for _, y in points], "o-", ms=3, label=router)
        axes.set(title=f"{policy} in every instance", xlabel=OVER[study.over], ylabel="attained, %")
        if study.over == "instances":
            axes.set_xscale("log", base=2)
            axes.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    _save(figure, path)


def draw_targets(study: Study, rows: Rows, path: Path) -> None:
    """A group of bars per case, one bar per target."""
    figure = Figure(figsize=(9, 0.9 + 0.36 * len(study.cases)), layout="constrained", dpi=90)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    height = 0.8 / len(study.targets)
    cases = {case: group for (case, _), group in by_point(rows).items()}
    for k, target in enumerate(study.targets):
        found = [throughput(group, "strict", target) for group in cases.values()]
        axes.barh(
            [i + k * height for i, own in enumerate(found) if own],
            [own["rate"] for own in found if own],
            height,
            label=f"{target:.0%} strictly",
        )
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(cases))], list(cases), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("effective throughput, requests/s")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Software": None})
