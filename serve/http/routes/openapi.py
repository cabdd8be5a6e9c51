"""GET /openapi.json: made by pydantic from the bodies that are checked and the shapes that are answered."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from apt_jax.serve.http.routes.models import VERSION
from apt_jax.serve.openai import replies
from apt_jax.serve.openai.chat_requests import ChatRequest
from apt_jax.serve.openai.requests import MAX_SLO_MS, MIN_SLO_MS, CompletionRequest
from apt_jax.serve.openai.token_requests import DetokenizeRequest, TokenizeRequest

REF_TEMPLATE = "#/components/schemas/{model}"
SLO_HEADERS: tuple[dict[str, Any], ...] = tuple(
    {
        "name": f"x-slo-{name}-ms",
        "in": "header",
        "required": False,
        "description": f"{meaning}; the body's slo goes before it",
        "schema": {"type": "number", "minimum": MIN_SLO_MS, "maximum": MAX_SLO_MS},
    }
    for name, meaning in (("ttft", "promise for the time to the first token"), ("tbt", "promise for the P99 gap"))
)


@dataclass(frozen=True)
class Operation:
    """One route as the document shows it."""

    method: str
    path: str
    summary: str
    reply: Any
    body: Any = None
    statuses: tuple[int, ...] = ()  # of errors
    parameters: tuple[dict[str, Any], ...] = ()
    chunk: Any = None  # what each event of a stream carries
    media_type: str = "application/json"

    def streamed(self, chunk: Any) -> "Operation":
        """The same as one that the engine works for: it may stream, has an SLO, and may run into a time limit."""
        return replace(self, statuses=(*POST_STATUSES, 504), parameters=SLO_HEADERS, chunk=chunk)


NAME_PARAMETER = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
POST_STATUSES = (400, 404, 413, 500, 503)
OPERATIONS = (
    Operation(
        "post", "/v1/completions", "Complete one or several prompts", replies.TextCompletion, CompletionRequest
    ).streamed(replies.TextCompletionChunk),
    Operation("post", "/v1/chat/completions", "Answer in a chat", replies.ChatCompletionReply, ChatRequest).streamed(
        replies.ChatCompletionChunk
    ),
    Operation("get", "/v1/models", "The model served, as a list", replies.ModelList),
    Operation(
        "get", "/v1/models/{name}", "The model served", replies.Model, statuses=(404,), parameters=(NAME_PARAMETER,)
    ),
    Operation("post", "/tokenize", "Text to token ids", replies.Tokens, TokenizeRequest, POST_STATUSES),
    Operation("post", "/detokenize", "Token ids to text", replies.Detokenized, DetokenizeRequest, POST_STATUSES),
    Operation("get", "/health", "200 unless the engine has failed for good", replies.Status, statuses=(503,)),
    Operation("get", "/ready", "200 once requests are taken", replies.Status, statuses=(503,)),
    Operation("get", "/version", "Version of the server", replies.Version),
    Operation("get", "/load", "Requests under way", replies.Load),
    Operation("get", "/metrics", "Metrics for Prometheus", str, media_type="text/plain"),
)


def openapi_route() -> Route:
    """GET /openapi.json."""

    async def document_route(http: Request) -> Response:
        return JSONResponse(document())

    return Route("/openapi.json", document_route, methods=["GET"])


@cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    types: list[tuple[Any, JsonSchemaMode, TypeAdapter[Any]]] = []
    for operation in OPERATIONS:
        types.append((operation.reply, "serialization", TypeAdapter(operation.reply)))
        if operation.chunk is not None:
            types.append((operation.chunk, "serialization", TypeAdapter(operation.chunk)))
        if operation.body is not None:
            types.append((operation.body, "validation", TypeAdapter(operation.body)))
    types.append((replies.Error, "serialization", TypeAdapter(replies.Error)))
    schemas, definitions = TypeAdapter.json_schemas(types, ref_template=REF_TEMPLATE)
    found = {kind: schema for (kind, _), schema in schemas.items()}
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, found)
    return {
        "openapi": "3.1.0",
        "info": {"title": "apt-jax", "version": VERSION, "summary": "OPT models under latency promises"},
        "paths": paths,
        "components": {"schemas": definitions.get("$defs", {})},
    }


def _operation(operation: Operation, schemas: dict[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {operation.media_type: {"schema": schemas[operation.reply]}}
    if operation.chunk is not None:
        content["text/event-stream"] = {"schema": _event(schemas[operation.chunk], schemas[replies.Error])}
    responses: dict[str, Any] = {"200": {"description": "done", "content": content}}
    for status in operation.statuses:
        reply = replies.Status if operation.reply is replies.Status else replies.Error
        responses[str(status)] = {
            "description": "why not",
            "content": {"application/json": {"schema": schemas[reply]}},
        }
    shown: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    if operation.parameters:
        shown["parameters"] = list(operation.parameters)
    if operation.body is not None:
        body = {"application/json": {"schema": schemas[operation.body]}}
        shown["requestBody"] = {"required": True, "content": body}
    return shown


def _event(chunk: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    """One server-sent event: before 3.2, OpenAPI has no word for a stream, and tools take the schema as an event's."""
    body = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": [chunk, error]}}
    return {
        "type": "object",
        "description": "each event of the stream, which ends with [DONE]",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, body]}},
        "required": ["data"],
    }
