"""What the solvers and the objective answer in cases of one to four requests worked out by hand."""

import numpy as np
import pytest

from apt_jax.scheduling.policies.apt.knapsack.exact import solve_exact
from apt_jax.scheduling.policies.apt.knapsack.greedy import offer, solve_greedy
from apt_jax.scheduling.policies.apt.knapsack.problem import Problem, Solution


def make(pending, blocks, capacity, rho=0.0, hidden=False, kv=True, num_requests=1):
    """`hidden` and `kv`: whether all may be, or of each."""
    n = len(pending)
    return Problem(
        np.asarray(pending, np.float64), np.asarray(blocks, np.int64), np.broadcast_to(np.asarray(kv), (n,)),
        np.broadcast_to(np.asarray(hidden), (n,)), capacity, num_requests, rho,
    )  # fmt: skip


def answer(solution: Solution) -> str:
    """Who is scheduled as what, in order: `1h 0k`."""
    return " ".join(f"{i}{'kh'[int(solution.is_hidden[i])]}" for i in solution.order)


# -- the objective -------------------------------------------------------------------------------------------------


def test_value_and_blocks_of_a_solution():
    """Penalties of 3 x 0.125 s a block: 1.5, 3 and 4.5 s."""
    problem = make([2.0, 4.0, 8.0], [4, 8, 12], 50, rho=0.125, hidden=True, num_requests=3)
    solution = Solution(np.array([True, True, False]), np.array([False, True, True]), np.array([0, 1]))
    assert problem.penalty_s.tolist() == [1.5, 3.0, 4.5] and problem.hidden_blocks.tolist() == [2, 4, 6]
    assert problem.value_s(solution) == 2.0 + 4.0 - 3.0 and problem.blocks(solution) == 4 + 4


@pytest.mark.parametrize(
    ("capacity", "kv", "hidden", "is_guaranteed"),
    [
        (8, True, True, True), (7, True, True, False), (7, [True, False], True, True), (7, False, True, True),
        (4, False, True, True), (3, False, True, False), (3, False, [True, False], True),
    ],
)  # fmt: skip
def test_each_must_fit_alone(capacity, kv, hidden, is_guaranteed):
    assert make([1.0, 1.0], [4, 8], capacity, kv=kv, hidden=hidden).is_guaranteed is is_guaranteed


def test_a_value_of_nothing_is_allowed_and_one_page_is_the_least():
    assert make([0.0], [2], 0).size == 1
    for blocks in (0, 1, 3):
        with pytest.raises(ValueError, match="evenly divisible by 2"):
            make([1.0, 1.0], [4, blocks], 4)
    with pytest.raises(ValueError, match="at least 0"):
        make([np.nan], [2], 4)


# -- what is offered -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pending", "rho", "kv", "hidden", "items"),
    [
        # (request, blocks, gain, hidden, upgrade) of one with 8 blocks, of 8 there are
        (3.0, 0.125, True, True, [(0, 4, 2.0, True, False), (0, 4, 1.0, False, True)]),
        (2.0, 0.125, True, True, [(0, 4, 1.0, True, False), (0, 4, 1.0, False, True)]),  # as much as the upgrade
        (1.9, 0.125, True, True, [(0, 8, 1.9, False, False)]),
        (3.0, 0.125, True, False, [(0, 8, 3.0, False, False)]),
        (3.0, 0.125, False, True, [(0, 4, 2.0, True, False)]),
        (3.0, 0.0, True, True, [(0, 4, 3.0, True, False)]),  # an upgrade would gain nothing
        (3.0, -0.125, True, True, [(0, 4, 4.0, True, False)]),
        (1.0, 0.125, False, True, []),  # nor is anything gained here
        (0.0, 0.125, True, False, []),
        (3.0, 0.125, False, False, []),
    ],
)
def test_items_of_one_request(pending, rho, kv, hidden, items):
    found = offer(make([pending], [8], 8, rho, hidden, kv))
    columns = (found.request, found.blocks, found.gain_s, found.is_hidden, found.is_upgrade)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == items


@pytest.mark.parametrize(("capacity", "blocks"), [(8, [4, 4]), (7, [4]), (4, [4]), (3, [])])
def test_only_what_fits_alone_is_offered(capacity, blocks):
    assert offer(make([3.0], [8], capacity, 0.125, True)).blocks.tolist() == blocks


# -- the greedy solver ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pending", "blocks", "capacity", "paper", "filled"),
    [
        ([1.0, 2.0], [4, 4], 8, "1k 0k", "1k 0k"),  # all fit, to the last block
        ([1.0, 2.0], [4, 4], 7, "1k", "1k"),
        ([1.0, 1.0], [2, 20], 20, "0k", "0k"),  # worth as much as the large one alone
        ([1.0, 1.5], [2, 20], 20, "1k", "1k"),
        ([1.0, 1.5, 0.1], [2, 20, 2], 22, "0k 1k", "0k 1k"),
        ([1.0, 1.5, 0.1], [2, 18, 2], 18, "1k", "1k"),  # beside it nothing fits
        ([1.0, 5.0, 0.1, 0.05], [2, 18, 2, 4], 19, "1k", "1k"),
        ([1.0, 7.0, 0.5, 0.1], [2, 18, 4, 4], 18, "1k", "1k"),
        ([3.0, 1.0, 0.5], [4, 8, 4], 8, "0k", "0k 2k"),  # the third in place of the second
        ([3.0, 1.0, 0.25, 0.2], [4, 8, 4, 2], 10, "0k", "0k 3k 2k"),
        ([3.0, 1.0, 0.25, 0.2, 0.1], [4, 10, 4, 4, 2], 10, "0k", "0k 2k 4k"),  # two misfits
    ],
)
def test_packing_and_filling(pending, blocks, capacity, paper, filled):
    problem = make(pending, blocks, capacity)
    assert (answer(solve_greedy(problem, fill=False)), answer(solve_greedy(problem))) == (paper, filled)


def test_what_fits_beside_the_large_one():
    """20 blocks: the first (4) is worth most per block, the third (18) more in all, and two are left for the second."""
    problem = make([1.0, 0.1, 2.0], [4, 2, 18], 20)
    assert answer(solve_greedy(problem, fill=False)) == "2k" and answer(solve_greedy(problem)) == "2k 1k"


@pytest.mark.parametrize(("crumb", "chosen"), [(0.93, "1h"), (0.95, "0k")])
def test_the_large_one_alone_may_be_hidden(crumb, chosen):
    """As KV it does not fit; hidden it takes 15 blocks and is worth 1 - 30 x 0.002."""
    problem = make([crumb, 1.0], [2, 30], 16, 0.002, [False, True])
    assert answer(solve_greedy(problem)) == answer(solve_greedy(problem, fill=False)) == chosen


@pytest.mark.parametrize(("capacity", "chosen"), [(16, "0k 1k"), (12, "0k 1h"), (8, "0h 1h"), (4, "0h")])
def test_upgrades_go_to_the_dearest_while_there_is_room(capacity, chosen):
    """Eight blocks each; an upgrade is worth 1 s in either case, the first half 3 and 2."""
    assert answer(solve_greedy(make([4.0, 3.0], [8, 8], capacity, 0.125, True))) == chosen


# -- the exact solver ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "chosen"),
    [
        (make([3.0, 2.0, 2.0], [6, 4, 4], 8), "1k 2k"),  # the greedy one takes the first
        (make([4.0, 3.0], [8, 4], 10, 0.125, True), "0k 1h"),
        (make([4.0, 3.0], [8, 8], 8, 0.125, True), "0h 1h"),
        (make([1.0, 1.0], [4, 4], 4), "0k"),  # equals: the later one is left out
        (make([1.0, 1.0], [4, 4], 3), ""),
        (make([1.0], [8], 4, 0.125, True), ""),  # the penalty takes all of it
        (make([1.0], [8], 8, 0.125, True), "0k"),
        (make([1.0], [8], 8, -0.125, True), "0h"),
    ],
)
def test_the_optimum(problem, chosen):
    assert answer(solve_exact(problem)) == chosen
