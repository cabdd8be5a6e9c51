"""Around all routes: request ids, the access log, limits on headers, and API keys. Plain ASGI, as streams need."""

import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Collection, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apt_jax.serve.errors import error_body, error_reply
from apt_jax.serve.json_text import shown

MAX_HEADERS = 256
PORT = re.compile(r":\d*$")  # after a host
GIVEN_ID = re.compile(r"[\x21-\x7e]{1,128}")

access = logging.getLogger("apt_jax.access")


class RequestIds:
    """Gives every request an id, its client's `x-request-id` or a new one, sends it back, and logs the request.

    Requests for one of `unlogged_paths` get no line in the access log; None is all.
    """

    def __init__(self, app: ASGIApp, unlogged_paths: Collection[str] | None):
        self._app = app
        self._unlogged_paths = unlogged_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = id_of(Headers(scope=scope))
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
            if self._unlogged_paths is not None and route_of(scope) not in self._unlogged_paths:
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


class RootPath:
    """Serves below `root`, whether the proxy in front takes that away or leaves it."""

    def __init__(self, app: ASGIApp, root: str):
        self._app = app
        self._root = root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http":
            path = scope["path"]
            below = path if path.startswith(f"{self._root}/") else self._root + path
            scope = {**scope, "root_path": self._root, "path": below}
        await self._app(scope, receive, send)


class Unforeseen:
    """Answers 500 where the application fails in a way that nobody foresaw, and logs it with the request's id."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        began = False

        async def watched(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if began or scope["type"] != "http":
                raise
            fields = {"path": scope["path"], "request_id": scope["state"]["request_id"]}
            access.error("unforeseen failure", exc_info=error, extra={"fields": fields})
            status, body, headers = error_reply(error)
            await JSONResponse(body, status, headers)(scope, receive, send)


class Hosts:
    """Lets requests through whose Host is this machine's loopback name or one of `allowed`: "*" is any, "*.x" below x.

    A web page may have its own name resolved to 127.0.0.1 (DNS rebinding), and so read what this server answers; its
    browser then sends that name. With `loopback_only` requests that came in at other addresses are not checked.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str], loopback_only: bool):
        self._app = app
        self._allowed = {name.lower() for name in allowed}
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http" and (not self._loopback_only or is_loopback((scope.get("server") or ("",))[0])):
            given = Headers(scope=scope).get("host")
            if given is not None and not self._is_allowed(given):
                message = f"Host {shown(given)} is not a name of this server; allow it with --allowed-hosts"
                body = error_body(message, "invalid_request_error", "host", "host_not_allowed")
                await JSONResponse(body, 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_allowed(self, given: str) -> bool:
        name = PORT.sub("", given.strip().lower()).removesuffix(".")
        if "*" in self._allowed or name in self._allowed or name == "localhost" or name.endswith(".localhost"):
            return True
        parents = {f"*.{'.'.join(name.split('.')[i:])}" for i in range(1, name.count(".") + 1)}
        return bool(parents & self._allowed) or is_loopback(name.removeprefix("[").removesuffix("]"))


def route_of(scope: Scope) -> str:
    """The path of a route, without where the application is mounted (or --root-path)."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    below = path.removeprefix(root)
    return below if root and path.startswith(root) and below.startswith("/") else path


def is_loopback(host: str) -> bool:
    """Whether a host is a loopback address, or the name that stands for them."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def id_of(headers: Headers) -> str:
    """The client's `x-request-id` where it can be one, or a new one."""
    given = headers.get("x-request-id", "")
    return given if GIVEN_ID.fullmatch(given) else uuid.uuid4().hex


class HeaderLimit:
    """Refuses requests with more than MAX_HEADERS headers, or whose headers together are longer than `max_bytes`."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http":
            size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
            count = len(scope["headers"])
            if size > self._max_bytes or count > MAX_HEADERS:
                message = f"the headers have {size} bytes, at most {self._max_bytes} are taken; see --max-header-bytes"
                if count > MAX_HEADERS:
                    message = f"the request has {count} headers, at most {MAX_HEADERS} are taken"
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
        if scope["type"] == "http" and route_of(scope) not in self._open_paths and scope["method"] != "OPTIONS":
            kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
            given = token.strip().encode("latin-1", "replace")
            # every key is compared, in constant time, so that timing tells nothing
            found = [hmac.compare_digest(given, key) for key in self._keys]
            if kind.lower() != "bearer" or not any(found):
                message, code = "give an API key of this server as Authorization: Bearer KEY", "missing_api_key"
                if given:
                    message, code = "this API key is not one of this server's", "invalid_api_key"
                body = error_body(message, "authentication_error", None, code)
                await JSONResponse(body, 401, {"www-authenticate": "Bearer"})(scope, receive, send)
                return
        await self._app(scope, receive, send)
