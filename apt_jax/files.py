"""Files that others read while they are replaced, those that users bring, and folders kept from start to start."""

import atexit
import contextlib
import errno
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

OWNER_ONLY, EVERYBODY = 0o600, 0o666  # modes of new files; the process's umask takes bits away
_CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}


class Unreadable(OSError):
    """What has a file's name cannot be read; one sentence with the name."""


def read_file(path: Path, *, pipe: bool = False) -> bytes:
    """The bytes of a file on disk, or with `pipe` those that come out of a pipe or a device.

    Never waits for somebody to open the other end of a pipe.

    Raises:
        FileNotFoundError: there is nothing of that name.
        Unreadable: it is a folder, a pipe that may not be one or that nobody writes to, or reading it fails.
    """
    with _opened(path, pipe) as file:
        try:
            os.set_blocking(file.fileno(), True)
            data = file.read()
            is_pipe = stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
        except OSError as error:
            raise Unreadable(f"{path} cannot be read: {_words(error)}") from error
    if is_pipe and not data:
        raise Unreadable(f"{path} is a pipe that nobody writes to; give a file")
    return data


def check_file(path: Path) -> None:
    """Raises what `read_file` raises, without reading; for files that a library opens, which could wait for ever."""
    with _opened(path, pipe=False):
        pass


def _opened(path: Path, pipe: bool) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {_words(error)}") from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or (pipe and not stat.S_ISDIR(mode)):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
    raise Unreadable(f"{path} is {kind}; a file is needed there")


def reason_of(error: OSError) -> str:
    """What went wrong, in words, with the file's name where it is known."""
    words = _words(error)
    return words if error.filename is None else f"{os.fsdecode(error.filename)}: {words}"


def _words(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    return error.strerror[:1].lower() + error.strerror[1:]


def read_text(path: Path, *, pipe: bool = False) -> str:
    """The text of a UTF-8 file (see `read_file`); a byte order mark is left out.

    Raises:
        ValueError: it is not UTF-8; one sentence without the file's name.
        FileNotFoundError: there is nothing of that name.
        Unreadable: it cannot be read; one sentence.
    """
    data = read_file(path, pipe=pipe)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte 0x{data[error.start]:02x} at {error.start})") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: it is not JSON, or nested too deeply; one sentence without the file's name.
        FileNotFoundError: there is nothing of that name.
        Unreadable: it cannot be read; one sentence.
    """
    try:
        return json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def replace_file(path: Path, data: bytes, *, mode: int = OWNER_ONLY, durable: bool = False) -> None:
    """Write `data` to `path`, whose folder is made if need be; a reader sees the old file or the new one.

    A link stays one, and what is no file on disk (/dev/stdout, a pipe) is simply written to. With a `mode` for others
    too, a file that was there keeps its own. `durable`: it is on the disk when this returns, also if power fails.

    Raises:
        OSError: it cannot be written; `path`, which the error names, is as it was.
    """
    before = path.stat().st_mode if path.exists() else None
    try:
        if before is not None and not stat.S_ISREG(before):
            path.write_bytes(data)
            return
        real = Path(os.path.realpath(path))
        real.parent.mkdir(parents=True, exist_ok=True)
        if mode != OWNER_ONLY:
            mode = mode & ~_umask() if before is None else stat.S_IMODE(before)
        draft, name = _draft_of(real)
        try:
            try:
                write_all(draft, data)
                if mode != OWNER_ONLY:
                    os.fchmod(draft, mode)
                if durable:
                    sync(draft)
            finally:
                os.close(draft)
            os.replace(name, real)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        if durable:
            sync_folder(real.parent)
    except OSError as error:  # of a write it has no name, otherwise the draft's
        raise OSError(error.errno, error.strerror, str(path)) from error


def _draft_of(path: Path) -> tuple[int, str]:
    """A new file beside `path`, open to be written, and its name."""
    return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".draft")


def write_all(file: int, data: bytes) -> None:
    """Write all of `data` to an open file descriptor.

    Raises:
        OSError: only a part of it, or nothing, was written.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def check_readable(path: Path, flag: str) -> None:
    """Raises ValueError if there is nothing to read at `path`, named by `flag`; checks before the work starts."""
    if not os.path.exists(path):
        why = "is a link to no file" if path.is_symlink() else "does not exist"
        raise ValueError(f"{flag} {path} {why}; give the name of a file")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{flag} {path} cannot be read: permission denied; choose another file")


def check_writable(path: Path | None, flag: str, *, in_place: bool = False) -> None:
    """Raises ValueError if a result cannot be written to `path`, named by `flag`; checks before the work starts.

    Makes a draft beside it, and writes no bytes to a device: a full disk or device fails then. A pipe is left alone,
    whose reader would take an end for that of the result. `in_place`: a file that is there is not replaced but grows,
    which its folder need not allow.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {path}: there is no folder {path.parent}; make it, or choose another file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{flag} {path} cannot be written: permission denied; choose another file")
    if in_place and path.is_file() and not os.access(path.parent, os.W_OK):
        return
    try:
        _try_to_write(path)
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {_words(error)}; choose another file") from error


def _try_to_write(path: Path) -> None:
    if path.is_fifo():
        return
    if path.exists() and not path.is_file():
        device = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            os.write(device, b"")
        finally:
            os.close(device)
        return
    draft, name = _draft_of(Path(os.path.realpath(path)))
    try:
        write_all(draft, b"\n")
    finally:
        os.close(draft)
        os.unlink(name)


def check_apart(paths: Mapping[str, Path | None]) -> None:
    """Raises ValueError if two flags name one file on disk, of which the second result would replace the first."""
    seen: dict[str, str] = {}
    for flag, path in paths.items():
        if path is None or (path.exists() and not path.is_file()):
            continue
        first = seen.setdefault(os.path.realpath(path), flag)
        if first != flag:
            raise ValueError(f"{first} and {flag} both name {path}; give each a file of its own")


def check_plot(path: Path | None) -> None:
    """Raises ValueError if no plot can be drawn to `path` of `--plot`; for a check before the work starts."""
    if path is None:
        return
    check_writable(path, "--plot")
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ValueError("--plot needs matplotlib; install it with: pip install 'apt-jax[plots]'") from error
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--plot {path}: the format {path.suffix!r} is unknown; known: {', '.join(sorted(known))}")


def sync(file: int) -> None:
    """Wait until what was written to a descriptor is on the disk, where that kind of file can be waited for.

    Raises:
        OSError: it could not be written.
    """
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """`sync` of the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def kept_folder(path: Path, what: str) -> Path:
    """`path`, made if need be, with the user's home folder for ~; it may be read-only if there is something in it.

    Where it cannot be had (no home folder, no permission, a read-only file system) a `temporary_folder`.
    """
    try:
        folder = path.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK) or any(folder.iterdir()):
            return folder
        return temporary_folder(what, f"{folder} is not writable")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        return temporary_folder(what, str(error))


def temporary_folder(what: str, reason: str) -> Path:
    """A folder that is there until this process ends; a warning says why `what` is not kept longer."""
    folder = Path(tempfile.mkdtemp(prefix="apt-jax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    logger.warning("%s are not kept for the next start: %s; they are in %s until this one ends", what, reason, folder)
    return folder


def _umask() -> int:
    """The process's, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
