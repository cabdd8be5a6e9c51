"""Digests of every plan of many small simulations: whether a change of the code changed a decision.

`python -m experiments.plan_digest > before.json` before the change, `... --compare before.json` after it. Every policy
runs in every cache mode, with hidden attention slower and faster than KV, in pools that are ample and that are short;
`apt` runs with each of its options too.
"""

import argparse
import hashlib
import itertools
import json
import sys
from pathlib import Path

from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.catalogue import make_policy, policy_names
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import Limits
from apt_jax.simulation.simulator import Outcome, simulate
from apt_jax.simulation.workload import load_lengths, make_arrivals

MODES = ("hybrid", "kv", "hidden")
POOLS = {"ample": 6000, "short": 700}  # blocks
OPTIONS = (
    *(f"apt:value={value}" for value in ("absolute", "slack", "footprint", "longest")),
    "apt:fallback=constant", "apt:fallback=none", "apt:mixed=off", "apt:prediction=off", "apt:convert=off",
    "apt:sustained=off", "apt:margin=0:late_margin=0", "apt:readmit_first=off", "apt:paced=off", "apt:fit_victims=off",
    "apt:priorities=off", "apt:patience_s=0.5:lane_share=0.5",
)  # fmt: skip


def digest(policy: str, mode: str, attention: str, pool: str, *, requests: int = 120, rate: float = 8.0) -> str:
    """What the policy decided: a hash of all plans in order and of every request's times."""
    found = hashlib.sha256()

    def note(plan: Plan, now: float) -> None:
        lines = [f"{now:.9f}"]
        lines += [f"s {s.request.request_id} {s.num_tokens} {s.kind.value} {s.reason.value}" for s in plan.scheduled]
        lines += [f"p {p.request.request_id} {p.reason.value}" for p in plan.preempted]
        lines += [f"c {c.request.request_id} {c.reason.value}" for c in plan.converted]
        lines += [f"w {request.request_id} {w.reason.value}" for w in plan.waited for request in w.requests]
        found.update("\n".join(lines).encode())

    outcome = _simulate(policy, mode, attention, POOLS[pool], requests, rate, note)
    for request in outcome.requests:
        found.update(f"{request.request_id} {request.first_token_s!r} {request.gaps_s!r}".encode())
    return found.hexdigest()[:16]


def _simulate(policy, mode, attention, blocks, requests, rate, note) -> Outcome:  # type: ignore[no-untyped-def]
    lengths = load_lengths("sharegpt")
    arrivals = make_arrivals(lengths, rate=rate, num_requests=requests, cv=2.0, seed=3, duration_s=1.0)
    hardware = HARDWARE["a100-40gb"]
    cost_model = CostModel(MODELS["opt-13b"], hardware, attention)
    return simulate(
        arrivals, make_policy(policy, PolicyContext(cost_model, seed=1)), cost_model=cost_model, num_blocks=blocks,
        limits=Limits(64, 1024, mode, watermark_blocks=blocks // 100), on_plan=note,
    )  # fmt: skip


def all_digests() -> dict[str, str]:
    """Digests by `policy mode attention pool`."""
    cases = list(itertools.product([*policy_names(), *OPTIONS], MODES, ("one-pass", "recompute"), POOLS))
    found = {}
    for number, case in enumerate(cases, start=1):
        print(f"\r{number}/{len(cases)}", end="", file=sys.stderr, flush=True)
        found[" ".join(case)] = digest(*case)
    print(file=sys.stderr)
    return found


def main() -> int:
    """Print the digests, or those that differ from a file's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--compare", type=Path, help="file written before the change")
    before = parser.parse_args().compare
    after = all_digests()
    if before is None:
        print(json.dumps(after, indent=1))
        return 0
    known = json.loads(before.read_text(encoding="utf-8"))
    changed = [case for case in {**known, **after} if known.get(case) != after.get(case)]
    print(f"{len(after)} simulations, {len(changed)} changed", *changed, sep="\n  ")
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
