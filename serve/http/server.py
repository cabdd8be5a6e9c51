"""`apt-jax serve`: runs the application in uvicorn, from opening the port to the end of shutdown."""

import asyncio
import dataclasses
import errno
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from apt_jax.engine.interface import ServingEngine
from apt_jax.engine_config import EngineConfig
from apt_jax.files import reason_of
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.serve.batch.store import BatchStore
from apt_jax.serve.batch.worker import BatchWorker
from apt_jax.serve.errors import EngineFailure, NotReady
from apt_jax.serve.http.app import STOP_TIMEOUT_S, create_app
from apt_jax.serve.http.http_protocol import TimedProtocol, timed_protocol
from apt_jax.serve.http.resume import Resumption
from apt_jax.serve.http.service import Service
from apt_jax.serve.http.snapshot import unfinished_samples
from apt_jax.serve.http.snapshot_cache import SnapshotCache
from apt_jax.serve.http.snapshot_file import check_snapshot_file, keep_records
from apt_jax.serve.logs import tell
from apt_jax.serve.openai.templates.chat_template import read_template
from apt_jax.serve.options import LoadOptions, ServerOptions
from apt_jax.serve.replicas.backend import ReplicaBackend
from apt_jax.serve.replicas.leaving.notice import PreemptionNotice, PreemptionWatch
from apt_jax.serve.replicas.messages import EngineSpec
from apt_jax.serve.replicas.options import RayOptions, ReplicaOptions
from apt_jax.serve.replicas.ray_session import check_ray
from apt_jax.serve.runtime.engine_thread import EngineThread
from apt_jax.serve.runtime.starting.start_up import StartUp, spare_collector

NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
ATTEMPTS = 10  # at a free port that is free on every address
BACKLOG = 2048  # connections that wait to be accepted
KEEP_BEGINS_S = 30.0  # by when an engine must have ended its step, to keep cached pages
FLUSH_S = 5.0  # that clients get, after the running requests were ended, to read what is sent

logger = logging.getLogger("apt_jax.serve")


class Server(uvicorn.Server):
    """Uvicorn's server, which on shutdown gives requests a grace time and then ends them with finish reason abort."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service
        self._grace_s = service.options.shutdown_timeout

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal stops the server in order, a second one ends it at once."""
        if self.should_exit:
            os._exit(128 + sig)
        super().handle_exit(sig, frame)

    def end_before_preemption(self, why: str) -> None:
        """Stop in order while the machine lasts; from any thread."""
        lasts_s = self._service.options.preemption_grace
        self._grace_s = max(lasts_s - FLUSH_S, 0.0)
        self.config.timeout_graceful_shutdown = math.ceil(max(lasts_s, FLUSH_S))
        logger.warning("the machine will be taken away in %g s: %s; no new requests are taken", lasts_s, why)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, wait for the requests, then close."""
        grace_s = self._grace_s
        self._service.stop()
        if self._service.num_generating:
            logger.info("stopping; %d running requests get %g s", self._service.num_generating, grace_s)
        timer = asyncio.get_running_loop().call_later(grace_s, self._service.backend.abort_all)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
        for connection in list(self.server_state.connections):
            assert isinstance(connection, TimedProtocol)
            connection.end()
        await asyncio.sleep(0)  # the transports close in the next turn of the loop


def serve(
    model: str | None,
    load: LoadOptions,
    options: ServerOptions,
    config: EngineConfig,
    replicas: ReplicaOptions | None = None,
    ray: RayOptions | None = None,
    leader_host: str | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code. With `replicas` that use Ray, SIGHUP updates them.

    `leader_host`: see `build_engine`.

    Listens at once: while the model loads, /health is 200 and /ready 503. A model that cannot be loaded ends the
    server with one sentence and exit code 1.

    Raises:
        ValueError: the chat template is not one, the snapshot file cannot be used, the batch folder or the preemption
            notice cannot be used, or Ray is needed and not installed.
        OSError: the chat template, or the snapshot to resume from, cannot be read.
    """
    if replicas is not None and replicas.uses_ray:
        check_ray()
    make_policy(config.scheduling_policy)
    start_up = StartUp()
    snapshot = None if options.snapshot_file is None else check_snapshot_file(options.snapshot_file)
    resumption = None if options.resume_from is None else Resumption(Path(options.resume_from))
    store = None if options.batch_dir is None else open_store(Path(options.batch_dir).expanduser().absolute())
    template = None if options.chat_template is None else read_template(Path(options.chat_template))
    notice = None if options.preemption_notice is None else PreemptionNotice.parse(options.preemption_notice)
    try:
        listeners = listen_everywhere(options.host, options.port)
    except OSError as error:
        where = f"{options.host}:{options.port}"
        tell(f"cannot listen on {where} ({error.strerror or error}); choose another --host or --port")
        return 1
    failures: list[Exception] = []

    def fail(error: Exception) -> None:
        if backend.engine is None:
            failures.append(error)
            server.should_exit = True
        else:  # /health says so: whoever watches it decides
            report_failure(error)

    def make_engine() -> ServingEngine:
        from apt_jax.serve.runtime.build import build_engine  # imports jax, which takes seconds

        start_up.ended("imports")
        return build_engine(
            model, engine_config=config, on_phase=start_up.ended, leader_host=leader_host,
            moves_pages=options.snapshot_cache, **dataclasses.asdict(load),
        )  # fmt: skip

    (name, *others), url = options.served_names(model), url_of(listeners[0], https=options.ssl_certfile is not None)

    def ready(seconds: float) -> None:
        if isinstance(backend, EngineThread):
            start_up.ended("measuring", backend.compile_s)
        else:
            start_up.ended("replicas")
        spare_collector()
        logger.info(
            "ready after %.1f s (%s): %s answers at %s/v1/completions", start_up.total_s, start_up.text(), name, url
        )

    backend: EngineThread | ReplicaBackend
    if replicas is not None and replicas.uses_ray:
        spec = EngineSpec(
            model, load, config, name, log_format=options.log_format, log_level=options.log_level,
            preemption_notice=options.preemption_notice,
            preemption_grace=options.preemption_grace,
        )  # fmt: skip
        notice = None if notice is None else notice.of_front()
        backend = ReplicaBackend(spec, replicas, ray or RayOptions(), ready, fail)
        service = Service(backend, backend.view(name), name, with_environment(options))
    else:
        backend = EngineThread(make_engine, ready, fail)
        service = Service.of_engine(backend, name, with_environment(options))
    service.chat_template, service.other_names = template, tuple(others)
    if store is not None:
        service.batches = BatchWorker(
            *(store, backend.submit, service.served_model, service.for_batches),
            num_engines=lambda: backend.num_engines if isinstance(backend, ReplicaBackend) else 1,
        )
    app = create_app(service, resumption)
    server = Server(http_config(app, options), service)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its milestones are told here
    logger.info("listening on %s, loading %s; %s/ready turns 200 when requests are taken", url, name, url)
    watch = None if notice is None else PreemptionWatch(notice, server.end_before_preemption)
    try:
        if watch is not None:
            watch.start()
        run_until_signal(server, listeners, None if isinstance(backend, EngineThread) else backend.update)
    finally:
        if watch is not None:
            watch.stop()
        kept_in = keep_unfinished(service, snapshot)
        if options.snapshot_cache:
            if kept_in is not None:
                keep_caches(service, kept_in, service.unfinished_records)
            if resumption is not None:
                keep_caches(service, resumption.path, resumption.progress)
            backend.stop(STOP_TIMEOUT_S)
    if failures:
        report_failure(failures[0])
    if not backend.stop(timeout_s=0):
        # It is inside the compiler, which nothing can interrupt; the interpreter would crash under its feet.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(1 if failures else 0)
    logger.info("stopped")
    return 1 if failures else 0


def open_store(folder: Path) -> BatchStore:
    """The files and batches of --batch-dir.

    Raises:
        ValueError: it cannot be used.
    """
    try:
        return BatchStore(folder)
    except OSError as error:
        raise ValueError(f"--batch-dir {folder} cannot be used: {reason_of(error)}; give another one") from error


def http_config(app: ASGIApp, options: ServerOptions) -> uvicorn.Config:
    """How uvicorn serves `app`; raises ValueError if a file of TLS cannot be read."""
    files = {"keyfile": options.ssl_keyfile, "certfile": options.ssl_certfile, "ca-certs": options.ssl_ca_certs}
    for flag, path in files.items():
        try:
            open(path or os.devnull, "rb").close()
        except OSError as error:
            raise ValueError(f"--ssl-{flag} {path} cannot be read: {reason_of(error)}; give another one") from error
    return uvicorn.Config(
        app,
        # of h11, which limits headers that are still coming in
        http=timed_protocol(options.request_read_timeout, options.response_write_timeout),
        h11_max_incomplete_event_size=options.max_header_bytes,
        ws="none",
        log_config=None,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        ssl_ca_certs=options.ssl_ca_certs,
        ssl_cert_reqs=options.ssl_cert_reqs,
        access_log=False,  # the application's own has more
        lifespan="on",
        timeout_graceful_shutdown=math.ceil(options.shutdown_timeout + FLUSH_S),
    )


def keep_unfinished(service: Service, file: Path | None) -> Path | None:
    """Write what the server could not finish to `file`, if one is wanted, or to another one if it must be.

    Returns:
        The file; None if nothing was written.
    """
    records = service.unfinished_records
    if not records:
        return None
    if file is None:
        logger.warning("%d requests were not finished", len(records))
    elif (path := keep_records(file, records)) is not None:
        logger.info("%d unfinished requests are in %s; --resume-from %s finishes them", len(records), path, path)
        return path
    else:
        ids = ", ".join(record["id"] for record in records)
        logger.error("%d unfinished requests are lost, nothing could be written anywhere: %s", len(records), ids)
    return None


def keep_caches(service: Service, snapshot: Path, records: list[dict[str, Any]]) -> None:
    """Write the cached pages of unfinished requests beside their snapshot. What is missing is computed again."""
    samples = [sample for record in records for sample in unfinished_samples(record)]
    cache = SnapshotCache(snapshot)
    if not samples or not isinstance(service.backend, EngineThread):
        return
    try:
        answer = service.backend.call(lambda engine: cache.keep(engine, samples))
        end = time.monotonic() + KEEP_BEGINS_S
        while not (answer.running() or answer.done()) and time.monotonic() < end:
            time.sleep(0.01)
        answer.cancel()  # no effect once it has begun
        kept = answer.result()
    except (NotReady, EngineFailure, CancelledError) as error:
        logger.warning(
            "the cached pages of unfinished requests are lost: %s", str(error) or "the engine does not answer"
        )
    except Exception:
        logger.exception("not all cached pages of unfinished requests could be kept in %s", cache.folder)
    else:
        logger.info(
            "cached pages of %d of %d unfinished samples are in %s: %d tokens, %.1f MiB",
            *(kept.num_samples, len(samples), cache.folder, kept.num_tokens, kept.num_bytes / 2**20),
        )


def with_environment(options: ServerOptions) -> ServerOptions:
    """The options with the key that APT_JAX_API_KEY holds, which `ps` does not show."""
    key = os.environ.get("APT_JAX_API_KEY")
    return options if not key else dataclasses.replace(options, api_key=(*options.api_key, key))


def run_until_signal(
    server: uvicorn.Server, listeners: list[socket.socket], on_hangup: Callable[[], None] | None = None
) -> None:
    """Run `server` on `listeners`; a first SIGINT or SIGTERM stops it in order, and it returns normally.

    `on_hangup` is called on every SIGHUP, which otherwise is ignored: a closed terminal does not end a server.
    """

    def stop(number: int, frame: object) -> None:
        server.should_exit = True

    # uvicorn raises the signals again, for the handlers that it found, once it has stopped
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def hang_up(number: int, frame: object) -> None:
        if on_hangup is None:
            logger.info("SIGHUP is ignored: there are no replicas to update")
        else:
            on_hangup()

    previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
    try:
        server.run(sockets=listeners)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def report_failure(error: Exception) -> None:
    """One sentence for what the user can cure, the traceback for what they cannot."""
    if isinstance(error, ValueError | OSError):
        tell(error)
    else:
        logger.error("the engine failed", exc_info=error)


def listen_everywhere(host: str, port: int) -> list[socket.socket]:
    """A listening socket for every address of `host`, IPv4 first, all on one port; 0 is any free one.

    Raises:
        OSError: the host is unknown, or no address of it, or the port on one of them, can be had.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = dict.fromkeys(str(address[0]) for *_, address in sorted(found, key=lambda one: one[0]))
    for attempts_left in reversed(range(ATTEMPTS)):
        listeners: list[socket.socket] = []
        try:
            for address in addresses:
                try:
                    chosen = listeners[0].getsockname()[1] if listeners else port
                    listeners.append(listen(address, chosen))
                except OSError as error:  # an address in the hosts file of a machine without IPv6
                    if error.errno not in NO_SUCH_ADDRESS or (address == [*addresses][-1] and not listeners):
                        raise
            return listeners
        except OSError as error:
            for listener in listeners:
                listener.close()
            if port != 0 or error.errno != errno.EADDRINUSE or not attempts_left:
                raise
    raise AssertionError("the last attempt returns or raises")


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; clients that connect before the server runs wait.

    Raises:
        OSError: the address is unknown or taken.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6 and address[0] != "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket, https: bool = False) -> str:
    """`http://HOST:PORT` of a bound socket."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if https else 'http'}://{shown}:{port}"
