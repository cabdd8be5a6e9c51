"""Warm-up runs whole steps: what is set up at the first one no longer depends on what comes with the first request."""

import subprocess
import sys

import pytest

from tests.support.checkpoint_folders import TINY, random_model
from tests.support.engines import make_engine

# No file descriptor is left after warm-up, so nothing can be opened, and no library loaded, at the first request.
NO_FILES = """
import os, resource
from apt_jax.request import SamplingParams
from tests.support.checkpoint_folders import TINY, random_model
from tests.support.engines import make_engine
engine = make_engine(random_model(TINY, seed=0), TINY, num_blocks=64)
engine.warm_up()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True:
        os.dup(0)
except OSError:
    pass
engine.add([3, 4, 5], SamplingParams(temperature=0, max_tokens=4), request_id="first")
outputs = []
while engine.has_unfinished:
    outputs += engine.step()
os.write(1, f"{outputs[-1].finish_reason.value} {engine.figures().num_failed_steps}".encode())
"""


@pytest.mark.parametrize("mode", ["kv", "hidden", "hybrid"])
def test_a_prompt_and_a_decode_step_of_each_kind_are_run(mode, monkeypatch):
    engine = make_engine(random_model(TINY, seed=0), TINY, num_blocks=64, cache_mode=mode)
    ran, dispatch = [], engine.runner.dispatch

    def spy(batch):
        ran.append((int(batch.rows.kind[0]), int(batch.rows.start[0]), batch.bucket.decode_only))
        return dispatch(batch)

    monkeypatch.setattr(engine.runner, "dispatch", spy)
    engine.warm_up()
    wanted = [(kind.index, start, start == 1) for kind in engine.state.limits.kinds for start in (0, 1)]
    assert ran[: len(wanted)] == wanted
    assert engine.state.pool.num_free == engine.state.pool.num_blocks and engine.figures().num_recompiles == 0


def test_the_first_request_needs_no_file_descriptor():
    done = subprocess.run([sys.executable, "-c", NO_FILES], capture_output=True, text=True, check=False)
    assert done.stdout == "length 0" and "Failed to initialize" not in done.stderr, done.stderr
