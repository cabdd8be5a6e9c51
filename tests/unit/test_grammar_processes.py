"""The processes of grammars: how many there are, what they are shared by, when they end."""

import contextlib
import gc
import os
import pickle
import threading
import time
from functools import partial

import pytest

from apt_jax.output import QueueFull
from apt_jax.tokenization.grammars import compiling
from apt_jax.tokenization.grammars.compiling import Grammars
from apt_jax.tokenization.grammars.forking import ForkingProcess
from tests.unit.test_grammar_limits import FOLDER, is_running, processes_of


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
