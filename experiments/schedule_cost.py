"""Time of one scheduling decision on this machine, by number of candidates: `python -m experiments.schedule_cost`.

The candidates are ShareGPT lengths in a full pool: as many run as memory and `max_num_seqs` = 256 allow, the others
wait. Each call is a real iteration (plan, apply, commit), with one new arrival before it; only `schedule` is timed.
"""

import argparse
import statistics
import time

from apt_jax.cache import BlockPool
from apt_jax.request import Request, SamplingParams
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import Limits, SchedulerState
from apt_jax.simulation.workload import load_lengths

SIZES = (50, 200, 800, 1600, 2000, 10_000)


def measure(name: str, size: int, iterations: int, mode: str = "hybrid") -> list[float]:
    """Seconds of each of `iterations` calls of `schedule` with about `size` candidates."""
    lengths = load_lengths("sharegpt")
    state = SchedulerState(BlockPool(4000, 16), Limits(256, 2048, mode, 40))  # type: ignore[arg-type]
    policy = make_policy(name, PolicyContext(CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"])))
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    now, seconds, arrived = 0.0, [], 0
    for iteration in range(iterations + 20):
        while state.num_unfinished < size:
            row = arrived % len(lengths.prompt_tokens)
            prompt, output = int(lengths.prompt_tokens[row]), int(lengths.output_tokens[row])
            state.add(Request(f"r{arrived}", range(prompt), params, now, output))
            arrived += 1
        started = time.perf_counter()
        plan = policy.schedule(state, now)
        seconds.append(time.perf_counter() - started)
        now += 0.03
        for span in state.apply(plan, now):
            if span.samples and state.commit(span.request, 5, now) is not None:
                policy.finished(span.request, now)
        del iteration
    return seconds[20:]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--policy", default="apt")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    args = parser.parse_args()
    print(f"policy {args.policy}, {args.iterations} iterations each, milliseconds per schedule()")
    print(f"{'candidates':>10} {'median':>8} {'p90':>8} {'min':>8}")
    for size in map(int, args.sizes.split(",")):
        times = sorted(1e3 * s for s in measure(args.policy, size, args.iterations))
        print(f"{size:>10} {statistics.median(times):>8.2f} {times[int(0.9 * len(times))]:>8.2f} {times[0]:>8.2f}")


if __name__ == "__main__":
    main()
