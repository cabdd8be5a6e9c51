"""Files of JSON lines that grow line by line and outlive the process that writes them, however it ends."""

import fcntl
import json
import logging
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apt_jax.files import OWNER_ONLY, sync, write_all

# line ends to some readers (Python's str.splitlines among them) that JSON lets stand in a text
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")

logger = logging.getLogger(__name__)


class FileInUse(ValueError):
    """Another process writes the file."""


class NotThisKind(ValueError):
    """The file holds something else; it was not touched."""


class LineFile:
    """A file to which lines are appended; readable for the owner only if this makes it, and locked while it is open.

    Opening brings it into order: a last line without its end is completed if it is whole, and cut off if it is not.

    Args:
        begin: how every line begins; the rest of a torn first line is known by it.
        take: called with each line that is there; False for one that is damaged or of another kind.
        what: the kind of line, and cure: what to do about a file that holds something else; for errors.

    Raises:
        FileInUse: another process has it open.
        NotThisKind: there are lines, and none is of this kind; or it is no file on disk.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, begin: bytes, take: Callable[[bytes], bool], *, what: str, cure: str):
        self.path = path
        self.damaged: list[int] = []  # numbers of lines, from 1
        self._kind = f"is no {what}; {cure}"
        if path.exists() and not path.is_file():
            raise NotThisKind(f"{path} is not a file on disk; {cure}")
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, OWNER_ONLY)
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise NotThisKind(f"{path} is not a file on disk; {cure}")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FileInUse(f"another run writes {path}; wait for it, or {cure}") from error
            self._size = self._recover(begin, take)
        except BaseException:
            os.close(self._file)
            raise
        for number in self.damaged:
            logger.warning("%s line %d is damaged; what it answered is done again", path, number)

    def append(self, line: bytes) -> None:
        """Add a line, its end included; it is with the operating system when this returns.

        Raises:
            OSError: it cannot be written; the file, which the error names, is as it was.
        """
        try:
            write_all(self._file, line)
        except BaseException as error:
            os.ftruncate(self._file, self._size)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            raise
        self._size += len(line)

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        sync(self._file)

    def close(self) -> None:
        """Release the file."""
        os.close(self._file)

    def _recover(self, begin: bytes, take: Callable[[bytes], bool]) -> int:
        """Read the lines and mend the last one; returns the size in bytes."""
        known, end, tail = 0, 0, b""
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    tail = line
                    break
                end += len(line)
                if take(line[:-1]):
                    known += 1
                elif line.strip():
                    self.damaged.append(number)
        is_whole = bool(tail) and take(tail)
        if not (known or is_whole):
            if self.damaged:
                raise NotThisKind(f"{self.path} line {self.damaged[0]} {self._kind}")
            if not (tail.startswith(begin) or begin.startswith(tail)):
                raise NotThisKind(f"{self.path} {self._kind}")
        if is_whole:
            write_all(self._file, b"\n")
            return end + len(tail) + 1
        if tail:
            os.ftruncate(self._file, end)
        return end


def line_of(value: Any) -> bytes:
    """`value` as one line of JSON, which every reader takes for one line."""
    text = _LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
    return text.encode("utf-8", "backslashreplace") + b"\n"  # half a surrogate pair is written as JSON escapes it
