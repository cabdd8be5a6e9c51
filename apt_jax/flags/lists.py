"""Lists in flags: values separated by commas, each of them once."""

import math
from collections.abc import Collection


def listed_names(flag: str, text: str, known: Collection[str] | None = None) -> list[str]:
    """The names in `text`, in its order.

    Raises:
        ValueError: one is empty, given twice, or not among `known`.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"{flag}={text!r} has an empty value; give names separated by commas")
    for name in names:
        if known is not None and name not in known:
            raise ValueError(f"{flag}={text!r}: unknown {name!r}; known: {', '.join(known)}")
    return _once(flag, text, names)


def listed_numbers(flag: str, text: str, low: float = 0.0, high: float = math.inf) -> list[float]:
    """The numbers in `text`, greater than `low` and at most `high`, in its order.

    Raises:
        ValueError: one is something else, or given twice.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if any(not low < number <= high for number in numbers):
        limit = "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{flag}={text!r} must be numbers separated by commas, greater than {low:g}{limit}")
    return _once(flag, text, numbers)


def listed_counts(flag: str, text: str, low: int) -> list[int]:
    """The whole numbers in `text`, at least `low`, in its order.

    Raises:
        ValueError: one is something else, or given twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 20 and int(part) >= low for part in parts):
        raise ValueError(f"{flag}={text!r} must be whole numbers separated by commas, at least {low}")
    return _once(flag, text, [int(part) for part in parts])


def _once[T](flag: str, text: str, values: list[T]) -> list[T]:
    for index, value in enumerate(values):
        if value in values[:index]:
            shown = f"{value:g}" if isinstance(value, float) else value
            raise ValueError(f"{flag}={text!r} has {shown} twice; leave one out")
    return values
