"""HTTP over a connection, with a limit on the time in which a request must arrive.

uvicorn limits how long a connection may be idle between requests, but not how long a client may take to send one: a
client that sends a byte now and then would hold its connection, and a task, for as long as it likes.
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from apt_jax.serve.errors import error_body

SENTENCE = "the request did not come in within {:g} s, the limit of --request-read-timeout"


class TimedProtocol(H11Protocol):
    """Ends a connection that has not sent a whole request, headers and body, in `read_timeout_s` seconds.

    The time runs from the connection, and for later requests on it from their first byte. A client whose request has
    begun gets 408 where nothing else was answered.
    """

    read_timeout_s = 60.0

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit of the first request."""
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the time limit."""
        self._stop_clock()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Start or stop the time limit, depending on whether a request is incomplete."""
        super().handle_events()
        if self._is_receiving:
            self._start_clock()
        else:
            self._stop_clock()

    @property
    def _is_receiving(self) -> bool:
        state = self.conn.their_state
        return state is h11.SEND_BODY or (state is h11.IDLE and bool(self.conn.trailing_data[0]))

    def _start_clock(self) -> None:
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self.read_timeout_s, self._too_slow)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application must not answer any more
            self.cycle.message_event.set()
        if self._is_receiving and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse()
        self.transport.close()

    def _refuse(self) -> None:
        message = SENTENCE.format(self.read_timeout_s)
        body = json.dumps(error_body(message, "invalid_request_error", None, "request_too_slow")).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=408, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")


def timed_protocol(read_timeout_s: float) -> type[TimedProtocol]:
    """The protocol with a limit of its own."""
    return type("TimedProtocol", (TimedProtocol,), {"read_timeout_s": read_timeout_s})
