"""Results as lines of JSON, each written out before the next begins, so that ending a process at any moment loses none.

Every line has `event` and `at_s`, seconds since the check began. A stage's process writes `begins` before a measurement
and then `result`, `error` or `skipped`; the process that runs the stages writes `started`, `ended` (a measurement was
under way when its process ended) and `stage`.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

Record = dict[str, Any]

LAST = ("result", "error", "skipped", "ended")  # events after which a measurement is over
_CLOCK = "APT_JAX_DEVICE_CHECK_BEGAN"  # in the environment: CLOCK_MONOTONIC, which all processes share


def begin() -> float:
    """When the check began, in `time.monotonic()`; the first call sets it for this process and those it starts."""
    return float(os.environ.setdefault(_CLOCK, repr(time.monotonic())))


class Records:
    """A file of records that several processes add to."""

    def __init__(self, path: Path):
        self.path = path
        self._read_bytes = 0

    def add(self, event: str, **figures: Any) -> None:
        """Write one record; it is on disk when this returns."""
        record = {"event": event, "at_s": round(time.monotonic() - begin(), 2), **figures}
        line = json.dumps(record, allow_nan=True).encode() + b"\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)

    def new(self) -> list[Record]:
        """Records written since the last call, whole lines only."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def read_records(path: Path) -> list[Record]:
    """All records of a file; none if there is no file."""
    return Records(path).new()


def begun(records: list[Record], stage: str) -> set[str]:
    """Names of a stage's measurements that were begun."""
    return {r["check"] for r in records if r["event"] == "begins" and r["stage"] == stage}


def under_way(records: list[Record], stage: str) -> Record | None:
    """The `begins` record of the measurement of `stage` that is not over."""
    last = None
    for record in records:
        if record.get("stage") == stage and "check" in record:
            last = record
    return last if last is not None and last["event"] == "begins" else None
