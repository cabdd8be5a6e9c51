"""POST on one of the ENDPOINTS: all run through the engine the same way, whole or streamed."""

import asyncio
import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jax.serve.errors import CLIENT_CLOSED_REQUEST, RequestTimeout, reason_of
from apt_jax.serve.http.service import Service
from apt_jax.serve.json_text import parse_json
from apt_jax.serve.openai.bodies.requests import GenerationRequest, PromptRequest
from apt_jax.serve.openai.bodies.token_requests import parse_abort
from apt_jax.serve.openai.endpoints import Endpoint
from apt_jax.serve.openai.generation import Generation, as_bad_request
from apt_jax.serve.openai.slo_report import check_begun
from apt_jax.serve.openai.sse import PiecesResponse, SseResponse, close_on_disconnect
from apt_jax.serve.runtime.group import Group

SHORT_BODY_BYTES = 4096  # longer ones are read off the event loop
FEW_SAMPLES = 8  # more are made off the event loop
SHORT_ANSWER_VALUES = 4096  # larger ones are written off the event loop

logger = logging.getLogger("apt_jax.requests")


async def generate(endpoint: Endpoint, service: Service, http: Request) -> Response:
    """What POST on one of the ENDPOINTS answers."""
    arrival_s = time.monotonic()
    service.check_accepts()
    data = await service.read_body(http)
    is_short = len(data) <= SHORT_BODY_BYTES and endpoint.is_quick

    def read() -> GenerationRequest:
        return endpoint.parse(parse_json(data))

    body = read() if is_short else await service.off_loop(read)
    model = service.served_model()

    def prepare() -> Generation[Any]:
        return endpoint.generation.prepare(
            body,
            model,
            request_id=f"{endpoint.generation.ID_PREFIX}-{body.request_id or uuid.uuid4().hex}",
            headers=headers_of(http),
            arrival_s=arrival_s,
            max_samples=model.engine.config.max_num_queued_reqs,
        )

    if body.is_structured:
        await service.check_grammar(body, model)
    is_short = is_short and not body.is_structured and body.num_prompts * (body.n or 1) <= FEW_SAMPLES
    generation = prepare() if is_short else await service.off_loop(prepare)
    if service.options.log_requests:
        fields = {"id": generation.request_id, "request_id": http.state.request_id}
        logger.info("body %s", body.model_dump_json(exclude_none=True, warnings=False), extra={"fields": fields})
    if body.stream and service.options.stream_interval > 1:
        interval = service.options.stream_interval
        generation.samples = [dataclasses.replace(s, tokens_at_once=interval) for s in generation.samples]
    with contextlib.ExitStack() as cleanup:
        service.check_free(body.request_id)
        group = service.backend.submit(generation.samples)
        ids = http.state.request_id, generation.request_id, body.request_id
        cleanup.enter_context(service.generating(generation, group, ids=ids))
        if (connection := getattr(http.state, "connection", None)) is not None:
            connection.answers.append(partial(service.keep_unsent, generation, group))
        await accepted(group, service, http, body, cleanup)
        if body.stream:
            if model.engine.config.abandon_after is not None:  # the status must wait for the first token
                check_begun(await group.begun(), len(generation.samples))
            return SseResponse(_events(service, generation, group), cleanup.pop_all())
        return await _whole(service, generation, group, cleanup)


async def abort_request(service: Service, http: Request) -> Response:
    """POST /abort_request: end requests under way; their clients get what there is, with finish reason abort."""
    data = await service.read_body(http)
    return JSONResponse({"aborted": service.end(parse_abort(parse_json(data)).request_id)})


def headers_of(http: Request) -> dict[str, str]:
    """Its headers, names in lower case; a repeated one's values together."""
    return {name: ",".join(http.headers.getlist(name)) for name in http.headers}


async def accepted(
    group: Group, service: Service, http: Request, body: PromptRequest, cleanup: contextlib.ExitStack
) -> None:
    """Wait until the engine has taken a group; from then on time and the client's leaving end it.

    Raises:
        BadRequest: it refuses one.
    """
    cleanup.callback(_limit_time(group, service.options.request_timeout))
    close_on_disconnect(http.receive, group, cleanup)
    try:
        await group.accepted()
    except ValueError as error:
        raise as_bad_request(error, body) from error


def _limit_time(group: Group, limit_s: float | None) -> Callable[[], None]:
    """Ends `group` after --request-timeout; call what this returns when it is over."""
    if limit_s is None:
        return lambda: None
    error = RequestTimeout(f"the request took longer than {limit_s:g} s, the limit of --request-timeout")
    return asyncio.get_running_loop().call_later(limit_s, group.expire, error).cancel


async def _whole(
    service: Service, generation: Generation[Any], group: Group, cleanup: contextlib.ExitStack
) -> Response:
    async for outputs in group:
        for sample, output in outputs:
            generation.collect(sample, output)
    if not generation.is_finished:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if generation.num_values <= SHORT_ANSWER_VALUES:
        return JSONResponse(generation.response())
    return PiecesResponse(service.pieces(generation.response_pieces()), cleanup.pop_all())


async def _events(service: Service, generation: Generation[Any], group: Group) -> AsyncGenerator[bytes]:
    """Server-sent events; what has come since the last send goes out in one piece, or in several if it is much."""
    at_once = generation.outputs_at_once
    try:
        yield generation.opening()
        async for outputs in group:
            try:
                while outputs:
                    part, outputs = outputs[:at_once], outputs[at_once:]
                    yield b"".join([generation.streamed(*pair) for pair in part])
                    if outputs:
                        await asyncio.sleep(0)  # others' turn: a slow reader's events may be many
            finally:
                group.put_back(outputs)
        yield generation.closing()
    except Exception as error:  # the status line has gone out
        if isinstance(error, RequestTimeout):  # else it is counted where it ended
            service.refused(str(reason_of(error)))
        yield generation.failing(error)
    yield generation.END
