"""GET /: the dashboard, one page without build step or external assets."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

PAGE = Path(__file__).with_name("dashboard.html")
HEADERS = {
    # nothing from elsewhere, and no other page may frame it
    "content-security-policy": "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def dashboard_route() -> Route:
    """The page; its figures come from /debug/state."""
    page = PAGE.read_text(encoding="utf-8")

    async def dashboard(http: Request) -> Response:
        return HTMLResponse(page, headers=HEADERS)

    return Route("/", dashboard, methods=["GET"])
