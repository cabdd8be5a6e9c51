"""A server process under test: started, watched (metrics, memory, file descriptors), stopped in any way."""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil

CLOCK_JUMPS = (
    "import random, time; real = time.time; time.time = lambda: real() + random.choice([-86400.0, -1.0, 0.0, 3600.0]); "
)


class Server:
    """`apt-jax serve` on a free port; its log goes to a file."""

    def __init__(self, folder: Path, *flags: str, clock_jumps: bool = False):
        self.log = folder / f"server-{time.time_ns()}.log"
        code = f"import sys; {CLOCK_JUMPS if clock_jumps else ''}from apt_jax.serve.cli import main; main(sys.argv[1:])"
        command = [sys.executable, "-c", code, "serve", "--port", "0", "--shutdown-timeout", "5", *flags]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder)
        self.pid = self._process.pid
        self._lines: list[str] = []
        self._url = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._url.wait(120), "it does not listen"
        self.port = int(self.url.rsplit(":", 1)[1])
        began = time.monotonic()
        while self.get("/ready").status_code != 200:
            assert self._process.poll() is None and time.monotonic() < began + 400, self.tail()
            time.sleep(0.5)
        self._watched = psutil.Process(self._process.pid)

    def get(self, path: str) -> httpx.Response:
        """A plain GET."""
        return httpx.get(f"{self.url}{path}", timeout=60)

    def figures(self) -> dict[str, float]:
        """Metrics without labels, and memory, file descriptors and threads of the process."""
        lines = self.get("/metrics").text.splitlines()
        found = {}
        for line in lines:
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                found[re.sub(r',model_name="[^"]*"|model_name="[^"]*",?', "", name).replace("{}", "")] = float(value)
        found["rss_mb"] = self._watched.memory_info().rss / 2**20
        found["fds"] = self._watched.num_fds()
        found["threads"] = self._watched.num_threads()
        return found

    def settle(self, timeout_s: float = 120) -> dict[str, float]:
        """Wait until nothing runs or waits; every block must be free then. The figures."""
        end = time.monotonic() + timeout_s
        while True:
            found = self.figures()
            busy = found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"]
            load = self.get("/load").json()["server_load"]
            if not busy and not load:
                break
            assert time.monotonic() < end, f"{busy} requests and {load} connections never end"
            time.sleep(0.5)
        used = found['apt:cache_blocks{kind="kv"}'] + found['apt:cache_blocks{kind="hidden"}']
        assert used == 0 and found["apt:idle_lost_blocks"] == 0, "blocks leaked"
        assert found["apt:recompiles_after_warmup_total"] == 0, "it compiled while serving"
        return found

    def signal(self, number: int) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        """The exit code."""
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL, if it lives."""
        self._process.kill()
        self._process.wait(20)

    def tail(self) -> str:
        """The last log lines."""
        return "".join(self._lines[-30:])

    def troubles(self) -> str:
        """The log but for what says that all is well."""
        return "".join(line for line in self._lines if " INFO " not in line)[:20_000]

    def count(self, word: str) -> int:
        """Log lines with a word."""
        return sum(word in line for line in self._lines)

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self.log.open("w") as log:
            for line in self._process.stderr:
                log.write(line)
                self._lines.append(line)
                if found := re.search(r"listening on (http://\S+),", line):
                    self.url = found[1]
                    self._url.set()
