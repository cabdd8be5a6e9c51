"""Notices that this machine is about to be taken away, as spot and preemptible machines get them.

`gce` asks Google Compute Engine's metadata server, which answers when something changes
(https://cloud.google.com/compute/docs/instances/preemptible). Its address is in GCE_METADATA_HOST, as Google's own
libraries have it. `file:PATH` is a file that somebody makes, `signal` a SIGUSR1. What follows is SpotServe's idea
(arXiv 2311.15566, section 4): decode as long as the machine lasts, then hand over tokens instead of losing them.

With replicas each process watches the machine that it is on: PATH may contain {replica}, its name, and then says
nothing to the server in front.
"""

import http.client
import logging
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

METADATA_HOST = "metadata.google.internal"
EVENTS = (("instance/preempted", "TRUE"), ("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"))
WAIT_S = 60  # within which the metadata server answers, if nothing changes
RETRY_S = 1.0
REPLICA = "{replica}"  # in a path, the name of one
LOOK_S = 0.2  # between two looks for a file

logger = logging.getLogger("apt_jax.serve")


@dataclass(frozen=True)
class PreemptionNotice:
    """Where notices come from; `path` is that of `file`."""

    source: Literal["gce", "file", "signal"]
    path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> "PreemptionNotice":
        """From the command line.

        Raises:
            ValueError: it is neither gce, file:PATH nor signal.
        """
        source, _, path = text.partition(":")
        if source == "file" and path:
            return cls("file", Path(path))
        if text == "gce":
            return cls("gce")
        if text == "signal":
            return cls("signal")
        raise ValueError(f"preemption_notice={text!r} must be gce, file:PATH or signal")

    def of_front(self) -> "PreemptionNotice | None":
        """What the server watches itself; None if it is not for it."""
        return None if self.path is not None and REPLICA in str(self.path) else self

    def of_replica(self, name: str) -> "PreemptionNotice | None":
        """What a replica watches; None for a signal, which goes to one process."""
        if self.path is not None:
            return PreemptionNotice("file", Path(str(self.path).replace(REPLICA, name)))
        return None if self.source == "signal" else self


class PreemptionWatch:
    """Calls `on_notice` with a sentence, once, from a thread of its own or a signal handler."""

    def __init__(self, notice: PreemptionNotice, on_notice: Callable[[str], None]):
        self._notice, self._on_notice = notice, on_notice
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to watch; in the main thread, if it is for a signal."""
        if self._notice.source == "signal":
            signal.signal(signal.SIGUSR1, lambda number, frame: self._tell("SIGUSR1 was received"))
            return
        found = [partial(self._watch_metadata, *event) for event in EVENTS]
        for watch in [self._watch_file] if self._notice.source == "file" else found:
            threading.Thread(target=watch, name="preemption", daemon=True).start()

    def stop(self) -> None:
        """Tell nothing any more."""
        self._ended.set()
        if self._notice.source == "signal":
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)

    def _tell(self, why: str) -> None:
        with self._lock:
            is_first = not self._ended.is_set()
            self._ended.set()
        if is_first:
            self._on_notice(why)

    def _watch_file(self) -> None:
        assert self._notice.path is not None
        while not self._ended.wait(LOOK_S):
            if self._notice.path.exists():
                self._tell(f"{self._notice.path} is there")

    def _watch_metadata(self, name: str, value: str) -> None:
        host, seen, etag, failed = os.environ.get("GCE_METADATA_HOST", METADATA_HOST), "", "0", False
        while not self._ended.is_set():
            if seen == value:
                self._tell(f"{name} of {host} is {value}")
                return
            try:
                seen, etag = _ask(host, name, etag)
                failed = False
            except (OSError, http.client.HTTPException) as error:
                if not failed:
                    logger.warning("no notice of preemption can be had from %s (%s); it is asked again", host, error)
                failed = True
                self._ended.wait(RETRY_S)


def _ask(host: str, name: str, etag: str) -> tuple[str, str]:
    """The value of `name` and its version, once that is another one than `etag`, or after `WAIT_S`."""
    query = f"wait_for_change=true&timeout_sec={WAIT_S}&last_etag={etag}"
    connection = http.client.HTTPConnection(host, timeout=WAIT_S + 10)
    try:
        connection.request("GET", f"/computeMetadata/v1/{name}?{query}", headers={"Metadata-Flavor": "Google"})
        reply = connection.getresponse()
        text = reply.read(4096).decode("utf-8", "replace").strip()
        if reply.status != 200:
            raise http.client.HTTPException(f"it answers {reply.status}")
        return text, reply.headers.get("etag") or "0"
    finally:
        connection.close()
