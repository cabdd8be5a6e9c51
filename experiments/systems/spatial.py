"""semi-PD's spatial form beside the other systems: OPT-13B on one A100, 900 s, as in `experiments.studies systems`.

Run `python -m experiments.systems.spatial --out docs/studies/spatial.json`.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from apt_jax.cache import CacheKind
from apt_jax.run_figures import backlog_growth, is_sustained
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.spatial.costs import ShareCosts
from apt_jax.simulation.spatial.service import SpatialService
from experiments.studies.catalogue import AZURE, FOLDER, LONG

Row = dict[str, Any]
PLACES: tuple[tuple[str, Experiment, float], ...] = (
    *(("ShareGPT", LONG, rate) for rate in (1.5, 2.0, 2.5, 3.0)),
    ("Azure", replace(AZURE, duration_s=900.0), 0.9),
    ("classes", replace(LONG, classes=FOLDER / "chats_and_summaries.csv"), 1.5),
    ("bursts", replace(LONG, cv=2.0), 2.5),
)
FORMS: tuple[tuple[str, bool, bool], ...] = (
    ("semi-pd, in space", True, True),
    ("the same, waits for memory not counted", True, False),
    ("half and half, without the loop", False, True),
)


def run(place: str, experiment: Experiment, rate: float, form: str, adapts: bool, counts_memory: bool) -> Row:
    """One simulation, with the figures of the other studies."""
    arrivals, _ = experiment.arrivals(rate)
    pages = experiment.pool_blocks("semi-pd") // CacheKind.KV.blocks_per_page
    service = SpatialService(
        ShareCosts(experiment.cost_model("one-pass")),
        pages,
        adapts=adapts,
        counts_memory=counts_memory,
    )
    served = service.run(arrivals, experiment.slo)
    gaps = [np.diff(request.times_s) for request in served]
    first = np.array([request.times_s[0] - request.arrival.arrival_s for request in served])
    together = list(zip(served, first.tolist(), gaps, strict=True))
    every = np.concatenate(gaps)
    strictly = [request.slo.is_kept_strictly(late, each.tolist()) for request, late, each in together]
    window_s = arrivals[-1].arrival_s  # as in the other studies: when the last one comes
    kept = [
        np.searchsorted(r.times_s, window_s, "right") for r, is_kept in zip(served, strictly, strict=True) if is_kept
    ]
    backlog = [r.arrival.arrival_s for r in served], [r.times_s[-1] for r in served], window_s
    return {
        "place": place, "rate": rate, "form": form,
        "strict_attainment": float(np.mean(strictly)),
        "attainment": float(np.mean([r.slo.is_kept(f, g.tolist()) for r, f, g in together])),
        "frozen": float(np.mean([g.max(initial=0.0) > r.slo.stall_limit_s for r, _, g in together])),
        "kept_token_throughput": float(sum(kept) / window_s),
        "backlog_growth": backlog_growth(*backlog)[0] * window_s / len(served), "sustained": is_sustained(*backlog),
        "p99_ttft_s": float(np.percentile(first, 99)), "p99_tbt_s": float(np.percentile(every, 99)),
        "preemptions": service.num_preemptions, "mean_share": float(np.mean(service.seen_shares)),
    }  # fmt: skip


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "|  | requests/s |  | strict | P99 | frozen | kept tokens/s | TTFT p99, s | TBT p99, s | preemptions | growth "
        "| mean share of prompts |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['place']} | {row['rate']:g} | {row['form']} | {row['strict_attainment']:.1%} | "
            f"{row['attainment']:.1%} | {row['frozen']:.1%} | {row['kept_token_throughput']:.0f} | "
            f"{row['p99_ttft_s']:.2f} | {row['p99_tbt_s']:.3f} | "
            f"{row['preemptions']} | {row['backlog_growth']:.1%} | {row['mean_share']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=900.0, help="of arrivals")
    args = parser.parse_args()
    rows = [
        run(place, replace(experiment, duration_s=args.seconds), rate, *form)
        for place, experiment, rate in PLACES
        for form in FORMS
    ]
    if args.out is not None:
        args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
