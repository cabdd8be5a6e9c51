"""`apt-jax serve`: uvicorn around the application, from the first byte listened to to the last byte answered."""

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from apt_jax.config import EngineConfig
from serve.app import create_app
from serve.engine_thread import EngineThread
from serve.options import DEMO_NAME, LoadOptions, ServerOptions
from serve.service import Service

if TYPE_CHECKING:
    from apt_jax.engine import Engine

GRACE_S = 5.0  # that running requests get when the server is told to stop

logger = logging.getLogger("apt_jax.serve")


class Server(uvicorn.Server):
    """Uvicorn's server, which on shutdown gives requests a grace time and then ends them with finish reason abort."""

    def __init__(self, config: uvicorn.Config, engine_thread: EngineThread):
        super().__init__(config)
        self._engine_thread = engine_thread

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, wait for the requests, then close."""
        logger.info("stopping; running requests get %.0f s", GRACE_S)
        timer = asyncio.get_running_loop().call_later(GRACE_S, self._engine_thread.abort_all)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def serve(model: str | None, load: LoadOptions, options: ServerOptions, config: EngineConfig) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code.

    Listens at once: while the model loads, /health is 200 and /ready 503. A model that cannot be loaded ends the
    server with one sentence and exit code 1.
    """
    try:
        listener = listen(options.host, options.port)
    except OSError as error:
        print(
            f"error: cannot listen on {options.host}:{options.port} ({error.strerror or error}); "
            "choose another --host or --port",
            file=sys.stderr,
        )
        return 1
    failures: list[Exception] = []

    def fail(error: Exception) -> None:
        if engine_thread.engine is None:
            failures.append(error)
            server.should_exit = True
        else:  # /health says so: whoever watches it decides
            report_failure(error)

    def make_engine() -> "Engine":
        from serve.build import build_engine  # imports jax, which takes seconds
        from serve.chat_template import read_template

        if options.chat_template is not None:
            service.chat_template = read_template(Path(options.chat_template))
        return build_engine(model, engine_config=config, **dataclasses.asdict(load))

    name, url = options.served_model_name or model or DEMO_NAME, url_of(listener)

    def ready(seconds: float) -> None:
        logger.info("ready after %.1f s: %s answers at %s/v1/completions", seconds, name, url)

    engine_thread = EngineThread(make_engine, ready, fail)
    service = Service(engine_thread, name, with_environment(options))
    app = create_app(service)
    server = Server(
        uvicorn.Config(
            app,
            http="h11",  # the one parser with a limit on headers that are still coming in
            h11_max_incomplete_event_size=options.max_header_bytes,
            log_config=None,
            access_log=False,  # the application's own has more
            lifespan="on",
            timeout_graceful_shutdown=int(2 * GRACE_S),
        ),
        engine_thread,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its milestones are told here
    logger.info("listening on %s, loading %s; %s/ready turns 200 when requests are taken", url, name, url)
    run_until_signal(server, listener)
    if failures:
        report_failure(failures[0])
    if not engine_thread.stop(timeout_s=0):
        # It is inside the compiler, which nothing can interrupt; the interpreter would crash under its feet.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(1 if failures else 0)
    logger.info("stopped")
    return 1 if failures else 0


def with_environment(options: ServerOptions) -> ServerOptions:
    """The options with the key that APT_JAX_API_KEY holds, which `ps` does not show."""
    key = os.environ.get("APT_JAX_API_KEY")
    return options if not key else dataclasses.replace(options, api_key=(*options.api_key, key))


def run_until_signal(server: uvicorn.Server, listener: socket.socket) -> None:
    """Run `server` on `listener`; a first SIGINT or SIGTERM stops it in order, and it returns normally."""

    def stop(number: int, frame: object) -> None:
        server.should_exit = True

    # uvicorn raises the signals again, for the handlers that it found, once it has stopped
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def report_failure(error: Exception) -> None:
    """One sentence for what the user can cure, the traceback for what they cannot."""
    if isinstance(error, ValueError | OSError):
        print(f"error: {error}", file=sys.stderr)
    else:
        logger.error("the engine failed", exc_info=error)


def listen(host: str, port: int) -> socket.socket:
    """A listening-to-be TCP socket.

    Raises:
        OSError: the address is unknown or taken.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket) -> str:
    """`http://HOST:PORT` of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
