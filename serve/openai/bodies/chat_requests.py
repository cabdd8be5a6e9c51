"""The body of POST /v1/chat/completions, checked strictly."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from apt_jax.sampling.params import MAX_LOGPROBS
from apt_jax.serve.errors import BadRequest
from apt_jax.serve.openai.bodies.fields import Whole, limits
from apt_jax.serve.openai.bodies.neutral_fields import OF_CHATS, OF_MESSAGES, OF_TEXT_PARTS, Fields
from apt_jax.serve.openai.bodies.requests import GenerationRequest, check_stream
from apt_jax.serve.openai.bodies.strict import Strict, at_most, parse_body

MAX_MESSAGES = 4096


class TextPart(Strict):
    """A part of a message; only text is served."""

    NEUTRAL: ClassVar[Fields] = OF_TEXT_PARTS

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a chat."""

    NEUTRAL: ClassVar[Fields] = OF_MESSAGES

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} has no content; give a text")
        return self

    def for_template(self) -> dict[str, str]:
        """What chat templates read: parts joined by line ends, as vLLM does."""
        content = self.content or ""  # an assistant's message may have none
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **named}


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True), at_most(MAX_MESSAGES, "messages")]


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    NEUTRAL: ClassVar[Fields] = OF_CHATS

    messages: Messages
    max_completion_tokens: Whole | None = Field(default=None, json_schema_extra=limits("max_tokens"))  # type: ignore[arg-type]
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None

    @property
    def asked_max_tokens(self) -> int | None:
        """`max_completion_tokens`, OpenAI's newer name, takes precedence."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling_fields(self) -> dict[str, Any]:
        """Keywords of `SamplingParams`; logprobs is the number of likely tokens there."""
        fields = super().sampling_fields()
        fields["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        fields["max_tokens"] = self.asked_max_tokens
        return fields


def parse_chat(value: object) -> ChatRequest:
    """Check a parsed body of /v1/chat/completions.

    Raises:
        BadRequest: one sentence that names the field, and its value where that helps.
    """
    body = parse_body(value, ChatRequest)
    check_stream(body)
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs is only allowed with logprobs=true", "top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise BadRequest(
            f"max_tokens={body.max_tokens} and max_completion_tokens={body.max_completion_tokens} are two names of one "
            "limit; give one of them",
            "max_completion_tokens",
        )
    return body
