"""Runs stages as processes: ends what hangs, goes on after what crashed, and gives time that one saves to the next."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.device_check.records import Record, Records, under_way
from experiments.peers.process_group import ProcessGroup

MOST_STARTS = 8  # of one stage
OVER = "the stage's time was over"
_LOOK_S = 0.2
_KILLED_S = 10.0  # until a process is gone that was killed; a driver may hold it


@dataclass(frozen=True)
class Stage:
    """A name, and seconds planned for it when the check has nine minutes: estimates."""

    name: str
    planned_s: float


type Command = Callable[[Stage, float], list[str]]  # of a stage and the seconds it has


@dataclass
class Supervisor:
    """Runs the stages of one check.

    Attributes:
        records: of the check.
        command: what a stage runs.
        variables: environment of the stages.
        log: gets what they print.
        show: gets each record as it is written.
    """

    records: Records
    command: Command
    variables: Mapping[str, str]
    log: Path
    show: Callable[[Record], None] = lambda record: None
    seen: list[Record] = field(default_factory=list)

    def run(self, stages: Sequence[Stage], seconds: float) -> dict[str, str]:
        """How each stage ended. A stage has until the plans of all up to it are over, at the scale of `seconds`."""
        began, planned, ends = time.monotonic(), 0.0, {}
        scale = seconds / sum(stage.planned_s for stage in stages)
        for stage in stages:
            planned += stage.planned_s * scale
            started = time.monotonic()
            ends[stage.name] = self._run_stage(stage, began + planned)
            self.records.add(
                "stage", stage=stage.name, end=ends[stage.name], seconds=round(time.monotonic() - started, 1)
            )
            self._look()
        return ends

    def _run_stage(self, stage: Stage, deadline: float) -> str:
        end = "no time was left"
        for _ in range(MOST_STARTS):
            if time.monotonic() >= deadline:
                return end
            end, goes_on = self._run_once(stage, deadline)
            if not goes_on:
                return end
        return f"{end}, after {MOST_STARTS} starts"

    def _run_once(self, stage: Stage, deadline: float) -> tuple[str, bool]:
        """How one process of a stage ended, and whether another is to go on after it."""
        command = self.command(stage, deadline - time.monotonic())
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, env=dict(self.variables), stdout=log, stderr=log, start_new_session=True
            )  # fmt: skip
        seen_before = len(self.seen)
        try:
            why = self._watch(process, stage, deadline)
        finally:  # also when this process is interrupted
            ProcessGroup(process).signal(signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILLED_S)
        self._look()
        last = under_way(self.seen, stage.name)
        if last is not None:
            self.records.add(
                "ended", stage=stage.name, check=last["check"], reason=why or f"exit code {process.returncode}"
            )
            self._look()
        if why == OVER:
            return why, False
        if why is None and process.returncode == 0:
            return "done", False
        advanced = any(r.get("stage") == stage.name and r["event"] == "begins" for r in self.seen[seen_before:])
        return why or f"exit code {process.returncode}", advanced

    def _watch(self, process: "subprocess.Popen[bytes]", stage: Stage, deadline: float) -> str | None:
        """Wait for a process; why it must be ended, or None if it has ended."""
        current, since = None, 0.0
        while process.poll() is None:
            now = time.monotonic()
            if now >= deadline:
                return OVER
            self._look()
            last = under_way(self.seen, stage.name)
            name = None if last is None else last["check"]
            if name != current:
                current, since = name, now
            if last is not None and now - since > last["limit_s"]:
                return f"no answer after {last['limit_s']:.0f} s"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_S)
        return None

    def _look(self) -> None:
        """Read and show new records."""
        for record in self.records.new():
            self.seen.append(record)
            self.show(record)


def stage_environment(platform: str) -> dict[str, str]:
    """What stages run with: the platform, and no memory of the device held by more than one process."""
    return {**os.environ, "JAX_PLATFORMS": "cpu" if platform == "cpu" else "cuda,cpu", "PYTHONUNBUFFERED": "1"}


def end_with_parent() -> None:
    """End this process when the one that started it has ended, however that happened."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
