"""The bodies of requests, checked strictly: a field works as documented or is refused by name."""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from apt_jax.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, RANGES, SamplingParams, Slo
from apt_jax.serve.errors import BadRequest
from apt_jax.serve.json_text import shown
from apt_jax.serve.openai.neutral_fields import OF_COMPLETIONS, OF_STREAM_OPTIONS, OF_STRUCTURED_OUTPUTS, Fields
from apt_jax.serve.openai.strict import Strict, at_most, check_length, parse_body

MAX_STOP_STRINGS = 64
DEFAULT_MAX_TOKENS = 16
MIN_SLO_MS, MAX_SLO_MS = 0.001, 1e9

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


class SloBody(Strict):
    """Latency SLO of one request, in milliseconds; a missing part takes the server's default."""

    ttft_ms: float | None = Field(default=None, ge=MIN_SLO_MS, le=MAX_SLO_MS)
    tbt_ms: float | None = Field(default=None, ge=MIN_SLO_MS, le=MAX_SLO_MS)
    stall_ms: float | None = Field(default=None, ge=MIN_SLO_MS, le=MAX_SLO_MS)


class StreamOptions(Strict):
    """Options of a streamed response."""

    NEUTRAL: ClassVar[Fields] = OF_STREAM_OPTIONS

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


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
    choice: Annotated[list[Text], Field(min_length=1)] | None = None
    grammar: Text | None = None


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


class GenerationRequest(Strict):
    """What both kinds of completion take: OpenAI's fields, vLLM's sampling fields, and `slo`.

    For every field null means the default. Limits of the sampling fields are those of `SamplingParams`.
    """

    model: str | None = None
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
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    priority: Whole | None = Field(default=None, ge=-(2**31), le=2**31 - 1)
    user: str | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    slo: SloBody | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def asked_max_tokens(self) -> int | None:
        """The limit that the client gave; None leaves it to the server."""
        return self.max_tokens

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
        return own or of_format

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


# Parts of an SLO, and the headers that carry each: vLLM's users know the second as TPOT.
SLO_HEADERS = {
    "ttft": ("x-slo-ttft-ms",),
    "tbt": ("x-slo-tbt-ms", "x-slo-tpot-ms"),
    "stall": ("x-slo-stall-ms",),
}

SAMPLING_FIELDS = sorted(SamplingParams.field_names())


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


def slo_of(body: SloBody | None, headers: Mapping[str, str], default: Slo) -> Slo:
    """The SLO of a request, part by part: its body's `slo`, else the `SLO_HEADERS`, else `default`.

    A header that came several times is one with its values separated by commas, as proxies may write it too.

    Raises:
        BadRequest: a header is not a number of milliseconds from MIN_SLO_MS to MAX_SLO_MS, even if it is not needed,
            or its values, or those of two spellings, differ.
    """
    chosen: dict[str, float] = {}
    for part, names in SLO_HEADERS.items():
        given = {name: _milliseconds(name, headers[name]) for name in names if name in headers}
        if len({*given.values()}) > 1:
            both = " and ".join(f"{name}={value:g}" for name, value in given.items())
            raise BadRequest(f"headers {both} mean the same and differ; send one of them", names[0])
        in_body = None if body is None else getattr(body, f"{part}_ms")
        given_ms = next(iter(given.values()), None) if in_body is None else in_body
        if given_ms is not None:
            chosen[f"{part}_s"] = given_ms / 1000
    return default.with_parts(**chosen)


def _milliseconds(name: str, text: str) -> float:
    values = []
    for part in text.split(","):
        try:
            values.append(float(part))
        except ValueError:
            values.append(float("nan"))
    if not all(MIN_SLO_MS <= value <= MAX_SLO_MS for value in values):
        raise BadRequest(
            f"header {name}: {shown(text)} must be a number of milliseconds greater than 0, up to 1e9", name
        )
    if len({*values}) > 1:
        raise BadRequest(f"header {name} came several times, with {shown(text)}; send it once", name)
    return values[0]


def _not_empty[T: (str, list[int])](value: T, name: str) -> T:
    if not value:
        raise ValueError(f"{name} is empty; give at least one character or token id")
    return value
