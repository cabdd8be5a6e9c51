"""The two files of a batch job: requests in, one JSON object per line, and results out, appended as they come.

A result's id holds the number of its line and a hash of it, so the results themselves say which lines are done: a
job that was killed at any moment resumes there, and every line is answered exactly once.
"""

import codecs
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_jax.serve.line_file import LineFile, line_of
from apt_jax.serve.options import DEFAULT_MAX_BODY_BYTES

MAX_LINE_BYTES = DEFAULT_MAX_BODY_BYTES
READ_BYTES = 1 << 20
RESULT_ID = re.compile(r"batch_req_([0-9]+)_([0-9a-f]{16})")

logger = logging.getLogger("apt_jax.serve")


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


@contextlib.contextmanager
def readable_twice(path: Path) -> Iterator[Path]:
    """`path`, or a private copy of what can be read only once: a pipe, a terminal, standard input.

    Raises:
        ValueError: it is no UTF-8 text.
        OSError: it cannot be read, or there is no room for the copy.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path} is a folder; give a file of requests")
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode) or (stat.S_ISCHR(mode) and not _ends(path)):
        raise ValueError(f"{path} is a device or socket, not a file; give a file of requests")
    # an open file under /dev/fd is read on from where another read stopped, on some systems
    if stat.S_ISREG(mode) and not path.is_relative_to("/dev"):
        _check_encoding(path, path)
        yield path
        return
    logger.info("%s can be read only once; reading all of it before the first answer", path)
    with tempfile.TemporaryFile(prefix="apt-jax-batch-") as copy:
        with path.open("rb") as file:
            while piece := file.read1(READ_BYTES):  # a terminal says only once that it is at its end
                copy.write(piece)
        copy.flush()
        logger.info("read %d bytes of %s", copy.tell(), path)
        with _named(copy) as name:
            _check_encoding(name, path)
            yield name


def _ends(device: Path) -> bool:
    """Whether a character device is a terminal or empty, not one that gives bytes for ever."""
    with device.open("rb", buffering=0) as file:
        return file.isatty() or os.path.samefile(device, os.devnull)


@contextlib.contextmanager
def _named(file: Any) -> Iterator[Path]:
    """A path of an open file that has no name, so that nothing is left of it when this process is killed."""
    name = Path(f"/proc/self/fd/{file.fileno()}")
    if name.exists():
        yield name
        return
    with tempfile.NamedTemporaryFile(prefix="apt-jax-batch-") as copy:  # a system without /proc
        file.seek(0)
        shutil.copyfileobj(file, copy, READ_BYTES)
        copy.flush()
        yield Path(copy.name)


def _check_encoding(path: Path, source: Path) -> None:
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{source} is UTF-16 text; save it as UTF-8")


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a batch file that are not blank, read as they are asked for; byte order marks are left out.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        number = 0
        while piece := file.readline(MAX_LINE_BYTES + len(codecs.BOM_UTF8) + 1):
            number += 1
            text = piece.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")
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

    Opening reads which lines are done and mends a last line that was only half written.

    Raises:
        ValueError: another job writes it, or it is not a result file.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path):
        self._path = path
        self._done: dict[int, str] = {}
        self._file = LineFile(
            path, b'{"id": "batch_req_', self._take, what="result of a batch job", cure="choose another output"
        )

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._file.sync()
        finally:
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
        self._file.append(line_of({"id": line.result_id, "custom_id": custom_id, "response": response, "error": error}))
        self._done[line.number] = line.digest

    def _take(self, line: bytes) -> bool:
        """Note which input line a result is of."""
        try:
            found = RESULT_ID.fullmatch(json.loads(line)["id"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return False
        if found is not None:
            self._done[int(found[1])] = found[2]
        return found is not None
