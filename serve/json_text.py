"""JSON from clients and for them, so that no other client waits for it.

What they send is bounded before it is parsed, so that parsing takes neither long nor much memory.

The parser holds Python's lock from the first byte to the last, and makes an object of 56 bytes and more of two bytes
of text. What it will make is counted first, outside of strings, which costs a fraction of the parsing. What they get is
written in pieces where it is large.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pydantic_core

from apt_jax.serve.errors import BadRequest

MAX_VALUES = 262_144  # of every kind; a batch of 128 prompts of 2,048 token ids
MAX_FIELDS = 32_768  # lists, objects and their fields: the costly ones
SHOWN_VALUE_CHARS = 60
PIECE_BYTES = 1 << 16
LIST_SLICE = 64
LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity
_SLICE_BYTES = 1 << 18
_FIRST_BYTES = 4096
_NOT_STRUCTURE = bytes(sorted(set(range(256)) - set(b'",:[{')))


@dataclass(frozen=True)
class Structure:
    """What a JSON text holds: all values, and of these the lists and objects, with the fields of the latter."""

    values: int
    fields: int


def structure(data: bytes) -> Structure:
    """Count what `data` holds outside of its strings, until it is too much. Pure.

    Of what is not JSON, at least what a parser reads of it is counted.
    """
    commas, colons, opened = data.count(b","), data.count(b":"), data.count(b"[") + data.count(b"{")
    most = Structure(commas + opened + 1, colons + opened)
    if most.values <= MAX_VALUES and most.fields <= MAX_FIELDS:  # even with those in strings
        return most
    commas = colons = opened = at = in_string = 0
    while at < len(data):
        piece = data[at : at + _SLICE_BYTES]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2 and len(piece) > 1:
            piece = piece[:-1]  # a backslash stays with what it escapes
        at += len(piece)
        kept = piece.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_STRUCTURE)
        marks = np.frombuffer(kept, np.uint8)
        quotes = marks == ord('"')
        outside = marks[(np.add.accumulate(quotes, dtype=np.uint8) + in_string) % 2 == 0]
        in_string = (in_string + int(np.count_nonzero(quotes))) % 2
        found = np.bincount(outside, minlength=256)
        commas, colons = commas + int(found[ord(",")]), colons + int(found[ord(":")])
        opened += int(found[ord("[")] + found[ord("{")])
        if commas + opened >= MAX_VALUES or colons + opened > MAX_FIELDS:
            break
    return Structure(commas + opened + 1, colons + opened)


def parse_json(data: bytes, what: str = "the body") -> Any:
    """The JSON value in `data`; errors call it `what`.

    Raises:
        BadRequest: not JSON, not UTF-8, NaN, nested too deeply, or of more than MAX_VALUES values or MAX_FIELDS lists,
            objects and fields.
    """
    found = structure(data)
    fields = found.fields, MAX_FIELDS, "lists, objects and fields"
    try:
        for count, limit, name in (fields, (found.values, MAX_VALUES, "values")):
            if count > limit:
                pydantic_core.from_json(data[:_FIRST_BYTES], allow_inf_nan=False, allow_partial="trailing-strings")
                raise BadRequest(f"{what} has more than {limit} {name}, the most that is read; send several requests")
        return pydantic_core.from_json(data, allow_inf_nan=False)
    except BadRequest:
        raise
    except ValueError as error:
        raise BadRequest(f"{what} is not valid JSON: {error}") from error


@dataclass(frozen=True)
class Joined:
    """A long list or text that comes in `parts`, lists or strings; to be written once."""

    parts: Iterator[list[Any]] | Iterator[str]
    is_text: bool = False


def json_pieces(value: object) -> Iterator[bytes]:
    """A JSON value, written in pieces of about PIECE_BYTES; an iterator is a list whose items are made when written."""
    held: list[bytes] = []
    size = 0
    for part in _parts(value):
        held.append(part)
        size += len(part)
        if size >= PIECE_BYTES:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def _parts(value: object) -> Iterator[bytes]:
    if isinstance(value, dict):
        for number, (name, inner) in enumerate(value.items()):
            yield (b"," if number else b"{") + pydantic_core.to_json(name) + b":"
            yield from _parts(inner)
        yield b"}" if value else b"{}"
    elif isinstance(value, Iterator):
        yield b"["
        for number, inner in enumerate(value):
            if number:
                yield b","
            yield from _parts(inner)
        yield b"]"
    elif isinstance(value, Joined):
        yield b'"' if value.is_text else b"["
        comma = b"" if value.is_text else b","
        for number, part in enumerate(value.parts):
            yield (comma if number else b"") + pydantic_core.to_json(part)[1:-1]
        yield b'"' if value.is_text else b"]"
    elif isinstance(value, list) and len(value) > LIST_SLICE:
        for at in range(0, len(value), LIST_SLICE):
            yield (b"," if at else b"[") + pydantic_core.to_json(value[at : at + LIST_SLICE])[1:-1]
        yield b"]"
    else:
        yield pydantic_core.to_json(value)


def shown(value: object) -> str:
    """A value as JSON, cut to what fits in a sentence; no more than that is written of a large one."""
    if isinstance(value, str):
        value = value[: SHOWN_VALUE_CHARS + 1]
    pieces = json.JSONEncoder(ensure_ascii=True, default=str).iterencode(value)
    text = "".join(islice(pieces, SHOWN_VALUE_CHARS + 1))
    return text if len(text) <= SHOWN_VALUE_CHARS else f"{text[:SHOWN_VALUE_CHARS]}..."


def finite(logprob: float) -> float:
    """A number that JSON can write."""
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB
