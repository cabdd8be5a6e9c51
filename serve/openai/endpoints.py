"""The endpoints that generate: how a body is read and what makes the response. For routes, batches and snapshots."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from apt_jax.serve.openai import replies
from apt_jax.serve.openai.bodies.chat_requests import ChatRequest, parse_chat
from apt_jax.serve.openai.bodies.requests import CompletionRequest, GenerationRequest, parse_completion
from apt_jax.serve.openai.bodies.responses import ResponseRequest, parse_response
from apt_jax.serve.openai.chat_completions import ChatCompletion
from apt_jax.serve.openai.completions import Completion
from apt_jax.serve.openai.generation import Generation
from apt_jax.serve.openai.response_objects import ResponseEvent, ResponseObject
from apt_jax.serve.openai.responses import ModelResponse


@dataclass(frozen=True)
class Endpoint:
    """`parse` raises BadRequest for a body that is not valid; `reply` and `chunk` are the shapes of the response.

    `is_quick`: whether a short body is always made into samples in a moment; a template may do anything.
    """

    summary: str
    parse: Callable[[object], GenerationRequest]
    generation: type[Generation[Any]]
    body: type[GenerationRequest]
    reply: Any
    chunk: Any
    is_quick: bool = False


ENDPOINTS = {
    "/v1/completions": Endpoint(
        "Complete one or several prompts",
        parse_completion,
        Completion,
        CompletionRequest,
        replies.TextCompletion,
        replies.TextCompletionChunk,
        is_quick=True,
    ),
    "/v1/chat/completions": Endpoint(
        "Answer in a chat",
        parse_chat,
        ChatCompletion,
        ChatRequest,
        replies.ChatCompletionReply,
        replies.ChatCompletionChunk,
    ),
    "/v1/responses": Endpoint(
        "Answer a text or a conversation",
        parse_response,
        ModelResponse,
        ResponseRequest,
        ResponseObject,
        ResponseEvent,
    ),
}
ENDPOINTS_BY_PREFIX = {endpoint.generation.ID_PREFIX: endpoint for endpoint in ENDPOINTS.values()}
