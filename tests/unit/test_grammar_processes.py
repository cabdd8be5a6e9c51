"""The processes of grammars: how many there are, what they are shared by, when they end."""

import contextlib
import errno
import gc
import json
import os
import pickle
import resource
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest

from apt_jax.output import QueueFull
from apt_jax.tokenization.grammars import compiling
from apt_jax.tokenization.grammars.compiling import Grammars
from apt_jax.tokenization.grammars.forking import ForkingProcess
from apt_jax.tokenization.grammars.frames import DIED, OPEN, READY, read_frame, write_frame
from tests.unit.test_grammar_limits import FOLDER, WORDS, is_running, processes_of


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return (FOLDER / "tokenizer.json").read_text("utf-8")


def test_one_process_compiles_what_many_ask_for_at_once(tokenizer, monkeypatch):
    """Each compiled it for itself, and each of the first ones started a process that knows the vocabulary."""
    grammars, attempts, starts = Grammars(lambda: tokenizer, 1), [], []
    attempt, start = Grammars._attempt, ForkingProcess._start
    monkeypatch.setattr(Grammars, "_attempt", lambda self, *asked: attempts.append(asked) or attempt(self, *asked))
    monkeypatch.setattr(ForkingProcess, "_start", lambda self: starts.append(self) or start(self))
    threads = [threading.Thread(target=grammars.check, args=[{"regex": "[a-c]{8}"}]) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(starts) == 1 and len({cpu_s for _, cpu_s in attempts}) == len(attempts), "again only if it takes longer"


def test_what_waits_for_the_same_grammar_does_not_wait_for_ever(tokenizer, monkeypatch):
    monkeypatch.setattr(compiling, "SLOW_S", 0.2)
    grammars, may_end = Grammars(lambda: tokenizer, 1), threading.Event()
    monkeypatch.setattr(Grammars, "_compile", lambda self, asked: may_end.wait(20) and "it is refused")

    def ask() -> None:
        with contextlib.suppress(ValueError):
            grammars.check({"regex": "a"})

    first = threading.Thread(target=ask)
    first.start()
    while not grammars._under_way:
        time.sleep(0.001)
    with pytest.raises(QueueFull, match="the same grammar is being compiled for others; try again later"):
        grammars.check({"regex": "a"})
    may_end.set()
    first.join()
    with pytest.raises(ValueError, match="it is refused"):
        grammars.check({"regex": "a"})


def test_a_grammar_that_is_followed_is_not_compiled_again(tokenizer, monkeypatch):
    monkeypatch.setattr(compiling, "MOST_KEPT", 1)
    grammars, asked = Grammars(lambda: tokenizer, 1), {"choice": ["yes"]}
    assert not grammars.is_known(asked)
    matcher = grammars.matcher(asked)
    grammars.check({"choice": ["no"]})
    assert grammars.is_known(asked)
    second = grammars.matcher(asked)
    assert second._process is matcher._process
    del matcher, second
    gc.collect()
    assert not grammars.is_known(asked), "nobody follows it, and another one is kept"


def test_all_processes_end_when_it_is_closed(tokenizer):
    grammars, asked = Grammars(lambda: tokenizer, 1), {"choice": ["yes"]}
    before = set(processes_of(os.getpid()))
    matcher = grammars.matcher(asked)
    (forking,) = set(processes_of(os.getpid())) - before
    (follower,) = processes_of(forking)
    grammars.close()
    assert not is_running(forking)
    deadline = time.monotonic() + 10
    while is_running(follower) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(follower)
    assert matcher.accept(1) is not None
    with pytest.raises(QueueFull, match="the server is stopping"):
        grammars.check(asked)
    grammars.close()


def test_another_process_gets_what_makes_it(tokenizer):
    grammars = Grammars(partial(str, tokenizer), 1)
    grammars.check({"choice": ["yes"]})
    pickle.loads(pickle.dumps(grammars)).check({"choice": ["no"]})


def test_grammars_that_nothing_follows_make_room_for_others(tokenizer):
    """Where few descriptors or processes are allowed, those that were kept refused all others for ever."""
    grammars = Grammars(lambda: tokenizer, 1)
    followed = grammars.matcher({"choice": ["a"]})
    for text in "bcd":
        grammars.check({"choice": [text]})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        with contextlib.suppress(OSError):
            while True:
                stack.enter_context(open(os.devnull, "rb"))
        grammars.check({"choice": ["e"]})
        assert not grammars.is_known({"choice": ["b"]}) and grammars.is_known({"choice": ["a"]})
    assert followed.allow(np.zeros(WORDS, np.int32)) is None


@pytest.mark.parametrize("hard_mib", [None, 100])
def test_what_the_system_does_not_allow_ends_one_grammar_only(tokenizer, hard_mib):
    """A process that could not be forked ended its link without a reason, and a limit of memory by others broke all."""
    change = "" if hard_mib else "os.fork = fork"
    limit = f"resource.setrlimit(resource.RLIMIT_AS, ({hard_mib} << 30, {hard_mib} << 30))" if hard_mib else ""
    program = f"""
import errno, os, resource, socket, sys
from apt_jax.tokenization.grammars import process
def fork():
    raise OSError(errno.EAGAIN, "no more")
{change}
{limit}
process.main(socket.socket(fileno=int(sys.argv[1])), 1)
"""
    control, theirs = socket.socketpair()
    with control, subprocess.Popen([sys.executable, "-c", program, str(theirs.fileno())], pass_fds=[theirs.fileno()]):
        theirs.close()
        write_frame(control, READY, data=tokenizer.encode())
        assert read_frame(control).kind == READY
        for _ in range(2):
            link, its = socket.socketpair()
            socket.send_fds(control, [b"f"], [its.fileno()])
            its.close()
            with contextlib.suppress(OSError):
                write_frame(link, OPEN, data=json.dumps(({"choice": ["yes"]}, 2.0)).encode())
            frame = read_frame(link)
            assert frame.kind == READY if hard_mib else frame[::3] == (DIED, str(-errno.EAGAIN).encode())
            link.close()
        control.close()
