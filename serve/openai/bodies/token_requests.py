"""The bodies of POST /tokenize and POST /detokenize, as vLLM has them, and of POST /abort_request, as SGLang has it."""

from typing import Annotated, ClassVar

from pydantic import Field

from apt_jax.serve.errors import BadRequest
from apt_jax.serve.openai.bodies.chat_requests import Messages
from apt_jax.serve.openai.bodies.neutral_fields import OF_TEMPLATES, Fields
from apt_jax.serve.openai.bodies.strict import Strict, parse_body


class TokenizeRequest(Strict):
    """A text, or the messages of a chat."""

    NEUTRAL: ClassVar[Fields] = OF_TEMPLATES

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]


class AbortRequest(Strict):
    """Which requests to end: one by its id, in either spelling, or all."""

    request_id: Annotated[str, Field(min_length=1)] | None = None
    rid: Annotated[str, Field(min_length=1)] | None = None
    abort_all: bool | None = None


def parse_abort(value: object) -> AbortRequest:
    """Check a parsed body; `request_id` of what is returned is None where all are to end.

    Raises:
        BadRequest: a field is wrong, or there is not exactly one of them.
    """
    body = parse_body(value, AbortRequest)
    given = [name for name in (body.request_id, body.rid, body.abort_all or None) if name is not None]
    if len(given) != 1:
        raise BadRequest("give request_id, the id of one request, or abort_all=true", "request_id")
    return AbortRequest(request_id=body.request_id or body.rid)


def parse_tokenize(value: object) -> TokenizeRequest:
    """Check a parsed body.

    Raises:
        BadRequest: a field is wrong, or there is not exactly one of prompt and messages.
    """
    body = parse_body(value, TokenizeRequest)
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("give either prompt or messages", "prompt")
    return body
