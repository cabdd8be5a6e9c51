"""Fields of bodies: their forms, how they are read, and their limits."""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from apt_jax.sampling.params import MAX_LOGIT_BIAS, RANGES
from apt_jax.serve.json_text import shown
from apt_jax.serve.openai.bodies.strict import at_most, check_length

MAX_STOP_STRINGS = 64
MOST_METADATA, MOST_KEY_CHARS, MOST_VALUE_CHARS = 16, 64, 512  # OpenAI's limits

PromptItem = str | tuple[int, ...]


def parse_prompt(value: object) -> tuple[PromptItem, ...]:
    """Every form of `prompt` as a tuple of texts or of token-id tuples.

    Raises:
        ValueError: another type, or nothing in it.
    """
    if isinstance(value, str):
        return (_not_empty(value, "prompt"),)
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return (tuple(value),)
        if all(isinstance(item, str) for item in value):
            return tuple(_not_empty(item, f"prompt {i}") for i, item in enumerate(value))
        if all(isinstance(item, list) and all(type(x) is int for x in item) for item in value):
            return tuple(tuple(_not_empty(item, f"prompt {i}")) for i, item in enumerate(value))
    if value == []:
        raise ValueError("prompt is empty; give at least one character or token id")
    if isinstance(value, list) and _has_floats(value) and not _has_floats(whole := _whole_numbers(value)):
        return parse_prompt(whole)
    raise ValueError(
        f"prompt must be a string, a list of strings, a list of token ids or a list of lists of token ids, "
        f"not {shown(value)}"
    )


def _has_floats(value: list[Any]) -> bool:
    return any(type(x) is float for item in value for x in (item if isinstance(item, list) else (item,)))


def _whole_numbers(value: list[Any]) -> list[Any]:
    return [[as_whole(x) for x in item] if isinstance(item, list) else as_whole(item) for item in value]


def check_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """Raises ValueError for a key or value that is too long."""
    for key, value in metadata.items():
        if len(key) > MOST_KEY_CHARS or len(value) > MOST_VALUE_CHARS:
            limits = f"{MOST_KEY_CHARS} characters, and its value {MOST_VALUE_CHARS}"
            raise ValueError(f"the key {shown(key)} of metadata may have {limits}")
    return metadata


Metadata = Annotated[dict[str, str], at_most(MOST_METADATA, "metadata"), AfterValidator(check_metadata)]


def parse_stop(value: object) -> tuple[str, ...] | None:
    """`stop` as a tuple of strings, None if it was null.

    Raises:
        ValueError: another type, or too many of them.
    """
    strings = [value] if isinstance(value, str) else value
    if strings is None:
        return None
    if isinstance(strings, list) and len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"stop has {len(strings)} strings, at most {MAX_STOP_STRINGS} are allowed")
    if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
        raise ValueError(f"stop must be a string or a list of strings, not {shown(value)}")
    return tuple(strings)


def parse_logit_bias(value: object) -> object:
    """Token ids, which JSON can only write as strings, as integers."""
    if not isinstance(value, dict):
        return value
    check_length(value, "logit_bias", MAX_LOGIT_BIAS)
    for key in value:
        digits = str(key)
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 18):
            raise ValueError(f"logit_bias has the key {shown(key)}, keys must be token ids")
    return {int(key): bias for key, bias in value.items()}


LOGIT_BIAS_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,18}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIAS,
        },
        {"type": "null"},
    ]
}


Text = Annotated[str, Field(min_length=1)]


def as_whole(value: object) -> object:
    """A whole number as an integer, also where it was written as 16.0, which JSON does not tell apart."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def limits(name: str) -> dict[str, float]:
    """The range that `SamplingParams` gives a field, as JSON schema keywords; null is not their concern."""
    low, high = next((low, high) for field, low, high in RANGES if field == name)
    keywords = {"minimum": low} if high == math.inf else {"minimum": low, "maximum": high}
    if name == "top_p":
        keywords["exclusiveMinimum"] = keywords.pop("minimum")
    return keywords


def ranged(name: str) -> Any:
    """A sampling field that may be left out; `SamplingParams` checks its range, the schema only shows it."""
    return Field(default=None, json_schema_extra=limits(name))  # type: ignore[arg-type]


Whole = Annotated[int, BeforeValidator(as_whole)]
TokenId = Annotated[Whole, Field(ge=0)]
PromptForms = (
    Text
    | Annotated[list[Text], Field(min_length=1)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
)


def _not_empty[T: (str, list[int])](value: T, name: str) -> T:
    if not value:
        raise ValueError(f"{name} is empty; give at least one character or token id")
    return value
