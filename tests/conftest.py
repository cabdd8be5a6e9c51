"""Compiled programs are shared by all tests of a run (and by parallel workers), so that each shape compiles once."""

import os

# Before jax is imported, for processes started by tests too: most of the suite's time is compiling, and code that is
# not optimised compiles in two thirds of the time.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import pytest
from hypothesis import HealthCheck, settings

from apt_jax.serve.runtime.starting.compile_cache import use_compile_cache

# A busy machine is no reason to fail; continuous integration always draws the same examples.
settings.register_profile(
    "project", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("project")


@pytest.fixture(scope="session", autouse=True)
def shared_programs(tmp_path_factory, worker_id):
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "programs"
    use_compile_cache(str(folder))
