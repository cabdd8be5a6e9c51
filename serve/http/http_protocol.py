"""HTTP over a connection, with limits on the time in which a request must arrive and its answer must be taken.

uvicorn limits how long a connection may be idle between requests, but not how long a client may take to send one: a
client that sends a byte now and then would hold its connection, and a task, for as long as it likes. So would one that
asks for a long answer and reads nothing, with the answer's memory. And uvicorn reads
whatever has come in one go, which takes a second where a body comes in thousands of chunks of one byte.
"""

import asyncio
import json
import re
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import h11
from starlette.datastructures import Headers
from uvicorn.protocols.http.h11_impl import H11Protocol

from apt_jax.serve.errors import error_body
from apt_jax.serve.http.middleware import access, id_of

END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
READ_BYTES = 4096  # at once
READ_S = 0.004
MAX_UNSENT = 256  # answers on one connection that its buffer holds at most
SENTENCE = "the request did not come in within {:g} s, the limit of --request-read-timeout"


class StrictConnection(h11.Connection):
    """Refuses requests whose length or fields a proxy in front might read in another way (request smuggling).

    h11 takes a Content-Length beside chunks, equal ones twice, and folded lines, as the RFC lets it.
    """

    def next_event(self) -> Any:
        """The next event.

        Raises:
            RemoteProtocolError: it is not HTTP as this server takes it; `fault` keeps the error.
        """
        try:
            if self.their_state is h11.IDLE:
                check_head(self.trailing_data[0])
            return super().next_event()
        except h11.RemoteProtocolError as error:
            self.fault = error
            raise

    fault: h11.RemoteProtocolError | None = None


def check_head(data: bytes) -> None:
    """Raises RemoteProtocolError for a whole head of a request in `data` that could be read in two ways."""
    end = END_OF_HEAD.search(data)
    if end is None:
        return
    line, *headers = (line.removesuffix(b"\r") for line in data[: end.start()].split(b"\n"))
    names = [header.partition(b":")[0].strip().lower() for header in headers]
    lengths, codings = names.count(b"content-length"), names.count(b"transfer-encoding")
    faults = (
        (b"\r" in line or any(b"\r" in header for header in headers), "a carriage return inside a line"),
        (any(header[:1] in (b" ", b"\t") for header in headers), "a header folded over several lines"),
        (lengths > 1, "several Content-Length headers"),
        (codings > 1, "several Transfer-Encoding headers"),
        (lengths and codings, "both Content-Length and Transfer-Encoding"),
        (codings and line.endswith(b"HTTP/1.0"), "a Transfer-Encoding in HTTP/1.0"),
    )
    for found, what in faults:
        if found:
            raise h11.RemoteProtocolError(f"the request has {what}, which proxies read in different ways")
    for name, header in zip(names, headers, strict=True):
        if name == b"content-length" and not header.partition(b":")[2].strip().isdigit():
            raise h11.RemoteProtocolError("the request's Content-Length is not one number")


class TimedProtocol(H11Protocol):
    """Ends a connection that has not sent a whole request, headers and body, in `read_timeout_s` seconds.

    The time runs from the connection, and for later requests on it from their first byte. A client whose request has
    begun gets 408 where nothing else was answered. One that takes none of its answer for `write_timeout_s` seconds is
    cut off, as if it had disconnected.
    """

    read_timeout_s = 60.0
    write_timeout_s = 300.0

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.conn: StrictConnection = StrictConnection(h11.SERVER, self.config.h11_max_incomplete_event_size or 16384)
        self._deadline: asyncio.TimerHandle | None = None
        self._reader_check: asyncio.TimerHandle | None = None
        # whom to tell if the newest answers on this connection are not sent when the server ends
        self.answers: deque[Callable[[], None]] = deque(maxlen=MAX_UNSENT)
        app, self.app = self.app, self._called
        self._app = app
        self._unread = b""
        self._is_reading = False

    def data_received(self, data: bytes) -> None:
        """Read what has come, for a few milliseconds at a time."""
        self._unread += data
        if not self._is_reading:
            self._read_on()

    def _read_on(self) -> None:
        end = self.loop.time() + READ_S
        while self._unread and not self.transport.is_closing():
            piece, self._unread = self._unread[:READ_BYTES], self._unread[READ_BYTES:]
            super().data_received(piece)
            if self._unread and self.loop.time() > end:
                self._is_reading = True
                self.transport.pause_reading()
                self.loop.call_soon(self._read_on)
                return
        if self._is_reading:
            self._is_reading = False
            if not self.flow.read_paused and not self.transport.is_closing():
                self.transport.resume_reading()

    async def _called(self, scope: Any, receive: Any, send: Any) -> None:
        """The application, which finds this connection in its state."""
        self._forget_reader()
        if not self.has_unsent:
            self.answers.clear()
        scope["state"]["connection"] = self
        await self._app(scope, receive, send)

    @property
    def has_unsent(self) -> bool:
        """Whether bytes wait for the client to read earlier ones."""
        return self.transport.get_write_buffer_size() > 0

    def end(self) -> None:
        """The server ends: tell whose answers have not all been sent, and let go of the socket."""
        if self.has_unsent:
            for tell in self.answers:
                tell()
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit of the first request."""
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the time limits."""
        self._stop_clock()
        self._forget_reader()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client is slower than its answer."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """The client has taken enough; more is written now."""
        self._forget_reader()
        super().resume_writing()

    def on_response_complete(self) -> None:
        """The rest of the answer is left to the transport."""
        super().on_response_complete()
        self._watch_reader()

    def _watch_reader(self) -> None:
        """Look later whether the client has taken anything; nothing is written until then, or this is forgotten."""
        self._forget_reader()
        if self.has_unsent:
            unsent = self.transport.get_write_buffer_size()
            self._reader_check = self.loop.call_later(self.write_timeout_s, self._check_reader, unsent)

    def _forget_reader(self) -> None:
        if self._reader_check is not None:
            self._reader_check.cancel()
            self._reader_check = None

    def _check_reader(self, unsent: int) -> None:
        if self.transport.get_write_buffer_size() >= unsent:
            fields = {"client": (self.client or ("",))[0], "limit_s": self.write_timeout_s}
            access.info("a client that reads nothing is cut off", extra={"fields": fields})
            self.transport.abort()
        else:
            self._watch_reader()

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
        if self._is_receiving:
            self._refuse(408, SENTENCE.format(self.read_timeout_s), "request_too_slow")
        else:
            self._forget_cycle()
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP as this server takes it, and close the connection; what follows cannot be trusted."""
        fault = self.conn.fault
        if fault is not None and fault.error_status_hint == 431:
            self._refuse(431, "the headers are too long; see --max-header-bytes", "headers_too_large")
        else:
            self._refuse(400, f"not a valid HTTP request: {msg if fault is None else fault}", "invalid_http")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer with an error, unless an answer has begun, and close the connection."""
        self._stop_clock()
        self._forget_cycle()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            request_id = self._request_id()
            body = json.dumps(error_body(message, "invalid_request_error", None, code)).encode()
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            headers["x-request-id"] = request_id
            response = h11.Response(status_code=status, headers=list(headers.items()))
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            fields = {"status": status, "client": (self.client or ("",))[0], "request_id": request_id}
            access.info("request refused", extra={"fields": fields | {"reason": message}})
        self.transport.close()

    def _forget_cycle(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application must not answer any more
            self.cycle.message_event.set()

    def _request_id(self) -> str:
        """The one that the application gave the request; before that the client's, or a new one."""
        if self.conn.their_state is h11.IDLE or self.scope is None:
            return uuid.uuid4().hex
        state = cast(dict[str, Any], self.scope).get("state", {})
        return str(state.get("request_id") or id_of(Headers(raw=self.headers)))


def timed_protocol(read_timeout_s: float, write_timeout_s: float) -> type[TimedProtocol]:
    """The protocol with limits of its own."""
    limits = {"read_timeout_s": read_timeout_s, "write_timeout_s": write_timeout_s}
    return type("TimedProtocol", (TimedProtocol,), limits)
