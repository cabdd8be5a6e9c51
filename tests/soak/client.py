"""One HTTP request over a socket of its own, with every way to misbehave; it costs little, so that many can run."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any


@dataclass
class Outcome:
    """How a request ended: status (0: none came), events, finish reasons, whether the end of the stream was seen.

    `raw` is all that came of one that was not streamed.
    """

    status: int = 0
    events: int = 0
    reasons: tuple[str, ...] = ()
    whole: bool = False
    error: str = ""
    raw: bytes = b""

    @property
    def is_definite(self) -> bool:
        """Whether the client knows what became of its request."""
        return self.whole or self.status >= 400


async def complete(
    port: int, body: dict[str, Any], *, leave_after: int | None = None, pause_s: float = 0.0, read_bytes: int = 1 << 16
) -> Outcome:
    """POST /v1/completions; leaves after so many events if told to, or reads slowly."""
    outcome = Outcome()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    except OSError as error:
        outcome.error = str(error)
        return outcome
    try:
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close"
        writer.write(f"{head}\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        if leave_after == 0:
            return outcome
        text = b""
        while piece := await reader.read(read_bytes):
            text += piece
            if not outcome.status and b"\r\n" in text:
                outcome.status = int(text.split(b" ", 2)[1])
            outcome.events = text.count(b"data: {")
            if leave_after is not None and outcome.events >= leave_after:
                return outcome
            if pause_s:
                await asyncio.sleep(pause_s)
        reasons = ("length", "stop", "abort")
        outcome.reasons = tuple(r for r in reasons for _ in range(text.count(f'"finish_reason":"{r}"'.encode())))
        outcome.raw = b"" if body.get("stream") else text
        outcome.whole = b"data: [DONE]" in text or (outcome.status == 200 and text.rstrip().endswith(b"}"))
    except OSError as error:
        outcome.error = str(error)
    finally:
        writer.close()
    return outcome


async def send_raw(port: int, data: bytes, *, ends: bool = False, timeout_s: float = 20) -> int:
    """Send any bytes; the status that comes back, 0 if none. `ends`: there is no more, whatever the head says."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        await writer.drain()
        if ends and writer.can_write_eof():
            writer.write_eof()
        answer = await asyncio.wait_for(reader.read(4096), timeout_s)
        return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0
    except (OSError, TimeoutError):
        return 0
    finally:
        writer.close()
