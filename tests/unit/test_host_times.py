"""The host's time for a policy's decisions, and that simulations are charged for it."""

import pytest

from apt_jax.request import Slo
from apt_jax.scheduling.costs.cost_model import CostModel, Scales
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.costs.host_times import HOST_TIMES, HostTime, host_time
from apt_jax.scheduling.policies.catalogue import make_policy, policy_names
from apt_jax.scheduling.state import Limits
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.simulator import simulate, simulate_fleet
from apt_jax.simulation.workload import Arrival


def test_every_policy_was_measured_and_an_unknown_one_costs_nothing():
    assert set(HOST_TIMES) == set(policy_names())
    assert host_time("apt:mixed=off") == HOST_TIMES["apt"] and host_time("theirs") == HostTime(0.0, 0.0)
    assert HostTime(2.0, 0.5).seconds(6) == 5.0
    assert all(0 < time.iteration_s < 1e-3 and 0 < time.candidate_s < 1e-5 for time in HOST_TIMES.values())


def test_an_iteration_of_a_simulation_is_longer_by_the_decision(monkeypatch):
    """Two requests that arrive together: two candidates until the shorter one is done, then one."""

    def run(found):
        monkeypatch.setattr("apt_jax.simulation.experiment.host_time", lambda policy: found)
        arrivals = [Arrival(0.0, 10, 2), Arrival(0.0, 10, 3)]
        outcome = simulate_fleet(arrivals, Experiment().fleet("fcfs", "kv", "absorbed"), slo=Slo())
        return [(r.ttft_s, *r.gaps_s) for r in outcome.requests]

    free, charged = run(HostTime()), run(HostTime(0.25, 0.125))
    for without, with_time, added in zip(free, charged, ((0.5, 0.5), (0.5, 0.5, 0.375)), strict=True):
        assert with_time == pytest.approx([a + b for a, b in zip(without, added, strict=True)])


def test_a_measured_host_makes_simulated_iterations_longer():
    """What a running engine learned of its host is charged without any table."""

    def run(host):
        model = CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"], scales=Scales(host=host))
        arrivals = [Arrival(0.0, 10, 2), Arrival(0.0, 10, 3)]
        limits = Limits(8, 64, "kv")
        outcome = simulate(arrivals, make_policy("fcfs"), cost_model=model, num_blocks=100, limits=limits)
        return [(r.ttft_s, *r.gaps_s) for r in outcome.requests]

    free, charged = run(HostTime()), run(HostTime(0.25, 0.125))
    for without, with_time, added in zip(free, charged, ((0.5, 0.5), (0.5, 0.5, 0.375)), strict=True):
        assert with_time == pytest.approx([a + b for a, b in zip(without, added, strict=True)])
