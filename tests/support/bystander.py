"""A client with a stream, in a process of its own, that notes when it gets something; and what a server's peak was."""

import contextlib
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# no import but these: it starts at once, and nothing but the server can hold it up
READER = """
import socket, struct, sys, time
host, port, body, path = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode(), sys.argv[4]
request = (b"POST /v1/completions HTTP/1.1\\r\\nhost: localhost\\r\\nconnection: close\\r\\n"
    b"content-type: application/json\\r\\ncontent-length: %d\\r\\n\\r\\n%s" % (len(body), body))
with open(path, "ab", buffering=0) as times:
    while True:
        s = socket.create_connection((host, port))
        s.sendall(request)
        begun = False
        while data := s.recv(65536):
            if begun or b"data: " in data:
                times.write(struct.pack("d", time.monotonic() if begun else -time.monotonic()))
                begun = True
"""
LIMIT_S = 60.0


class Bystander:
    """What the stream saw."""

    def __init__(self, times: Path, process: "subprocess.Popen[bytes]"):
        self._times = times
        self._process = process

    @property
    def seen(self) -> list[tuple[float, bool]]:
        """When something came, by this machine's monotonic clock, and whether it was the first of a stream."""
        data = self._times.read_bytes()
        return [(abs(at), at < 0) for (at,) in struct.iter_unpack("d", data[: len(data) // 8 * 8])]

    def worst_gap_s(self, began_s: float, ended_s: float) -> float:
        """The longest time without anything within a span, waiting until the stream goes on after it.

        The time to the first token is no gap: a stream that is asked for again may wait for its turn.
        """
        limit_s = time.monotonic() + LIMIT_S
        while not (seen := self.seen) or seen[-1][0] < ended_s:
            assert time.monotonic() < limit_s, (
                f"the stream has stopped; its client's exit code is {self._process.poll()}"
            )
            time.sleep(0.005)
        pieces = [(began_s, False), *(piece for piece in seen if piece[0] >= began_s)]
        pairs = itertools.pairwise(pieces)
        return max((b - a for (a, _), (b, is_first) in pairs if a <= ended_s and not is_first), default=0.0)


@contextlib.contextmanager
def bystander(url: str) -> Iterator[Bystander]:
    """A stream that goes on until the block ends; one that has all its tokens is asked for again."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": [5], "max_tokens": 1_000, "stream": True, "ignore_eos": True})
    with tempfile.NamedTemporaryFile() as times:
        command = [sys.executable, "-S", "-E", "-c", READER, host, port, body, times.name]
        process = subprocess.Popen(command)
        try:
            yield Bystander(Path(times.name), process)
        finally:
            process.kill()
            process.wait()


def forget_peak(process: int | str = "self") -> None:
    """Begin to count a process's `peak_bytes` again."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def peak_bytes(process: int | str = "self") -> int:
    """The most memory that a process has had since."""
    return _kilobytes("VmHWM", process) << 10


def memory_bytes(process: int | str = "self") -> int:
    """The memory that a process has now."""
    return _kilobytes("VmRSS", process) << 10


def _kilobytes(name: str, process: int | str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1])
