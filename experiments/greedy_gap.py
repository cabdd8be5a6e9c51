"""How close the greedy solver is to the optimum on the queues of a run: `python -m experiments.greedy_gap`.

Simulates OPT-13B on an A100 under overload with the adaptive policy and keeps every problem in which not everything
fits. Each is then solved exactly (dynamic programming over blocks), by the greedy solver, and by the paper's
Algorithm 1 without filling up; printed is value over optimum.
"""

import argparse
import random
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from apt_jax.scheduling.policies.apt import admission, eviction
from apt_jax.scheduling.policies.apt.knapsack.exact import solve_exact
from apt_jax.scheduling.policies.apt.knapsack.greedy import solve_greedy
from apt_jax.scheduling.policies.apt.knapsack.problem import Problem, Solution
from apt_jax.simulation.experiment import Experiment


def contested_problems(policy: str, attention: str, rate: float, num_requests: int) -> list[Problem]:
    """Problems of a run in which the greedy solver leaves a request out."""
    found: list[Problem] = []

    def recording(problem: Problem, *, fill: bool = True) -> Solution:
        solution = solve_greedy(problem, fill=fill)
        if 0 < solution.is_scheduled.sum() < problem.size:
            found.append(problem)
        return solution

    admission.solve_greedy = eviction.solve_greedy = recording
    try:
        experiment = replace(Experiment(enable_prefix_caching=False), num_requests=num_requests)
        experiment.run(policy, "hybrid", attention, rate)  # type: ignore[arg-type]
    finally:
        admission.solve_greedy = eviction.solve_greedy = solve_greedy
    return found


def main() -> None:
    """Simulate, solve, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--policy", default="apt-paper")
    parser.add_argument("--hidden-attention", default="recompute", choices=("recompute", "absorbed"))
    parser.add_argument("--rate", type=float, default=4.0)
    parser.add_argument("--num-requests", type=int, default=1000)
    parser.add_argument("--problems", type=int, default=500, help="drawn at random from those of the run")
    args = parser.parse_args()
    problems = contested_problems(args.policy, args.hidden_attention, args.rate, args.num_requests)
    chosen = random.Random(0).sample(problems, min(args.problems, len(problems)))
    ratios = {"greedy": [], "greedy without filling up": []}  # type: dict[str, list[float]]
    for problem in tqdm(chosen, desc="solving exactly"):
        best = problem.value_s(solve_exact(problem))
        ratios["greedy"].append(problem.value_s(solve_greedy(problem)) / best)
        ratios["greedy without filling up"].append(problem.value_s(solve_greedy(problem, fill=False)) / best)
    sizes = [problem.size for problem in chosen]
    print(
        f"{len(problems)} contested problems, {len(chosen)} solved; median {np.median(sizes):.0f} requests,"
        f" {max(sizes)} at most; {np.mean([p.is_guaranteed for p in chosen]):.0%} meet the guarantee's premise"
    )
    print(f"{'value / optimum':<28} {'worst':>7} {'p1':>7} {'p10':>7} {'median':>7} {'mean':>7}")
    for name, values in ratios.items():
        figures = (min(values), *np.percentile(values, (1, 10, 50)), float(np.mean(values)))
        print(f"{name:<28} " + " ".join(f"{figure:>7.4f}" for figure in figures))


if __name__ == "__main__":
    main()
