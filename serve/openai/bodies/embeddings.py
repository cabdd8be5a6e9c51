"""The body of POST /v1/embeddings, checked strictly."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PlainValidator

from apt_jax.serve.errors import BadRequest
from apt_jax.serve.openai.bodies.fields import PromptForms, PromptItem, parse_prompt
from apt_jax.serve.openai.bodies.neutral_fields import OF_EMBEDDINGS, Fields
from apt_jax.serve.openai.bodies.requests import PromptRequest
from apt_jax.serve.openai.bodies.slo import SloBody
from apt_jax.serve.openai.bodies.strict import parse_body


def parse_input(value: object) -> tuple[PromptItem, ...]:
    """Every form of `input`, which are those of `prompt`.

    Raises:
        ValueError: another type, or nothing in it.
    """
    try:
        return parse_prompt(value)
    except ValueError as error:
        raise ValueError(str(error).replace("prompt", "input", 1)) from error


class EmbeddingRequest(PromptRequest):
    """Body of POST /v1/embeddings."""

    NEUTRAL: ClassVar[Fields] = OF_EMBEDDINGS

    input: Annotated[tuple[PromptItem, ...], PlainValidator(parse_input, json_schema_input_type=PromptForms)]
    encoding_format: Literal["float", "base64"] | None = None
    normalize: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    slo: SloBody | None = None


def parse_embedding(value: object) -> EmbeddingRequest:
    """Check a parsed body of /v1/embeddings.

    Raises:
        BadRequest: one sentence that names the field, and its value where that helps.
    """
    if isinstance(value, dict) and value.get("dimensions") is not None:
        raise BadRequest(
            f"dimensions={str(value['dimensions'])[:80]}: these embeddings cannot be shortened: the model was not "
            "trained for that; leave it out",
            "dimensions",
        )
    return parse_body(value, EmbeddingRequest)
