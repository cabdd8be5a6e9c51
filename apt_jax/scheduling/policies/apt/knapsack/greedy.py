"""The greedy solver: marginal gain per block, within a factor 2 of the optimum, in O(n log n).

Each request offers up to two items. "Hidden" costs half its blocks and gains `pending - penalty`; "upgrade to KV"
costs the other half and gains `penalty`. If the upgrade would be worth more than the first half, the request offers
one item instead: KV, all blocks, gain `pending`. So gains per block never rise within one request, and packing items
in order of gain per block up to the first that does not fit, plus a fraction of that one, solves the linear
relaxation. The better of the packed items (V) and that request alone (V') is therefore at least half the optimum:
V + V' >= relaxation >= optimum. It needs every request to fit alone (`Problem.is_guaranteed`).

Source: Apt-Serve, Algorithm 1 and Theorem 1. Beyond it: after the first misfit both answers are filled up with
whatever still fits, so the result is never worse than the paper's.
"""

from dataclasses import dataclass

import numpy as np

from apt_jax.scheduling.policies.apt.knapsack.problem import Bools, Floats, Ints, Problem, Solution

FILL_ROUNDS = 24  # each is one vectorised pass; later ones would add next to nothing


@dataclass(frozen=True)
class Items:
    """What the requests offer, the best gain per block first; ties by their order, an upgrade after its first half."""

    request: Ints
    blocks: Ints
    gain_s: Floats
    is_hidden: Bools  # the request's kind once the item is taken
    is_upgrade: Bools  # never ahead of its first half


def solve_greedy(problem: Problem, *, fill: bool = True) -> Solution:
    """A feasible solution worth at least half the optimum if `problem.is_guaranteed`.

    Args:
        problem: the instance.
        fill: continue with what still fits after the first misfit; False is the paper's Algorithm 1 to the letter.
    """
    items = offer(problem)
    room = problem.capacity_blocks
    packed = int(np.searchsorted(np.cumsum(items.blocks), room, side="right"))
    taken = np.zeros(len(items.request), np.bool_)
    taken[:packed] = True
    if packed == len(items.request):
        return _solution(problem, items, taken)
    critical = int(items.request[packed])
    value_s = float(items.gain_s[:packed].sum())
    alone, alone_s = _alone(problem, critical)
    if not fill:
        return alone if value_s < alone_s else _solution(problem, items, taken)
    filled = _solution(problem, items, _fill(items, taken, room - int(items.blocks[:packed].sum())))
    if problem.value_s(filled) >= alone_s:
        return filled
    others = items.request != critical
    rest = _fill(items, ~others, room - problem.blocks(alone)) & others
    return _merge(alone, _solution(problem, items, rest), critical)


def offer(problem: Problem) -> Items:
    """The items of all requests, sorted. Items without gain, or larger than the whole capacity, are left out."""
    pending, penalty = problem.pending_s, problem.penalty_s
    kv_blocks, hidden_blocks = problem.kv_blocks, problem.hidden_blocks
    kv = problem.may_be_kv & (kv_blocks <= problem.capacity_blocks)
    hidden = problem.may_be_hidden & (hidden_blocks <= problem.capacity_blocks)
    # KV in one piece where hidden is impossible or worth less than its upgrade
    whole = kv & (~hidden | (pending - penalty < penalty))
    halves = hidden & ~whole
    upgrade = halves & kv & (penalty > 0)
    first = np.flatnonzero(whole | halves)
    second = np.flatnonzero(upgrade)
    request = np.concatenate([first, second])
    least = np.where(whole[first], kv_blocks[first], hidden_blocks[first])
    blocks = np.concatenate([least, kv_blocks[second] - hidden_blocks[second]])
    gain = np.concatenate([np.where(whole[first], pending[first], pending[first] - penalty[first]), penalty[second]])
    is_hidden = np.concatenate([halves[first], np.zeros(len(second), np.bool_)])
    is_upgrade = np.arange(len(request)) >= len(first)
    order = np.argsort(-gain / blocks, kind="stable")
    order = order[gain[order] > 0]
    return Items(request[order], blocks[order], gain[order], is_hidden[order], is_upgrade[order])


def _alone(problem: Problem, index: int) -> tuple[Solution, float]:
    """S' and V': one request by itself in the kind worth most."""
    penalty_s = float(problem.penalty_s[index])
    kv = bool(problem.may_be_kv[index]) and int(problem.kv_blocks[index]) <= problem.capacity_blocks
    hidden = not kv or (bool(problem.may_be_hidden[index]) and penalty_s < 0)
    is_scheduled = np.zeros(problem.size, np.bool_)
    is_scheduled[index] = True
    is_hidden = is_scheduled & hidden
    value_s = float(problem.pending_s[index]) - (penalty_s if hidden else 0.0)
    return Solution(is_scheduled, is_hidden, np.array([index], np.int64)), value_s


def _fill(items: Items, taken: Bools, room: int) -> Bools:
    """`taken` and, in order, every further item that fits in `room` blocks.

    A skipped first half is never followed by its upgrade: they are equally large and room only shrinks.
    """
    taken = taken.copy()
    left = np.flatnonzero(~taken)
    for _ in range(FILL_ROUNDS):
        left = left[items.blocks[left] <= room]
        if len(left) == 0:
            break
        total = np.cumsum(items.blocks[left])
        fits = int(np.searchsorted(total, room, side="right"))
        taken[left[:fits]] = True
        room -= int(total[fits - 1])
        left = left[fits:]
    return taken


def _solution(problem: Problem, items: Items, taken: Bools) -> Solution:
    is_scheduled = np.zeros(problem.size, np.bool_)
    is_hidden = np.zeros(problem.size, np.bool_)
    request, hidden = items.request[taken], items.is_hidden[taken]
    is_scheduled[request] = True
    is_hidden[request[hidden]] = True
    is_hidden[request[~hidden]] = False  # whole requests and upgrades
    return Solution(is_scheduled, is_hidden, request[~items.is_upgrade[taken]])


def _merge(alone: Solution, rest: Solution, index: int) -> Solution:
    return Solution(
        alone.is_scheduled | rest.is_scheduled,
        np.where(alone.is_scheduled, alone.is_hidden, rest.is_hidden),
        np.concatenate([np.array([index], np.int64), rest.order]),
    )
