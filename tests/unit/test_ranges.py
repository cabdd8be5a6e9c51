"""No number of a command line may be NaN or infinite where that means nothing: every flag of every command."""

import dataclasses
import math
import typing

import pytest

from apt_jax.engine_config import EngineConfig
from apt_jax.ranges import check_cv, check_finite
from apt_jax.request import Slo
from apt_jax.routing.autoscaler import AutoscalerOptions
from apt_jax.scheduling.policies.catalogue import POLICIES, make_policy
from apt_jax.serve.bench.offline.options import BenchThroughput
from apt_jax.serve.bench.serving.options import BenchServe
from apt_jax.serve.bench.work_options import WorkOptions
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.replicas.options import ReplicaOptions, parse_resources
from apt_jax.simulation.options import SimulateArgs

OPTIONS = (
    EngineConfig, ServerOptions, ReplicaOptions, BenchServe, BenchThroughput, WorkOptions, SimulateArgs,
    AutoscalerOptions,
)  # fmt: skip
INFINITE = {(BenchServe, "burstiness")}  # regular arrivals


def float_fields(options: type) -> list[str]:
    hints = typing.get_type_hints(options)
    return [f.name for f in dataclasses.fields(options) if float in (hints[f.name], *typing.get_args(hints[f.name]))]


FLAGS = [(options, name) for options in OPTIONS for name in float_fields(options)]


@pytest.mark.parametrize(("options", "name"), FLAGS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_a_flag_that_is_no_sensible_number_is_refused_by_name(options, name, value):
    if (options, name) in INFINITE and value == math.inf:
        options(**{name: value})
        return
    with pytest.raises(ValueError, match=name):
        options(**{name: value})


def test_seeds_and_block_sizes_are_checked_where_flags_are():
    with pytest.raises(ValueError, match="seed=-1 must be at least 0"):
        EngineConfig(seed=-1)
    for size in (-8, 0, 3, 256):
        with pytest.raises(ValueError, match=f"block_size={size} must be"):
            EngineConfig(block_size=size)
    assert EngineConfig(block_size=128).block_size == 128


def test_the_options_of_policies_are_checked_too():
    found = [
        (policy, name)
        for policy, made in POLICIES.items()
        if (options := getattr(made, "Options", None)) is not None
        for name in float_fields(options)
    ]
    assert ("apt", "patience_s") in found
    for policy, name in found:
        for value in ("nan", "inf", "-1"):
            with pytest.raises(ValueError, match=name):
                make_policy(f"{policy}:{name}={value}")


@pytest.mark.parametrize("amount", ["nan", "inf", "-1", "x", ""])
def test_an_amount_of_a_resource_is_a_number(amount):
    with pytest.raises(ValueError, match="replica_resources has"):
        parse_resources((f"GPU={amount}",))


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0, -1.0])
def test_an_slo_is_a_finite_time(seconds):
    with pytest.raises(ValueError, match="tbt_s"):
        Slo(1.0, seconds)


@pytest.mark.parametrize("cv", [math.nan, math.inf, -1.0, 1e-9, 1e9])
def test_a_coefficient_of_variation_that_no_generator_can_draw_is_refused(cv):
    with pytest.raises(ValueError, match="cv"):
        check_cv(cv)
    check_cv(0.0)


def test_fields_that_are_none_or_no_number_pass():
    @dataclasses.dataclass
    class Options:
        limit: float | None = None
        name: str = "nan"
        most: float = math.inf

    check_finite(Options(), may_be_infinite=("most",))
    with pytest.raises(ValueError, match="most=inf"):
        check_finite(Options())


def test_the_coefficients_of_variation_that_can_be_drawn():
    for cv in (0.0, 0.01, 1.0, 100.0):
        check_cv(cv)
    for cv in (0.009, 100.1, 150.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"^cv=.* must be a coefficient of variation between 0.01 and 100$"):
            check_cv(cv)
    with pytest.raises(ValueError, match=r"^burstiness=1e-06 \(cv=1e\+03\) must be"):
        check_cv(1000.0, "burstiness=1e-06")
