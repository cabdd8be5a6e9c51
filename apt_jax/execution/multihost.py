"""Several processes, one engine: process 0 schedules, the others run the same programs on their devices.

Programs over devices of several processes (multi-host TPU slices, GPU nodes) must be started by every process, in the
same order. Only process 0 has a scheduler, requests and a clock. It sends the others what it is about to start, over
one TCP connection each: the padded arrays of a batch, or the block tables to convert. So nothing has to be
deterministic, and everything above the runner is as on one process.

Messages are pickles: each connection is authenticated with a random key that process 0 distributes over JAX's own
collectives when they start. Processes of a job trust each other, as they do for those collectives.

A lost process ends the engine, since every program needs all processes. The others do not wait in a
collective that never ends: process 0 sees the connection end and ends too, and so do the others then.
"""

import atexit
import contextlib
import logging
import os
import pickle
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener, wait

import jax
import numpy as np
from jax.experimental import multihost_utils

from apt_jax.batching.arrays import Batch, ScoreChunk
from apt_jax.cache import Projection
from apt_jax.execution.interface import StepResults, StepRunner

logger = logging.getLogger(__name__)

_KEY_BYTES, _HOST_BYTES = 32, 256


class LeadingRunner:
    """The runner of process 0: sends the followers what it starts, then starts it on its own devices.

    Args:
        runner: that of this process.
        followers: a connection to each of the other processes.
    """

    def __init__(self, runner: StepRunner, followers: Sequence[Connection]):
        self._runner = runner
        self._followers = followers

    @property
    def num_programs(self) -> int:
        """See `StepRunner`."""
        return self._runner.num_programs

    @property
    def num_outside(self) -> int:
        """See `StepRunner`."""
        return self._runner.num_outside

    def compile_all(self, progress: bool = False) -> None:
        """See `StepRunner`; in all processes at the same time."""
        self._send("compile_all")
        self._runner.compile_all(progress)

    def dispatch(self, batch: Batch) -> StepResults:
        """See `StepRunner`."""
        self._send("dispatch", without_requests(batch))
        return self._runner.dispatch(batch)

    def read(self, results: StepResults) -> StepResults:
        """See `StepRunner`; every process holds all results."""
        return self._runner.read(results)

    def project(self, projections: Sequence[Projection]) -> None:
        """See `StepRunner`."""
        if projections:
            self._send("project", list(projections))
            self._runner.project(projections)

    def save(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `StepRunner`; each process keeps its devices' parts."""
        self._send("save", list(pairs))
        self._runner.save(pairs)

    def restore(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `StepRunner`."""
        self._send("restore", list(pairs))
        self._runner.restore(pairs)

    def fetch(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `StepRunner`."""
        self._send("fetch", list(pairs))
        self._runner.fetch(pairs)

    def land(self) -> None:
        """See `StepRunner`."""
        self._send("land")
        self._runner.land()

    def reset(self) -> None:
        """See `StepRunner`."""
        self._send("reset")
        self._runner.reset()

    def _send(self, name: str, *args: object) -> None:
        message = pickle.dumps((name, args), protocol=pickle.HIGHEST_PROTOCOL)
        for follower in self._followers:
            follower.send_bytes(message)


def lead(runner: StepRunner, address: str | None = None) -> LeadingRunner:
    """Wait for the other processes, which call `follow`; they are let go when this process ends.

    If one of them ends before, this process ends at once with one sentence and exit code 1: a thread that waits for its
    devices could not be ended in order.

    Args:
        address: name or address of this machine that the others reach; default: that of its route to other machines.
    """
    key = secrets.token_bytes(_KEY_BYTES)
    host = address or _own_address()
    with Listener((host, 0), authkey=key, backlog=jax.process_count()) as listener:
        _, port = listener.address
        _exchange(host, port, key)
        followers = {}
        for _ in range(jax.process_count() - 1):
            follower = listener.accept()
            followers[follower] = f"process {follower.recv()} of {jax.process_count()}"
    letting_go = threading.Event()

    def let_go() -> None:
        letting_go.set()
        for follower in followers:
            with contextlib.suppress(OSError), socket.fromfd(follower.fileno(), socket.AF_INET, 0) as end:
                end.shutdown(socket.SHUT_RDWR)  # closing it would not end it while `_watch` waits for it
            follower.close()

    atexit.register(let_go)  # before jax.distributed waits for everybody
    threading.Thread(target=_watch, args=(followers, letting_go), name="followers", daemon=True).start()
    logger.info("leading %d other processes", len(followers))
    return LeadingRunner(runner, list(followers))


def follow(runner: StepRunner) -> None:
    """Run what process 0 runs until it ends; `runner` must be made like its.

    SIGINT and SIGTERM often go to all processes of a job: a first one is ignored, since process 0 may still finish
    requests, and a second one ends this process at once.

    Raises:
        Exception: what `runner` raises. This process is then lost to the others, of which JAX informs them.
    """
    host, port, key = _exchange()
    with Client((host, port), authkey=key) as leader:
        leader.send(jax.process_index())
        _ignore_first_signal()
        logger.info("process %d follows process 0 at %s:%d", jax.process_index(), host, port)
        while True:
            try:
                message = leader.recv_bytes()
            except (EOFError, OSError):
                logger.info("process 0 has ended")
                return
            name, args = pickle.loads(message)
            getattr(runner, name)(*args)


def _watch(followers: Mapping[Connection, str], letting_go: threading.Event) -> None:
    """End this process when a follower is gone. They send nothing, so only an end is to be read. Values are names."""
    try:
        gone = wait(list(followers))
    except OSError:  # closed by this process
        gone = []
    if letting_go.is_set():
        return
    names = ", ".join(followers[follower] for follower in followers if follower in gone)
    logger.error("%s was lost, and nothing can be computed without it; start all processes again", names)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(1)


def _ignore_first_signal() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    numbers = signal.SIGINT, signal.SIGTERM

    def ignore(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        logger.info("this process ends when process 0 does; a second signal ends it at once")

    for each in numbers:
        signal.signal(each, ignore)


def smallest_of_all(count: int) -> int:
    """The smallest `count` of all processes, which all must ask at the same time."""
    if jax.process_count() == 1:
        return count
    return int(np.min(multihost_utils.process_allgather(np.int64(count))))


def without_requests(batch: Batch) -> Batch:
    """The part of a batch that a runner needs: its arrays, and whether any row samples."""
    return batch._replace(
        allowed=None if batch.allowed is None else batch.allowed.found(),
        requests=(None,) * len(batch.requests),  # type: ignore[arg-type] # their number is what counts
        spans=(),
        chunks=tuple(ScoreChunk(chunk.index, chunk.target, ()) for chunk in batch.chunks),
    )


def _exchange(host: str = "", port: int = 0, key: bytes = b"") -> tuple[str, int, bytes]:
    """Process 0's arguments, in every process."""
    name = host.encode()
    if len(name) > _HOST_BYTES:
        raise ValueError(f"host name {host!r} is longer than {_HOST_BYTES} bytes; give an address")
    mine = name.ljust(_HOST_BYTES, b"\0") + port.to_bytes(4, "big") + key.ljust(_KEY_BYTES, b"\0")
    sent = multihost_utils.broadcast_one_to_all(np.frombuffer(mine, np.uint8))
    found = np.asarray(sent, np.uint8).tobytes()
    end = _HOST_BYTES + 4
    return found[:_HOST_BYTES].rstrip(b"\0").decode(), int.from_bytes(found[_HOST_BYTES:end], "big"), found[end:]


def _own_address() -> str:
    """Address of the interface that leads to other machines; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:  # no route at all
            return "127.0.0.1"
