"""POST /v1/embeddings and /score: what is found in prompts, without an answer."""

import contextlib
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jax.serve.errors import CLIENT_CLOSED_REQUEST, NotReady
from apt_jax.serve.http.routes.generation import accepted, headers_of
from apt_jax.serve.http.service import Service
from apt_jax.serve.json_text import parse_json
from apt_jax.serve.openai.bodies.embeddings import parse_embedding
from apt_jax.serve.openai.bodies.scores import parse_score
from apt_jax.serve.openai.prompts_only.embeddings import Embedding
from apt_jax.serve.openai.prompts_only.scores import Score


async def embed(service: Service, http: Request) -> Response:
    """The vectors of texts."""
    return await _answer(Embedding, parse_embedding, service, http)


async def score(service: Service, http: Request) -> Response:
    """How likely texts are after others."""
    return await _answer(Score, parse_score, service, http)


async def _answer(
    kind: type[Embedding | Score],
    parse: Callable[[object], Any],
    service: Service,
    http: Request,
) -> Response:
    arrival_s = time.monotonic()
    service.check_accepts()
    data = await service.read_body(http)
    body = await service.off_loop(lambda: parse(parse_json(data)))
    model = service.served_model()

    def prepare() -> Embedding | Score:
        return kind.prepare(
            body,
            model,
            request_id=f"{kind.ID_PREFIX}-{body.request_id or uuid.uuid4().hex}",
            headers=headers_of(http),
            arrival_s=arrival_s,
            max_samples=model.engine.config.max_num_queued_reqs,
        )

    asked = await service.off_loop(prepare)
    with contextlib.ExitStack() as cleanup:
        service.check_free(body.request_id)
        group = service.backend.submit(asked.samples)
        cleanup.enter_context(service.under_way((http.state.request_id, asked.request_id, body.request_id), group))
        await accepted(group, service, http, body, cleanup)
        async for outputs in group:
            for sample, output in outputs:
                asked.collect(sample, output)
        if group.closed:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if not asked.is_whole:
            raise NotReady(f"the request was ended before its {kind.WANTED} were found; send it again")
        return JSONResponse(await service.off_loop(asked.response))
