"""Start-up: its phases add up, the server tells them, and importing the package stays light."""

import re
import subprocess
import sys
import time

import jax
import pytest

from apt_jax.serve.runtime.starting.start_up import StartUp
from tests.support.served_model import write_folder

HEAVY = {"jax", "jaxlib", "flax", "orbax", "numpy", "scipy", "transformers", "pydantic", "starlette", "aiohttp"}


@pytest.mark.parametrize(
    "statement", ["import apt_jax", "from apt_jax import SamplingParams", "import apt_jax.serve.cli"]
)
def test_importing_the_package_does_no_heavy_work(statement):
    """`import apt_jax` takes a moment: jax and the like are imported when a model is."""
    done = subprocess.run([sys.executable, "-c", f"{statement}\nimport sys; print(*sys.modules)"], capture_output=True)
    loaded = {name.split(".")[0] for name in done.stdout.decode().split()}
    assert "apt_jax" in loaded and not loaded & HEAVY


def test_phases_follow_each_other_and_add_up():
    start_up = StartUp()
    began = start_up.total_s
    time.sleep(0.02)
    start_up.ended("imports")
    time.sleep(0.03)
    start_up.ended("measuring", compiling_s=0.02)
    assert list(start_up.phases) == ["Python", "imports", "programs", "measuring"]
    assert start_up.phases["imports"] >= 0.02 and start_up.phases["programs"] == 0.02
    assert began + 0.05 <= start_up.total_s <= began + 5
    assert re.fullmatch(r"Python \d+\.\d, imports 0\.\d, programs 0\.0, measuring 0\.\d", start_up.text())


def test_the_server_tells_where_its_start_went(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    few = "--max-num-seqs 1 --max-num-batched-tokens 16 --num-blocks 16 --cache-mode kv --scheduling-policy fcfs"
    command = [sys.executable, "-m", "apt_jax.serve.cli", "serve", folder, "--port", "0", "--load-format", "dummy"]
    cache = ["--compilation-cache-dir", str(jax.config.jax_compilation_cache_dir)]
    process = subprocess.Popen([*command, *cache, *few.split()], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr:
        try:
            found = None
            while found is None and (line := process.stderr.readline()):
                found = re.search(r"ready after (\S+) s \((.*?)\): ", line)
        finally:
            process.terminate()
            process.wait(60)
    assert found is not None
    phases = dict(part.rsplit(" ", 1) for part in found[2].split(", "))
    assert list(phases) == ["Python", "imports", "kernels", "weights", "tokenizer", "memory", "programs", "measuring"]
    assert sum(map(float, phases.values())) == pytest.approx(float(found[1]), abs=0.4)
