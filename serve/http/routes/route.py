"""The declaration of a route, which the application, the middleware and the OpenAPI document read."""

from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from apt_jax.serve.http.service import Service


@dataclass(frozen=True)
class RouteSpec:
    """One route: how it is served and, where it has a `reply`, how the OpenAPI document shows it."""

    method: Literal["GET", "POST", "DELETE"]
    path: str  # as Starlette matches it: with {name} or {name:path}
    handler: Callable[[Service, Request], Awaitable[Response]]
    _: KW_ONLY
    is_open: bool = False  # answers without an API key
    is_probe: bool = False  # asked every few seconds: not worth a line in the access log
    is_generation: bool = False  # the engine works for it: a refusal counts in the metrics
    summary: str = ""
    body: Any = None
    reply: Any = None  # of a 200; None keeps the route out of the document
    chunk: Any = None  # what each event of a stream carries
    statuses: tuple[int, ...] = ()  # of errors
    parameters: tuple[dict[str, Any], ...] = ()
    media_type: str = "application/json"

    def bound(self, service: Service) -> Route:
        """For the application."""
        return Route(self.path, partial(self.handler, service), methods=[self.method])
