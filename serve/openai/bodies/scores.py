"""The body of POST /score, checked strictly; the fields have vLLM's names."""

from typing import Annotated, ClassVar

from pydantic import Field, PlainValidator, ValidationInfo

from apt_jax.serve.errors import BadRequest
from apt_jax.serve.json_text import shown
from apt_jax.serve.openai.bodies.fields import Text
from apt_jax.serve.openai.bodies.neutral_fields import OF_SCORES, Fields
from apt_jax.serve.openai.bodies.requests import PromptRequest
from apt_jax.serve.openai.bodies.slo import SloBody
from apt_jax.serve.openai.bodies.strict import parse_body


def parse_texts(value: object, info: ValidationInfo) -> tuple[str, ...]:
    """A text or a list of texts.

    Raises:
        ValueError: something else, or nothing.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{info.field_name} must be a text or a list of texts, not {shown(value)}")
    return tuple(texts)


Texts = Annotated[
    tuple[str, ...],
    PlainValidator(parse_texts, json_schema_input_type=str | Annotated[list[str], Field(min_length=1)]),
]


class ScoreRequest(PromptRequest):
    """How likely are texts after others? `text_1` goes before each of `text_2`, or each before its own."""

    NEUTRAL: ClassVar[Fields] = OF_SCORES

    text_1: Texts
    text_2: Texts
    truncate_prompt_tokens: None = None
    cache_salt: Text | None = None
    slo: SloBody | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """What is before, and what is scored."""
        firsts = self.text_1 * (len(self.text_2) if len(self.text_1) == 1 else 1)
        return list(zip(firsts, self.text_2, strict=True))


def parse_score(value: object) -> ScoreRequest:
    """Check a parsed body of /score.

    Raises:
        BadRequest: one sentence that names the field, and its value where that helps.
    """
    if isinstance(value, dict) and value.get("truncate_prompt_tokens") is not None:
        raise BadRequest("truncate_prompt_tokens would cut off what is scored; leave it out", "truncate_prompt_tokens")
    body = parse_body(value, ScoreRequest)
    if len(body.text_1) not in (1, len(body.text_2)):
        message = f"text_1 has {len(body.text_1)} texts and text_2 {len(body.text_2)}; give one, or as many"
        raise BadRequest(message, "text_1")
    for number, text in enumerate(body.text_2):
        if not text:
            raise BadRequest(f"text_2 {number} is empty; give at least one character", "text_2")
    return body
