"""A process with a third cache kind: 8-bit hidden vectors, next to KV and hidden vectors of full precision.

The kind is declared as a developer would, by a line in `CacheKind` and modes in which requests may have it; nothing
else is changed. Run as a module it simulates every policy with it and prints what became of the requests, as JSON.
"""

import json
import sys
from collections import Counter
from types import ModuleType

from apt_jax import files

CACHE = files.__file__.replace("files.py", "cache.py")
AFTER = {
    '    HIDDEN = CacheSpec("hidden", "hidden vectors", (Vector.HIDDEN,), converts_to="kv")\n': (
        '    HIDDEN8 = CacheSpec("hidden8", "8-bit hidden vectors", (Vector.HIDDEN,), 1, converts_to="kv")\n'
    ),
    '    "hybrid": (CacheKind.KV, CacheKind.HIDDEN),\n': (
        '    "hidden8": (CacheKind.HIDDEN8,),\n    "hybrid8": (CacheKind.KV, CacheKind.HIDDEN8),\n'
    ),
}
MODES = ("hidden8", "hybrid8")


def declare() -> None:
    """Put `apt_jax.cache` with the kind in the place of the module; nothing may have imported it yet."""
    assert "apt_jax.cache" not in sys.modules
    with open(CACHE, encoding="utf-8") as file:
        source = file.read()
    for line, more in AFTER.items():
        assert source.count(line) == 1, line
        source = source.replace(line, line + more)
    module = ModuleType("apt_jax.cache")
    sys.modules["apt_jax.cache"] = module
    exec(compile(source, CACHE, "exec"), module.__dict__)


def simulate_all() -> dict[str, dict[str, dict[str, int]]]:
    """By `policy mode attention`: scheduled entries by cache kind, and requests by finish reason."""
    from apt_jax.scheduling.costs.cost_model import CostModel
    from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
    from apt_jax.scheduling.plan import Plan
    from apt_jax.scheduling.policies.catalogue import make_policy, policy_names
    from apt_jax.scheduling.policies.interface import PolicyContext
    from apt_jax.scheduling.state import Limits
    from apt_jax.simulation.simulator import Stalled, simulate
    from apt_jax.simulation.workload import load_lengths, make_arrivals

    arrivals = make_arrivals(load_lengths("sharegpt"), rate=8.0, num_requests=8, cv=2.0, seed=3, duration_s=1.0)
    found = {}
    for policy in policy_names():
        for mode in MODES:
            for attention in ("one-pass", "recompute"):
                kinds: Counter[str] = Counter()

                def note(plan: Plan, now: float, kinds: Counter[str] = kinds) -> None:
                    kinds.update(entry.kind.value for entry in plan.scheduled)

                costs = CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"], attention)
                made = make_policy(policy, PolicyContext(costs, seed=1))
                try:
                    outcome = simulate(
                        arrivals, made, cost_model=costs, num_blocks=200,
                        limits=Limits(64, 1024, mode, watermark_blocks=2), on_plan=note,
                    )  # fmt: skip
                    ends = Counter(request.finish_reason.value for request in outcome.requests)
                except Stalled:
                    ends = Counter(stalled=len(arrivals))
                found[f"{policy} {mode} {attention}"] = {"kinds": dict(kinds), "ends": dict(ends)}
    return found


if __name__ == "__main__":
    declare()
    print(json.dumps(simulate_all()))
