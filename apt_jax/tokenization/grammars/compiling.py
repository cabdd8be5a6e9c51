"""Which tokens may come next where an output must follow a grammar: a JSON schema, a regular expression, choices, Lark.

Each grammar is compiled and followed by a process of its own (`process.py`) within limits of processor time and
memory: a hostile one is refused, or ends its own requests, with a reason. No jax here.
"""

import contextlib
import hashlib
import json
import os
import signal
import socket
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from apt_jax.output import QueueFull
from apt_jax.tokenization.grammars.following import NOT_TOLD, Died, GrammarProcess, Matcher
from apt_jax.tokenization.grammars.forking import ForkingProcess
from apt_jax.tokenization.grammars.frames import FAILED, OPEN, READY, read_frame, write_frame

MAX_CHARS = 400_000  # of a schema, expression, grammar, or of all choices
MOST_KEPT, MOST_KEPT_CHARS = 64, 2_000_000  # grammars, those used last
MOST_PROCESSES = 256  # with those of running requests that are not kept any more
MOST_MIB_TOGETHER = 4096
FAST_S, SLOW_S = 0.05, 2.0  # of processor time to compile one: few need the second, which others need not wait for
FAST_LANES, SLOW_LANES, SLOW_WAITING = 4, 1, 6
ENDING_TRIES, ENDING_S = 10, 0.02
MOST_REFUSED = 256  # that are remembered, so that they take nothing when they come again
STOPPING = "the server is stopping: no grammar is compiled any more; try again later"


class Grammars:
    """Compiles grammars for one tokenizer. Thread-safe; a process starts with the first of them, in half a second.

    Args:
        tokenizer: makes a `tokenizers.Tokenizer` as JSON.
        eos_token_id: what ends an output that could go on; without one every grammar is refused.
    """

    def __init__(self, tokenizer: Callable[[], str], eos_token_id: int | None):
        self._arguments = tokenizer, eos_token_id
        self._parent = ForkingProcess(tokenizer, eos_token_id)
        self._kept: OrderedDict[str, GrammarProcess] = OrderedDict()
        self._alive: weakref.WeakValueDictionary[str, GrammarProcess] = (
            weakref.WeakValueDictionary()
        )  # followed, or kept
        self._refused: OrderedDict[bytes, str] = OrderedDict()  # digests, with the reason
        self._processes: weakref.WeakSet[GrammarProcess] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # of what is under way
        self._under_way: set[str] = set()
        self._fast, self._slow = Lanes(FAST_LANES, None), Lanes(SLOW_LANES, SLOW_WAITING)
        self._compiling: set[socket.socket] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process goes what makes it."""
        return Grammars, self._arguments

    def check(self, asked: Mapping[str, Any]) -> None:
        """Compile a grammar for `matcher` to find. It may wait, for seconds if others compile large ones.

        Raises:
            ValueError: it cannot be compiled, or takes too much, or none can be with this tokenizer; one sentence.
            QueueFull: too many are being compiled or followed.
        """
        self._find(asked)

    def matcher(self, asked: Mapping[str, Any]) -> Matcher:
        """A new matcher at the beginning of what `SamplingParams.structured_outputs` asks for; raises as `check`."""
        return self._find(asked).open()

    def is_known(self, asked: Mapping[str, Any]) -> bool:
        """Whether `matcher` finds it, or its refusal, without compiling anything."""
        try:
            key, digest = _names_of(asked)
        except ValueError:
            return True
        with self._lock:
            return digest in self._refused or self._found(key) is not None

    def close(self) -> None:
        """End all its processes; what follows a grammar fails, and nothing is compiled any more."""
        self.end_compiling()
        with self._lock:
            processes = list(self._processes)
            self._kept.clear()
        for process in processes:
            process.end()
        self._parent.close()

    def end_compiling(self) -> None:
        """Refuse what is being compiled, and all that comes: the server is stopping."""
        self._fast.close()
        self._slow.close()
        with self._lock:
            for link in self._compiling:
                with contextlib.suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)

    def _find(self, asked: Mapping[str, Any]) -> GrammarProcess:
        key, digest = _names_of(asked)
        with self._changed:
            if not self._changed.wait_for(lambda: key not in self._under_way, SLOW_S):
                raise QueueFull("the same grammar is being compiled for others; try again later")
            if (found := self._found(key)) is not None:
                return found
            if (refusal := self._refused.get(digest)) is not None:
                raise ValueError(refusal)
            self._under_way.add(key)
        try:
            made = self._compile(asked)
        except BaseException:
            self._end_way(key)
            raise
        with self._lock:
            self._end_way(key)
            if isinstance(made, str):
                self._refused[digest] = made
                if len(self._refused) > MOST_REFUSED:
                    self._refused.popitem(last=False)
                raise ValueError(made)
            self._kept[key] = self._alive[key] = made
            while len(self._kept) > MOST_KEPT or sum(map(len, self._kept)) > MOST_KEPT_CHARS:
                self._kept.popitem(last=False)
            return made

    def _found(self, key: str) -> GrammarProcess | None:
        """A process that follows it; under the lock."""
        found = self._alive.get(key)
        if found is None:
            return None
        if found.has_ended():
            self._forget(found)
            return None
        if key in self._kept:
            self._kept.move_to_end(key)
        return found

    def _forget(self, process: GrammarProcess) -> None:
        """It has ended, or is to; under the lock."""
        self._processes.discard(process)
        for named in (self._kept, self._alive):
            for key in [key for key, kept in named.items() if kept is process]:
                del named[key]

    def _end_way(self, key: str) -> None:
        with self._changed:
            self._under_way.discard(key)
            self._changed.notify_all()

    def _compile(self, asked: Mapping[str, Any]) -> GrammarProcess | str:
        """A process that has compiled it, or why there is none."""
        self._make_room()
        try:
            with self._fast.one():
                return self._attempt(asked, FAST_S)
        except Died as error:
            died = error
        if died.signal == signal.SIGPROF:
            try:
                with self._slow.one():
                    return self._attempt(asked, SLOW_S)
            except Died as error:
                died = error
        if self._fast.is_closed:
            raise QueueFull(STOPPING)
        if died.is_accident:
            raise QueueFull(f"a grammar was not compiled: {died}")
        ((kind, _),) = asked.items()
        return f"structured_outputs {kind} cannot be compiled: {died}"

    def _attempt(self, asked: Mapping[str, Any], cpu_s: float) -> GrammarProcess | str:
        """`_try`, again if there was no process for it but for grammars that nothing follows."""
        try:
            return self._try(asked, cpu_s)
        except OSError as error:
            refusal = f"no process can be started for a grammar ({error.strerror}); try again later"
            if not self._let_go():
                raise QueueFull(refusal) from error
        for _ in range(ENDING_TRIES):
            time.sleep(ENDING_S)  # until their processes have ended
            with contextlib.suppress(OSError):
                return self._try(asked, cpu_s)
        raise QueueFull(refusal)

    def _try(self, asked: Mapping[str, Any], cpu_s: float) -> GrammarProcess | str:
        """Compile it within `cpu_s` of processor time.

        Raises:
            Died: that takes more, or too much memory.
            OSError: no process can be started.
        """
        link = self._parent.fork()
        with self._lock:
            self._compiling.add(link)
        try:
            with contextlib.suppress(OSError):
                write_frame(link, OPEN, data=json.dumps((asked, cpu_s)).encode())
            frame = None if self._fast.is_closed else read_frame(link)
        finally:
            with self._lock:
                self._compiling.discard(link)
        if frame is not None and frame.kind == READY:
            keep_bounds = weakref.WeakMethod(self._keep_bounds)
            made = GrammarProcess(link, frame.data, frame.mib, lambda: (keep_bounds() or (lambda: None))())
            with self._lock:
                self._processes.add(made)
            return made
        link.close()
        if frame is not None and frame.kind == FAILED:
            return frame.data.decode()
        cause = NOT_TOLD if frame is None else int(frame.data)
        if cause < NOT_TOLD:
            raise OSError(-cause, os.strerror(-cause))
        raise Died(cause, cpu_s)

    def _make_room(self) -> None:
        """Let go of grammars that nothing follows if there are too many processes; raises QueueFull if none is."""
        with self._lock:
            if len(self._processes) < MOST_PROCESSES:
                return
            self._let_go()
            if len(self._processes) >= MOST_PROCESSES:
                raise QueueFull(f"{MOST_PROCESSES} different grammars are being followed; try again later")

    def _let_go(self) -> bool:
        """Let go of all grammars that nothing follows; whether there are some."""
        with self._lock:
            found = [key for key, kept in self._kept.items() if not kept.num_open]
            for key in found:
                del self._kept[key]
            return bool(found)

    def _keep_bounds(self) -> None:
        """End the process that has taken most if all together have taken too much."""
        with self._lock:
            processes = list(self._processes)
        if sum(process.mib for process in processes) > MOST_MIB_TOGETHER:
            largest = max(processes, key=lambda process: process.mib)
            with self._lock:
                self._forget(largest)
            largest.end()


def _names_of(asked: Mapping[str, Any]) -> tuple[str, bytes]:
    """The key of a grammar, and its digest; raises ValueError if it is too large."""
    try:
        key = json.dumps(asked, sort_keys=True)
    except RecursionError:
        raise ValueError("structured_outputs is nested too deep; use fewer levels") from None
    if len(key) > MAX_CHARS:
        raise ValueError(f"structured_outputs has {len(key)} characters, at most {MAX_CHARS} are allowed")
    return key, hashlib.sha256(key.encode()).digest()


class Lanes:
    """How many may do something at a time, and how many may wait for it; None: any number."""

    def __init__(self, count: int, waiting: int | None):
        self.is_closed = False
        self._free, self._may_wait, self._waiting = count, waiting, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Wait for one's turn.

        Raises:
            QueueFull: too many wait already, or it is closed.
        """
        with self._changed:
            if self._may_wait is not None and not self._free and self._waiting >= self._may_wait:
                raise QueueFull(f"{self._waiting} large grammars wait to be compiled; try again later")
            self._waiting += 1
            self._changed.wait_for(lambda: self._free or self.is_closed)
            self._waiting -= 1
            if self.is_closed:
                raise QueueFull(STOPPING)
            self._free -= 1
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify()

    def close(self) -> None:
        """Nobody's turn comes any more."""
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()
