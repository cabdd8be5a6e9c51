"""Classes of requests with promises of their own: mixed SLOs, priorities and workloads in one simulation."""

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_jax.files import read_json, read_text
from apt_jax.request import Slo

DEFAULT_CLASS = "default"
_NUMBERS = {"ttft_ms": "ttft_s", "tbt_ms": "tbt_s", "stall_ms": "stall_s"}
MAX_PRIORITY = 2**63 - 1
_COLUMNS = ("name", "share", *_NUMBERS, "priority", "user", "workload")


@dataclass(frozen=True)
class Terms:
    """What one request is promised: its class, SLO, priority (for `--scheduling-policy priority`) and user."""

    slo: Slo
    priority: int = 0
    name: str = DEFAULT_CLASS
    user: str | None = None


@dataclass(frozen=True)
class RequestClass:
    """A class: its share of the requests, its terms, and a workload of its own, else the simulation's."""

    share: float
    terms: Terms
    workload: str | None = None


def load_classes(path: Path, default: Slo) -> list[RequestClass]:
    """The classes of a CSV file, or of a JSON file with a list of objects.

    Columns: share (any positive numbers, in proportion); name, ttft_ms, tbt_ms, stall_ms, priority, user, workload as
    wanted. What is left out is the default.

    Raises:
        ValueError: there is no such file, or a cell is no such value; one sentence.
    """
    if not path.is_file():
        raise ValueError(f"--classes {path}: there is no such file")
    try:
        rows = _rows(path)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"--classes {path} cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"--classes {path} must be a list of objects")
    if not rows:
        raise ValueError(f"--classes {path} has no class")
    found = []
    for number, row in enumerate(rows, start=1):
        where = f"--classes {path}, class {number}"
        if None in row:  # csv's key for what is left
            raise ValueError(f"{where}: there are more cells than columns")
        if unknown := [str(key) for key in row if key not in _COLUMNS]:
            raise ValueError(f"{where}: {', '.join(unknown)} is unknown; known: {', '.join(_COLUMNS)}")
        share = number_of(row.get("share"), f"{where}: share")
        if share is None:
            raise ValueError(f"{where} has no share; give a number greater than 0")
        if not share > 0:
            raise ValueError(f"{where}: share={row.get('share')!r} must be greater than 0")
        terms = terms_of(row, default, f"{where}: ", name=str(row.get("name") or f"class {number}"))
        found.append(RequestClass(share, terms, str(row["workload"]) if row.get("workload") else None))
    names = [found_class.terms.name for found_class in found]
    if len(set(names)) < len(names):
        raise ValueError(f"--classes {path}: every class needs a name of its own")
    if not math.isfinite(sum(found_class.share for found_class in found)):
        raise ValueError(f"--classes {path}: the shares are too large to be added")
    return found


def _rows(path: Path) -> Any:
    if path.suffix == ".json":
        return read_json(path)
    return list(csv.DictReader(io.StringIO(read_text(path), newline="")))


def terms_of(
    row: Mapping[str, Any], default: Slo, where: str, name: str, columns: Mapping[str, str] | None = None
) -> Terms:
    """Terms from the cells `ttft_ms`, `tbt_ms`, `stall_ms`, `priority`, `user` of a row; empty ones are the default's.

    Args:
        row: cells by column.
        default: as the server's, part by part (`Slo.with_parts`).
        where: how a sentence about a bad cell begins.
        name: of the class.
        columns: their names in `row` where these differ.

    Raises:
        ValueError: a cell is no such number.
    """
    known = columns or {}
    names = {each: known.get(each, each) for each in (*_NUMBERS, "priority")}
    given = {each: number_of(row.get(column), f"{where}{column}") for each, column in names.items()}
    for each in _NUMBERS:
        value = given[each]
        if value is not None and not value > 0:
            raise ValueError(f"{where}{names[each]}={value:g} must be greater than 0")
    priority = given["priority"] or 0.0
    if priority % 1 or abs(priority) > MAX_PRIORITY:
        raise ValueError(f"{where}{names['priority']}={priority:g} must be a whole number")
    own = {part: value / 1000 for each, part in _NUMBERS.items() if (value := given[each]) is not None}
    user = row.get(known.get("user", "user"))
    return Terms(default.with_parts(**own), int(priority), name, str(user) if user else None)


def number_of(value: Any, what: str) -> float | None:
    """A cell's number; None of an empty one. ValueError says what it must be."""
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{what}={value!r} must be a number")
    return number
