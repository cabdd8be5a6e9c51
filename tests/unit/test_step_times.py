"""Which seconds of a running engine the cost model learns from."""

from apt_jax.engine.step_times import StepTimes
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.costs.step_load import StepLoad

LOAD = StepLoad(decode_requests=1, context_tokens=(10, 0), samples=1, decodes=(1, 0))


def observed(*ends):
    """`(seconds, candidates)` learned from iterations that ended so: load, start (None: no pause), end, candidates."""
    times = StepTimes(CostModel(MODELS["opt-125m"], HARDWARE["h200"]), learns=True)
    for load, started_s, now, candidates in ends:
        times.ended(load, started_s, now, candidates)
    return [(o.seconds, o.candidates) for o in times.calibration._recent]


def test_an_iteration_lasts_from_the_end_of_the_one_before():
    """The host's time in between is part of it, so that iterations add up to the time that passes."""
    assert observed((LOAD, 1.0, 2.0, 1), (LOAD, None, 5.0, 2), (LOAD, None, 6.5, 3)) == [(3.0, 2), (1.5, 3)]


def test_a_pause_without_requests_is_no_part_of_it():
    assert observed((LOAD, 1.0, 2.0, 1), (LOAD, 10.0, 10.5, 4)) == [(0.5, 4)]


def test_with_one_in_flight_it_begins_when_the_one_before_ends():
    """Planned and started at 1.5, while another runs until 2."""
    assert observed((LOAD, 1.0, 2.0, 1), (LOAD, 1.5, 4.0, 1)) == [(2.0, 1)]


def test_what_says_nothing_about_others_is_not_learned_but_ends_at_its_time():
    assert observed((LOAD, 1.0, 2.0, 1), (None, None, 5.0, 2), (LOAD, None, 6.0, 3)) == [(1.0, 3)]


def test_after_a_failure_nothing_is_known_of_the_device():
    times = StepTimes(CostModel(MODELS["opt-125m"], HARDWARE["h200"]), learns=True)
    times.ended(LOAD, 1.0, 2.0, 1)
    times.forget_end()
    times.ended(LOAD, None, 9.0, 1)
    assert not times.calibration.num_observations
