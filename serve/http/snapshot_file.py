"""The file of a snapshot: one request per line, shared by all servers that are told its name.

It is replaced as a whole under a lock, so that of two servers that stop at the same time neither loses the other's
requests, and lines that this server cannot read stay in it as they are.
"""

import contextlib
import fcntl
import glob
import itertools
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_jax.files import OWNER_ONLY, replace_file, sync_folder, write_all
from apt_jax.serve.openai.endpoints import ENDPOINTS_BY_PREFIX
from apt_jax.serve.options import DEFAULT_SNAPSHOT_FILE

VERSION = 2  # 1 did not name the model
START = b'{"version": '  # of every record
LOCK_TIMEOUT_S, LOCK_RETRY_S = 10.0, 0.02
PROBE = bytes(64 * 1024)  # there must be room for this much when the server starts

logger = logging.getLogger("apt_jax.serve")


@dataclass(frozen=True)
class Entry:
    """A line of the file: the record of a request, or, where it cannot be read, what is wrong."""

    line: bytes
    record: dict[str, Any] | None
    fault: str = ""


def read_snapshot(path: Path, *, report: bool = True) -> list[dict[str, Any]]:
    """The records of a file; `restore` makes one a generation again. No file is no record.

    `report` lines that cannot be read in the log; they stay in the file.

    Raises:
        ValueError: it has lines and none can be read; one sentence.
        OSError: it cannot be read.
    """
    if not path.exists():
        return []
    _check_kind(path, path.stat().st_mode)
    entries = _usable(path, path.read_bytes())
    for entry in entries:
        if report and entry.record is None:
            logger.error("%s; its request is left there, and the others are finished", entry.fault)
    return [entry.record for entry in entries if entry.record is not None]


def write_snapshot(path: Path, records: Iterable[dict[str, Any]], done: Container[str] = ()) -> int:
    """Add records to a file, in the place of older ones of the same requests, and take out those whose ids are `done`.

    Returns how many requests are in it then; a file without any is removed. A new file is its owner's only.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be written; it is as it was.
    """
    added = {record["id"]: record for record in records}
    path = Path(os.path.realpath(path))
    with _locked(path) as file:
        lines = []
        for entry in _usable(path, _read(file)):
            if entry.record is None or (entry.record["id"] not in done and entry.record["id"] not in added):
                lines.append(entry.line)
        lines += [json.dumps(record).encode() for record in added.values()]
        for draft in path.parent.glob(f".{glob.escape(path.name[:100])}.*.draft"):
            draft.unlink(missing_ok=True)  # of a process that was killed: whoever writes one holds the lock
        if lines:
            replace_file(path, b"".join(line + b"\n" for line in lines), durable=True)
        else:
            path.unlink()
            sync_folder(path.parent)
    return len(lines)


def check_snapshot_file(name: str) -> Path:
    """The file called `name`, absolute, once it is known that a snapshot can be added to it; see `set_damaged_aside`.

    The default name is only warned about, since nobody chose it: `keep_records` then finds another place.

    Raises:
        ValueError: it holds something else, or cannot be written.
    """
    path = Path(name).expanduser().absolute()
    try:
        set_damaged_aside(path)
        with _locked(Path(os.path.realpath(path))) as file:
            _usable(path, _read(file))
            with tempfile.TemporaryFile(dir=path.parent) as probe:
                write_all(probe.fileno(), PROBE)
                os.fsync(probe.fileno())
    except (ValueError, OSError) as error:
        reason = _reason(error)
        if name != DEFAULT_SNAPSHOT_FILE:
            raise ValueError(
                f"--snapshot-file {name} cannot be used: {reason}; name a file in a folder that can be written, "
                "or None to keep nothing"
            ) from error
        logger.warning(
            "requests that are unfinished at shutdown cannot be kept in %s (%s); they would go to another folder, "
            "which is logged then; --snapshot-file names a better place",
            *(path, reason),
        )
    return path


def set_damaged_aside(path: Path) -> None:
    """Rename a snapshot of which nothing can be read, so that a supervised server can start; nothing is removed.

    It is torn, or of another version. What looks like somebody else's text stays, for the caller to refuse.
    """
    path = Path(os.path.realpath(path))
    if not path.is_file() or not _is_damaged(path, path.read_bytes()):
        return
    with _locked(path) as file:
        data = _read(file)
        if not _is_damaged(path, data):
            return
        aside = next(
            other for n in itertools.count(1) if not (other := path.with_name(f"{path.name}.unreadable-{n}")).exists()
        )
        path.rename(aside)
        sync_folder(path.parent)
    logger.error(
        "no request in %s can be read (%s); the file is %s now, and its requests are not finished",
        *(path, _entries(path, data)[0].fault, aside),
    )


def keep_records(path: Path, records: list[dict[str, Any]]) -> Path | None:
    """Write records to `path`, or, where that fails, to a new private folder; returns the file, None if none works."""
    try:
        write_snapshot(path, records)
        return path
    except (ValueError, OSError) as error:
        logger.error("%s cannot be written (%s); looking for another place", path, _reason(error))
    for folder in _other_folders(path):
        try:
            other = Path(tempfile.mkdtemp(prefix="apt-jax-unfinished-", dir=folder)) / path.name
        except OSError:
            continue
        try:
            write_snapshot(other, records)
            return other
        except (ValueError, OSError):
            with contextlib.suppress(OSError):
                other.unlink(missing_ok=True)
                other.parent.rmdir()
    return None


def _other_folders(path: Path) -> Iterator[Path]:
    """Where a snapshot may go instead, the places that outlive a restart of the machine first."""
    yield path.parent
    for find in (Path.cwd, Path.home, lambda: Path(tempfile.gettempdir()), lambda: Path("/var/tmp")):
        with contextlib.suppress(OSError, RuntimeError):  # it is gone; there is none
            yield find()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The open file, made if need be; nobody else has it in here. It may be replaced and removed.

    Raises:
        OSError: it cannot be opened or is no file, or another process does not let go of it.
    """
    end = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        if path.exists():
            _check_kind(path, path.stat().st_mode)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, OWNER_ONLY)
        try:
            if _lock(path, file):
                try:
                    yield file
                finally:
                    if path.exists() and path.stat().st_size == 0:
                        path.unlink()  # it was made for the lock alone
                return
        finally:
            os.close(file)
        if time.monotonic() > end:
            raise TimeoutError(f"another process has held {path} for {LOCK_TIMEOUT_S:g} s")
        time.sleep(LOCK_RETRY_S)


def _lock(path: Path, file: int) -> bool:
    """Whether this process has the lock, and what it has locked is still what `path` names."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _check_kind(path: Path, mode: int) -> None:
    """Raises ValueError for anything but a file on disk."""
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is a folder" if stat.S_ISDIR(mode) else f"{path} is not a file on disk")


def _read(file: int) -> bytes:
    with open(file, "rb", closefd=False) as whole:
        return whole.read()


def _usable(path: Path, data: bytes) -> list[Entry]:
    """The lines of a snapshot that are not blank.

    Raises:
        ValueError: there are some, and none is a record.
    """
    entries = _entries(path, data)
    if entries and all(entry.record is None for entry in entries):
        raise ValueError(f"{entries[0].fault}; move the file away, or choose another one")
    return entries


def _entries(path: Path, data: bytes) -> list[Entry]:
    lines = enumerate(data.split(b"\n"), start=1)
    return [_entry(path, number, line) for number, line in lines if line.strip()]


def _is_damaged(path: Path, data: bytes) -> bool:
    """Whether this was a snapshot, and no line of it can be read."""
    entries = _entries(path, data)
    if not entries or any(entry.record is not None for entry in entries):
        return False
    return any(entry.line.startswith(START) for entry in entries) or not _is_text(data)


def _is_text(data: bytes) -> bool:
    try:
        return "\0" not in data.decode()
    except UnicodeDecodeError:
        return False


def _entry(path: Path, number: int, line: bytes) -> Entry:
    try:
        record = json.loads(line)
        version, kind = record["version"], record["kind"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return Entry(line, None, f"{path} line {number} is damaged, or no snapshot of a request")
    if version != VERSION:
        return Entry(line, None, f"{path} line {number} is of version {version}, this server reads {VERSION}")
    if kind not in ENDPOINTS_BY_PREFIX or not isinstance(record.get("id"), str):
        return Entry(line, None, f"{path} line {number} is no snapshot of a request of this server")
    return Entry(line, record)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "its folder does not exist"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
