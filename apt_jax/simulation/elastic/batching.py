"""Which prompts are computed together, and over how many instances: LoongServe's dynamic programming (section 5.3).

    f[i][k] = min over j < i, u <= k of f[j][k - u] + T(prompts j..i, u) * sum of 1 / length

with prompts in order of length. Batches run side by side, so what is least is the sum of their normalised latencies.
"""

import math
from collections.abc import Callable, Sequence

Batch = tuple[tuple[int, ...], int]  # places of its prompts, and how many instances


def best_batches(
    lengths: Sequence[int], instances: int, seconds: Callable[[Sequence[int], int], float],
    fits: Callable[[Sequence[int], int], bool] = lambda lengths, instances: True,
) -> list[Batch]:  # fmt: skip
    """Cut prompts into batches with instances of their own; empty if not all of them fit at once.

    `seconds` is the prefill's, `fits` says whether the memory of so many instances holds the keys and values.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    ordered = [lengths[i] for i in order]
    count = len(ordered)
    cost = [[math.inf] * (instances + 1) for _ in range(count + 1)]
    chosen: list[list[tuple[int, int]]] = [[(0, 0)] * (instances + 1) for _ in range(count + 1)]
    cost[0] = [0.0] * (instances + 1)
    inverse = [0.0]
    for length in ordered:
        inverse.append(inverse[-1] + 1 / length)
    for i in range(1, count + 1):
        for j in range(i):
            part = ordered[j:i]
            weight = inverse[i] - inverse[j]
            for u in range(1, instances + 1):
                if not fits(part, u):
                    continue
                own = seconds(part, u) * weight
                for k in range(u, instances + 1):
                    if cost[j][k - u] + own < cost[i][k]:
                        cost[i][k], chosen[i][k] = cost[j][k - u] + own, (j, u)
    if math.isinf(cost[count][instances]):
        return []
    batches: list[Batch] = []
    i, k = count, instances
    while i:
        j, u = chosen[i][k]
        batches.append((tuple(order[j:i]), u))
        i, k = j, k - u
    return batches[::-1]


def pays_to_take(alone_s: float, with_more_s: float, lengths: Sequence[int], running: int, mean_output: float) -> bool:
    """Whether a prefill of prompts of these lengths should take the instances of a decode of `running` requests.

    What the prompts gain, by their lengths, against what the decode loses, which waits for the prefill, by its outputs.
    """
    gain = (alone_s - with_more_s) * sum(1 / length for length in lengths)
    return gain >= with_more_s * running / max(mean_output, 1.0)
