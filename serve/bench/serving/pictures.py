"""Plots of `bench serve`: the cliff, and how first-token times are distributed."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apt_jax.files import EVERYBODY, replace_file
from apt_jax.request import Slo
from apt_jax.serve.bench.serving.records import Run


def draw(path: Path, points: Sequence[tuple[float, float, Run]], slo: Slo) -> None:
    """Write two panels to `path`. `points` are rate, attainment and run, in order of rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained", dpi=80)
    FigureCanvasAgg(figure)
    cliff, ttft = figure.subplots(1, 2)
    finite = [(rate, share) for rate, share, _ in points if np.isfinite(rate)]
    cliff.plot([rate for rate, _ in finite], [100 * share for _, share in finite], "o-")
    for rate, share, _ in points:
        if not np.isfinite(rate):
            cliff.axhline(100 * share, color="0.6", lw=0.8, ls="--", label="all at once")
            cliff.legend(fontsize=7)
    for rate, _, run in points:
        times = np.sort([record.ttft_s for record in run.records if not record.has_failed])
        if len(times):
            percent = 100 * np.arange(1, len(times) + 1) / len(run.records)
            ttft.step(np.maximum(times, 1e-4), percent, where="post", label=f"{rate:g}/s")
    cliff.set(title="SLO attainment", xlabel="requests/s", ylabel="%", ylim=(0, 102))
    ttft.set(title="time to first token, cumulative", xlabel="s", ylabel="% of requests", ylim=(0, 102))
    ttft.set_xscale("log")
    ttft.axvline(slo.ttft_s, color="0.6", lw=0.8)
    if ttft.get_legend_handles_labels()[0]:
        ttft.legend(fontsize=7)
    for axes in (cliff, ttft):
        axes.grid(alpha=0.3)
    kind, picture = path.suffix[1:] or "png", io.BytesIO()
    figure.savefig(picture, format=kind, metadata={"Software": None} if kind == "png" else None)
    replace_file(path, picture.getvalue(), mode=EVERYBODY)
