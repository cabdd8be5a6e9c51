"""Files that others read while they are replaced, and folders that are kept from start to start."""

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whose folder is made if need be; a reader sees the old file or the new one.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(data)
        except OSError:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)


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
