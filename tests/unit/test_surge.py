"""A stretch of overload: where its arrivals fall, who came when, and what is refused."""

import numpy as np
import pytest

from apt_jax.request import SamplingParams
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.options import SimulateArgs
from apt_jax.simulation.requests.columns import SimulatedRequest
from apt_jax.simulation.requests.known_lengths import KnownLengths
from apt_jax.simulation.requests.surge import Surge


def test_arrivals_are_denser_by_the_factor_inside_and_as_before_outside():
    surge = Surge(10.0, 5.0, 3.0)
    at_base = np.arange(0.0, 41.0)
    times = surge.times(at_base)
    assert (times[:11] == at_base[:11]).all(), "nothing moves before it"
    assert times[10:26] == pytest.approx(10 + np.arange(16) / 3), "15 of the base rate's arrivals within 5 seconds"
    assert np.diff(times)[25:] == pytest.approx(1.0), "then the base rate again"
    assert surge.mean_factor(40.0) == pytest.approx(1 + 2 * 5 / 40)
    assert surge.mean_factor(12.0) == pytest.approx(1 + 2 * 2 / 12) and surge.mean_factor(0.0) == 1.0


def test_phases_count_by_arrival_and_leave_out_what_is_empty():
    surge = Surge(10.0, 20.0, 2.0)
    arrivals = [9.9, 10.0, 29.9, 30.0, 89.9, 90.0]
    phases = surge.by_phase(arrivals, [True, True, False, False, False, True], [True] * 6)
    assert [(p["name"], p["requests"], p["strict_attainment"]) for p in phases] == [
        ("before", 1, 1.0), ("surge", 2, 0.5), ("minute after", 2, 0.0), ("later", 1, 1.0),
    ]  # fmt: skip
    assert all(p["attainment"] == 1.0 for p in phases)
    assert [p["name"] for p in surge.by_phase([1.0], [True], [True])] == ["before"]


@pytest.mark.parametrize("text", ["", "1:2", "a:1:2", "1:0:2", "-1:1:2", "1:1:0.5", "1:1:nan", "1:inf:2", "1:2:3:4"])
def test_a_surge_that_is_none_is_refused_with_a_sentence(text):
    with pytest.raises(ValueError, match="must be"):
        Surge.parse(text)


def test_a_run_has_as_many_requests_as_its_rates_say_and_its_phases():
    run = Experiment(model="opt-125m", hardware="tpu-v5e", num_blocks=300, num_requests=1, duration_s=300.0)
    arrivals, _ = run.arrivals(2.0)
    surged = Experiment(
        model="opt-125m", hardware="tpu-v5e", num_blocks=300, num_requests=1, duration_s=300.0,
        surge=Surge(100.0, 50.0, 3.0),
    )  # fmt: skip
    more, _ = surged.arrivals(2.0)
    assert (len(arrivals), len(more)) == (600, 800)
    inside = sum(100.0 < a.arrival_s <= 150.0 for a in more)
    assert 250 < inside < 350, "6 requests a second for 50 seconds"
    _, report = surged.run("fcfs", "kv", "absorbed", 2.0)
    assert report is not None
    assert [p["name"] for p in report.attainment_by_phase] == ["before", "surge", "minute after", "later"]
    assert sum(p["requests"] for p in report.attainment_by_phase) == 800


def test_known_lengths_are_the_requests_own():
    common = dict(model="opt-125m", hardware="tpu-v5e", num_blocks=300, num_requests=200, duration_s=1.0)
    learnt, _ = Experiment(**common).run("sjf", "kv", "absorbed", 50.0)
    known, _ = Experiment(**common, known_lengths=True).run("sjf", "kv", "absorbed", 50.0)

    def rank_correlation(outcome):
        done = [(r.ended_s - r.arrival_s, r.target_tokens) for r in outcome.requests]
        ranks = [np.argsort(np.argsort(column)) for column in zip(*done, strict=True)]
        return np.corrcoef(*ranks)[0, 1]

    assert rank_correlation(known) > rank_correlation(learnt) + 0.05, "the shortest really go first"


def test_lengths_known_with_an_error_are_off_by_it_and_stay_so():
    requests = []
    for order in range(2000):
        one = SimulatedRequest(f"r{order}", range(4), SamplingParams(max_tokens=None), 0.0, 5000)
        one.order, one.target_tokens = order, 100
        requests.append(one)
    none, predictor = np.zeros(2000, np.int64), KnownLengths(0.5, seed=3)
    logs = np.log(predictor.remaining_of(requests, none, none) / 100)
    assert abs(logs.mean()) < 0.05 and logs.std() == pytest.approx(0.5, rel=0.05)
    assert (predictor.remaining_of(requests[:5], none[:5], none[:5]) == 100 * np.exp(logs[:5])).all()
    assert (KnownLengths().remaining_of(requests, none, none) == 100).all()
    assert predictor.remaining_of(requests[:1], none[:1], np.array([4000]))[0] == 400, "it has outlived the guess"
    with pytest.raises(ValueError, match=r"known_lengths_error=0.5 needs --known-lengths"):
        SimulateArgs(known_lengths_error=0.5)
    with pytest.raises(ValueError, match=r"known_lengths_error=4.0 must be in 0..3"):
        SimulateArgs(known_lengths=True, known_lengths_error=4.0)
