"""Cached pages of unfinished requests on disk, beside their snapshot: `--snapshot-cache`.

A file for each sample, in the folder SNAPSHOT.caches: a line of JSON that says what the pages are of, then each page
behind a SHA-256 of that line, its number and its bytes. So a page is taken only in its own place, by the same weights
and for the same tokens; whatever is damaged, missing or of something else is computed again.
"""

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from apt_jax.engine.interface import ServingEngine
from apt_jax.files import OWNER_ONLY, check_file, reason_of
from apt_jax.serve.runtime.samples import Sample

VERSION = 1
MOST_HEADER_BYTES = 65536
DIGEST_BYTES = hashlib.sha256().digest_size

logger = logging.getLogger("apt_jax.serve")


@dataclass
class Kept:
    """Of a snapshot: samples whose pages were written, the tokens that these pages hold, and bytes of files."""

    num_samples: int = 0
    num_tokens: int = 0
    num_bytes: int = 0


class SnapshotCache:
    """The folder of page files of one snapshot; nothing is made before there is something to keep.

    Every method that takes an engine belongs to that engine's thread.
    """

    def __init__(self, snapshot: Path):
        self.folder = snapshot.with_name(f"{snapshot.name}.caches")

    def keep(self, engine: ServingEngine, samples: Iterable[Sample]) -> Kept:
        """Write the pages that the engine has cached of each sample's tokens.

        Raises:
            OSError: the disk is full, or nothing can be written there; what was written before stays.
        """
        kept, pages = Kept(), engine.saved_pages
        for sample in samples if pages is not None else ():
            assert pages is not None
            tokens = tokens_of(sample)
            if (saved := pages.save(tokens, sample.cache_salt)) is None:
                continue
            held = saved.num_pages * pages.block_size
            header = _header(saved.form, tokens[:held], sample.cache_salt, saved.num_pages, saved.page_bytes)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            path = self._path(sample.request_id)
            try:
                with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, OWNER_ONLY), "wb") as file:
                    file.write(header)
                    for number, page in enumerate(saved.pages):
                        file.write(_digest(header, number, page))
                        file.write(page)
                    kept.num_bytes += file.tell()
            except OSError:
                path.unlink(missing_ok=True)
                raise
            kept.num_samples += 1
            kept.num_tokens += held
        return kept

    def restore(self, engine: ServingEngine, samples: Iterable[Sample]) -> int:
        """Enter the kept pages of samples in the engine's prefix cache; how many of their tokens are cached now."""
        if not self.folder.is_dir() or (pages := engine.saved_pages) is None:
            return 0
        found = 0
        for sample in samples:
            path, tokens = self._path(sample.request_id), tokens_of(sample)
            try:
                check_file(path)
                with open(path, "rb") as file:
                    line = file.readline(MOST_HEADER_BYTES)
                    header = json.loads(line)
                    form, count, size = header["form"], int(header["pages"]), int(header["page_bytes"])
                    held = tokens[: count * pages.block_size]
                    if line != _header(form, held, sample.cache_salt, count, size):
                        raise ValueError("it is not of these tokens")
                    contents = _pages(file, line, count, size, path)
                    found += pages.restore(held, sample.cache_salt, form, contents)
            except FileNotFoundError:
                continue
            except OSError as error:
                logger.error("%s; its request computes its prompt again", reason_of(error))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                logger.error("%s is damaged (%s); its request computes its prompt again", path, error)
        return found

    def drop(self, request_ids: Iterable[str]) -> None:
        """Remove the files of samples that have ended, and the folder once it is empty."""
        for request_id in request_ids:
            try:
                self._path(request_id).unlink(missing_ok=True)
            except OSError as error:
                logger.error("%s; remove it by hand", reason_of(error))
        try:
            self.folder.rmdir()
        except OSError:  # there is none, or others' files are in it
            return

    def _path(self, request_id: str) -> Path:
        """A request's id may be anything."""
        name = hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return self.folder / f"{name}.pages"


def tokens_of(sample: Sample) -> list[int]:
    """All known tokens of a sample."""
    return [*sample.prompt_token_ids, *sample.output_token_ids]


def _header(form: dict[str, Any], tokens: Sequence[int], salt: str | None, num_pages: int, page_bytes: int) -> bytes:
    """The first line of a file."""
    of = hashlib.sha256(array("i", tokens).tobytes() + repr(salt).encode("utf-8", "surrogatepass")).hexdigest()
    fields = {"version": VERSION, "form": form, "tokens": of, "pages": num_pages, "page_bytes": page_bytes}
    return json.dumps(fields).encode() + b"\n"


def _digest(header: bytes, number: int, page: bytes) -> bytes:
    return hashlib.sha256(header + number.to_bytes(8, "little") + page).digest()


def _pages(file: BinaryIO, header: bytes, count: int, size: int, path: Path) -> Iterator[bytes]:
    """The pages of a file up to the first that is damaged."""
    for number in range(count):
        digest, page = file.read(DIGEST_BYTES), file.read(size)
        if digest != _digest(header, number, page):
            logger.error("%s is damaged after %d of %d pages; the rest is computed again", path, number, count)
            return
        yield page
