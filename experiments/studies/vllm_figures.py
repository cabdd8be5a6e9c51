"""Simulated `vllm-v0` and `vllm-v1` compared with published figures of vLLM for OPT-13B.

Kwon et al., SOSP 2023 (arXiv 2309.06180), one A100 with 40 GB, ShareGPT, Poisson arrivals over an hour: table 1 (tokens
that fit), figure 12a (normalized latency: mean of a request's latency divided by its output) and figure 13a (requests
that run at once, at 2 requests/s). Run `python -m experiments.studies.vllm_figures`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.simulator import Outcome

RATES = (0.5, 1.0, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0)
POLICIES = ("vllm-v0", "vllm-v1")


def normalized_latency_s(outcome: Outcome) -> float:
    """Mean over requests of latency divided by output tokens."""
    last_s = [(r, r.last_token_s) for r in outcome.requests if r.last_token_s is not None]
    found = [(at - r.arrival_s) / len(r.output_token_ids) for r, at in last_s]
    return float(np.mean(found))


def mean_running(outcome: Outcome) -> float:
    """Requests with blocks, averaged over the time of arrivals."""
    end_s = max(r.arrival_s for r in outcome.requests)
    samples = [s for s in outcome.samples_by_instance[0] if s.end_s <= end_s]
    seconds = np.array([s.end_s - s.start_s for s in samples])
    return float(np.average([s.running for s in samples], weights=seconds))


def points(duration_s: float, seed: int, rates: tuple[float, ...]) -> list[dict[str, Any]]:
    """One row for each policy and rate."""
    experiment = Experiment(duration_s=duration_s, seed=seed, num_requests=1, enable_prefix_caching=False)
    rows = []
    for policy in POLICIES:
        for rate in rates:
            outcome, report = experiment.run(policy, "kv", "absorbed", rate)
            assert report is not None
            rows.append(
                {
                    "policy": policy, "rate": rate, "normalized_latency_s": round(normalized_latency_s(outcome), 4),
                    "mean_running": round(mean_running(outcome), 2), "preemptions": report.preemptions,
                    "backlog": report.backlog, "seed": seed, "duration_s": duration_s,
                    "tokens_as_kv": experiment.pool_blocks(policy) // 2 * experiment.block_size,
                }
            )  # fmt: skip
    return rows


def main() -> None:
    """Print a table, and write the rows as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--duration-s", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = points(args.duration_s, args.seed, tuple(map(float, args.rates.split(","))))
    print("| policy | requests/s | normalized latency, s/token | running | preemptions | backlog |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['policy']} | {row['rate']:g} | {row['normalized_latency_s']:.3f} | {row['mean_running']:.1f} | "
            f"{row['preemptions']} | {row['backlog']} |"
        )
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
