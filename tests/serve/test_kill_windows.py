"""SIGKILL at every single change of a file by a snapshot, results, a batch job, a conversion and what is kept."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import kill_windows

SOURCE = Path(kill_windows.__file__).with_name("kill.c")
FEWEST = {
    "http-batch": 25,
    "batch": 7,
    "snapshot": 5,
    "first-snapshot": 5,
    "results": 6,
    "replaced": 4,
    "convert": 15,
    "orbax": 12,
}
STEPS = {"orbax": 60, "http-batch": 3}  # which change of so many; every one of the others


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory):
    """The environment of a process that can be killed."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("kill") / "kill.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library), "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize("work", FEWEST)
def test_a_kill_at_any_change_of_a_file_loses_and_doubles_nothing(tmp_path, preloaded, work):
    command = [sys.executable, "-m", "tests.kill_windows", work, str(tmp_path), str(STEPS.get(work, 1))]
    done = subprocess.run(command, env=preloaded, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [int(line) for line in done.stdout.split()]
    assert len(counts) == 3 and min(counts) >= FEWEST[work], "the changes must be seen"
