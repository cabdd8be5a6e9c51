"""The two files of a batch job: requests in, one JSON object per line, and results out, appended as they come.

A result's id holds the number of its line and a hash of it, so the results themselves say which lines are done: a
job that was killed at any moment resumes there, and every line is answered exactly once.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_jax.serve.options import DEFAULT_MAX_BODY_BYTES

MAX_LINE_BYTES = DEFAULT_MAX_BODY_BYTES
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Line:
    """Line `number` (from 1) of the input; `data` is None if it is longer than MAX_LINE_BYTES."""

    number: int
    data: bytes | None
    digest: str

    @property
    def result_id(self) -> str:
        """The id of its result."""
        return f"batch_req_{self.number}_{self.digest}"


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a batch file that are not blank, read as they are asked for.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        number = 0
        while piece := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            text = piece.rstrip(b"\r\n")
            digest = hashlib.sha256(text).hexdigest()[:16]
            too_long = len(text) > MAX_LINE_BYTES
            while piece and not piece.endswith(b"\n"):  # the rest of a line that is too long
                piece = file.readline(READ_BYTES)
            if text.strip():
                yield Line(number, None if too_long else text, digest)


def count_lines(path: Path) -> int:
    """Lines that `read_lines` yields."""
    return sum(1 for _ in read_lines(path))


class ResultFile:
    """The output of a job; locked against a second job while it is open.

    Opening reads which lines are done and cuts off a last line that was only half written.

    Raises:
        ValueError: another job writes it, or it is not a result file.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("a+b")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another run writes {path}; wait for it or choose another output") from error
            self._done = self._recover()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.flush()
        with contextlib.suppress(OSError):  # not every kind of file can be synced
            os.fsync(self._file.fileno())
        self._file.close()

    @property
    def num_done(self) -> int:
        """Lines answered, in this run and before."""
        return len(self._done)

    def is_done(self, line: Line) -> bool:
        """Whether `line` is answered.

        Raises:
            ValueError: the line with that number was different when it was answered.
        """
        digest = self._done.get(line.number)
        if digest not in (None, line.digest):
            raise ValueError(
                f"{self._path} answers another line {line.number} than the input has now; "
                "choose another output, or delete it to start again"
            )
        return digest is not None

    def write(self, line: Line, custom_id: str | None, response: Any, error: Any) -> None:
        """Append the result of `line`; it is with the operating system when this returns."""
        assert line.number not in self._done, f"line {line.number} is answered twice"
        result = {"id": line.result_id, "custom_id": custom_id, "response": response, "error": error}
        self._file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self._done[line.number] = line.digest

    def _recover(self) -> dict[int, str]:
        done: dict[int, str] = {}
        self._file.seek(0)
        whole = 0
        for number, raw in enumerate(self._file, start=1):
            if not raw.endswith(b"\n"):
                break
            whole += len(raw)
            try:
                line_number, digest = json.loads(raw)["id"].removeprefix("batch_req_").split("_")
                done[int(line_number)] = digest
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{self._path} line {number} is no result of a batch job; choose another output"
                ) from error
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)
        return done
