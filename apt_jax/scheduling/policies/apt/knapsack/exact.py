"""The exact solver: dynamic programming over blocks, O(n * capacity). An oracle for tests and studies."""

import numpy as np

from apt_jax.scheduling.policies.apt.knapsack.problem import Problem, Solution

_SKIP, _KV, _HIDDEN = 0, 1, 2


def solve_exact(problem: Problem) -> Solution:
    """The optimum; among equals the one that leaves late arrivals out.

    Source: the textbook recurrence for the multiple-choice knapsack, best[c] = max over a request's choices.
    """
    capacity = problem.capacity_blocks
    best = np.zeros(capacity + 1)
    choices = np.zeros((problem.size, capacity + 1), np.int8)
    for i in range(problem.size):
        pending = float(problem.pending_s[i])
        improved = best.copy()
        for choice, allowed, cost, gain in (
            (_KV, problem.may_be_kv[i], int(problem.kv_blocks[i]), pending),
            (_HIDDEN, problem.may_be_hidden[i], int(problem.hidden_blocks[i]), pending - float(problem.penalty_s[i])),
        ):
            if not allowed or cost > capacity:
                continue
            candidate = best[: capacity + 1 - cost] + gain
            better = candidate > improved[cost:]
            improved[cost:][better] = candidate[better]
            choices[i, cost:][better] = choice
        best = improved
    is_scheduled = np.zeros(problem.size, np.bool_)
    is_hidden = np.zeros(problem.size, np.bool_)
    room = capacity
    for i in reversed(range(problem.size)):
        choice = choices[i, room]
        is_scheduled[i] = choice != _SKIP
        is_hidden[i] = choice == _HIDDEN
        room -= {_SKIP: 0, _KV: int(problem.kv_blocks[i]), _HIDDEN: int(problem.hidden_blocks[i])}[int(choice)]
    return Solution(is_scheduled, is_hidden, np.flatnonzero(is_scheduled))
