"""The two ways in which a body asks for structured outputs: OpenAI's and vLLM's."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from apt_jax.sampling.structured import MAX_CHOICES
from apt_jax.serve.errors import BadRequest
from apt_jax.serve.openai.bodies.fields import Text
from apt_jax.serve.openai.bodies.neutral_fields import OF_STRUCTURED_OUTPUTS, Fields
from apt_jax.serve.openai.bodies.strict import Strict, at_most


class JsonSchema(Strict):
    """The schema of `response_format`; it is always followed strictly."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's way to ask for structured outputs."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def asked(self) -> dict[str, Any] | None:
        """As `SamplingParams.structured_outputs`; None for text."""
        if self.type != "json_schema":
            return {"json_object": True} if self.type == "json_object" else None
        if self.json_schema is None or not self.json_schema.schema_:
            raise BadRequest("response_format of type json_schema needs json_schema with a schema", "response_format")
        return {"json": self.json_schema.schema_}


class StructuredOutputs(Strict):
    """vLLM's way to ask for them; one of these."""

    NEUTRAL: ClassVar[Fields] = OF_STRUCTURED_OUTPUTS

    json_: dict[str, Any] | Text | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Annotated[
        Annotated[list[Text], Field(min_length=1, fail_fast=True)] | None,
        at_most(MAX_CHOICES, "structured_outputs choice"),
    ] = Field(default=None, json_schema_extra={"maxItems": MAX_CHOICES})
    grammar: Text | None = None
