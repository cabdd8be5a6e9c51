"""The HTTP application: OpenAI's completions API and the probes, over an engine thread."""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.completions import Completion, as_bad_request
from serve.engine_thread import EngineStatus, EngineThread
from serve.errors import ERROR_REPLIES, BodyTooLarge, ModelNotFound, error_body, error_reply
from serve.group import Group
from serve.protocol import CompletionRequest, parse_completion, parse_json
from serve.sse import SseResponse, close_on_disconnect, event

STOP_TIMEOUT_S = 5.0
LONG_TEXT_CHARS = 4096  # longer prompts are tokenised off the event loop
CLIENT_CLOSED_REQUEST = 499  # never sent: the client has gone


class Service:
    """What the routes share: the engine thread, the model's public name, and limits."""

    def __init__(self, engine_thread: EngineThread, model_name: str, max_body_bytes: int):
        self.engine_thread = engine_thread
        self.model_name = model_name
        self.max_body_bytes = max_body_bytes
        self.created = int(time.time())

    async def completions(self, http: Request) -> Response:
        """POST /v1/completions."""
        arrival_s = time.monotonic()
        body = parse_completion(parse_json(await self._read_body(http)))
        completion = await self._prepare(body, http, arrival_s)
        with contextlib.ExitStack() as cleanup:
            group = self.engine_thread.submit(completion.samples)
            close_on_disconnect(http.receive, group, cleanup)
            try:
                await group.accepted()
            except ValueError as error:
                raise as_bad_request(error, body) from error
            if body.stream:
                return SseResponse(self._events(completion, group), cleanup.pop_all())
            return await self._whole(completion, group)

    async def models(self, http: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, http: Request) -> Response:
        """GET /v1/models/NAME."""
        name = http.path_params["name"]
        if name != self.model_name:
            raise ModelNotFound(f"the model {name!r} is not served here; use {self.model_name!r}", "model")
        return JSONResponse(self._model())

    async def health(self, http: Request) -> Response:
        """GET /health: 200 while the process can still come to serve or serves."""
        status = self.engine_thread.status
        return JSONResponse({"status": status.value}, 503 if status is EngineStatus.FAILED else 200)

    async def ready(self, http: Request) -> Response:
        """GET /ready: 200 once every program is compiled and requests are taken."""
        status = self.engine_thread.status
        if status is EngineStatus.READY:
            return JSONResponse({"status": status.value})
        return JSONResponse({"status": status.value}, 503, {"retry-after": "1"})

    async def _read_body(self, http: Request) -> bytes:
        """The body, read no further than the limit.

        Raises:
            BodyTooLarge: it is longer.
        """
        limit = self.max_body_bytes
        too_large = BodyTooLarge(f"the body is longer than {limit} bytes; send less or raise --max-body-bytes")
        length = http.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        chunks, size = [], 0
        async for chunk in http.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)
        return b"".join(chunks)

    async def _prepare(self, body: CompletionRequest, http: Request, arrival_s: float) -> Completion:
        engine = self.engine_thread.ready_engine()

        def prepare() -> Completion:
            return Completion.prepare(
                body,
                engine,
                request_id=f"cmpl-{uuid.uuid4().hex}",
                model_name=self.model_name,
                headers=http.headers,
                arrival_s=arrival_s,
                max_samples=engine.config.max_num_queued_reqs,
            )

        if sum(len(item) for item in body.prompt if isinstance(item, str)) > LONG_TEXT_CHARS:
            return await run_in_threadpool(prepare)
        return prepare()

    @staticmethod
    async def _whole(completion: Completion, group: Group) -> Response:
        async for outputs in group:
            for sample, output in outputs:
                completion.collect(sample, output)
        if not completion.is_finished:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return JSONResponse(completion.response())

    @staticmethod
    async def _events(completion: Completion, group: Group) -> AsyncGenerator[bytes]:
        """Server-sent events; all that has come since the last send goes out in one piece."""
        try:
            async for outputs in group:
                yield b"".join(event(completion.chunk(sample, output)) for sample, output in outputs)
            if completion.wants_usage:
                yield event(completion.usage_chunk())
        except Exception as error:  # the status line has gone out; OpenAI's clients know an error event
            yield event(error_reply(error)[1])
        yield b"data: [DONE]\n\n"

    def _model(self) -> dict[str, object]:
        engine = self.engine_thread.engine
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "apt-jax",
            "max_model_len": None if engine is None else engine.max_model_len,
        }


def create_app(service: Service) -> Starlette:
    """The application; its lifespan starts and stops the engine thread."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine_thread.start()
        yield
        await run_in_threadpool(service.engine_thread.stop, STOP_TIMEOUT_S)

    return Starlette(
        routes=[
            Route("/v1/completions", service.completions, methods=["POST"]),
            Route("/v1/models", service.models, methods=["GET"]),
            Route("/v1/models/{name:path}", service.model, methods=["GET"]),
            Route("/health", service.health, methods=["GET"]),
            Route("/ready", service.ready, methods=["GET"]),
        ],
        exception_handlers={
            **{kind: _error for kind, _ in ERROR_REPLIES},
            Exception: _error,  # also logged, with its traceback
            HTTPException: _http_error,
            ClientDisconnect: _gone,
        },
        lifespan=lifespan,
    )


async def _error(http: Request, error: Exception) -> Response:
    status, body, headers = error_reply(error)
    return JSONResponse(body, status, headers)


async def _gone(http: Request, error: Exception) -> Response:
    """The client left before its body was read; nobody gets this."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _http_error(http: Request, error: Exception) -> Response:
    """Starlette's own errors (no such route, wrong method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {http.method} {http.url.path}"
    return JSONResponse(error_body(message, "invalid_request_error"), error.status_code, error.headers)
