"""What structured outputs may ask for; whether it can be compiled is for `tokenization/grammars/` to find."""

from collections.abc import Mapping
from typing import Any

MAX_CHOICES = 10_000
MAX_SHOWN_CHARS = 200  # of a value in a sentence

STRUCTURED: dict[str, tuple[type, ...]] = {
    "json": (dict, str), "json_object": (bool,), "regex": (str,), "choice": (list, tuple), "grammar": (str,),
}  # fmt: skip


def check_structured(asked: object) -> None:
    """Raise ValueError unless it asks for one form of structured output; whether it can be compiled is not checked."""
    if not isinstance(asked, Mapping):
        raise ValueError(
            f"structured_outputs={repr(asked)[:MAX_SHOWN_CHARS]} must be an object with one of {', '.join(STRUCTURED)}"
        )
    if len(asked) != 1 or not asked.keys() <= STRUCTURED.keys():
        raise ValueError(f"structured_outputs has {sorted(asked)}, give exactly one of {', '.join(STRUCTURED)}")
    ((kind, value),) = asked.items()
    if kind == "choice" and isinstance(value, list | tuple) and len(value) > MAX_CHOICES:
        raise ValueError(f"structured_outputs choice has {len(value)} texts, at most {MAX_CHOICES} are allowed")
    texts: Any = value if kind == "choice" else ()
    if not isinstance(value, STRUCTURED[kind]) or value in ("", [], (), False):
        shown, wanted = repr(value)[:MAX_SHOWN_CHARS], STRUCTURED[kind][0].__name__
        raise ValueError(f"structured_outputs {kind}={shown} must be a {wanted} and not empty")
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("structured_outputs choice has something that is no text; every choice must be one")
