"""GET /: the dashboard, one page without build step or external assets."""

from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from apt_jax.serve.http.service import Service

PAGE = Path(__file__).with_name("dashboard.html")
HEADERS = {
    # nothing from elsewhere, and no other page may frame it
    "content-security-policy": "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


async def dashboard(service: Service, http: Request) -> Response:
    """GET /: the page; its figures come from /debug/state."""
    return HTMLResponse(_page(), headers=HEADERS)


@cache
def _page() -> str:
    return PAGE.read_text(encoding="utf-8")
