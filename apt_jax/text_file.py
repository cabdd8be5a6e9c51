"""Text and JSON files that users bring, whatever is in them."""

import json
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; a byte order mark is left out.

    Raises:
        ValueError: it is not UTF-8; one sentence without the file's name.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte 0x{data[error.start]:02x} at {error.start})") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: it is not JSON, or nested too deeply; one sentence without the file's name.
        OSError: it cannot be read.
    """
    try:
        return json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
