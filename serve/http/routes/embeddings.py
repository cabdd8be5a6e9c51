"""POST /v1/embeddings."""

import contextlib
import time
import uuid

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jax.serve.errors import CLIENT_CLOSED_REQUEST, NotReady
from apt_jax.serve.http.routes.generation import limit_time
from apt_jax.serve.http.service import Service
from apt_jax.serve.json_text import parse_json
from apt_jax.serve.openai.bodies.embeddings import parse_embedding
from apt_jax.serve.openai.embeddings import ID_PREFIX, Embedding
from apt_jax.serve.openai.generation import as_bad_request
from apt_jax.serve.openai.sse import close_on_disconnect


async def embed(service: Service, http: Request) -> Response:
    """The vectors of texts."""
    arrival_s = time.monotonic()
    service.check_accepts()
    data = await service.read_body(http)
    body = await service.off_loop(lambda: parse_embedding(parse_json(data)))
    model = service.served_model()

    def prepare() -> Embedding:
        return Embedding.prepare(
            body,
            model,
            request_id=f"{ID_PREFIX}-{body.request_id or uuid.uuid4().hex}",
            headers={name: ",".join(http.headers.getlist(name)) for name in http.headers},
            arrival_s=arrival_s,
            max_samples=model.engine.config.max_num_queued_reqs,
        )

    embedding = await service.off_loop(prepare)
    with contextlib.ExitStack() as cleanup:
        group = service.backend.submit(embedding.samples)
        cleanup.enter_context(service.under_way((http.state.request_id, embedding.request_id, body.request_id), group))
        cleanup.callback(limit_time(group, service.options.request_timeout))
        close_on_disconnect(http.receive, group, cleanup)
        try:
            await group.accepted()
        except ValueError as error:
            raise as_bad_request(error, body) from error
        async for outputs in group:
            for sample, output in outputs:
                embedding.collect(sample, output)
        if group.closed:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if not embedding.is_whole:
            raise NotReady("the request was ended before its vectors were found; send it again")
        return JSONResponse(await service.off_loop(embedding.response))
