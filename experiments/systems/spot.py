"""A service of OPT-30B on spot machines, over published traces: P99 and cost of each reaction, and on demand.

Run `python -m experiments.systems.spot --out docs/studies/spot.json`; `--table` shows a file that is there.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from apt_jax.simulation.spot.service import Reaction, Record, Service
from apt_jax.simulation.spot.shapes import HEADROOM, Model
from apt_jax.simulation.spot.trace import TRACES, Trace, steady
from apt_jax.simulation.workload import make_arrivals

RATE = 5.0
CASES: tuple[tuple[str, Reaction, int], ...] = (
    ("move, least movement", "move", 0),
    ("move, in order", "unmatched", 0),
    ("move weights, compute the cache again", "tokens", 0),
    ("restart with the best formation", "restart", 0),
    ("reroute, groups of 2", "reroute", 2),
    ("reroute, groups of 4", "reroute", 4),
)
ON_DEMAND = "on demand"
Row = dict[str, Any]


def on_demand(model: Model, rate: float, most: int) -> int:
    """The fewest machines that are trusted with the rate."""
    bears = (n for n in range(1, most + 1) if any(HEADROOM * model.bound(shape) >= rate for shape in model.shapes(n)))
    return next(bears)


def run(model: Model, trace: Trace, label: str, reaction: Reaction, degree: int, rate: float, seed: int) -> Row:
    """One simulation."""
    made = make_arrivals(model.lengths, rate=rate, num_requests=1, cv=1.0, seed=seed, duration_s=trace.end_s)
    arrivals = [arrival for arrival in made if arrival.arrival_s < trace.end_s]
    price = model.machine.spot_price
    machines = trace
    if label == ON_DEMAND:
        machines, price = steady(on_demand(model, rate, trace.most()), trace.end_s), model.machine.on_demand_price
    service = Service(model, machines, reaction, rate, degree=degree)
    records = service.run(arrivals)
    times = [np.array(record.times_s()) for record in records]
    assert [len(each) for each in times] == [arrival.output_tokens for arrival in arrivals]
    return {
        "trace": trace.name, "case": label, "rate": rate, "seed": seed, "requests": len(records),
        **_figures(records, times), "moved_bytes": float(service.moved_bytes), "paused_s": round(service.paused_s, 3),
        "recomputed_tokens": service.recomputed_tokens, "formed": service.num_formed,
        "machine_s": machines.machine_s(),
        "price_per_1000_tokens": price * machines.machine_s() / 3600 / sum(map(len, times)) * 1000,
    }  # fmt: skip


def _figures(records: list[Record], times: list[np.ndarray]) -> Row:
    arrived = np.array([record.arrival.arrival_s for record in records])
    latency, first = (np.array([each[i] for each in times]) - arrived for i in (-1, 0))
    gaps = np.array([np.diff(each).max(initial=0.0) for each in times])
    return {
        "p50_latency_s": float(np.percentile(latency, 50)), "p99_latency_s": float(np.percentile(latency, 99)),
        "p99_ttft_s": float(np.percentile(first, 99)), "p99_longest_gap_s": float(np.percentile(gaps, 99)),
        "strict_attainment": float(np.mean((first <= 1) & (gaps <= 1))),
    }  # fmt: skip


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| trace | | P50, s | P99, s | first token P99, s | longest gap P99, s | strict | moved, GB | stood, s | "
        "computed again, tokens | price of 1,000 tokens |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        base = next(r for r in rows if r["trace"] == row["trace"] and r["case"] == ON_DEMAND)
        share = row["price_per_1000_tokens"] / base["price_per_1000_tokens"]
        lines.append(
            f"| {row['trace']} | {row['case']} | {row['p50_latency_s']:.2f} | {row['p99_latency_s']:.1f} | "
            f"{row['p99_ttft_s']:.1f} | {row['p99_longest_gap_s']:.1f} | {row['strict_attainment']:.1%} | "
            f"{row['moved_bytes'] / 1e9:.0f} | {row['paused_s']:.1f} | {row['recomputed_tokens']:,} | {share:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--traces", default=",".join(trace.name for trace in TRACES))
    parser.add_argument("--seconds", type=float, help="of each trace; default: all of it")
    parser.add_argument("--table", type=Path, help="show this file instead")
    args = parser.parse_args()
    rows: list[Row] = []
    if args.table is not None:
        rows = json.loads(args.table.read_text("utf-8"))["rows"]
    else:
        model = Model()
        for trace in TRACES:
            if trace.name in args.traces.split(","):
                end_s = min(args.seconds or trace.end_s, trace.end_s)
                part = replace(
                    trace, end_s=end_s, changes=tuple(change for change in trace.changes if change.time_s < end_s)
                )
                for case in (*CASES, (ON_DEMAND, "move", 0)):
                    rows.append(run(model, part, *case, rate=args.rate, seed=args.seed))
    if args.out is not None:
        args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
