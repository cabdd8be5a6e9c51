"""An engine in two processes when one of them ends: the other must not wait for ever. Run by `make test-devices`."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.support import served_model

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not os.environ.get("APT_JAX_TEST_DEVICES"), reason="make test-devices runs this"),
]
SOON_S = 20.0  # on a busy machine; it takes a second


@dataclass
class Pair:
    """Process 0, which serves, and process 1, which follows it."""

    leader: subprocess.Popen[str]
    follower: subprocess.Popen[str]
    url: str
    lines: list[str]  # that the leader wrote, as they come

    def ends(self) -> int:
        """Exit code of the leader, which must end soon."""
        return self.leader.wait(SOON_S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served_model.write_folder(tmp_path_factory.mktemp("model"))


@contextlib.contextmanager
def serving(folder, *more: str) -> Iterator[Pair]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "num_blocks": 48, "max_model_len": 128}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "apt_jax.serve.cli", "serve", str(folder), "--port", "0", "--load-format", "dummy"]
    command += [*flags, "--tensor-parallel-size", "2", "--coordinator-address", address, "--num-processes", "2", *more]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    both = [
        subprocess.Popen([*command, "--process-id", str(n)], env=environment, stderr=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    lines: tuple[list[str], list[str]] = ([], [])
    readers = [
        threading.Thread(target=kept.extend, args=(process.stderr,)) for process, kept in zip(both, lines, strict=True)
    ]
    for reader in readers:
        reader.start()
    try:
        end = time.monotonic() + 300
        while not (found := re.search(r"answers at (http://[^/]+)/", "".join(lines[0]))):
            assert time.monotonic() < end and both[0].poll() is None, "".join(lines[0] + lines[1])
            time.sleep(0.1)
        yield Pair(*both, found[1], lines[0])
    finally:
        for process, reader in zip(both, readers, strict=True):
            process.kill()
            process.wait(10)
            reader.join(10)
            assert process.stderr is not None
            process.stderr.close()


def streamed(pair: Pair, max_tokens: int) -> Iterator[str]:
    """Events of one long answer."""
    body = {"prompt": "the fox", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{pair.url}/v1/completions", json=body, timeout=SOON_S) as reply:
        assert reply.status_code == 200
        yield from (line for line in reply.iter_lines() if line.startswith("data: "))


def test_an_idle_engine_ends_when_its_follower_is_killed(folder):
    with serving(folder) as pair:
        pair.follower.kill()
        assert pair.ends() == 1
        assert "process 1 of 2 was lost" in pair.lines[-1]


def test_a_busy_engine_ends_when_its_follower_is_killed(folder):
    with serving(folder) as pair:
        with contextlib.suppress(httpx.TransportError):
            for number, _ in enumerate(streamed(pair, 110)):
                if number == 3:
                    pair.follower.kill()
        assert pair.ends() == 1
        assert any("process 1 of 2 was lost" in line for line in pair.lines)


def test_a_signal_to_both_lets_the_leader_finish_its_requests(folder):
    with serving(folder) as pair:
        events = []
        for number, event in enumerate(streamed(pair, 110)):
            events.append(event)
            if number == 3:
                for process in (pair.follower, pair.leader):
                    process.send_signal(signal.SIGTERM)
        assert '"finish_reason":"length"' in "".join(events) and events[-1] == "data: [DONE]"
        assert pair.ends() == 0 and pair.follower.wait(SOON_S) == 0
