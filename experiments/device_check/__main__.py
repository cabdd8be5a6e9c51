"""Everything that matters on a device that nobody has had yet, unattended, in a few minutes: `make device-check`.

    python -m experiments.device_check --minutes 9 --results device-results

Most important first: every kernel against its reference; decode attention as a share of a copy's speed; chunks over
cached prefixes; whole decode steps of OPT-13B against their floor, and rho; `fcfs` on keys and values beside `apt` on
the hybrid cache, under load. Each stage is a process: one that hangs or crashes loses what it was measuring, and the
rest goes on. Nothing is downloaded; jax, flax, safetensors, filelock, msgpack, psutil and tqdm are needed.

`results.jsonl` grows line by line, `log.txt` has what the stages print, `summary.md` is written after each stage.
"""

import argparse
import importlib
import logging
import math
import os
import platform as host
import sys
from importlib.metadata import version
from pathlib import Path

from experiments.device_check.records import Record, Records, begin, read_records
from experiments.device_check.summary import failures, line, table
from experiments.device_check.supervisor import OVER, Stage, Supervisor, end_with_parent, stage_environment
from experiments.peers.process_group import end_what_was_started

STAGES = (
    Stage("correctness", 100),
    Stage("attention", 70),
    Stage("chunks", 40),
    Stage("steps", 160),
    Stage("serving", 170),
)
RESULTS, LOG, SUMMARY = "results.jsonl", "log.txt", "summary.md"


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; a stage's process gets --stage and --seconds."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.device_check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--results", type=Path, default=Path("device-results"), help="folder, made if missing")
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu", help="cpu: small, to show that it runs")
    parser.add_argument("--stages", default=",".join(stage.name for stage in STAGES), help="separated by commas")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--attention-backend", default="auto", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def chosen(names: str) -> list[Stage]:
    """Stages by name, in their own order.

    Raises:
        ValueError: there is no such stage.
    """
    known = {stage.name: stage for stage in STAGES}
    for name in names.split(","):
        if name not in known:
            raise ValueError(f"stages={names!r}: unknown {name!r}; known: {', '.join(known)}")
    return [stage for stage in STAGES if stage.name in names.split(",")]


def attention_backend(records: list[Record]) -> str:
    """XLA for engines if a kernel did not come back in the stage that checks them, else what passes their own check."""
    hung = any(r["event"] == "ended" and r["stage"] == "correctness" and r["reason"] != OVER for r in records)
    return "xla" if hung else "auto"


def run_stage(args: argparse.Namespace) -> int:
    """One stage, in this process."""
    from apt_jax.serve.runtime.starting.compile_cache import use_compile_cache
    from experiments.device_check.session import Session
    from experiments.device_check.sizes import SIZES

    end_with_parent()
    logging.basicConfig(level=logging.INFO)
    use_compile_cache(None)
    path = args.results / RESULTS
    session = Session(args.stage, path, SIZES[args.platform], args.seconds, args.attention_backend)
    if not any(r["event"] == "started" for r in read_records(path)):
        device = session.device
        versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
        Records(path).add(
            "started", device=f"{device.device_kind} ({device.platform})", driver=device.client.platform_version,
            python=host.python_version(), processors=os.cpu_count(), memory=device.memory_stats(), **versions,
        )  # fmt: skip
    importlib.import_module(f"experiments.device_check.{args.stage}").run(session)
    return 0


def main(args: argparse.Namespace) -> int:
    """Run the stages; 1 if one was not done, or something in it failed.

    Raises:
        ValueError: an argument is impossible.
    """
    if not (math.isfinite(args.minutes) and args.minutes > 0):
        raise ValueError(f"minutes={args.minutes:g} must be above 0, such as 9")
    stages = chosen(args.stages)
    begin()
    args.results = args.results.resolve()
    args.results.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, LOG, SUMMARY):
        (args.results / name).unlink(missing_ok=True)
    path = args.results / RESULTS

    def command(stage: Stage, seconds: float) -> list[str]:
        given = ("--results", str(args.results), "--platform", args.platform, "--stage", stage.name)
        backend = attention_backend(read_records(path))
        return [
            sys.executable, "-m", "experiments.device_check", *given, "--seconds", f"{seconds:.1f}",
            "--attention-backend", backend,
        ]  # fmt: skip

    def show(record: Record) -> None:
        if (text := line(record)) is not None:
            print(text, flush=True)
        if record["event"] == "stage":
            (args.results / SUMMARY).write_text(table(read_records(path)), encoding="utf-8")

    supervisor = Supervisor(Records(path), command, stage_environment(args.platform), args.results / LOG, show)
    ends = supervisor.run(stages, 60 * args.minutes)
    failed = failures(supervisor.seen)
    print(f"results in {args.results}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed) or any(end != "done" for end in ends.values()))


if __name__ == "__main__":
    arguments = parsed()
    try:
        if arguments.stage is not None:
            sys.exit(run_stage(arguments))
        end_what_was_started()
        sys.exit(main(arguments))
    except ValueError as error:
        sys.exit(f"error: {error}")
