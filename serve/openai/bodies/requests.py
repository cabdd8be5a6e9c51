"""The bodies of requests, checked strictly: a field works as documented or is refused by name."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, field_validator

from apt_jax.request import MAX_USER_CHARS
from apt_jax.sampling.params import MAX_BAD_WORDS, MAX_STOP_TOKEN_IDS, SamplingParams
from apt_jax.serve.errors import BadRequest
from apt_jax.serve.openai.bodies.fields import (
    LOGIT_BIAS_SCHEMA,
    MAX_STOP_STRINGS,
    PromptForms,
    PromptItem,
    Text,
    TokenId,
    Whole,
    parse_logit_bias,
    parse_prompt,
    parse_stop,
    ranged,
)
from apt_jax.serve.openai.bodies.neutral_fields import OF_COMPLETIONS, OF_STREAM_OPTIONS, Fields
from apt_jax.serve.openai.bodies.slo import SloBody
from apt_jax.serve.openai.bodies.strict import Strict, at_most, parse_body
from apt_jax.serve.openai.bodies.structured import ResponseFormat, StructuredOutputs

DEFAULT_MAX_TOKENS = 16
SAMPLING_FIELDS = sorted(SamplingParams.field_names() - {"truncate_prompt_tokens"})  # that cuts the prompt here


class StreamOptions(Strict):
    """Options of a streamed response."""

    NEUTRAL: ClassVar[Fields] = OF_STREAM_OPTIONS

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class PromptRequest(Strict):
    """What every request with a prompt takes."""

    model: str | None = None
    user: Annotated[str, Field(max_length=MAX_USER_CHARS)] | None = None
    priority: Whole | None = Field(default=None, ge=-(2**31), le=2**31 - 1)
    request_id: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")] | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Whole | None = Field(default=None, ge=-1, json_schema_extra={"not": {"const": 0}})

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _check_truncation(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("truncate_prompt_tokens=0 leaves nothing of the prompt; give at least 1, or -1")
        return value

    @property
    def reserved_tokens(self) -> int:
        """Tokens that the context must have room for beside a prompt."""
        return 0


class GenerationRequest(PromptRequest):
    """What both kinds of completion take: OpenAI's fields, vLLM's sampling fields, and `slo`.

    For every field null means the default. Limits of the sampling fields are those of `SamplingParams`.
    """

    n: Whole | None = ranged("n")
    max_tokens: Whole | None = ranged("max_tokens")
    min_tokens: Whole | None = ranged("min_tokens")
    temperature: float | None = ranged("temperature")
    top_k: Whole | None = ranged("top_k")
    top_p: float | None = ranged("top_p")
    min_p: float | None = ranged("min_p")
    repetition_penalty: float | None = ranged("repetition_penalty")
    presence_penalty: float | None = ranged("presence_penalty")
    frequency_penalty: float | None = ranged("frequency_penalty")
    logit_bias: Annotated[
        dict[int, float] | None,
        BeforeValidator(parse_logit_bias, json_schema_input_type=dict[str, float] | None),
        WithJsonSchema(LOGIT_BIAS_SCHEMA),
    ] = None
    seed: Whole | None = ranged("seed")
    prompt_logprobs: Whole | None = ranged("prompt_logprobs")
    stop: Annotated[
        tuple[str, ...] | None,
        PlainValidator(
            parse_stop,
            json_schema_input_type=Text | Annotated[list[Text], Field(max_length=MAX_STOP_STRINGS)] | None,
        ),
    ] = None
    stop_token_ids: Annotated[
        Annotated[list[TokenId], Field(fail_fast=True)] | None,
        at_most(MAX_STOP_TOKEN_IDS, "stop_token_ids"),
    ] = Field(default=None, json_schema_extra={"maxItems": MAX_STOP_TOKEN_IDS})
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, fail_fast=True)] | None = None
    bad_words: Annotated[
        Annotated[list[Text], Field(fail_fast=True)] | None,
        at_most(MAX_BAD_WORDS, "bad_words"),
    ] = Field(default=None, json_schema_extra={"maxItems": MAX_BAD_WORDS})
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    slo: SloBody | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def asked_max_tokens(self) -> int | None:
        """The limit that the client gave; None leaves it to the server."""
        return self.max_tokens

    @property
    def reserved_tokens(self) -> int:
        """Those of the answer."""
        return 1 if self.asked_max_tokens is None else self.asked_max_tokens

    @property
    def num_prompts(self) -> int:
        """Prompts, each of which gets `n` samples."""
        return 1

    def sampling_fields(self) -> dict[str, Any]:
        """Keywords of `SamplingParams`, null where the default is meant."""
        return {name: getattr(self, name) for name in SAMPLING_FIELDS if hasattr(self, name)}

    def sampling_params(self, defaults: Mapping[str, float] | None = None) -> SamplingParams:
        """The sampling fields that were given, over the model's own `defaults`, over the API's.

        Raises:
            BadRequest: a value out of its range; `param` names the field.
        """
        given = {name: value for name, value in self.sampling_fields().items() if value is not None}
        if (asked := self.asked_structure()) is not None:
            given["structured_outputs"] = asked
        try:
            return SamplingParams(**{"max_tokens": self.default_max_tokens, **(defaults or {}), **given})
        except ValueError as error:
            raise bad_request(error, given) from error

    def asked_structure(self) -> dict[str, Any] | None:
        """`SamplingParams.structured_outputs`.

        Raises:
            BadRequest: both fields ask for something, or a schema is missing.
        """
        of_format = None if self.response_format is None else self.response_format.asked()
        if self.structured_outputs is None:
            return of_format
        own = self.structured_outputs.model_dump(by_alias=True, exclude_none=True)
        if of_format is not None and own:
            raise BadRequest(
                "response_format and structured_outputs ask for the same thing; give one", "response_format"
            )
        return of_format or own  # own may be empty, which is refused

    @property
    def is_structured(self) -> bool:
        """Whether it says what the answer must follow; cheap, and true of what asks for nothing."""
        return self.response_format is not None or self.structured_outputs is not None

    @property
    def default_max_tokens(self) -> int | None:
        """Tokens to generate at most where the client says nothing; None is what the context holds."""
        return None


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    NEUTRAL: ClassVar[Fields] = OF_COMPLETIONS

    prompt: Annotated[
        tuple[PromptItem, ...],
        PlainValidator(parse_prompt, json_schema_input_type=PromptForms),
    ]
    max_tokens: Whole | None = Field(default=None, json_schema_extra={"minimum": 0})
    logprobs: Whole | None = ranged("logprobs")
    echo: bool | None = None

    @property
    def is_prompt_only(self) -> bool:
        """Whether the prompt is to be echoed and nothing generated."""
        return bool(self.echo) and self.max_tokens == 0

    def sampling_fields(self) -> dict[str, Any]:
        """Keywords of `SamplingParams`; a prompt without an answer is scored, also where nobody reads the scores."""
        fields = super().sampling_fields()
        if self.echo and self.logprobs is not None and (self.prompt_logprobs or 0) >= 0:
            fields["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        elif self.is_prompt_only and self.prompt_logprobs is None:
            fields["prompt_logprobs"] = 0
        return fields

    @property
    def default_max_tokens(self) -> int | None:
        """OpenAI's default."""
        return DEFAULT_MAX_TOKENS

    @property
    def num_prompts(self) -> int:
        """Those of the list."""
        return len(self.prompt)


def bad_request(error: ValueError, names: Iterable[str]) -> BadRequest:
    """The error of a lower layer as a BadRequest, its `param` the one of `names` that its sentence starts with."""
    message = str(error)
    start = message.removeprefix("the ")
    return BadRequest(message, next((name for name in names if start.startswith((f"{name}=", f"{name} "))), None))


def parse_completion(value: object) -> CompletionRequest:
    """Check a parsed body of /v1/completions.

    Raises:
        BadRequest: one sentence that names the field, and its value where that helps.
    """
    body = parse_body(value, CompletionRequest)
    check_stream(body)
    if body.is_prompt_only and body.min_tokens:
        raise BadRequest(f"min_tokens={body.min_tokens} is more than max_tokens=0", "min_tokens")
    return body


def check_stream(body: GenerationRequest) -> None:
    """Raises BadRequest if there are options of a stream without one, or what a stream has no place for."""
    if body.stream and body.prompt_logprobs is not None:
        raise BadRequest("prompt_logprobs is only possible without stream, as in vLLM", "prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options is only allowed with stream=true", "stream_options")
