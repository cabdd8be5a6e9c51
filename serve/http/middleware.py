"""Around all routes: request ids, the access log, limits on headers, and API keys. Plain ASGI, as streams need."""

import hmac
import logging
import re
import time
import uuid
from collections.abc import Collection, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apt_jax.serve.errors import error_body

GIVEN_ID = re.compile(r"[\x21-\x7e]{1,128}")

access = logging.getLogger("apt_jax.access")


class RequestIds:
    """Gives every request an id, its client's `x-request-id` or a new one, sends it back, and logs the request.

    Requests for one of `unlogged_paths` get no line in the access log.
    """

    def __init__(self, app: ASGIApp, unlogged_paths: Collection[str]):
        self._app = app
        self._unlogged_paths = unlogged_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        began, status, body_bytes = time.monotonic(), 0, 0

        async def send_with_id(message: Message) -> None:
            nonlocal status, body_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(raw=message["headers"])["x-request-id"] = request_id
            else:
                body_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if scope["path"] not in self._unlogged_paths:
                fields = {
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "duration_ms": round(1000 * (time.monotonic() - began), 1),
                    "bytes": body_bytes,
                    "client": (scope.get("client") or ("",))[0],
                    "request_id": request_id,
                }
                access.info("request", extra={"fields": fields})


class HeaderLimit:
    """Refuses requests whose headers together are longer than `max_bytes`."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http":
            size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
            if size > self._max_bytes:
                message = f"the headers have {size} bytes, at most {self._max_bytes} are taken; see --max-header-bytes"
                body = error_body(message, "invalid_request_error", None, "headers_too_large")
                await JSONResponse(body, 431)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class ApiKeys:
    """Lets a request through only with one of `keys` as its bearer token; `open_paths` need none."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], open_paths: Collection[str]):
        self._app = app
        self._open_paths = open_paths
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http" and scope["path"] not in self._open_paths and scope["method"] != "OPTIONS":
            kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
            given = token.strip().encode("latin-1", "replace")
            # every key is compared, in constant time, so that timing tells nothing
            found = [hmac.compare_digest(given, key) for key in self._keys]
            if kind.lower() != "bearer" or not any(found):
                message = "give an API key of this server as Authorization: Bearer KEY"
                body = error_body(message, "authentication_error", None, "invalid_api_key")
                await JSONResponse(body, 401, {"www-authenticate": "Bearer"})(scope, receive, send)
                return
        await self._app(scope, receive, send)
