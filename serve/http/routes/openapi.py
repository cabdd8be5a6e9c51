"""GET /openapi.json: made by pydantic from the bodies that are checked and the shapes that are answered."""

import re
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from apt_jax.serve.http.routes.probes import VERSION
from apt_jax.serve.http.routes.route import RouteSpec
from apt_jax.serve.openai import replies

REF_TEMPLATE = "#/components/schemas/{model}"
PATH_CONVERTER = re.compile(r":\w+}")  # Starlette's, in {name:path}


def document(routes: Iterable[RouteSpec]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the routes that have a reply. Pure."""
    shown = [route for route in routes if route.reply is not None]
    types: list[tuple[Any, JsonSchemaMode, TypeAdapter[Any]]] = []
    for route in shown:
        types.append((route.reply, "serialization", TypeAdapter(route.reply)))
        if route.chunk is not None:
            types.append((route.chunk, "serialization", TypeAdapter(route.chunk)))
        if route.body is not None:
            types.append((route.body, "validation", TypeAdapter(route.body)))
    types.append((replies.Error, "serialization", TypeAdapter(replies.Error)))
    schemas, definitions = TypeAdapter.json_schemas(types, ref_template=REF_TEMPLATE)
    found = {kind: schema for (kind, _), schema in schemas.items()}
    paths: dict[str, dict[str, Any]] = {}
    for route in shown:
        path = PATH_CONVERTER.sub("}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, found)
    return {
        "openapi": "3.1.0",
        "info": {"title": "apt-jax", "version": VERSION, "summary": "OPT models under latency SLOs"},
        "paths": paths,
        "components": {"schemas": definitions.get("$defs", {})},
    }


def _operation(route: RouteSpec, schemas: dict[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {route.media_type: {"schema": schemas[route.reply]}}
    if route.chunk is not None:
        content["text/event-stream"] = {"schema": _event(schemas[route.chunk], schemas[replies.Error])}
    responses: dict[str, Any] = {"200": {"description": "done", "content": content}}
    for status in route.statuses:
        reply = replies.Status if route.reply is replies.Status else replies.Error
        responses[str(status)] = {
            "description": "why not",
            "content": {"application/json": {"schema": schemas[reply]}},
        }
    shown: dict[str, Any] = {"summary": route.summary, "responses": responses}
    if route.parameters:
        shown["parameters"] = list(route.parameters)
    if route.body is not None:
        body = {"application/json": {"schema": schemas[route.body]}}
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
