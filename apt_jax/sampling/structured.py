"""What structured outputs may ask for; whether it can be compiled is for `tokenization/grammars/` to find."""

from collections.abc import Mapping
from typing import Any

MAX_CHOICES = 10_000
MAX_SHOWN_CHARS = 200  # of a value in a sentence

STRUCTURED: dict[str, tuple[type, ...]] = {
    "json": (dict, str), "json_object": (bool,), "regex": (str,), "choice": (list, tuple), "grammar": (str,),
}  # fmt: skip


FORMS = {
    "json": "a JSON schema, an object or its text", "json_object": "true", "regex": "a text that is not empty",
    "choice": "a list of texts, at least one", "grammar": "a text that is not empty",
}  # fmt: skip


def check_structured(asked: object) -> None:
    """Raise ValueError unless it asks for one form of structured output; whether it can be compiled is not checked."""
    if not isinstance(asked, Mapping):
        raise ValueError(
            f"structured_outputs={repr(asked)[:MAX_SHOWN_CHARS]} must be an object with one of {', '.join(STRUCTURED)}"
        )
    if len(asked) != 1 or not asked.keys() <= STRUCTURED.keys():
        names = " and ".join(str(name)[:MAX_SHOWN_CHARS] for name in asked)
        found = f"has {names[:MAX_SHOWN_CHARS]}" if asked else "is empty"
        raise ValueError(f"structured_outputs {found}; give exactly one of {', '.join(STRUCTURED)}")
    ((kind, value),) = asked.items()
    if kind == "choice" and isinstance(value, list | tuple) and len(value) > MAX_CHOICES:
        raise ValueError(f"structured_outputs choice has {len(value)} texts, at most {MAX_CHOICES} are allowed")
    texts: Any = value if kind == "choice" else ()
    if kind == "json_object" and value is False:
        raise ValueError("structured_outputs json_object=false asks for nothing; give true, or leave it out")
    if not isinstance(value, STRUCTURED[kind]) or value in ("", [], ()):
        shown = repr(value)[:MAX_SHOWN_CHARS]
        raise ValueError(f"structured_outputs {kind}={shown} must be {FORMS[kind]}")
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("structured_outputs choice has something that is no text; every choice must be one")
