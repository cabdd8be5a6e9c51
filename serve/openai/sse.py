"""Server-sent events, and noticing at once that the client has gone."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any, ClassVar

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from apt_jax.serve.runtime.group import Group


def event(data: Any) -> bytes:
    """One event that carries `data` as JSON."""
    return b"data: " + to_json(data) + b"\n\n"


def close_on_disconnect(receive: Receive, group: Group, cleanup: contextlib.ExitStack) -> None:
    """Close `group` when the client disconnects, and in any case when `cleanup` is closed."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        group.abandon()

    cleanup.callback(group.close)
    cleanup.callback(asyncio.create_task(watch()).cancel)


class PiecesResponse(Response):
    """JSON in pieces. Closes `cleanup` when it ends in any way, also while it waits for a slow reader."""

    media_type = "application/json"
    headers_of_kind: ClassVar[dict[str, str]] = {}

    def __init__(self, pieces: AsyncGenerator[bytes], cleanup: contextlib.ExitStack):
        self._pieces = pieces
        self._cleanup = cleanup
        self.status_code = 200
        self.background = None
        self.init_headers(self.headers_of_kind)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces; the caller, which made `cleanup`, watches `receive`."""
        with self._cleanup:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with contextlib.aclosing(self._pieces) as pieces:
                async for piece in pieces:
                    if not piece:
                        continue
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class SseResponse(PiecesResponse):
    """A stream of events."""

    media_type = "text/event-stream"
    headers_of_kind: ClassVar[dict[str, str]] = {"cache-control": "no-cache", "x-accel-buffering": "no"}
