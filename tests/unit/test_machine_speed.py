"""Simulated time on a machine of changing speed."""

import pytest

from apt_jax.scheduling.costs.cost_model import CostModel, Scales
from apt_jax.scheduling.costs.fit import Observation
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.costs.host_times import HostTime
from apt_jax.scheduling.costs.step_load import StepLoad
from experiments.peers.machine_speed import Drifting, Speed

LOAD = StepLoad(decode_requests=1, context_tokens=(10, 0), samples=1, decodes=(1, 0))


class Quarters(CostModel):
    """A quarter of a second for every iteration."""

    def step_s(self, load):
        return 0.25


MODEL = Quarters(MODELS["opt-125m"], HARDWARE["h200"], scales=Scales(host=HostTime(0.125, 0.0625)))


def speed_of(*served):
    """Of iterations `(seconds, end)` with two candidates each, which are predicted to take half a second."""
    return Speed(MODEL, [Observation(LOAD, seconds, 2) for seconds, _ in served], [end_s for _, end_s in served])


def test_the_speed_of_a_second_is_predicted_over_measured():
    assert speed_of((0.25, 0.3), (0.75, 0.9), (2.0, 2.5)).speeds.tolist() == [1.0, 1.0, 0.25]


def test_work_ends_when_the_machine_has_done_it():
    speed = speed_of((0.5, 0.5), (1.0, 1.5), (0.5, 2.5))  # 1, then a half, then 1
    assert speed.end_s(0.0, 0.5) == pytest.approx(0.5)
    assert speed.end_s(0.5, 1.0) == pytest.approx(2.0)
    assert speed.end_s(1.0, 0.25) == pytest.approx(1.5)
    assert speed.end_s(2.5, 2.0) == pytest.approx(4.5), "after the run the machine is as predicted"
    assert speed.end_s(7.0, 2.0) == pytest.approx(9.0)


def test_an_iteration_has_the_host_s_time_and_takes_as_long_as_the_machine_then_needs():
    drifting = Drifting(MODEL, speed_of((0.5, 0.5), (2.0, 1.9)))  # 1, then a quarter
    for now, seconds in ((0.0, 0.5), (1.0, 1.0 + 0.25), (5.0, 0.5)):
        drifting.now = now
        host_s = drifting.host_s(2)
        assert host_s + drifting.step_s(LOAD) == pytest.approx(seconds)
