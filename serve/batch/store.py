"""Files and batches of the Batch API on disk: one folder, one server, each file and batch of the client who made it.

A file is its bytes, `files/ID.jsonl`, and what is known of it, `files/ID.json`, which is written last: without it the
bytes are not there. A batch is `batches/ID.json`, replaced as a whole, and its answers so far, in a results file. So
nothing is ever half there, whenever the server is killed.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from apt_jax.files import OWNER_ONLY, reason_of, replace_file, sync
from apt_jax.serve.errors import BadRequest, NotFound

FILE_ID = re.compile(r"file-[0-9a-f]{24}")
BATCH_ID = re.compile(r"batch_[0-9a-f]{24}")
ENDED = ("completed", "failed", "expired", "cancelled")
MOST_FILES = 1000  # of one owner, answers included
MOST_BATCHES = 1000

logger = logging.getLogger("apt_jax.serve")


def owner_of(api_key: str | None) -> str:
    """Who a request with this key is from; the key itself is not kept. None: everybody, where no key is needed."""
    return "" if api_key is None else hashlib.sha256(api_key.encode()).hexdigest()


class BatchStore:
    """Files and batches below `folder`, which is made if need be.

    Raises:
        ValueError: another server uses the folder.
        OSError: it cannot be used.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files, self._batches = folder / "files", folder / "batches"
        for each in (self._files, self._batches):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._changing = threading.Lock()
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, OWNER_ONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ValueError(f"--batch-dir {folder} is used by another server; give each its own") from error
        for path in self._files.glob("*.jsonl"):  # of an upload that did not end, or an answer that was begun
            if FILE_ID.fullmatch(path.stem) and not path.with_suffix(".json").exists():
                path.unlink()
        kept = {self.results_of(batch["id"]) for _, batch in self.unfinished()}
        for path in self._batches.glob("*.results.jsonl"):  # of a batch that has ended
            if BATCH_ID.fullmatch(path.name.partition(".")[0]) and path not in kept:
                path.unlink()
        for path in (*self._files.glob(".*.draft"), *self._batches.glob(".*.draft")):
            path.unlink()

    def close(self) -> None:
        """Let another server use the folder."""
        os.close(self._lock)

    # -- files ----------------------------------------------------------------------------------------------------

    def add_file(
        self, owner: str, name: str, purpose: str, pieces: Iterable[bytes], file_id: str | None = None
    ) -> dict[str, Any]:
        """Keep a file; with `file_id`, one of the server's own that may be there already and is replaced.

        Raises:
            BadRequest: the owner has too many.
            OSError: it cannot be written; nothing is kept.
        """
        if file_id is None:
            if len(self._of(owner, self._files)) >= MOST_FILES:
                raise BadRequest(f"there are {MOST_FILES} files of this client already; delete some")
            file_id = f"file-{secrets.token_hex(12)}"
        path, size = self._files / f"{file_id}.jsonl", 0
        try:
            with os.fdopen(
                os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, OWNER_ONLY), "wb"
            ) as file:
                for piece in pieces:
                    size += file.write(piece)
                file.flush()
                sync(file.fileno())
            known = {
                "id": file_id, "object": "file", "bytes": size, "created_at": int(time.time()), "filename": name,
                "purpose": purpose, "status": "processed",
            }  # fmt: skip
            self._save(self._files / f"{file_id}.json", {**known, "owner": owner})
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        return known

    def file(self, owner: str, file_id: str) -> dict[str, Any]:
        """What is known of a file.

        Raises:
            NotFound: there is none.
        """
        return self._find(self._files, FILE_ID, owner, file_id, "file")

    def files(self, owner: str) -> list[dict[str, Any]]:
        """Those of one client, the newest first."""
        return self._of(owner, self._files)

    def path_of(self, file_id: str) -> Path:
        """The bytes of a file that is there."""
        return self._files / f"{file_id}.jsonl"

    def delete_file(self, owner: str, file_id: str) -> None:
        """Delete a file.

        Raises:
            NotFound: there is none.
            BadRequest: a batch that is under way reads it.
        """
        self.file(owner, file_id)
        using = [b["id"] for b in self.batches(owner) if b["input_file_id"] == file_id and b["status"] not in ENDED]
        if using:
            raise BadRequest(f"{file_id} is the input of {using[0]}, which is under way; cancel that first")
        (self._files / f"{file_id}.json").unlink()
        with contextlib.suppress(OSError):
            self.path_of(file_id).unlink()

    # -- batches --------------------------------------------------------------------------------------------------

    def add_batch(self, owner: str, batch: dict[str, Any]) -> dict[str, Any]:
        """Keep a new batch, which gets an id.

        Raises:
            BadRequest: the owner has too many that are under way.
        """
        if sum(known["status"] not in ENDED for known in self.batches(owner)) >= MOST_BATCHES:
            raise BadRequest(f"there are {MOST_BATCHES} batches of this client under way already; wait for some to end")
        batch = {"id": f"batch_{secrets.token_hex(12)}", "object": "batch", **batch}
        self._save(self._batches / f"{batch['id']}.json", {**batch, "owner": owner})
        return batch

    def batch(self, owner: str, batch_id: str) -> dict[str, Any]:
        """A batch.

        Raises:
            NotFound: there is none.
        """
        return self._find(self._batches, BATCH_ID, owner, batch_id, "batch")

    def batches(self, owner: str) -> list[dict[str, Any]]:
        """Those of one client, the newest first."""
        return self._of(owner, self._batches)

    def unfinished(self) -> list[tuple[str, dict[str, Any]]]:
        """Owner and batch of all that have not ended, the oldest first."""
        found = [(known.pop("owner"), known) for known in self._read_all(self._batches)]
        return [(owner, batch) for owner, batch in reversed(found) if batch["status"] not in ENDED]

    def update(self, owner: str, batch_id: str, unless: Collection[str] = ENDED, **changes: Any) -> dict[str, Any]:
        """A batch with `changes`, as it is kept from now on; as it was if its status is one of `unless`. Thread-safe.

        Raises:
            NotFound: there is none.
        """
        with self._changing:
            batch = self.batch(owner, batch_id)
            if batch["status"] in unless:
                return batch
            changed = {**batch, **changes}
            self._save(self._batches / f"{batch_id}.json", {**changed, "owner": owner})
            return changed

    def results_of(self, batch_id: str) -> Path:
        """Where the answers of a batch are kept as they come."""
        return self._batches / f"{batch_id}.results.jsonl"

    # -- both -----------------------------------------------------------------------------------------------------

    def _save(self, path: Path, known: dict[str, Any]) -> None:
        replace_file(path, json.dumps(known).encode() + b"\n", durable=True)

    def _find(self, folder: Path, pattern: re.Pattern[str], owner: str, name: str, what: str) -> dict[str, Any]:
        known = self._read(folder / f"{name}.json") if pattern.fullmatch(name) else None
        if known is None or known.pop("owner") != owner:
            raise NotFound(f"there is no {what} {name[:80]!r}")
        return known

    def _of(self, owner: str, folder: Path) -> list[dict[str, Any]]:
        return [known for known in self._read_all(folder) if known.pop("owner") == owner]

    def _read_all(self, folder: Path) -> Iterator[dict[str, Any]]:
        """The newest first."""
        known = filter(None, (self._read(path) for path in folder.glob("*.json")))
        yield from sorted(known, key=lambda each: (each["created_at"], each["id"]), reverse=True)

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            known = json.loads(path.read_bytes())
            return known if {"id", "owner", "created_at"} <= known.keys() else None
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.error("%s cannot be read: %s", path, reason_of(error))
            return None
        except (ValueError, AttributeError):
            logger.error("%s is damaged and is left out", path)
            return None
