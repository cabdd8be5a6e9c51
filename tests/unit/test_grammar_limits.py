"""Hostile grammars: whatever one is, it ends within its limits, with a reason, and nobody else waits for it."""

import contextlib
import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from apt_jax.output import QueueFull
from apt_jax.tokenization.grammars import compiling, process
from apt_jax.tokenization.grammars import forking as forking_module
from apt_jax.tokenization.grammars.compiling import Grammars, Lanes
from apt_jax.tokenization.grammars.forking import ForkingProcess
from apt_jax.tokenization.grammars.frames import FAILED, MASK, TAKEN

FOLDER = Path(__file__).parents[2] / "checkpoints" / "demo"
WORDS = 97
PRIMES = (101, 103, 107, 109, 113, 127)
ENDLESS = {"grammar": "start: A\nA: " + " & ".join(f"/(.{{{prime}}})*/" for prime in PRIMES)}
DEEP = {"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(3000)) + '\nr3000: "a"'}
NESTED_LISTS: list = []
for _ in range(100_000):
    NESTED_LISTS = [NESTED_LISTS]


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return (FOLDER / "tokenizer.json").read_text("utf-8")


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Grammars:
    return Grammars(lambda: tokenizer, 1)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (ENDLESS, r"grammar cannot be compiled: it takes more than (2 s of processor time|192 MiB of memory)"),
        ({"grammar": ENDLESS["grammar"].replace(".", "a").replace("*/", "*b/")}, "cannot be compiled: it takes"),
        (DEEP, "grammar cannot be compiled: it is nested too deep; make it smaller"),
        ({"regex": "(x{1000}){1000}{1000}"}, "regex cannot be (compiled: it takes|followed from its first token on)"),
        ({"json": {"type": "string", "pattern": "^(x{1000}){1000}$"}}, "json cannot be compiled: it takes"),
        ({"json": {"multipleOf": 9973, "allOf": [{"multipleOf": 9967}, {"multipleOf": 9949}]}}, "json cannot be"),
        ({"regex": "(" * 5000 + "a" + ")*" * 5000}, r"regex cannot be compiled: .{,260}\.\.\.$"),
        ({"grammar": "start: " + " ".join(f'r{i}{{1000}}' for i in range(3)) + '\nr0: "a"\nr1: "b"\nr2: "c"'}, None),
        ({"regex": "|".join(f"w{number * 7919 % 100_003}" for number in range(30_000))}, None),
        ({"json": {"enum": NESTED_LISTS}}, "structured_outputs is nested too deep; use fewer levels"),
        ({"json": {"oneOf": [{"type": "string"}, {"maxLength": 3}]}}, "oneOf cannot be followed strictly; use anyOf$"),
    ],
)  # fmt: skip
def test_it_is_refused_within_the_limits_or_followed(grammars, asked, reason):
    if reason is None:
        grammars.check(asked)
    else:
        with pytest.raises(ValueError, match=reason) as refused:
            grammars.check(asked)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
        began = time.monotonic()
        with pytest.raises(ValueError, match=reason):  # known by now
            grammars.check(asked)
        assert time.monotonic() - began < 0.5


def test_a_small_one_does_not_wait_for_many_large_ones(tokenizer, monkeypatch):
    """Forty-five large ones at once denied all others for as long as they were compiled."""
    monkeypatch.setattr(compiling, "FAST_S", 0.05)
    monkeypatch.setattr(compiling, "SLOW_S", 0.2)
    grammars = Grammars(lambda: tokenizer, 1)
    large = [{"grammar": ENDLESS["grammar"].replace("101", str(200 + number))} for number in range(45)]
    found: list[Exception] = []

    def ask(asked) -> None:
        try:
            grammars.check(asked)
        except (ValueError, QueueFull) as error:
            found.append(error)

    threads = [threading.Thread(target=ask, args=[asked]) for asked in large]
    for thread in threads:
        thread.start()
    grammars.check({"regex": "[a-f]{7}"})
    ended_before = len(found)
    for thread in threads:
        thread.join()
    assert len(found) == len(large) and ended_before < len(large)
    assert any(isinstance(error, QueueFull) for error in found), "they wait without bound"
    assert any("it takes more than" in str(error) for error in found)


def test_nothing_is_compiled_once_the_server_stops(tokenizer):
    grammars = Grammars(lambda: tokenizer, 1)
    kept = grammars.matcher({"choice": ["yes", "no"]})
    found: list[Exception] = []

    def ask(number: int) -> None:
        try:
            grammars.check({"grammar": ENDLESS["grammar"].replace("101", str(300 + number))})
        except (ValueError, QueueFull) as error:
            found.append(error)

    threads = [threading.Thread(target=ask, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    grammars.end_compiling()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 1.5
    assert {type(error) for error in found} == {QueueFull} and "server is stopping" in str(found[0])
    with pytest.raises(QueueFull, match="server is stopping"):
        grammars.check({"regex": "ab"})
    assert kept.allow(np.zeros(WORDS, np.int32)) is None, "requests that run go on"


@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "c|q{12}(x{1000}){1000}{1000}"},
        {"grammar": ENDLESS["grammar"].replace("A: ", 'A: "c" | "qqqqqqqqqqqq" (') + ")"},
    ],
)
def test_one_that_explodes_while_it_is_followed_ends_alone(grammars, asked):
    """Its first tokens are easy to find."""
    hostile, other = grammars.matcher(asked), grammars.matcher({"regex": "q{40}"})
    words, token = np.zeros(WORDS, np.int32), token_of("q")
    errors: list[str | None] = []
    for _ in range(14):
        for matcher in (hostile, other):
            matcher.push(token)
        errors.append(hostile.accept(token) or hostile.allow(words))
        assert other.accept(token) is None and other.allow(words) is None
    assert errors[0] is None and errors[-1] is not None and "\n" not in errors[-1] and len(errors[-1]) < 300


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGPROF, "it takes more than 0.5 s of processor time; make it smaller"),
        (signal.SIGABRT, "it takes more than 192 MiB of memory; make it smaller"),
        (signal.SIGSEGV, "it is nested too deep; make it smaller"),
        (signal.SIGKILL, "its process has ended; try again later"),
    ],
)
def test_the_kernel_ends_the_process_of_one_that_passes_a_limit(tokenizer, number, reason):
    grammars = Grammars(lambda: tokenizer, 1)
    hostile = grammars.matcher({"regex": "q{30}"})
    forking = max(processes_of(os.getpid()))
    (follower,) = processes_of(forking)
    other, words, token = grammars.matcher({"regex": "q{40}"}), np.zeros(WORDS, np.int32), token_of("q")
    os.kill(follower, number)
    assert (hostile.accept(token) or hostile.allow(words)) == reason
    assert hostile.allow(words) == reason and hostile.accept(token) == reason
    assert other.accept(token) is None and other.allow(words) is None
    again = grammars.matcher({"regex": "q{30}"})  # by a process of its own: one bad output is not the grammar's end
    assert again.accept(token) is None and again.allow(words) is None


def test_an_output_has_a_limit_for_all_its_tokens(monkeypatch):
    """Each within the limit for one, they would hold up all others for as long as it runs."""
    now = [0.0]
    monkeypatch.setattr(process.time, "process_time", lambda: now[0])

    class Slow:
        def compute_bitmask(self) -> bytes:
            now[0] += 0.03
            return b"\1"

        def consume_token(self, token: int) -> bool:
            now[0] += 0.005
            return True

        def is_error(self) -> bool:
            return False

        is_stopped = is_error

    output, count = process.Output(Slow()), 0
    while (found := output.mask())[0] == MASK and count < 100:
        assert output.accept(1) == (TAKEN, b"")
        count += 1
    assert found == (FAILED, b"its tokens take more than 10 ms of processor time each") and 15 <= count <= 20


def token_of(text: str) -> int:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(FOLDER / "tokenizer.json")).token_to_id(text)


def test_outputs_of_one_grammar_have_states_of_their_own(grammars):
    first, second = grammars.matcher({"choice": ["aab", "abb"]}), grammars.matcher({"choice": ["aab", "abb"]})
    a, b, words = token_of("a"), token_of("b"), np.zeros(WORDS, np.int32)
    for each, token in ((first, a), (second, a)):
        each.push(token)
    assert first.accept(a) is None and second.accept(a) is None
    assert first.accept(a) is None, "its bits were not asked for"
    assert 'token "a" doesn' in str(first.accept(a))
    assert second.accept(b) is None and second.allow(words) is None
    assert second.accept(b) is None and second.is_complete
    del first
    gc.collect()
    assert grammars.matcher({"choice": ["aab", "abb"]}).allow(words) is None


def test_those_that_take_most_end_where_all_take_too_much(grammars, monkeypatch):
    matcher = grammars.matcher({"grammar": 'start: s\ns: s s s | s s | "a" | "b" | "ab" | '})
    monkeypatch.setattr(compiling, "MOST_MIB_TOGETHER", -1)
    token, words, error = token_of("a"), np.zeros(WORDS, np.int32), None
    for _ in range(200):
        error = error or matcher.accept(token) or matcher.allow(words)
    assert error is not None


def test_there_are_at_most_so_many_processes(tokenizer, monkeypatch):
    monkeypatch.setattr(compiling, "MOST_PROCESSES", 2)
    grammars = Grammars(lambda: tokenizer, 1)
    grammars.check({"choice": ["a"]})
    kept = [grammars.matcher({"choice": ["b"]}), grammars.matcher({"choice": ["c"]})]
    with pytest.raises(QueueFull, match="2 different grammars are being followed; try again later"):
        grammars.check({"choice": ["d"]})
    kept[0].close()
    grammars.check({"choice": ["d"]})


def test_waiting_has_a_bound():
    lanes = Lanes(1, 0)
    with (
        lanes.one(),
        pytest.raises(QueueFull, match="0 large grammars wait to be compiled; try again later"),
        lanes.one(),
    ):
        pass
    with lanes.one():
        pass


def test_it_starts_again_if_somebody_ends_it(tokenizer):
    grammars = Grammars(lambda: tokenizer, 1)
    first = grammars.matcher({"choice": ["yes"]})
    for child in processes_of(os.getpid()):
        if os.getpgid(child) == os.getpgid(os.getpid()):
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    grammars.check({"choice": ["no"]})
    assert first.allow(np.zeros(WORDS, np.int32)) is None


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_grammar_is_not_refused_for_what_it_did_not_do(tokenizer, monkeypatch, is_killed):
    """It was refused as too large ever after if somebody ended the process that forks, or no descriptor was left."""
    grammars, asked = Grammars(lambda: tokenizer, 1), {"regex": "never before"}
    grammars.check({"regex": "before"})
    with monkeypatch.context() as patch:
        if is_killed:
            forking = max(processes_of(os.getpid()))
            os.kill(forking, signal.SIGSTOP)
            killer = threading.Timer(0.3, os.kill, (forking, signal.SIGKILL))
            killer.start()
        else:
            patch.setattr(forking_module.socket, "socketpair", no_descriptors)
        with pytest.raises(QueueFull, match=r"; try again later$"):
            grammars.check(asked)
    grammars.check(asked)


def no_descriptors():
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_they_begin_where_a_thousand_files_are_open(tokenizer):
    """The process that forks was told of descriptors for which `select` has no room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(1100):
                stack.enter_context(open(os.devnull, "rb"))
            grammars = Grammars(lambda: tokenizer, 1)
            for _ in range(2):
                assert grammars.matcher({"choice": ["yes"]}).allow(np.zeros(WORDS, np.int32)) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def processes_of(parent: int) -> list[int]:
    """Its children that fork for grammars."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((folder / "stat").read_text("ascii").rpartition(")")[2].split()[1]) == parent
            if is_child and b"grammars.process" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_all_processes_end_with_their_engine(tokenizer):
    """Also one that is compiling, and where the engine's process was killed."""
    program = f"""
import threading, time
from apt_jax.tokenization.grammars.compiling import Grammars
grammars = Grammars(open({str(FOLDER / "tokenizer.json")!r}, encoding="utf-8").read, 1)
grammars.check({{"choice": ["yes"]}})
threading.Thread(target=grammars.check, args=[{ENDLESS!r}], daemon=True).start()
time.sleep(0.05)
print("begun", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        (forking,) = processes_of(process.pid)
        followers = processes_of(forking)
        assert len(followers) >= 1
        process.kill()
    deadline = time.monotonic() + 10
    while (left := [pid for pid in (forking, *followers) if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_tokenizer_that_the_library_cannot_read_is_a_sentence():
    with pytest.raises(ValueError, match="structured outputs cannot be served with this tokenizer: "):
        ForkingProcess(lambda: "{}", 1).fork()
