"""Where snapshots are kept: what is in the way is found at the start, and nothing is lost at the end."""

import json
import logging
import multiprocessing
import os
import shutil

import pytest

from apt_jax.serve.http import snapshot_file
from apt_jax.serve.http.resume import Resumption
from apt_jax.serve.http.server import keep_unfinished
from apt_jax.serve.http.service import Service
from apt_jax.serve.http.snapshot_file import check_snapshot_file, keep_records, read_snapshot, write_snapshot
from apt_jax.serve.options import DEFAULT_SNAPSHOT_FILE, ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from tests.serve.test_serve_operations import resume
from tests.serve.test_snapshot_fields import kept
from tests.support.asgi_service import run, serving, until
from tests.support.fake_engine import CharTokenizer, FakeEngine


def ids(path):
    return [record["id"] for record in read_snapshot(path)]


def results(path):
    lines = path.with_name(f"{path.name}.results.jsonl").read_bytes().split(b"\n")
    return [json.loads(line)["custom_id"] for line in lines if line]


def in_the_way(folder, kind):
    """A path in `folder` at which no snapshot can be written, and why."""
    path = folder / "left.jsonl"
    match kind:
        case "missing folder":
            return folder / "no" / "left.jsonl", "its folder does not exist"
        case "folder":
            path.mkdir()
            return path, "is a folder"
        case "file as folder":
            path.write_text("x")
            return path / "left.jsonl", "Not a directory"
        case "pipe":
            os.mkfifo(path)
            return path, "is not a file on disk"
        case "foreign":
            path.write_text("notes\nof mine")
            return path, "line 1 is damaged, or no snapshot of a request"
        case "torn":
            path.write_text(json.dumps(kept("a"))[:60])
            return path, "line 1 is damaged, or no snapshot of a request"
        case "zeros":
            path.write_bytes(bytes(5000))
            return path, "line 1 is damaged, or no snapshot of a request"
        case "noise":
            path.write_bytes(b"\xff\xfe\n\x80")
            return path, "line 1 is damaged, or no snapshot of a request"
        case "old":
            path.write_text(json.dumps({**kept("a"), "version": 1}) + "\n")
            return path, "line 1 is of version 1, this server reads 2"
    raise AssertionError(kind)


KINDS = ["missing folder", "folder", "file as folder", "pipe", "foreign", "torn", "old", "zeros", "noise"]


def contents(folder):
    return {p.name: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


DAMAGED = ["torn", "old", "zeros", "noise"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in DAMAGED])
def test_what_is_in_the_way_is_said_at_the_start_and_left_as_it_is(tmp_path, kind):
    path, why = in_the_way(tmp_path, kind)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"--snapshot-file {path} cannot be used: .*{why}.*; name a file in a folder"):
        check_snapshot_file(str(path))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_snapshot_is_set_aside_so_that_a_supervised_server_starts(tmp_path, caplog, kind):
    """The shipped unit file names one file in both flags; the server was started again and again, for ever."""
    path, why = in_the_way(tmp_path, kind)
    data, first = path.read_bytes(), path.with_name("left.jsonl.unreadable-1")
    assert check_snapshot_file(str(path)) == path and Resumption(path).results_path.name == "left.jsonl.results.jsonl"
    assert contents(tmp_path) == {first.name: data}
    assert f"no request in {path} can be read ({path} {why}); the file is {first} now" in caplog.text
    path.write_bytes(data)
    Resumption(path)
    assert contents(tmp_path) == {first.name: data, "left.jsonl.unreadable-2": data}
    write_snapshot(path, [kept("a")])
    assert ids(path) == ["a"]


def test_a_snapshot_is_not_set_aside_for_one_damaged_line_or_where_it_cannot_be_moved(tmp_path, monkeypatch):
    path = tmp_path / "left.jsonl"
    write_snapshot(path, [kept("a")])
    path.write_bytes(b"\0\0\n" + path.read_bytes())
    check_snapshot_file(str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["left.jsonl"] and ids(path) == ["a"]
    path.write_bytes(bytes(10))
    monkeypatch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(ValueError, match="move the file away"):
        Resumption(path)
    with pytest.raises(ValueError, match="cannot be used: denied"):
        check_snapshot_file(str(path))
    assert contents(tmp_path) == {"left.jsonl": bytes(10)}


@pytest.mark.parametrize("kind", KINDS)
def test_requests_go_to_another_folder_if_something_is_in_the_way_at_the_end(tmp_path, caplog, kind):
    path, why = in_the_way(tmp_path, kind)
    before = contents(tmp_path)
    service = Service.of_engine(EngineThread(FakeEngine), "tiny", ServerOptions())
    service.unfinished_records = [kept("b")]
    with caplog.at_level(logging.INFO):
        keep_unfinished(service, path)
    (found,) = [p for root in (tmp_path, path.parent) if root.is_dir() for p in root.glob("apt-jax-unf*/left.jsonl")][
        :1
    ] or [p for p in [last_named(caplog)] if p.is_file()]
    assert ids(found) == ["b"] and f"--resume-from {found} finishes them" in caplog.text and why in caplog.text
    assert found.stat().st_mode & 0o777 == 0o600 and found.parent.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(found.parent)
    assert contents(tmp_path) == before


def last_named(caplog):
    return caplog.records[-1].args[-1]


def test_the_default_name_is_only_warned_about(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT_SNAPSHOT_FILE).mkdir()
    path = check_snapshot_file(DEFAULT_SNAPSHOT_FILE)
    assert "is a folder" in caplog.text and "--snapshot-file names a better place" in caplog.text
    assert path == tmp_path / DEFAULT_SNAPSHOT_FILE
    other = keep_records(path, [kept("a")])
    assert other is not None and other.parent.parent == tmp_path and ids(other) == ["a"]


def test_a_good_place_is_left_without_a_trace_and_a_snapshot_there_as_it_is(tmp_path):
    path = tmp_path / "left.jsonl"
    assert check_snapshot_file(str(path)) == path and list(tmp_path.iterdir()) == []
    write_snapshot(path, [kept("a")])
    path.write_bytes(path.read_bytes() + b'{"torn')
    before = contents(tmp_path)
    check_snapshot_file(str(path))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_is_found_at_the_start_and_loses_nothing_at_the_end(tmp_path, monkeypatch, step):
    path, works = tmp_path / "left.jsonl", getattr(os, step)
    write_snapshot(path, [kept("a")])
    full = set()

    def fails(*args):
        if path.parent.stat().st_dev in full or (step == "replace" and str(tmp_path / ".left") in str(args[0])):
            raise OSError(28, "No space left on device")
        return works(*args)

    if step != "replace":  # the disk of tmp_path is full at first, then there is room: nothing is half written
        full.add(tmp_path.stat().st_dev)
    monkeypatch.setattr(os, step, fails)
    if step != "replace":
        with pytest.raises(ValueError, match="cannot be used: No space left on device"):
            check_snapshot_file(str(path))
        assert keep_records(path, [kept("b")]) is None
        full.clear()
        assert keep_records(path, [kept("b")]) == path and ids(path) == ["a", "b"]
    else:
        other = keep_records(path, [kept("b")])
        assert other is not None and ids(other) == ["b"] and ids(path) == ["a"]
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".draft")] == []


def test_a_folder_that_has_gone_and_a_working_directory_that_has_gone(tmp_path, monkeypatch):
    home, gone = tmp_path / "home", tmp_path / "gone"
    home.mkdir()
    gone.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(gone)
    path = check_snapshot_file(DEFAULT_SNAPSHOT_FILE)
    gone.rmdir()
    other = keep_records(path, [kept("a")])
    assert other is not None and other.parent.parent == home and ids(other) == ["a"]


def test_lines_that_cannot_be_read_stay_and_the_others_are_resumed(tmp_path, caplog):
    path = tmp_path / "left.jsonl"
    damaged = [b"notes", json.dumps({**kept("old"), "version": 1}).encode(), b"\xff\xfe", b"[" * 100_000, b"null", b"3"]
    good = [json.dumps(kept(name)).encode() for name in ("a", "b\u2028\x85")]
    torn = json.dumps(kept("c")).encode()[:-9]
    path.write_bytes(b"\n".join([good[0], *damaged, good[1], torn]))
    found = finish(path)
    assert sorted(found) == ["a", "b\u2028\x85"]
    assert path.read_bytes() == b"\n".join([*damaged, torn]) + b"\n"
    for number in (2, 4, 5, 6, 7, 9):
        assert f"line {number} is damaged, or no snapshot of a request" in caplog.text
    assert "line 3 is of version 1" in caplog.text and "Traceback" not in caplog.text


def finish(path, engine=None):
    """Resume until nothing more can be done; the ids of all results."""
    resumption = Resumption(path)

    async def main():
        async with serving(engine or FakeEngine(tokenizer=CharTokenizer()), resumption=resumption):
            await until(lambda: resumption._is_claimed and resumption._results is None)

    run(main)
    return results(path)


def test_another_model_s_requests_are_refused_with_a_sentence_and_stay(tmp_path, caplog):
    path = tmp_path / "left.jsonl"
    other = {**kept("other"), "model": "facebook/opt-125m", "fingerprint": "weights:other"}
    write_snapshot(path, [kept("mine"), other])
    assert finish(path) == ["mine"] and ids(path) == ["other"]
    assert "1 requests of" in caplog.text and "facebook/opt-125m (weights:other)" in caplog.text
    assert "tiny (weights:fake)" in caplog.text and "start a server of that model to finish them" in caplog.text
    engine = FakeEngine(tokenizer=CharTokenizer())
    engine.fingerprint = "weights:other"
    assert finish(path, engine) == ["mine", "other"] and not path.exists()


@pytest.mark.parametrize("cut", [1, 17, -1])
@pytest.mark.parametrize("separators", [False, True])
def test_results_with_any_separator_or_a_torn_last_line_do_not_stop_the_next_start(tmp_path, cut, separators):
    path = tmp_path / "left.jsonl"
    write_snapshot(path, [kept("a"), kept("b")])
    text = "\u2028\u2029\x85" if separators else "x"
    whole = [
        json.dumps({"id": f"resumed-{i}", "custom_id": i, "response": text}, ensure_ascii=False).encode() for i in "ab"
    ]
    path.with_name("left.jsonl.results.jsonl").write_bytes(whole[0] + b"\n" + whole[1][:cut])
    assert finish(path) == ["a", "b"] and not path.exists()


def test_foreign_results_are_refused_at_the_start_and_left_as_they_are(tmp_path):
    path = tmp_path / "left.jsonl"
    write_snapshot(path, [kept("a")])
    for text in ("notes", "notes\n"):
        other = path.with_name("left.jsonl.results.jsonl")
        other.write_text(text)
        with pytest.raises(ValueError, match="is no result of a resumed request; move it away"):
            Resumption(path)
        assert other.read_text() == text and ids(path) == ["a"]


def test_results_are_private_and_a_start_with_nothing_to_resume_makes_no_file(tmp_path):
    path = tmp_path / "left.jsonl"
    Resumption(path)
    assert list(tmp_path.iterdir()) == []
    write_snapshot(path, [kept("a")])
    assert resume(path)["a"]["status_code"] == 200
    assert path.with_name("left.jsonl.results.jsonl").stat().st_mode & 0o777 == 0o600


def test_one_server_resumes_a_file_and_another_waits_for_it(tmp_path, caplog):
    path = tmp_path / "left.jsonl"
    write_snapshot(path, [kept("a")])
    first, second = Resumption(path), Resumption(path)
    paced, engine = FakeEngine(tokenizer=CharTokenizer(), paced=True), FakeEngine(tokenizer=CharTokenizer())

    async def main():
        with caplog.at_level(logging.INFO):
            async with serving(engine, resumption=second):
                async with serving(paced, resumption=first):
                    await until(lambda: paced.has_unfinished and "another server resumes" in caplog.text)
                    assert not engine.has_unfinished
                    write_snapshot(path, [kept("later")])  # of a third server that stops meanwhile
                # the first has been stopped within its request
                await until(lambda: not path.exists())

    run(main)
    assert sorted(results(path)) == ["a", "later"]


def stop_together(path, start, number):
    start.wait()
    for i in range(10):
        assert keep_records(path, [kept(f"{number}-{i}")]) == path


def test_of_many_servers_that_stop_at_the_same_time_none_loses_a_request(tmp_path):
    context = multiprocessing.get_context("spawn")  # JAX may be in this process, with threads
    path, start = tmp_path / "left.jsonl", context.Event()
    servers = [context.Process(target=stop_together, args=(path, start, number)) for number in range(4)]
    for server in servers:
        server.start()
    start.set()
    for server in servers:
        server.join()
        assert server.exitcode == 0
    assert sorted(ids(path)) == sorted(f"{number}-{i}" for number in range(4) for i in range(10))
    assert [p.name for p in tmp_path.iterdir()] == ["left.jsonl"]


def test_a_process_that_never_lets_go_of_the_file_does_not_hold_up_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot_file, "LOCK_TIMEOUT_S", 0.05)
    path = tmp_path / "left.jsonl"
    write_snapshot(path, [kept("a")])
    with snapshot_file._locked(path):
        other = keep_records(path, [kept("b")])
    assert other is not None and other != path and ids(other) == ["b"] and ids(path) == ["a"]


def test_the_first_other_place_is_beside_the_file_and_the_next_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    path = tmp_path / "place" / "left.jsonl"
    path.mkdir(parents=True)  # a folder in the file's way
    beside = keep_records(path, [kept("a")])
    assert beside.parent.parent == tmp_path / "place" and beside.name == "left.jsonl"
    shutil.rmtree(tmp_path / "place")
    elsewhere = keep_records(path, [kept("a")])
    assert elsewhere.parent.parent == tmp_path / "work" and ids(elsewhere) == ["a"]
