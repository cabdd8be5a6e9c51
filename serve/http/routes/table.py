"""Every route, one row each. To add one: write its handler, and its row here."""

from functools import cache, partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jax.serve.http.routes import batches
from apt_jax.serve.http.routes.dashboard import PAGES, page
from apt_jax.serve.http.routes.debug import plans, profile, requests, reset_prefix_cache, state, story, timeline
from apt_jax.serve.http.routes.generation import abort_request, generate
from apt_jax.serve.http.routes.models import detokenize, model, models, tokenize
from apt_jax.serve.http.routes.openapi import document
from apt_jax.serve.http.routes.probes import health, load, metrics, ready, version
from apt_jax.serve.http.routes.prompt_only import embed, score
from apt_jax.serve.http.routes.route import RouteSpec
from apt_jax.serve.http.service import Service
from apt_jax.serve.openai import replies
from apt_jax.serve.openai.bodies.batches import BatchRequest
from apt_jax.serve.openai.bodies.embeddings import EmbeddingRequest
from apt_jax.serve.openai.bodies.scores import ScoreRequest
from apt_jax.serve.openai.bodies.slo import MAX_SLO_MS, MIN_SLO_MS, SLO_HEADERS
from apt_jax.serve.openai.bodies.token_requests import AbortRequest, DetokenizeRequest, TokenizeRequest
from apt_jax.serve.openai.endpoints import ENDPOINTS, Endpoint

NAME: dict[str, Any] = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
FILE_PARAMETERS: tuple[dict[str, Any], ...] = tuple(
    {"name": name, "in": "query", "required": False, "description": meaning, "schema": schema}
    for name, meaning, schema in (
        ("purpose", "only those of this purpose", {"type": "string"}),
        ("order", "by the time they were made", {"enum": ["asc", "desc"], "default": "desc"}),
        ("limit", "at most so many", {"type": "integer", "minimum": 1, "maximum": 10_000}),
        ("after", "those after this id", {"type": "string"}),
    )
)
SLO_PARAMETERS: tuple[dict[str, Any], ...] = tuple(
    {
        "name": name,
        "in": "header",
        "required": False,
        "description": f"{meaning}; the body's slo overrides it",
        "schema": {"type": "number", "minimum": MIN_SLO_MS, "maximum": MAX_SLO_MS},
    }
    for part, meaning in (
        ("ttft", "SLO for the time to the first token, in ms"),
        ("tbt", "SLO for the 99th percentile of the gaps, in ms"),
        ("stall", "SLO for every single gap, in ms"),
    )
    for name in SLO_HEADERS[part]
)
POST_STATUSES = (400, 404, 413, 415, 500, 503)


def generation_route(path: str, endpoint: Endpoint) -> RouteSpec:
    """The route of one of the ENDPOINTS: it may stream, has an SLO, and may run into a time limit."""
    return RouteSpec(
        "POST",
        path,
        partial(generate, endpoint),
        is_generation=True,
        summary=endpoint.summary,
        body=endpoint.body,
        reply=endpoint.reply,
        chunk=endpoint.chunk,
        statuses=(*POST_STATUSES, 504),
        parameters=SLO_PARAMETERS,
    )


ID: dict[str, Any] = {**NAME, "name": "id"}
BATCH_ROUTES = (
    RouteSpec(
        *("POST", "/v1/files", batches.create_file),
        summary="Keep a file of requests (multipart form: file, purpose=batch)",
        reply=replies.FileObject,
        statuses=(400, 404, 413, 415),
    ),
    RouteSpec(
        *("GET", "/v1/files", batches.list_files),
        summary="Files",
        reply=replies.FileList,
        statuses=(400, 404),
        parameters=FILE_PARAMETERS,
    ),
    RouteSpec(
        *("GET", "/v1/files/{id}", batches.get_file),
        summary="A file",
        reply=replies.FileObject,
        statuses=(404,),
        parameters=(ID,),
    ),
    RouteSpec(
        *("DELETE", "/v1/files/{id}", batches.delete_file),
        summary="Delete a file",
        reply=replies.Deleted,
        statuses=(400, 404),
        parameters=(ID,),
    ),
    RouteSpec(
        *("GET", "/v1/files/{id}/content", batches.file_content),
        summary="The bytes of a file",
        reply=str,
        media_type="application/jsonl",
        statuses=(404,),
        parameters=(ID,),
    ),
    RouteSpec(
        *("POST", "/v1/batches", batches.create_batch),
        summary="Answer a file of requests, behind all others",
        body=BatchRequest,
        reply=replies.BatchObject,
        statuses=(400, 404, 413, 415),
    ),
    RouteSpec(
        *("GET", "/v1/batches", batches.list_batches),
        summary="Batches, the newest first",
        reply=replies.BatchList,
        statuses=(400, 404),
    ),
    RouteSpec(
        *("GET", "/v1/batches/{id}", batches.get_batch),
        summary="A batch",
        reply=replies.BatchObject,
        statuses=(404,),
        parameters=(ID,),
    ),
    RouteSpec(
        *("POST", "/v1/batches/{id}/cancel", batches.cancel_batch),
        summary="End a batch with what it has",
        reply=replies.BatchObject,
        statuses=(400, 404),
        parameters=(ID,),
    ),
)


async def openapi(service: Service, http: Request) -> Response:
    """GET /openapi.json."""
    root = service.options.root_path
    return JSONResponse(openapi_document() | ({"servers": [{"url": root}]} if root else {}))


@cache
def openapi_document() -> dict[str, Any]:
    """The OpenAPI document of ROUTES."""
    return document(ROUTES)


ROUTES = (
    *(generation_route(path, endpoint) for path, endpoint in ENDPOINTS.items()),
    RouteSpec(
        *("POST", "/v1/embeddings", embed),
        is_generation=True,
        summary="Vectors of texts: the last hidden state after each",
        body=EmbeddingRequest,
        reply=replies.EmbeddingList,
        statuses=(*POST_STATUSES, 504),
        parameters=SLO_PARAMETERS,
    ),
    *(
        RouteSpec(
            *("POST", path, score),
            is_generation=True,
            summary="How likely texts are after others: sums of log-probabilities",
            body=ScoreRequest,
            reply=replies.ScoreList,
            statuses=(*POST_STATUSES, 504),
            parameters=SLO_PARAMETERS,
        )
        for path in ("/score", "/v1/score")
    ),
    *BATCH_ROUTES,
    RouteSpec("GET", "/v1/models", models, summary="The model served, as a list", reply=replies.ModelList),
    RouteSpec(
        *("GET", "/v1/models/{name:path}", model),
        summary="The model served",
        reply=replies.Model,
        statuses=(404,),
        parameters=(NAME,),
    ),
    RouteSpec(
        *("POST", "/tokenize", tokenize),
        summary="Text to token ids",
        body=TokenizeRequest,
        reply=replies.Tokens,
        statuses=POST_STATUSES,
    ),
    RouteSpec(
        *("POST", "/detokenize", detokenize),
        summary="Token ids to text",
        body=DetokenizeRequest,
        reply=replies.Detokenized,
        statuses=POST_STATUSES,
    ),
    RouteSpec(
        *("POST", "/abort_request", abort_request),
        summary="End requests under way, with what they have",
        body=AbortRequest,
        reply=replies.Aborted,
        statuses=POST_STATUSES,
    ),
    RouteSpec(
        *("GET", "/health", health),
        is_open=True,
        is_probe=True,
        summary="200 unless the engine has failed for good",
        reply=replies.Status,
        statuses=(503,),
    ),
    RouteSpec(
        *("GET", "/ready", ready),
        is_open=True,
        is_probe=True,
        summary="200 once requests are taken",
        reply=replies.Status,
        statuses=(503,),
    ),
    RouteSpec("GET", "/version", version, is_open=True, summary="Version of the server", reply=replies.Version),
    RouteSpec("GET", "/load", load, is_open=True, is_probe=True, summary="Requests under way", reply=replies.Load),
    RouteSpec(
        *("GET", "/metrics", metrics),
        is_open=True,
        is_probe=True,
        summary="Metrics for Prometheus",
        reply=str,
        media_type="text/plain",
    ),
    RouteSpec("GET", "/debug/plans", plans),
    RouteSpec("GET", "/debug/requests", requests, is_probe=True),
    RouteSpec("GET", "/debug/requests/{id}", story),
    RouteSpec("GET", "/debug/history", timeline, is_probe=True),
    RouteSpec("GET", "/debug/state", state, is_probe=True),
    RouteSpec("POST", "/debug/profile", profile),
    RouteSpec("POST", "/reset_prefix_cache", reset_prefix_cache),
    RouteSpec("GET", "/openapi.json", openapi, is_open=True),
    *(RouteSpec("GET", path, page(path), is_open=True, is_probe=True) for path in PAGES),
)
