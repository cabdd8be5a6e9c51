"""The engine's side of the process that knows the vocabulary, and forks one for each grammar."""

import contextlib
import errno
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable

from apt_jax.tokenization.grammars.frames import FAILED, READY, read_frame, write_frame

END_S = 5.0


class ForkingProcess:
    """The process that knows the vocabulary, and forks one for each grammar. It ends with this one."""

    def __init__(self, tokenizer: Callable[[], str], eos_token_id: int | None):
        self._tokenizer, self._eos_token_id = tokenizer, eos_token_id
        self._lock = threading.Lock()
        self._is_closed = False
        self._control: socket.socket | None = None
        self._end: Callable[[], object] = lambda: None

    def fork(self) -> socket.socket:
        """The link to a new process.

        Raises:
            OSError: none can be started, or this is closed.
            ValueError: the tokenizer cannot be used.
        """
        with self._lock:
            if self._is_closed:
                raise OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN))
            if self._control is None:
                self._control = self._start()
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    socket.send_fds(self._control, [b"f"], [theirs.fileno()])
                except OSError:  # somebody has ended it
                    self._end()
                    self._control = None
                    self._control = self._start()
                    socket.send_fds(self._control, [b"f"], [theirs.fileno()])
        return ours

    def close(self) -> None:
        """End it; nothing is forked any more."""
        with self._lock:
            self._is_closed = True
            self._end()

    def _start(self) -> socket.socket:
        if self._eos_token_id is None:
            raise ValueError("structured outputs need an end-of-sequence token, and this tokenizer has none")
        ours, theirs = socket.socketpair()
        paths = [os.path.abspath(path) for path in sys.path]
        command = [sys.executable, "-P", "-m", "apt_jax.tokenization.grammars.process"]
        with theirs:
            process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(self._eos_token_id)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # so that Ctrl-C is for the server alone
            )  # fmt: skip
        self._end = weakref.finalize(self, _end, process, ours)
        with contextlib.suppress(OSError):
            write_frame(ours, READY, data=self._tokenizer().encode())
        frame = read_frame(ours)
        if frame is None or frame.kind == FAILED:
            self._end()
        if frame is None:
            raise ValueError("structured outputs cannot be served: their process does not start, the log says why")
        if frame.kind == FAILED:
            raise ValueError(f"structured outputs cannot be served with this tokenizer: {frame.data.decode()}")
        return ours


def _end(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    """It ends by itself once its link is closed."""
    control.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
