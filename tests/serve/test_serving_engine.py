"""The engine and the fake one offer all that `ServingEngine` asks for, with the same arguments."""

import inspect

import pytest

from apt_jax.engine.engine import Engine
from apt_jax.engine.interface import ServingEngine
from apt_jax.request import SamplingParams
from tests.support.fake_engine import CharTokenizer, FakeEngine

NAMES = sorted(name for name in vars(ServingEngine) if not name.startswith("_"))
METHODS = [name for name in NAMES if inspect.isfunction(vars(ServingEngine)[name])]


def arguments(function) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("engine", [Engine, FakeEngine])
def test_methods_take_the_arguments_of_the_protocol(engine, name):
    assert arguments(getattr(engine, name)) == arguments(getattr(ServingEngine, name))


def test_the_fake_engine_has_every_attribute_of_the_protocol():
    engine = FakeEngine(tokenizer=CharTokenizer())
    assert {"add", "abort", "step", "figures"} <= set(METHODS) < set(NAMES)
    assert [name for name in NAMES if not hasattr(engine, name)] == []


def test_figures_of_an_idle_engine_hold_no_blocks():
    engine = FakeEngine()
    engine.add([5], SamplingParams(max_tokens=5), request_id="r")
    engine.step()
    busy = engine.figures()
    assert (busy.num_waiting, busy.num_running) == (0, 1) and busy.num_held_blocks > 0
    engine.abort("r")
    idle = engine.figures()
    assert (idle.num_waiting, idle.num_running, idle.num_held_blocks) == (0, 0, 0)
    assert busy.num_running == 1, "a snapshot does not change"
