"""Everything of one OPT size on a GPU, unattended: `make bench-gpu`.

    make bench-gpu ARGS="--model opt-6.7b --parts steps,offline"

Three parts, each in a process of its own that is ended after --part-minutes; one that fails does not stop the others.
steps: decode steps against their floor, by both cache kinds. offline: the engine compared with transformers'
`generate` and its continuous batching. serving: this server with a capped cache, `apt` on the hybrid cache and `fcfs`
on keys and values, under the same load. Weights are random and not written down. Tables go to standard output, JSON to
--results.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from experiments.peers.catalogue import PYTHON, ROOT
from experiments.peers.process_group import ProcessGroup, end_what_was_started


@dataclass
class Args:
    """Everything of one OPT size on a GPU, unattended."""

    model: str = "opt-13b"
    """OPT size by name."""
    parts: str = "steps,offline,serving"
    """Parts to run, separated by commas."""
    results: Path = Path("gpu-results")
    """Folder for JSON and the plot."""
    rates: str = "1,2,4,6,8,12"
    """Requests per second offered to the servers."""
    num_prompts: int = 300
    """Number of requests per run of a server."""
    cache_bytes: int = 10_000_000_000
    """Bytes of each server's cache: what OPT-13B leaves free on the paper's GPU of 40 GB."""
    part_minutes: float = 60.0
    """Time limit of a part, in minutes."""
    platform: Literal["gpu", "cpu"] = "gpu"
    """cpu: only to show that it runs."""


def commands(args: Args) -> dict[str, list[str]]:
    """What each part runs."""
    same = ["--platform", args.platform, "--model", args.model, "--dummy"]
    kernels = [PYTHON, "-m", "apt_jax.serve.cli", "bench", "kernels", "--end-to-end", "--model", args.model]
    return {
        "steps": [
            *kernels, *(["--allow-cpu"] if args.platform == "cpu" else []),
            "--output", str(args.results / "steps.json"),
        ],
        "offline": [
            PYTHON, "-m", "experiments.peers", *same, "--dtypes", "bfloat16",
            "--peers", "transformers,transformers-batching", "--output", str(args.results / "offline.json"),
        ],
        "serving": [
            PYTHON, "-m", "experiments.peers.servers", *same, "--dtype", "bfloat16",
            "--servers", "apt-jax,apt-jax-fcfs", "--dataset", "sharegpt", "--rates", args.rates,
            "--num-prompts", str(args.num_prompts), "--cache-bytes", str(args.cache_bytes), "--max-num-seqs", "256",
            "--max-model-len", "2048", "--ttft-slo-ms", "1000", "--tbt-slo-ms", "1000",
            "--output", str(args.results / "serving.json"), "--plot", str(args.results / "serving.png"),
        ],
    }  # fmt: skip


def run(command: list[str], variables: Mapping[str, str], limit_s: float) -> str:
    """Run one part with all that it starts; how it ended, in words."""
    process = subprocess.Popen(command, cwd=ROOT, env=dict(variables), start_new_session=True)
    group = ProcessGroup(process)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"was ended after {limit_s / 60:g} minutes"
    finally:
        if process.poll() is None:
            group.signal(signal.SIGINT)  # so that it ends what runs in groups of its own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(90)
            group.signal(signal.SIGKILL)
            process.wait()
    return "done" if code == 0 else f"failed with exit code {code}"


def main(args: Args) -> int:
    """Run the parts; 1 if one was not done.

    Raises:
        ValueError: there is no such part.
    """
    args.results = args.results.resolve()
    all_parts = commands(args)
    for name in (names := args.parts.split(",")):
        if name not in all_parts:
            raise ValueError(f"parts: unknown {name!r}; known: {', '.join(all_parts)}")
    args.results.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, "JAX_PLATFORMS": "cpu" if args.platform == "cpu" else "cuda,cpu"}
    ends = {}
    for name in names:
        print(f"== {name}: {' '.join(all_parts[name])}", flush=True)
        ends[name] = run(all_parts[name], variables, 60 * args.part_minutes)
    print("\n".join(f"{name} {end}" for name, end in ends.items()))
    return int(any(end != "done" for end in ends.values()))


if __name__ == "__main__":
    end_what_was_started()
    try:
        sys.exit(main(tyro.cli(Args, prog="python -m experiments.peers.gpu")))
    except ValueError as error:
        sys.exit(f"error: {error}")
