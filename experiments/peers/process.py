"""A peer in a separate process, driven by lines of JSON."""

import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

from experiments.peers.catalogue import Peer
from experiments.peers.process_group import ProcessGroup


class PeerFailed(RuntimeError):
    """A peer cannot do what it was asked; one sentence."""


class Process:
    """A loaded peer.

    Args:
        options: see `protocol`.

    Raises:
        PeerFailed: it cannot be loaded; its output is in `log`.
    """

    def __init__(self, peer: Peer, python: Path, folder: Path, dtype: str, options: dict[str, Any], log: Path):
        self.name = peer.name
        self._log = log
        command = [str(python), str(peer.script), str(folder), dtype, json.dumps(options)]
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, bufsize=0,
                env=peer.variables(options["platform"]), start_new_session=True,
            )  # fmt: skip
        self._group = ProcessGroup(self._process)
        self._rest = b""
        try:
            self.load_s = float(self._receive(900)["load_s"])
        except PeerFailed:
            self.close()
            raise
        self._group.sleep()

    def generate(self, prompts: list[list[int]], new_tokens: int, timeout_s: float = 900) -> tuple[float, list[Any]]:
        """Seconds, and the new token ids of each prompt.

        Raises:
            PeerFailed: it failed, ended, took too long, or gave another number of tokens.
        """
        assert self._process.stdin is not None
        with self._group.awake():
            self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}).encode() + b"\n")
            answer = self._receive(timeout_s)
        if [len(row) for row in answer["tokens"]] != [new_tokens] * len(prompts):
            raise PeerFailed(
                f"{self.name} gave {[len(row) for row in answer['tokens']]} tokens instead of {new_tokens}"
            )
        return float(answer["seconds"]), answer["tokens"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._group.signal(signal.SIGCONT)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
            data = os.read(self._process.stdout.fileno(), 1 << 20) if ready else b""
            if not data:
                self._process.kill()
                why = "ended" if ready else f"gave no answer within {timeout_s:g} s"
                raise PeerFailed(f"{self.name} {why}; see {self._log}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"{self.name} failed: {answer['error']}; see {self._log}")
        return dict(answer)
