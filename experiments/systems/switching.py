"""What each part of cheap context switching is worth (FastSwitch), and half of the bytes (ALISE): OPT-13B, one A100.

And what policies gain whose requests come back beside an iteration instead of before it (`fetch`).

Three users (`users.csv`), one with double weight, one with single who asks twice as often, one with half: `fastswitch`
puts them in order anew every 25 iterations.
Run `python -m experiments.systems.switching --out docs/studies/switching.json`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from apt_jax.cache import CacheMode
from apt_jax.scheduling.costs.host_copies import CopyForm
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.simulator import Outcome
from experiments.studies.catalogue import HOST_BYTES, LONG

LAYERS = 40  # of OPT-13B: a block of vLLM's pool is a copy for each
CALL_S = 10e-6  # of the host, for one copy. Assumed: PyTorch's `copy_` takes about that
USERS = Path(__file__).parent / "users.csv"
SMALL = CopyForm(calls_s=LAYERS * CALL_S)
ASYNC = CopyForm(restores_beside=True)
BEFORE, BESIDE = "fastswitch:fetch=off", "fastswitch"  # the iteration, pages come back that a request goes on with
FORMS: dict[str, CopyForm | None] = {  # under `BEFORE`, the last one under `BESIDE`
    "computed again, nothing copied": None,
    "small copies, before the step, not retained": replace(SMALL, saves_beside=False, retains=False),
    "+ grouped": CopyForm(saves_beside=False, retains=False),
    "+ beside the step": replace(ASYNC, retains=False),
    "+ retained: FastSwitch": ASYNC,
    "FastSwitch, small copies": replace(SMALL, restores_beside=True),
    "FastSwitch, before the step": CopyForm(saves_beside=False),
    "this engine, `fetch=off`: copies in before the step": CopyForm(),
    "this engine: copies in beside the step, then it goes on": CopyForm(),
}
OTHERS: dict[str, tuple[str, CacheMode, CopyForm]] = {
    "alise, `fetch=off`": ("alise:fetch=off", "kv", CopyForm()),
    "alise": ("alise", "kv", CopyForm()),
    "alise, half of the bytes": ("alise", "kv", CopyForm(share=0.5)),
    "fastserve, `fetch=off`": ("fastserve:fetch=off", "kv", CopyForm()),
    "fastserve": ("fastserve", "kv", CopyForm()),
}
APT: dict[str, tuple[str, CacheMode, CopyForm]] = {
    "apt, KV, `fetch=off`": ("apt:fetch=off", "kv", CopyForm()),
    "apt, KV": ("apt", "kv", CopyForm()),
    "apt, hybrid, `fetch=off`": ("apt:fetch=off", "hybrid", CopyForm()),
    "apt, hybrid": ("apt", "hybrid", CopyForm()),
}
RATES, APT_RATES = (2.5, 3.0), {"kv": 3.4, "hybrid": 5.2}
Row = dict[str, Any]


def stall_share(outcome: Outcome, *, first: bool) -> float:
    """Share of copying in the longest hundredth of the waits for a first token, else of the gaps between tokens."""
    (samples,) = outcome.samples_by_instance
    ends_s, copied_s = np.array([s.end_s for s in samples]), np.cumsum([0.0, *(s.copied_s for s in samples)])

    def copied_until(times_s: np.ndarray) -> np.ndarray:
        return copied_s[np.searchsorted(ends_s, times_s + 1e-9)]

    waits, stalls = [], []
    for request in outcome.requests:
        assert request.first_token_s is not None
        since_s = [request.arrival_s] if first else []
        times_s = np.array([*since_s, request.first_token_s, *([] if first else request.gaps_s)])
        times_s[len(since_s) :] = np.cumsum(times_s[len(since_s) :])
        waits.append(np.diff(times_s))
        stalls.append(np.diff(copied_until(times_s)))
    wait, stall = np.concatenate(waits), np.concatenate(stalls)
    longest = wait >= np.percentile(wait, 99)
    return float(stall[longest].sum() / wait[longest].sum())


def run(
    policy: str, experiment: Experiment, rate: float, form: str, copies: CopyForm | None, mode: CacheMode = "kv"
) -> Row:
    """One simulation."""
    roomy = replace(experiment, enable_prefix_caching=copies is not None, host_cache_bytes=HOST_BYTES * bool(copies))
    outcome, report = roomy.run(policy, mode, "one-pass", rate, copies=copies or CopyForm())
    assert report is not None
    users = {request.class_name for request in outcome.requests}
    waits = {user: [r.ttft_s or 0.0 for r in outcome.requests if r.class_name == user] for user in sorted(users)}
    return {
        "form": form, "rate": rate, "strict_attainment": report.strict_attainment, "attainment": report.attainment,
        "p99_ttft_s": report.p99_ttft_s, "p99_tbt_s": report.p99_tbt_s,
        "ttft_stalls": stall_share(outcome, first=True), "tbt_stalls": stall_share(outcome, first=False),
        "preemptions": report.preemptions, "moved_bytes": report.moved_bytes,
        "p99_ttft_s_by_user": {user: float(np.percentile(each, 99)) for user, each in waits.items()},
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| requests/s |  | strict | P99 | TTFT p99, s | copying | TBT p99, s | copying | preemptions | moved, GB |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['rate']:g} | {row['form']} | {row['strict_attainment']:.1%} | {row['attainment']:.1%} | "
            f"{row['p99_ttft_s']:.2f} | {row['ttft_stalls']:.1%} | {row['p99_tbt_s']:.3f} | {row['tbt_stalls']:.1%} | "
            f"{row['preemptions']} | {row['moved_bytes'] / 1e9:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=450.0, help="of arrivals")
    parser.add_argument("--table", type=Path, help="show this file instead")
    args = parser.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text("utf-8"))["rows"]))
        return
    alone = replace(LONG, duration_s=args.seconds)
    users = replace(alone, classes=USERS)
    last = [*FORMS][-1]
    rows = [
        run(BESIDE if form == last else BEFORE, users, rate, form, copies)
        for rate in RATES
        for form, copies in FORMS.items()
    ]
    others = [(rate, *each) for rate in RATES for each in OTHERS.items()]
    others += [(APT_RATES[mode], form, (policy, mode, copies)) for form, (policy, mode, copies) in APT.items()]
    rows += [run(policy, alone, rate, form, copies, mode) for rate, form, (policy, mode, copies) in others]
    if args.out is not None:
        args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
