"""The plots that people expect of a serving study: the cliff, first-token times, batch size and cache mix."""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from apt_jax.cache import KINDS
from apt_jax.files import EVERYBODY, replace_file
from apt_jax.simulation.report import Report
from apt_jax.simulation.simulator import Sample

LINES = {"solid": "-", "dotted": ":", "dashed": "--"}  # of the cache kinds, by index


def draw(
    path: Path,
    reports: Sequence[Report],
    timelines: Mapping[Any, Sequence[Sample]],
    first_tokens: Mapping[Any, Sequence[float]],
    num_blocks: int,
) -> None:
    """Write four panels to `path`: attainment against rate, and of each configuration's highest rate the rest.

    `timelines` (of the first instance) and `first_tokens` are by `Report.key`.

    At least one report, and `check_plot(path)` has passed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained", dpi=60)
    FigureCanvasAgg(figure)
    cliff, ttft, batch, mix = figure.subplots(2, 2).flat
    labels = list(dict.fromkeys(_label(r) for r in reports))
    for number, label in enumerate(labels):
        points = sorted((r.rate, r) for r in reports if _label(r) == label)
        color = f"C{number % 10}"
        cliff.plot(
            [rate for rate, _ in points], [100 * r.attainment for _, r in points], "o-", color=color, label=label
        )
        last = points[-1][1]
        key = last.key
        times = np.sort(first_tokens[key])
        share = np.linspace(0, 100, len(times))
        ttft.plot(np.maximum(times, 1e-3), share, color=color, label=f"{label} at {last.rate:g}/s")
        start, size, *held = _timeline(timelines[key])
        batch.plot(start, size, color=color, lw=0.8)
        for blocks, line in zip(held, cycle(LINES.values()), strict=False):
            mix.plot(start, 100 * blocks / num_blocks, color=color, lw=0.8, ls=line)
    kinds = ", ".join(f"{line} {kind.spec.label}" for kind, line in zip(KINDS, cycle(LINES), strict=False))
    first = ", first instance" if any(r.router for r in reports) else ""
    for axes, title, x, y in (
        (cliff, "SLO attainment", "requests/s", "%"),
        (ttft, "time to first token, cumulative", "s", "% of requests"),
        (batch, "requests per iteration" + first, "s", ""),
        (mix, f"pool used ({kinds}){first}", "s", "%"),
    ):
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
    cliff.set_ylim(0, 102)
    ttft.set_xscale("log")
    ttft.axvline(1.0, color="0.6", lw=0.8)
    cliff.legend(fontsize=7)
    ttft.legend(fontsize=7)
    kind, picture = path.suffix[1:] or "png", io.BytesIO()
    figure.savefig(picture, format=kind, metadata={"Software": None} if kind == "png" else None)
    replace_file(path, picture.getvalue(), mode=EVERYBODY)


def _label(report: Report) -> str:
    hidden = "" if report.cache_mode == "kv" else f"/{report.hidden_attention}"
    return f"{report.router} {report.policy} {report.cache_mode}{hidden}".lstrip()


def _timeline(samples: Sequence[Sample], points: int = 300) -> tuple[np.ndarray, ...]:
    """Time, batch, and blocks of each cache kind at about `points` iterations."""
    step = max(1, len(samples) // points)
    rows = np.array([(s.start_s, s.scheduled, *s.held_blocks) for s in samples[::step]], np.float64)
    return tuple(rows.T)
