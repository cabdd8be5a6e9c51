"""Time of one scheduling decision on this machine, by number of candidates: `python -m experiments.schedule_cost`.

The candidates are ShareGPT lengths in a full pool: as many run as memory and `max_num_seqs` = 256 allow, the others
wait. Each call is a real iteration (plan, apply, commit), with one new arrival before it; only `schedule` is timed.
`--table` prints the lines of `apt_jax/scheduling/costs/host_times.py`: seconds of processor time, which other processes
disturb less, as a straight line over the number of candidates.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from apt_jax.cache import BlockPool
from apt_jax.request import Request, SamplingParams
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.policies.catalogue import make_policy, policy_names
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import Limits, SchedulerState
from apt_jax.simulation.workload import load_lengths

SIZES = (50, 200, 800, 1600, 2000, 10_000)
TABLE_SIZES = (25, 50, 100, 200, 400, 800)  # up to a server's bound on its queue, about


def measure(
    name: str, size: int, iterations: int, mode: str = "hybrid", clock: Callable[[], float] = time.perf_counter
) -> list[float]:
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
        started = clock()
        plan = policy.schedule(state, now)
        seconds.append(clock() - started)
        now += 0.03
        for span in state.apply(plan, now):
            if span.samples and state.commit(span.request, 5, now) is not None:
                policy.finished(span.request, now)
        del iteration
    return seconds[20:]


def straight_line(name: str, iterations: int) -> tuple[float, float]:
    """Seconds of processor time of a decision: per iteration, and per candidate; least squares on relative errors."""
    medians = [statistics.median(measure(name, size, iterations, clock=time.thread_time)) for size in TABLE_SIZES]
    columns = np.column_stack([np.ones(len(TABLE_SIZES)), TABLE_SIZES]) / np.array(medians)[:, None]
    constant, slope = np.linalg.lstsq(columns, np.ones(len(TABLE_SIZES)), rcond=None)[0]
    return max(float(constant), 0.0), max(float(slope), 0.0)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--policy", default="apt")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--table", action="store_true", help="all policies, for host_times.py")
    args = parser.parse_args()
    if args.table:
        for name in policy_names():
            constant, slope = straight_line(name, args.iterations)
            print(f'    "{name}": HostTime({1e6 * constant:.0f}e-6, {1e6 * slope:.2f}e-6),', flush=True)
        return
    print(f"policy {args.policy}, {args.iterations} iterations each, milliseconds per schedule()")
    print(f"{'candidates':>10} {'median':>8} {'p90':>8} {'min':>8}")
    for size in map(int, args.sizes.split(",")):
        times = sorted(1e3 * s for s in measure(args.policy, size, args.iterations))
        print(f"{size:>10} {statistics.median(times):>8.2f} {times[int(0.9 * len(times))]:>8.2f} {times[0]:>8.2f}")


if __name__ == "__main__":
    main()
