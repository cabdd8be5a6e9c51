"""Backlog, its growth and the classes of a run, each worked out by hand."""

import math

import numpy as np
import pytest

from apt_jax.run_figures import backlog_by_quarter, backlog_growth, by_quartile, is_sustained, unfinished_at


def test_a_request_is_unfinished_from_its_arrival_until_its_end():
    arrivals, ends = [1.0, 3.0, 2.0, 4.0], [2.0, math.inf, 5.0, 4.5]
    assert unfinished_at([0.5, 1.0, 2.0, 3.0, 4.0, 4.5, 9.0], arrivals, ends) == [0, 1, 1, 2, 3, 2, 1]
    assert backlog_by_quarter(arrivals, ends, 4.0) == [1, 1, 2, 3]


def steady(rate, window_s, stay_s):
    arrivals = np.arange(0, window_s, 1 / rate)
    return arrivals.tolist(), (arrivals + stay_s).tolist()


def growing(rate, window_s, share):
    """As many are served as arrive, but for a share of the rate."""
    arrivals = np.arange(0, window_s, 1 / rate)
    return arrivals.tolist(), (arrivals / (1 - share) + 1.0).tolist()


def test_growth_is_requests_per_second_over_the_second_half():
    assert backlog_growth(*steady(4.0, 900.0, 20.0), 900.0) == pytest.approx((0.0, 0.0), abs=0.01)
    assert backlog_growth(*growing(4.0, 900.0, 0.1), 900.0)[0] == pytest.approx(0.4, rel=0.05)
    filled = [0.0] * 500 + steady(4.0, 900.0, 5.0)[0]  # a pile of the first half that stays is no growth
    assert backlog_growth(filled, [math.inf] * 500 + steady(4.0, 900.0, 5.0)[1], 900.0)[0] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(("share", "lasts"), [(0.0, True), (0.005, True), (0.02, False), (0.1, False)])
def test_a_rate_lasts_if_less_than_a_hundredth_of_it_piles_up(share, lasts):
    assert is_sustained(*growing(5.0, 900.0, share), 900.0) is lasts


def served(rng, rate, window_s, drift):
    """Random arrivals that stay 15 s on average, but for a share `drift` that never ends."""
    arrivals = np.cumsum(rng.exponential(1 / rate, int(rate * window_s)))
    stay = rng.exponential(15.0, len(arrivals))
    ends = arrivals + stay
    stuck = rng.random(len(arrivals)) < drift
    ends[stuck] = math.inf
    return arrivals.tolist(), ends.tolist()


@pytest.mark.parametrize("rate", [0.7, 2.0, 6.0])
def test_a_flat_backlog_that_wavers_lasts_and_a_pile_does_not(rate):
    """Requests that stay 15 s on average: chance alone calls at most one run in twenty a growing one."""
    rng = np.random.default_rng(5)

    def lasting(drift):
        return np.mean([is_sustained(*served(rng, rate, 900.0, drift), 900.0) for _ in range(60)])

    assert lasting(0.0) >= 0.95
    assert lasting(0.15) <= 0.05


def test_a_short_run_says_nothing_about_what_lasts():
    assert is_sustained(*growing(5.0, 809.0, 0.5), 809.0) is None
    assert is_sustained([], [], 1000.0) is None
    assert is_sustained([0.0] * 5, [1.0] * 5, 0.0) is None


def test_quartiles_are_of_the_requests_and_keep_equal_lengths_together():
    lengths = [8, 1, 2, 3, 4, 5, 6, 7]
    strictly = [False, True, True, True, False, False, True, True]
    kept = [True] * 8
    found = by_quartile(lengths, strictly, kept)
    assert [(e["from_tokens"], e["to_tokens"], e["requests"]) for e in found] == [
        (1, 2, 2), (3, 4, 2), (5, 6, 2), (7, 8, 2),
    ]  # fmt: skip
    assert [e["strict_attainment"] for e in found] == [1.0, 0.5, 0.5, 0.5]
    assert [e["attainment"] for e in found] == [1.0] * 4
    same = by_quartile([5] * 6, [True] * 3 + [False] * 3, kept[:6])
    assert same == [
        {"from_tokens": 5, "to_tokens": 5, "requests": 6, "strict_attainment": 0.5, "attainment": 1.0}
    ]  # fmt: skip
    assert by_quartile([], [], []) == []
