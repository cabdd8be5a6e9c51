"""What serving a request now is worth: the seconds it has waited, weighed by its SLO, its priority and its standing."""

import numpy as np

from apt_jax.scheduling.policies.apt.facts.lateness import DEMOTED_VALUE
from apt_jax.scheduling.policies.apt.facts.queue import Queue
from apt_jax.scheduling.policies.apt.knapsack.problem import Bools, Floats
from apt_jax.scheduling.policies.apt.options import AptOptions

LEAST_SLACK_S = 0.01
PRIORITY_WEIGHT = 8.0  # a request of priority p - 1 is worth as much as this many of priority p
READMITTED_WEIGHT = 1000.0  # of a preempted request that can still be kept, against a newcomer
MOST_PRIORITY = 10  # priorities beyond it, in either direction, count like it


def values(
    options: AptOptions, queue: Queue, late: Bools, remaining: Floats | None, until_s: float, block_size: int
) -> Floats:
    """`[n]` seconds of value of serving each request now, greater than 0: what it will have waited at `until_s`.

    Args:
        options: `value` says how the wait is weighed.
        queue: the requests.
        late: of them, those that can no longer keep their SLO; they are demoted.
        remaining: predicted tokens to come, None without prediction.
        until_s: the expected end of the iteration, in seconds of the caller's clock.
        block_size: tokens per block.
    """
    pending_s = until_s - queue.since_s
    slo_s = queue.slo_s
    if options.value == "slack":
        value = 1.0 / np.maximum(slo_s - pending_s, LEAST_SLACK_S)
    elif options.value == "absolute":
        value = pending_s
    else:
        value = pending_s / slo_s
    if options.value == "footprint" and remaining is not None:
        # mean context over the rest of its life, times that life, against the context now
        value = value * queue.tokens / ((queue.tokens + remaining / 2) * remaining)
    elif options.value == "longest":
        value = value * queue.pages(block_size)  # the solver divides by blocks
    if options.readmit_first and queue.started.any():
        value = np.where(queue.started & (queue.pages_held == 0) & ~late, value * READMITTED_WEIGHT, value)
    if options.priorities and queue.priority.any():
        value = value * PRIORITY_WEIGHT ** -np.clip(queue.priority, -MOST_PRIORITY, MOST_PRIORITY)
    return np.where(late, value * DEMOTED_VALUE, value)
