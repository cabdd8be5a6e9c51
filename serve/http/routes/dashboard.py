"""The dashboard: a few pages and their parts, as they lie in a folder; without build step or external assets."""

from collections.abc import Awaitable, Callable
from functools import cache, partial
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from apt_jax.serve.http.service import Service

FOLDER = Path(__file__).parents[1] / "pages"
SCRIPTS = ("page", "charts", "overview", "requests", "plans")
PAGES = {  # by path: file and content type
    "/": ("overview.html", "text/html"),
    "/requests": ("requests.html", "text/html"),
    "/plans": ("plans.html", "text/html"),
    "/favicon.svg": ("icon.svg", "image/svg+xml"),
    "/favicon.ico": ("icon.svg", "image/svg+xml"),  # asked for by browsers that show a bare answer of the API
    "/pages/page.css": ("page.css", "text/css"),
    **{f"/pages/{name}.js": (f"{name}.js", "text/javascript") for name in SCRIPTS},
}
HEADERS = {
    # nothing from elsewhere, no code or style within a page, and no other page may frame it
    "content-security-policy": "default-src 'none'; connect-src 'self'; img-src 'self'; style-src 'self'; "
    "script-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page(path: str) -> Callable[[Service, Request], Awaitable[Response]]:
    """The handler of one of PAGES. The figures come from /debug/..., so pages need no key."""
    return partial(_page, *PAGES[path])


async def _page(name: str, media_type: str, service: Service, http: Request) -> Response:
    return Response(_content(name), headers=HEADERS, media_type=media_type)


@cache
def _content(name: str) -> bytes:
    return (FOLDER / name).read_bytes()
