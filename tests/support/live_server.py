"""The application behind uvicorn on a free port, in a thread of this process."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from apt_jax.serve.http.app import create_app
from apt_jax.serve.http.resume import Resumption
from apt_jax.serve.http.server import http_config, listen, url_of
from apt_jax.serve.http.service import Service
from apt_jax.serve.runtime.status import EngineStatus


@contextlib.contextmanager
def live(service: Service, resumption: Resumption | None = None) -> Iterator[str]:
    """Serve until the block ends; gives the address, once the engine is ready."""
    listener = listen("127.0.0.1", 0)
    config = http_config(create_app(service, resumption), service.options)
    config.timeout_graceful_shutdown = 5
    http = uvicorn.Server(config)
    runner = threading.Thread(target=http.run, kwargs={"sockets": [listener]})
    runner.start()
    thread = service.backend
    try:
        until(lambda: thread.status not in (EngineStatus.LOADING, EngineStatus.WARMING), 200)
        yield url_of(listener)
    finally:
        http.should_exit = True
        runner.join(20)
        listener.close()
    assert not runner.is_alive() and thread.status is EngineStatus.STOPPED


def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Wait for a condition."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)
