"""The body of POST /v1/completions, checked strictly: a field works as documented or is refused by name."""

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from apt_jax.request import SamplingParams, Slo
from serve.errors import BadRequest

MAX_STOP_STRINGS = 64
DEFAULT_MAX_TOKENS = 16
SHOWN_VALUE_CHARS = 60

NOT_SUPPORTED = (
    # OpenAI's, then vLLM's: known names that this server does not serve
    *("best_of", "suffix", "modalities", "response_format", "tools"),
    *("use_beam_search", "length_penalty", "guided_json", "prompt_logprobs", "truncate_prompt_tokens"),
    *("add_special_tokens", "min_new_tokens", "prompt_embeds", "lora_path", "spaces_between_special_tokens"),
)

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
    raise ValueError(
        f"prompt must be a string, a list of strings, a list of token ids or a list of lists of token ids, "
        f"not {_shown(value)}"
    )


def parse_stop(value: object) -> tuple[str, ...] | None:
    """`stop` as a tuple of strings, None if it was null.

    Raises:
        ValueError: another type, or too many of them.
    """
    strings = [value] if isinstance(value, str) else value
    if strings is None:
        return None
    if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
        raise ValueError(f"stop must be a string or a list of strings, not {_shown(value)}")
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"stop has {len(strings)} strings, at most {MAX_STOP_STRINGS} are allowed")
    return tuple(strings)


def parse_logit_bias(value: object) -> object:
    """Token ids, which JSON can only write as strings, as integers."""
    if not isinstance(value, dict):
        return value
    for key in value:
        digits = str(key).removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 18):
            raise ValueError(f"logit_bias has the key {_shown(key)}, keys must be token ids")
    return {int(key): bias for key, bias in value.items()}


class Strict(BaseModel):
    """Base of all bodies: no unknown fields, no conversion between types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class SloBody(Strict):
    """Latency promise of one request, in milliseconds; a missing one takes the server's default."""

    ttft_ms: float | None = Field(default=None, gt=0)
    tbt_ms: float | None = Field(default=None, gt=0)


class StreamOptions(Strict):
    """Options of a streamed response."""

    include_usage: bool = False


class CompletionRequest(Strict):
    """Body of POST /v1/completions: OpenAI's fields, vLLM's sampling fields, and `slo`.

    For every field null means the default. Limits of the sampling fields are those of `SamplingParams`.
    """

    model: str | None = None
    prompt: Annotated[
        tuple[PromptItem, ...],
        PlainValidator(parse_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(parse_logit_bias)] = None
    seed: int | None = None
    stop: Annotated[
        tuple[str, ...] | None, PlainValidator(parse_stop, json_schema_input_type=str | list[str] | None)
    ] = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    priority: int | None = None
    user: str | None = None
    slo: SloBody | None = None

    def sampling_params(self) -> SamplingParams:
        """The sampling fields that were given, over the defaults.

        Raises:
            BadRequest: a value out of its range; `param` names the field.
        """
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            return SamplingParams(**{"max_tokens": DEFAULT_MAX_TOKENS, **given})
        except ValueError as error:
            raise bad_request(error, given) from error


_SAMPLING_FIELDS = sorted(SamplingParams.field_names() & set(CompletionRequest.model_fields))


def bad_request(error: ValueError, names: Mapping[str, object]) -> BadRequest:
    """The error of a lower layer as a BadRequest, its `param` the one of `names` that its sentence starts with."""
    message = str(error)
    start = message.removeprefix("the ")
    return BadRequest(message, next((name for name in names if start.startswith((f"{name}=", f"{name} "))), None))


def parse_json(data: bytes, what: str = "the body") -> Any:
    """The JSON value in `data`; errors call it `what`.

    Raises:
        BadRequest: not JSON, not UTF-8, NaN, or nested too deeply.
    """
    try:
        return pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"{what} is not valid JSON: {error}") from error


def parse_completion(value: object) -> CompletionRequest:
    """Check a parsed body.

    Raises:
        BadRequest: one sentence that names the field, and its value where that helps.
    """
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, not {_shown(value)}")
    try:
        body = CompletionRequest.model_validate(value)
    except ValidationError as error:
        raise first_fault(error, CompletionRequest) from error
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options is only allowed with stream=true", "stream_options")
    if body.echo and body.logprobs is not None:
        raise BadRequest("logprobs of the prompt are not supported; leave out echo or logprobs", "logprobs")
    return body


def slo_of(body: SloBody | None, headers: Mapping[str, str], default: Slo) -> Slo:
    """The SLO of a request: its body's `slo`, else the headers x-slo-ttft-ms and x-slo-tbt-ms, else `default`.

    Raises:
        BadRequest: a header is not a number greater than 0.
    """
    chosen = {}
    for name, fallback in (("ttft", default.ttft_s), ("tbt", default.tbt_s)):
        in_body = None if body is None else getattr(body, f"{name}_ms")
        header = f"x-slo-{name}-ms"
        if in_body is not None:
            chosen[f"{name}_s"] = in_body / 1000
        elif header in headers:
            chosen[f"{name}_s"] = _milliseconds(header, headers[header]) / 1000
        else:
            chosen[f"{name}_s"] = fallback
    return Slo(**chosen)


def _milliseconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise BadRequest(f"header {name}: {_shown(text)} must be a number of milliseconds greater than 0", name)
    return value


def first_fault(error: ValidationError, model: type[BaseModel]) -> BadRequest:
    """What pydantic found first, in one sentence; unknown fields come with the nearest field of `model`."""
    fault = error.errors(include_url=False)[0]
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path[:2] if path and path[0] in ("slo", "stream_options") else path[:1])
    match fault["type"]:
        case "extra_forbidden" if path[-1] in NOT_SUPPORTED:
            return BadRequest(f"field {path[-1]} is not supported; leave it out", name)
        case "extra_forbidden":
            near = difflib.get_close_matches(path[-1], model.model_fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return BadRequest(f"unknown field {_shown('.'.join(path))}{hint}", name[:SHOWN_VALUE_CHARS])
        case "missing":
            return BadRequest(f"field {name} is missing", name)
        case "value_error":
            return BadRequest(str(fault["ctx"]["error"]), name)
    return BadRequest(f"{name}={_shown(fault['input'])}: {_lower_first(fault['msg'])}", name)


def _not_empty[T: (str, list[int])](value: T, name: str) -> T:
    if not value:
        raise ValueError(f"{name} is empty; give at least one character or token id")
    return value


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= SHOWN_VALUE_CHARS else f"{text[:SHOWN_VALUE_CHARS]}..."


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
