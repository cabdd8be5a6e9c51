"""The body of POST /v1/responses, checked strictly: text in, text out, and nothing kept."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from apt_jax.sampling.params import MAX_LOGPROBS
from apt_jax.serve.errors import BadRequest
from apt_jax.serve.openai.bodies.chat_requests import MAX_MESSAGES, Message
from apt_jax.serve.openai.bodies.fields import Metadata, Text, Whole, limits
from apt_jax.serve.openai.bodies.neutral_fields import (
    OF_INPUT_MESSAGES,
    OF_INPUT_PARTS,
    OF_RESPONSE_TEXT,
    OF_RESPONSES,
    OF_STREAM_OPTIONS,
    Fields,
)
from apt_jax.serve.openai.bodies.requests import GenerationRequest
from apt_jax.serve.openai.bodies.strict import LIST, TEXT, Strict, at_most, parse_body

ELSEWHERE = {  # fields of the other endpoints, and what this one has instead
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "prompt_logprobs": "/v1/completions",
    "response_format": "text.format",
    "return_token_ids": "/v1/completions",
    "return_tokens_as_token_ids": "/v1/completions",
    "n": "several requests",
}


# a text or a list: what is wrong in a list is then told, and not that it is no text
type Either[Plain, Parts] = Annotated[
    Annotated[Plain, Tag(TEXT)] | Annotated[Parts, Tag(LIST)],
    Discriminator(lambda value: TEXT if isinstance(value, str) else LIST),
]


class InputPart(Strict):
    """A part of a message; only text is served. `output_text` is what an earlier answer had."""

    NEUTRAL: ClassVar[Fields] = OF_INPUT_PARTS

    type: Literal["input_text", "output_text"]
    text: str


class InputMessage(Strict):
    """One message of a conversation, an earlier answer of this endpoint too."""

    NEUTRAL: ClassVar[Fields] = OF_INPUT_MESSAGES

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Either[str, Annotated[list[InputPart], Field(fail_fast=True)]]

    def as_message(self) -> Message:
        """For the chat template."""
        content = self.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        return Message(role=self.role, content=text)


class TextFormat(Strict):
    """How the text has to look; a schema is always followed strictly."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    def asked(self) -> dict[str, Any] | None:
        """As `SamplingParams.structured_outputs`; None for text."""
        if self.type != "json_schema":
            return {"json_object": True} if self.type == "json_object" else None
        if not self.schema_:
            raise BadRequest("text.format of type json_schema needs a schema", "text")
        return {"json": self.schema_}


class TextConfig(Strict):
    """What the answer's text is to be."""

    NEUTRAL: ClassVar[Fields] = OF_RESPONSE_TEXT

    format: TextFormat | None = None


class ResponseStreamOptions(Strict):
    """Options of a streamed response: none that change anything."""

    NEUTRAL: ClassVar[Fields] = OF_STREAM_OPTIONS


class ResponseRequest(GenerationRequest):
    """Body of POST /v1/responses."""

    NEUTRAL: ClassVar[Fields] = OF_RESPONSES

    input: Either[
        Text, Annotated[list[InputMessage], Field(min_length=1, fail_fast=True), at_most(MAX_MESSAGES, "input")]
    ]
    instructions: str | None = None
    max_output_tokens: Whole | None = Field(default=None, json_schema_extra=limits("max_tokens"))  # type: ignore[arg-type]
    metadata: Metadata | None = None
    text: TextConfig | None = None
    top_logprobs: Whole | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    include: list[Literal["message.output_text.logprobs"]] | None = None
    stream_options: ResponseStreamOptions | None = None  # type: ignore[assignment]
    # those of the other endpoints
    n: None = None
    max_tokens: None = None
    prompt_logprobs: None = None
    response_format: None = None
    return_token_ids: None = None
    return_tokens_as_token_ids: None = None

    @property
    def asked_max_tokens(self) -> int | None:
        """`max_output_tokens`."""
        return self.max_output_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return bool(self.include) or bool(self.top_logprobs)

    def sampling_fields(self) -> dict[str, Any]:
        """Keywords of `SamplingParams`; logprobs is the number of likely tokens there."""
        fields = super().sampling_fields()
        fields["logprobs"] = (self.top_logprobs or 0) if self.wants_logprobs else None
        fields["max_tokens"] = self.max_output_tokens
        return fields

    def asked_structure(self) -> dict[str, Any] | None:
        """`SamplingParams.structured_outputs`.

        Raises:
            BadRequest: both fields ask for something, or a schema is missing.
        """
        of_format = None if self.text is None or self.text.format is None else self.text.format.asked()
        own = super().asked_structure()
        if of_format is not None and own:
            raise BadRequest("text.format and structured_outputs ask for the same thing; give one", "text")
        return of_format or own  # own may be empty, which is refused

    @property
    def is_structured(self) -> bool:
        """Whether it says what the answer must follow."""
        return super().is_structured or (self.text is not None and self.text.format is not None)


def parse_response(value: object) -> ResponseRequest:
    """Check a parsed body of /v1/responses.

    Raises:
        BadRequest: one sentence that names the field, and its value where that helps.
    """
    if isinstance(value, dict):
        for name, instead in ELSEWHERE.items():
            if value.get(name) is not None and not (name == "n" and value[name] == 1):
                raise BadRequest(f"field {name} is not one of /v1/responses; use {instead}", name)
        value = {name: given for name, given in value.items() if name not in ELSEWHERE}
    body = parse_body(value, ResponseRequest)
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options is only allowed with stream=true", "stream_options")
    return body
