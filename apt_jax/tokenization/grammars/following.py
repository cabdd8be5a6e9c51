"""The engine's side of the process that follows a grammar: what may come next in each output."""

import contextlib
import signal
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np

from apt_jax.output import TRY_AGAIN
from apt_jax.tokenization.grammars.frames import (
    ACCEPT,
    ASK,
    CLOSE,
    DIED,
    ENDED,
    FAILED,
    MASK,
    MOST_MIB,
    OPEN,
    TOKEN_S,
    Frame,
    has_come,
    read_frame,
)  # fmt: skip


class Died(RuntimeError):
    """A grammar's process has ended, by a signal in most cases: over a limit.

    Args:
        signal: 0 if it has failed by itself, NOT_TOLD if nobody knows.
        limit_s: of processor time.

    Attributes:
        is_accident: whether somebody has ended it, or none could be started: the grammar may be as good as any.
    """

    def __init__(self, signal: int, limit_s: float):
        self.signal = signal
        self.is_accident = signal in _ACCIDENTS
        cure = TRY_AGAIN if self.is_accident else "make it smaller"
        super().__init__(f"{_CAUSES.get(signal, 'its process has ended').format(limit_s)}; {cure}")


NOT_TOLD = -1
_ACCIDENTS = (NOT_TOLD, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_CAUSES: dict[int, str] = {
    signal.SIGPROF: "it takes more than {:g} s of processor time",
    signal.SIGABRT: f"it takes more than {MOST_MIB} MiB of memory",
    signal.SIGSEGV: "it is nested too deep",
}


class Matcher:
    """The state of one output in its grammar. Used in one thread at a time."""

    def __init__(self, process: "GrammarProcess", number: int):
        self._process: GrammarProcess | None = process
        self._number = number
        self._bits: bytes | None = process.first
        self._error: str | None = None
        self._is_pushed = False
        self.is_complete = False  # whether nothing can follow but the end

    def allow(self, words: np.ndarray) -> str | None:
        """Set the bits of the tokens that may come next, and clear all others; an error if none can be found.

        Args:
            words: int32 `[W]`, token t is bit t % 32 of word t // 32; W is the model's, the tokenizer may have others.
        """
        words[:] = 0
        if self._bits is None and self._error is None:
            frame = self._answer()
            if frame is not None:
                self._bits = frame.data
        if self._error is not None or self._bits is None:
            return self._error
        found = np.frombuffer(self._bits, np.int32)
        count = min(len(words), len(found))
        words[:count] = found[:count]
        return None if words.any() else "no token can follow"

    def push(self, token_id: int) -> None:
        """Begin to take in a token. For several outputs: first push to all, so that they are taken in together."""
        if self._error is None and not self._is_pushed:
            assert self._process is not None
            self._is_pushed, self._bits = True, None
            self._process.send(ACCEPT, self._number, token_id)

    def accept(self, token_id: int) -> str | None:
        """Take in the next token, unless it was pushed; an error if it may not follow."""
        self.push(token_id)
        if self._error is None:
            self._is_pushed = False
            while (frame := self._answer()) is not None and frame.kind == MASK:
                pass  # that of the token before, which nobody needed
            self.is_complete = frame is not None and frame.kind == ENDED
        return self._error

    def close(self) -> None:
        """The output has ended: nothing more is asked of it."""
        if self._process is not None:
            self._process.close(self._number)
            self._process = None

    def _answer(self) -> Frame | None:
        """What the process says next of this output; None if that is an error."""
        assert self._process is not None
        try:
            frame = self._process.answer(self._number)
        except Died as error:
            self._error = str(error)
            return None
        if frame.kind == FAILED:
            self._error = frame.data.decode()
            return None
        return frame

    def __del__(self) -> None:
        self.close()


class GrammarProcess:
    """The process of one grammar, which has compiled it.

    Attributes:
        first: bits of the tokens that an output may begin with.
        mib: of memory that it has taken.
    """

    def __init__(self, link: socket.socket, first: bytes, mib: int, on_growth: Callable[[], None]):
        self.first, self.mib = first, mib
        self._link, self._on_growth = link, on_growth
        self._lock = threading.Lock()  # of what comes; what goes is short
        self._answers: dict[int, deque[Frame]] = {}
        self._closed: deque[int] = deque()  # matchers that may have been collected at any time
        self._next = 0
        self._died_of: int | None = None
        weakref.finalize(self, link.close)

    def open(self) -> Matcher:
        """A new matcher at the beginning."""
        with self._lock:
            number, self._next = self._next, (self._next + 1) % 2**32
            self._answers[number] = deque()
        self.send(OPEN, number)
        return Matcher(self, number)

    @property
    def num_open(self) -> int:
        """Outputs that follow it."""
        return len(self._answers)

    def send(self, what: int, number: int, token_id: int = 0) -> None:
        """Ask something of a matcher; the answer says so if the process has ended."""
        asks = ASK.pack(what, number, token_id)
        while self._closed:
            asks = ASK.pack(CLOSE, self._closed.popleft(), 0) + asks
        with contextlib.suppress(OSError):
            self._link.sendall(asks)

    def close(self, number: int) -> None:
        """A matcher is not needed any more; safe wherever it is collected."""
        if self._answers.pop(number, None) is not None:
            self._closed.append(number)

    def answer(self, number: int) -> Frame:
        """The next that comes for a matcher.

        Raises:
            Died: the process has ended.
        """
        with self._lock:
            while not (mine := self._answers[number]):
                if self._died_of is not None:
                    raise Died(self._died_of, TOKEN_S)
                self._take()
            return mine.popleft()

    def has_ended(self) -> bool:
        """Whether its process is known to have ended; it does not wait."""
        if self._lock.acquire(blocking=False):  # else somebody reads, and finds out
            try:
                while self._died_of is None and has_come(self._link):
                    self._take()
            finally:
                self._lock.release()
        return self._died_of is not None

    def _take(self) -> None:
        """Put what comes next where it is looked for."""
        frame = read_frame(self._link)
        if frame is None or frame.kind == DIED:
            self._died_of = NOT_TOLD if frame is None else int(frame.data)
            return
        if frame.mib > self.mib:
            self.mib = frame.mib
            self._on_growth()
        if (box := self._answers.get(frame.matcher)) is not None:
            box.append(frame)

    def end(self) -> None:
        """End the process; its outputs fail."""
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
