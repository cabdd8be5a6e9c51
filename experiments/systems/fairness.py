"""How evenly users are served who all want more than there is: OPT-13B, one A100, KV with host memory.

Three users of one class: one asks for eight of ten requests and the others for less than a third of what the device
serves (`flood.csv`), or for half of them and all for more than their third (`half.csv`). In every window of ten seconds
those users count that had a request waiting or running all the time: what each was served (a prompt token once, an
output token twice) goes into Jain's index, 1 where all had as much, and into the largest difference over the mean.
Run `python -m experiments.systems.fairness --out docs/studies/fair_users.json`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from apt_jax.request import Request
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.requests.columns import SimulatedRequest
from experiments.studies.catalogue import HOST_BYTES, LONG

FLOOD, HALF = (Path(__file__).parent / name for name in ("flood.csv", "half.csv"))
WINDOW_S = 10.0
OUTPUT_WEIGHT = 2.0
POLICIES = ("vllm-v1", "apt", "fastswitch:by=class", "fastswitch:by=user")
RATES = ((FLOOD, 3.0), (FLOOD, 3.5), (HALF, 5.0))
Row = dict[str, Any]


def service(request: Request, edges_s: np.ndarray) -> np.ndarray:
    """`[windows]` what a request was served between the edges: its prompt at its first token."""
    if request.first_token_s is None:
        return np.zeros(len(edges_s) - 1)
    times_s = np.cumsum([request.first_token_s, *request.gaps_s])
    weights = np.full(len(times_s), OUTPUT_WEIGHT)
    weights[0] += request.num_prompt_tokens
    return np.histogram(times_s, edges_s, weights=weights)[0]


def has_work(requests: Sequence[SimulatedRequest], edges_s: np.ndarray) -> np.ndarray:
    """`[windows]` whether some request was unfinished at every moment of each window."""
    found = np.ones(len(edges_s) - 1, bool)
    spans = sorted((r.arrival_s, np.inf if r.ended_s is None else r.ended_s) for r in requests)
    idle_from = 0.0
    for begin_s, end_s in [*spans, (np.inf, np.inf)]:
        if begin_s > idle_from:  # nothing in between
            found[(edges_s[:-1] < begin_s) & (edges_s[1:] > idle_from)] = False
        idle_from = max(idle_from, end_s)
    return found


def evenness(requests: Sequence[SimulatedRequest], until_s: float) -> tuple[float, float, int]:
    """Mean over the windows of Jain's index and of the largest difference; the number of windows."""
    edges_s = np.arange(0.0, until_s + 1e-9, WINDOW_S)
    users = sorted({r.user or "" for r in requests})
    own = [[r for r in requests if (r.user or "") == user] for user in users]
    served = np.array([np.sum([service(r, edges_s) for r in each], axis=0) for each in own])
    counted = np.array([has_work(each, edges_s) for each in own])
    indices, differences = [], []
    for window in np.flatnonzero(counted.sum(axis=0) >= 2):
        each = served[counted[:, window], window]
        if each.sum() > 0:
            indices.append(each.sum() ** 2 / (len(each) * (each**2).sum()))
            differences.append((each.max() - each.min()) / each.mean())
    return float(np.mean(indices)), float(np.mean(differences)), len(indices)


def run(policy: str, experiment: Experiment, rate: float) -> Row:
    """One simulation."""
    outcome, report = experiment.run(policy, "kv", "one-pass", rate)
    assert report is not None
    index, difference, windows = evenness(outcome.requests, outcome.window_s)
    users = sorted({r.user or "" for r in outcome.requests})
    waits = {user: [r.ttft_s or 0.0 for r in outcome.requests if r.user == user] for user in users}
    kept = {user: [r.attained_strictly for r in outcome.requests if r.user == user] for user in users}
    return {
        "users": experiment.classes.stem if experiment.classes else "",
        "policy": policy, "rate": rate, "jain": index, "difference": difference, "windows": windows,
        "strict_attainment": report.strict_attainment, "preemptions": report.preemptions,
        "strict_by_user": {user: float(np.mean(each)) for user, each in kept.items()},
        "p99_ttft_s_by_user": {user: float(np.percentile(each, 99)) for user, each in waits.items()},
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    users = sorted(rows[0]["strict_by_user"])
    heads = [
        "users",
        "requests/s",
        "policy",
        "Jain's index",
        "difference",
        "strict",
        *(f"strict, {user}" for user in users),
    ]
    heads += [f"TTFT p99 {user}, s" for user in users]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---|" + "---:|" * (len(heads) - 3)]
    for row in rows:
        cells = [row["users"], f"{row['rate']:g}", row["policy"], f"{row['jain']:.3f}", f"{row['difference']:.2f}"]
        cells += [f"{row['strict_attainment']:.1%}", *(f"{row['strict_by_user'][user]:.1%}" for user in users)]
        cells += [f"{row['p99_ttft_s_by_user'][user]:.2f}" for user in users]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0, help="of arrivals")
    args = parser.parse_args()
    experiment = replace(
        LONG, duration_s=args.seconds, enable_prefix_caching=True, host_cache_bytes=HOST_BYTES, num_requests=1
    )
    rows = [run(policy, replace(experiment, classes=path), rate) for path, rate in RATES for policy in POLICIES]
    if args.out is not None:
        args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
