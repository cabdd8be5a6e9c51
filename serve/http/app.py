"""The HTTP application: OpenAI's API and the probes, over an engine thread."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from apt_jax.serve.errors import CLIENT_CLOSED_REQUEST, ERROR_REPLIES, error_body, error_reply, reason_of
from apt_jax.serve.http.middleware import ApiKeys, HeaderLimit, Hosts, RequestIds, RootPath, Unforeseen, route_of
from apt_jax.serve.http.resume import Resumption
from apt_jax.serve.http.routes.route import RouteSpec
from apt_jax.serve.http.routes.table import ROUTES
from apt_jax.serve.http.service import Service

STOP_TIMEOUT_S = 5.0
SWITCH_INTERVAL_S = 0.0005  # a thread with long work gives Python's lock to the event loop after this


def create_app(
    service: Service, resumption: Resumption | None = None, routes: Sequence[RouteSpec] = ROUTES
) -> Starlette:
    """The application; its lifespan starts and stops the engine thread, and runs `resumption`."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.off_loop(int)  # the first call imports what else would hold up others beside the first long body
        service.backend.start()
        interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        resuming = None if resumption is None else asyncio.create_task(resumption.run(service))
        worker = None if service.batches is None else asyncio.create_task(service.batches.run())
        looking = asyncio.create_task(service.look())
        yield
        looking.cancel()
        service.stop()
        service.backend.abort_all()
        if worker is not None:  # what it has not answered is answered after the next start
            worker.cancel()
            await asyncio.wait([worker], timeout=STOP_TIMEOUT_S)
        if resuming is not None:
            await asyncio.wait([resuming], timeout=STOP_TIMEOUT_S)
            resuming.cancel()
        if not service.options.snapshot_cache:  # else its cache is read first, once the requests are safe
            await run_in_threadpool(service.backend.stop, STOP_TIMEOUT_S)
        sys.setswitchinterval(interval_s)
        if service.tracing is not None:
            await run_in_threadpool(service.tracing.close)

    options = service.options
    probes = {route.path for route in routes if route.is_probe}
    generating = {route.path for route in routes if route.is_generation}
    middleware = [Middleware(RootPath, options.root_path)] if options.root_path else []
    middleware += [Middleware(RequestIds, probes if options.access_log else None), Middleware(Unforeseen)]
    middleware.append(Middleware(HeaderLimit, options.max_header_bytes))
    if options.checks_host:
        middleware.append(Middleware(Hosts, options.own_hosts, loopback_only=not options.allowed_hosts))
    if options.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=options.allowed_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id"],
            )
        )
    if options.api_key:
        open_paths = {route.path for route in routes if route.is_open}
        middleware.append(Middleware(ApiKeys, options.api_key, open_paths))

    async def error(http: Request, error: Exception) -> Response:
        status, body, headers = error_reply(error)
        if route_of(http.scope) in generating and (reason := reason_of(error)) is not None:
            service.refused(reason)
        return JSONResponse(body, status, headers)

    return Starlette(
        routes=[route.bound(service) for route in routes],
        middleware=middleware,
        exception_handlers={
            **{kind: error for kind, _ in ERROR_REPLIES},
            HTTPException: _http_error,
            ClientDisconnect: _gone,
        },
        lifespan=lifespan,
    )


async def _gone(http: Request, error: Exception) -> Response:
    """The client left before its body was read; nobody gets this."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _http_error(http: Request, error: Exception) -> Response:
    """Starlette's own errors (no such route, wrong method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {http.method} {http.url.path}"
    return JSONResponse(error_body(message, "invalid_request_error"), error.status_code, error.headers)
