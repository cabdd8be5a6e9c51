"""The program that compiles and follows grammars, each in a process of its own: a hostile one harms nobody else.

The llguidance library keeps its limits in most cases only: an intersection of expressions may be worked out without
end, and deep rules overflow the stack. So the first process, which knows the vocabulary, forks one for each grammar.
That one has a limit of processor time, which the kernel keeps, and one of memory. The other side: `compiling.py`.
"""

import contextlib
import errno
import fcntl
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llguidance
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from apt_jax.tokenization.grammars.frames import (
    ACCEPT,
    ASK,
    CLOSE,
    DIED,
    ENDED,
    FAILED,
    MASK,
    MEAN_TOKEN_S,
    MOST_MIB,
    OPEN,
    READY,
    TAKEN,
    TOKEN_S,
    has_come,
    read_exactly,
    read_frame,
    write_frame,
)  # fmt: skip

# Of what the library allows by itself: the third of a second that an ambiguous grammar may take for a token would be
# other requests' time too, and 250,000 states of 1 to 2 kB each are half a gigabyte of one request.
LIMITS = LLParserLimits(max_items_in_row=500, step_max_items=20_000, max_lexer_states=50_000)
NOTHING_MEETS_IT = "no text meets it"
MAX_REASON_CHARS = 240
_ANY_OBJECT = {"type": "object"}
_WHITE_SPACE = r"[ ]?|\n[ ]{0,40}"  # between the parts of JSON: without a bound some models write nothing else


class Output:
    """The state of one output in its grammar, and the processor time that it took."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher
        self._left_s = TOKEN_S

    def mask(self) -> tuple[int, bytes]:
        """The bits of the tokens that may come next, or why there are none."""
        began = time.process_time()
        bits = self._matcher.compute_bitmask()
        self._left_s -= time.process_time() - began
        if self._matcher.is_error():
            return FAILED, reason_of(self._matcher.get_error()).encode()
        if self._left_s < 0:
            return FAILED, f"its tokens take more than {1000 * MEAN_TOKEN_S:g} ms of processor time each".encode()
        return MASK, bits

    def accept(self, token: int) -> tuple[int, bytes]:
        """Take in a token: TAKEN, ENDED if nothing but the end can follow, or FAILED and why."""
        began = time.process_time()
        taken = self._matcher.consume_token(token)
        self._left_s += MEAN_TOKEN_S - (time.process_time() - began)
        if not taken:
            error = self._matcher.get_error()
            return FAILED, (reason_of(error) if error else f"token {token} may not follow").encode()
        return (ENDED if self._matcher.is_stopped() else TAKEN), b""


def compiled(tokenizer: LLTokenizer, kind: str, value: Any) -> tuple[LLMatcher, bytes]:
    """A grammar at its beginning, and the bits of its first tokens.

    Raises:
        ValueError: it cannot be compiled, or followed; one sentence with the library's reason.
    """
    refusal = f"structured_outputs {kind} cannot be compiled"
    try:
        matcher = LLMatcher(tokenizer, grammar_text(kind, value), log_level=0, limits=LIMITS)
    except Exception as error:  # of the library, which raises nothing narrower
        raise ValueError(f"{refusal}: {reason_of(str(error))}") from error
    if matcher.is_error():
        raise ValueError(f"{refusal}: {reason_of(matcher.get_error())}")
    found, bits = Output(matcher.deep_copy()).mask()
    if found == FAILED or not any(bits):
        reason = bits.decode() if found == FAILED else "no token can follow"
        raise ValueError(f"structured_outputs {kind} cannot be followed from its first token on: {reason}")
    return matcher, bits


def grammar_text(kind: str, value: Any) -> str:
    """Text in llguidance's own form."""
    if kind == "json":
        return _json_grammar(value if isinstance(value, str) else json.dumps(value))
    if kind == "json_object":
        return _json_grammar(json.dumps(_ANY_OBJECT))
    if kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    if kind == "choice":
        # one lexeme, which is found in a hundredth of the time of a rule with as many alternatives
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, value)))
    return llguidance.grammar_from("grammar", value)


def _json_grammar(schema: str) -> str:
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITE_SPACE})


def reason_of(error: str) -> str:
    """The library's reason in one line, without its state."""
    text = " ".join(line.strip() for line in error.partition("<state>")[0].splitlines() if line.strip())
    if text == "NoExtensionBias":
        return NOTHING_MEETS_IT
    if "coerce_one_of" in text:
        return "oneOf cannot be followed strictly; use anyOf"
    return text if len(text) <= MAX_REASON_CHARS else f"{text[:MAX_REASON_CHARS]}..."


def follow(link: socket.socket, tokenizer: LLTokenizer) -> None:
    """Compile the grammar that comes first, then answer for outputs that follow it, until nobody asks any more."""
    at_first_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit_memory(0)
    frame = read_frame(link)
    if frame is None:
        return
    asked, cpu_s = json.loads(frame.data)
    ((kind, value),) = asked.items()

    def tell(what: int, output: int = 0, data: bytes = b"") -> None:
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - at_first_kib
        write_frame(link, what, output, data, mib=grown_kib // 1024)

    with ended_with(link), limited(cpu_s):
        try:
            (matcher, first), refusal = compiled(tokenizer, kind, value), None
        except ValueError as error:
            refusal = str(error)
    if refusal is not None:
        return tell(FAILED, data=refusal.encode())
    tell(READY, data=first)
    outputs: dict[int, Output] = {}
    while pieces := read_asks(link):
        masks: list[int] = []
        for what, output, token in pieces:
            if what == OPEN:
                limit_memory(len(outputs) + 1)
                outputs[output] = Output(matcher.deep_copy())
            elif what == CLOSE:
                outputs.pop(output, None)
            elif what == ACCEPT and output in outputs:
                with limited(TOKEN_S):
                    found, data = outputs[output].accept(token)
                tell(found, output, data)
                if found == TAKEN:
                    masks.append(output)
        for output in masks:  # the engine waits for no mask yet, but for what became of its tokens
            if output in outputs:
                with limited(TOKEN_S):
                    found, data = outputs[output].mask()
                tell(found, output, data)


def read_asks(link: socket.socket) -> list[tuple[int, int, int]]:
    """All that has come, at least one; empty at the end."""
    found = link.recv(ASK.size * 1024)
    if found and (rest := -len(found) % ASK.size):
        found += read_exactly(link, rest) or b""
    return [*ASK.iter_unpack(found)] if len(found) % ASK.size == 0 else []


def limit_memory(outputs: int) -> None:
    """Let this process take MOST_MIB for the grammar and each of its outputs, where the system counts it."""
    global _base_bytes
    if _base_bytes is None:
        try:
            pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        except OSError:
            return
        _base_bytes = pages * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = _base_bytes + (1 + outputs) * MOST_MIB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


_base_bytes: int | None = None  # of this process after it was forked


@contextlib.contextmanager
def limited(cpu_s: float) -> Iterator[None]:
    """The kernel ends this process if it takes longer; SIGPROF then says so."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


@contextlib.contextmanager
def ended_with(link: socket.socket) -> Iterator[None]:
    """The kernel ends this process as soon as the engine gives up; nothing is to come from it meanwhile."""
    flags = fcntl.fcntl(link, fcntl.F_GETFL)
    fcntl.fcntl(link, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(link, fcntl.F_SETFL, flags | os.O_ASYNC)
    if has_come(link):  # it has done so before
        os._exit(0)
    yield
    fcntl.fcntl(link, fcntl.F_SETFL, flags)


def fork_for(link: socket.socket, tokenizer: LLTokenizer, others: list[socket.socket]) -> int:
    """Start the process of one grammar; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGPROF, signal.SIGIO):
            signal.signal(number, signal.SIG_DFL)
        for other in others:
            other.close()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        follow(link, tokenizer)
    except BaseException:  # its engine is told that it ended
        os._exit(1)
    os._exit(0)


def main(control: socket.socket, eos_token_id: int) -> None:
    """Read the vocabulary, then fork for each link that comes, until the engine has gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the engine ends it, in its own time
        signal.signal(number, signal.SIG_IGN)
    frame = read_frame(control)
    if frame is None:
        return
    try:
        tokenizer = LLTokenizer(frame.data.decode(), eos_token=eos_token_id)
    except Exception as error:  # of the library, which raises nothing narrower
        return write_frame(control, FAILED, data=reason_of(str(error)).encode())
    write_frame(control, READY)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the library tells there what the engine is told anyway
    gc.collect()
    gc.freeze()
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
    signal.signal(signal.SIGCHLD, lambda number, stack: None)
    links: dict[int, socket.socket] = {}
    poll = select.poll()
    for end in (control, wake):
        poll.register(end, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if wake.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                wake.recv(4096)
            reap(links)
        if control.fileno() in ready:
            data, fds, _, _ = socket.recv_fds(control, 1, 1)
            if not data:
                return
            if not fds:  # no more descriptors: the engine sees the end of the link
                continue
            link = socket.socket(fileno=fds[0])
            try:
                links[fork_for(link, tokenizer, [control, wake, woken, *links.values()])] = link
            except OSError as error:  # no more processes
                with link, contextlib.suppress(OSError):
                    write_frame(link, DIED, data=str(-(error.errno or errno.EAGAIN)).encode())


def reap(links: dict[int, socket.socket]) -> None:
    """Tell the engine of which signal the processes died that have ended."""
    while links:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        with links.pop(pid) as link, contextlib.suppress(OSError):
            if status:
                link.settimeout(1)
                write_frame(link, DIED, data=str(os.WTERMSIG(status)).encode())  # 0: it has failed by itself


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
