"""The greedy solver against the exact one, on random instances and on cases worked out by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_jax.scheduling.policies.apt.knapsack.exact import solve_exact
from apt_jax.scheduling.policies.apt.knapsack.greedy import FILL_ROUNDS, offer, solve_greedy
from apt_jax.scheduling.policies.apt.knapsack.problem import Problem, Solution


def make(pending, blocks, capacity, rho=0.0, kv=None, hidden=None, num_requests=None):
    n = len(pending)
    return Problem(
        pending_s=np.asarray(pending, float),
        kv_blocks=np.asarray(blocks, np.int64),
        may_be_kv=np.ones(n, bool) if kv is None else np.asarray(kv, bool),
        may_be_hidden=np.ones(n, bool) if hidden is None else np.asarray(hidden, bool),
        capacity_blocks=capacity,
        num_requests=n if num_requests is None else num_requests,
        rho_s=rho,
    )


@st.composite
def problems(draw, fits_alone=True):
    n = draw(st.integers(1, 9))
    blocks = draw(st.lists(st.integers(1, 12).map(lambda pages: 2 * pages), min_size=n, max_size=n))
    pending = draw(st.lists(st.floats(0, 2, width=32), min_size=n, max_size=n))
    kv = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    hidden = [k is False or h for k, h in zip(kv, draw(st.lists(st.booleans(), min_size=n, max_size=n)), strict=True)]
    rho = draw(st.sampled_from([0.0, 1e-4, 1e-3, 0.01, 0.1, -1e-3, -0.05]))
    least = max(b if k else b // 2 for b, k in zip(blocks, kv, strict=True)) if fits_alone else 1
    capacity = draw(st.integers(least, max(least, sum(blocks))))
    return make(pending, blocks, capacity, rho, kv, hidden)


def feasible(problem: Problem, solution: Solution) -> bool:
    allowed = np.where(solution.is_hidden, problem.may_be_hidden, problem.may_be_kv)
    return (
        bool(allowed[solution.is_scheduled].all())
        and problem.blocks(solution) <= problem.capacity_blocks
        and sorted(solution.order) == list(np.flatnonzero(solution.is_scheduled))
    )


def brute_force(problem: Problem) -> float:
    best = 0.0
    for choice in itertools.product((0, 1, 2), repeat=problem.size):
        picked = np.array(choice)
        solution = Solution(picked > 0, picked == 2, np.flatnonzero(picked))
        if feasible(problem, solution):
            best = max(best, problem.value_s(solution))
    return best


@given(problems(fits_alone=False))
@settings(max_examples=40, deadline=None)
def test_exact_is_optimal(problem):
    if problem.size > 6:
        problem = make(
            problem.pending_s[:6], problem.kv_blocks[:6], problem.capacity_blocks, problem.rho_s,
            problem.may_be_kv[:6], problem.may_be_hidden[:6],
        )  # fmt: skip
    solution = solve_exact(problem)
    assert feasible(problem, solution)
    assert problem.value_s(solution) == pytest.approx(brute_force(problem), abs=1e-9)


@given(problems())
@settings(max_examples=300, deadline=None)
def test_greedy_is_at_least_half_the_optimum(problem):
    assert problem.is_guaranteed
    optimum = problem.value_s(solve_exact(problem))
    for fill in (False, True):
        solution = solve_greedy(problem, fill=fill)
        assert feasible(problem, solution)
        assert problem.value_s(solution) >= optimum / 2 - 1e-9


@given(problems(fits_alone=False))
@settings(max_examples=300, deadline=None)
def test_filling_is_never_worse_and_always_feasible(problem):
    paper, filled = solve_greedy(problem, fill=False), solve_greedy(problem)
    assert feasible(problem, paper) and feasible(problem, filled)
    assert problem.value_s(filled) >= problem.value_s(paper) - 1e-9


def test_the_half_is_tight_and_v_prime_rescues_it():
    # one crumb with the best gain per block keeps out a request that fills the pool
    problem = make([0.11, 1.0], [2, 20], 20, kv=[True, True], hidden=[False, False])
    assert list(solve_greedy(problem, fill=False).is_scheduled) == [False, True]
    assert problem.value_s(solve_greedy(problem)) == 1.0


def test_filling_goes_on_after_a_misfit():
    problem = make([2.0, 1.0, 0.2], [10, 12, 4], 14, kv=[True] * 3, hidden=[False] * 3)
    assert list(solve_greedy(problem, fill=False).is_scheduled) == [True, False, False]
    assert list(solve_greedy(problem).is_scheduled) == [True, False, True]


def test_hidden_is_offered_only_if_its_half_is_worth_more_than_the_upgrade():
    # penalty 2 * 0.05 * 4 = 0.4: worth halving for pending 1.0, not for 0.7
    items = offer(make([1.0, 0.7], [4, 4], 100, rho=0.05))
    assert list(items.request) == [0, 0, 1]
    assert list(items.blocks) == [2, 2, 4]
    assert items.gain_s == pytest.approx([0.6, 0.4, 0.7])
    assert list(items.is_hidden) == [True, False, False]


def test_with_room_everyone_gets_kv_and_with_negative_rho_hidden():
    assert not solve_greedy(make([1.0, 1.0], [4, 8], 100, rho=0.01)).is_hidden.any()
    faster = solve_greedy(make([1.0, 1.0], [4, 8], 100, rho=-0.01))
    assert faster.is_scheduled.all() and faster.is_hidden.all()


def test_ties_go_to_the_earlier_arrival():
    solution = solve_greedy(make([1.0] * 4, [4] * 4, 8, kv=[True] * 4, hidden=[False] * 4))
    assert list(solution.order) == [0, 1]


def test_a_request_larger_than_the_pool_is_left_out_and_the_premise_is_said_to_fail():
    problem = make([5.0, 1.0], [40, 4], 10)
    assert not problem.is_guaranteed
    assert list(solve_greedy(problem).is_scheduled) == [False, True]


def test_nothing_to_do_and_nothing_to_give():
    assert not solve_greedy(make([], [], 10)).is_scheduled.any()
    assert not solve_greedy(make([1.0], [2], 0)).is_scheduled.any()


def test_fill_rounds_bound_the_work_not_the_promise():
    # sizes fall so that each round places one item: more rounds than the bound are possible
    sizes = [2 * (1 << k) for k in range(FILL_ROUNDS + 4, 0, -1)]
    problem = make(np.ones(len(sizes)), sizes, sum(sizes[1::2]), hidden=[False] * len(sizes))
    assert feasible(problem, solve_greedy(problem))


@pytest.mark.parametrize("blocks", [[3], [0]])
def test_bad_blocks_are_refused(blocks):
    with pytest.raises(ValueError, match="even"):
        make([1.0], blocks, 4)


def test_bad_values_and_lengths_are_refused():
    with pytest.raises(ValueError, match="at least 0"):
        make([-1.0], [2], 4)
    with pytest.raises(ValueError, match="entries"):
        make([1.0, 1.0], [2], 4)
