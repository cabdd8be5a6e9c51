"""Tokenizers on disk in the form in which they were read, so that a second start need not import transformers for one.

That import takes seconds. The key is a hash of the folder's files and the versions of both libraries. The
folder is trusted like that of compiled programs.
"""

import contextlib
import hashlib
import json
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from apt_jax.files import Unreadable, check_file, read_file, read_json, replace_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_SOURCES = ("*.json", "*.txt", "*.model", "*.jinja", "additional_chat_templates/*.jinja")
_FORM = 2  # of what is kept; another number makes all files new

logger = logging.getLogger(__name__)


def check_tokenizer_files(folder: Path) -> None:
    """Raises Unreadable if one of the files of a tokenizer is there and cannot be read."""
    for path in (*(folder / name for name in TOKENIZER_FILES), *folder.glob("additional_chat_templates/*.jinja")):
        with contextlib.suppress(FileNotFoundError):
            check_file(path)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


class TokenizerStore:
    """A folder of tokenizers. Reading and writing never fail a start: an unusable one is read from its source."""

    def __init__(self, folder: Path):
        self._folder = folder

    def load(self, source: Path) -> dict[str, Any] | None:
        """What was saved for the model's folder `source` as its files are now; None if nothing was."""
        path = self._path(source)
        try:
            return read_json(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be used (%s); reading %s again", path, error, source)
            return None

    def save(self, source: Path, fields: dict[str, Any]) -> None:
        """Keep `fields`, which JSON can hold, for `source` as its files are now."""
        path = self._path(source)
        try:
            replace_file(path, json.dumps(fields).encode())
        except OSError as error:
            logger.warning("cannot keep a tokenizer at %s (%s)", path, error)

    def _path(self, source: Path) -> Path:
        digest = hashlib.sha256(repr((_FORM, _version("transformers"), _version("tokenizers"))).encode())
        for pattern in _SOURCES:
            for path in sorted(source.glob(pattern)):
                with contextlib.suppress(FileNotFoundError, Unreadable):  # it is no file of the tokenizer
                    data = read_file(path)
                    digest.update(f"{path.relative_to(source)} {len(data)} ".encode())
                    digest.update(data)
        return self._folder / f"{digest.hexdigest()}.json"
