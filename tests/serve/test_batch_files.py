"""The files of batch jobs: whatever they hold and whatever kind they are, nothing is lost and nothing overwritten."""

import codecs
import json
import logging
import os
import threading

import pytest

from apt_jax.engine_config import EngineConfig
from apt_jax.serve.batch import batch_jobs
from apt_jax.serve.batch.batch_file import Line, ResultFile, read_lines, readable_twice
from apt_jax.serve.line_file import line_of
from apt_jax.serve.options import LoadOptions
from tests.serve.test_batch_jobs import answer, line, results_of, write
from tests.support.fake_engine import CharTokenizer, FakeEngine

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


@pytest.fixture
def command(monkeypatch):
    """`run-batch` over the fake engine."""
    monkeypatch.setattr(
        "apt_jax.serve.runtime.build.build_engine", lambda *args, **options: FakeEngine(tokenizer=CharTokenizer())
    )
    return lambda source, output: batch_jobs.run_batch(source, output, None, None, LoadOptions(), EngineConfig())


def job(tmp_path, count=3):
    return write(tmp_path / "in.jsonl", *(line(f"r{i}") for i in range(count))), tmp_path / "out.jsonl"


def test_results_are_readable_for_their_owner_only_and_an_existing_file_keeps_its_mode(tmp_path):
    source, output = job(tmp_path)
    answer(source, output)
    assert output.stat().st_mode & 0o777 == 0o600
    shared = tmp_path / "shared.jsonl"
    shared.touch()
    shared.chmod(0o640)
    answer(source, shared)
    assert shared.stat().st_mode & 0o777 == 0o640


def test_texts_with_any_line_separator_make_one_line_for_every_reader(tmp_path):
    body = {"prompt": SEPARATORS + "é", "max_tokens": 1, "echo": True}
    source = write(tmp_path / "in.jsonl", line(SEPARATORS, body), line("next"))
    output = tmp_path / "out.jsonl"
    results = answer(source, output)
    assert results[1]["custom_id"] == SEPARATORS and len(output.read_text().splitlines()) == 2
    output.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in results.values()))  # of another writer
    with ResultFile(output) as again:
        assert again.num_done == 2


@pytest.mark.parametrize("text", [b"", b"\n \n", codecs.BOM_UTF8])
def test_an_input_without_lines_is_warned_of_and_no_failure(tmp_path, command, caplog, text):
    """As with vLLM: a pipeline's step that had nothing to do is done. The model is not loaded for it."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(text)
    assert command(source, output) == 0 and output.read_bytes() == b""
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == (
        "WARNING", f"{source} has no lines, so there is nothing to answer",
    )  # fmt: skip


def test_a_result_that_cannot_be_kept_names_the_file(tmp_path, monkeypatch):
    with ResultFile(tmp_path / "out.jsonl") as results:
        monkeypatch.setattr(os, "write", lambda *args: os.open("/none/at/all", os.O_RDONLY))
        with pytest.raises(FileNotFoundError) as caught:
            results.write(Line(1, b"", "0" * 16), "a", None, None)
        monkeypatch.undo()
        assert caught.value.filename == str(tmp_path / "out.jsonl") and results.num_done == 0


def test_half_a_surrogate_pair_is_written_as_json_escapes_it():
    assert json.loads(line_of({"text": "a\ud83d"})) == {"text": "a\ud83d"}


@pytest.mark.parametrize("cut", [1, 2, 5, 15, 16, 20, 21, 40, -1])
@pytest.mark.parametrize("before", [0, 1])
def test_a_result_torn_at_any_byte_is_dropped_or_completed(tmp_path, cut, before):
    source, output = job(tmp_path, 2)
    answer(source, output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:before]) + lines[before][:cut])
    answer(source, output)
    assert sorted(results_of(output)) == [1, 2]
    if cut == -1:
        assert output.read_bytes().startswith(b"".join(lines[: before + 1])), "it was whole but for its end"


@pytest.mark.parametrize(
    "text", [b"hello", b"{}", b"[1, 2]", b'{"id": "x"}', b'{"id": "resumed-1"', b"\0" * 40, b"\xff\xfe", b"a\nb", b"{"]
)
def test_a_foreign_file_is_refused_and_left_as_it_is_with_or_without_an_end_of_line(tmp_path, text):
    source, output = job(tmp_path)
    output.write_bytes(text)
    if text == b"{":  # a result may begin so
        answer(source, output)
        return
    with pytest.raises(ValueError, match=r"out\.jsonl( line 1)? is no result of a batch job; choose another output"):
        ResultFile(output)
    assert output.read_bytes() == text


def test_a_damaged_line_among_results_is_answered_again(tmp_path, caplog):
    source, output = job(tmp_path)
    answer(source, output)
    lines = output.read_bytes().splitlines(keepends=True)
    for garbage in (b"\0" * 30 + b"\n", lines[1][:30] + b"\n", b"[" * 100_000 + b"\n"):
        output.write_bytes(lines[0] + garbage + lines[2])
        with ResultFile(output) as results:
            assert results.num_done == 2
    assert "out.jsonl line 2 is damaged; what it answered is done again" in caplog.text


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_an_output_that_is_no_file_is_refused_at_once(tmp_path, kind):
    output = tmp_path / "out"
    if kind == "folder":
        output.mkdir()
    elif kind == "pipe":
        os.mkfifo(output)
    else:
        output.symlink_to("/dev/null")
    with pytest.raises(ValueError, match="out is not a file on disk; choose another output"):
        ResultFile(output)


def test_a_result_that_does_not_fit_leaves_only_whole_lines(tmp_path, monkeypatch):
    source, output = job(tmp_path)
    whole = os.write

    def full(file, data):
        monkeypatch.setattr(os, "write", lambda file, data: (_ for _ in ()).throw(OSError(28, "No space left")))
        return whole(file, bytes(data)[:20])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        answer(source, output)
    monkeypatch.undo()
    assert output.read_bytes() == b""
    assert len(answer(source, output)) == 3


def test_byte_order_marks_are_left_out_and_utf_16_is_refused(tmp_path, command):
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    text = f"{line('a')}\r\n{line('b')}\n".encode()
    path.write_bytes(codecs.BOM_UTF8 + text + codecs.BOM_UTF8 + text.replace(b'"a"', b'"c"').replace(b'"b"', b'"d"'))
    assert command(path, output) == 0
    assert [r["custom_id"] for r in results_of(output).values() if r["error"] is None] == ["a", "b", "c", "d"]
    path.write_bytes(text * 2)  # saved again without the mark: the same line
    with ResultFile(output) as results:
        assert results.is_done(next(read_lines(path)))
    path.write_bytes(text.decode().encode("utf-16"))
    with pytest.raises(ValueError, match="is UTF-16 text; save it as UTF-8"):
        command(path, tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()


def feed(path, data):
    writer = threading.Thread(target=lambda: path.write_bytes(data), daemon=True)
    writer.start()
    return writer


def test_a_pipe_is_read_whole_and_answered_whole(tmp_path, command, caplog):
    pipe, output = tmp_path / "pipe", tmp_path / "out.jsonl"
    os.mkfifo(pipe)
    lines = [line(f"r{i}", {"prompt": "a" * 50, "max_tokens": 1}) for i in range(1000)]  # more than a pipe holds
    text = "".join(f"{text}\n" for text in lines).encode()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            writer = feed(pipe, text)
            assert command(pipe, output) == 0
            writer.join()
            assert len(results_of(output)) == 1000
    assert f"{pipe} can be read only once" in caplog.text and f"all 1000 lines of {pipe}" in caplog.text


def test_the_copy_of_a_pipe_is_private_and_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    feed(pipe, b"one\ntwo\n")
    with readable_twice(pipe) as copy:
        assert [[text.data for text in read_lines(copy)] for _ in range(2)] == [[b"one", b"two"]] * 2
        assert copy.stat().st_mode & 0o077 == 0
        assert list((tmp_path / "copies").iterdir()) == [], "a process that is killed leaves nothing"


def test_an_open_descriptor_as_input_is_read_whole(tmp_path, command):
    read, write_end = os.pipe()
    os.write(write_end, f"{line('a')}\n{line('b')}\n".encode())
    os.close(write_end)
    assert command(type(tmp_path)(f"/dev/fd/{read}"), tmp_path / "out.jsonl") == 0
    os.close(read)
    assert len(results_of(tmp_path / "out.jsonl")) == 2


def test_a_folder_as_input_is_refused(tmp_path, command):
    with pytest.raises(ValueError, match="is a folder; give a file of requests"):
        command(tmp_path, tmp_path / "out.jsonl")


def test_a_job_goes_on_with_what_is_left_and_builds_no_engine_for_nothing(tmp_path, command, monkeypatch):
    source, output = job(tmp_path)
    assert command(source, output) == 0
    whole = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(whole[1])
    assert command(source, output) == 0
    again = output.read_bytes().splitlines(keepends=True)
    assert again[0] == whole[1] and len(again) == 3
    assert {json.loads(text)["custom_id"] for text in again} == {"r0", "r1", "r2"}
    monkeypatch.setattr("apt_jax.serve.runtime.build.build_engine", lambda *a, **b: pytest.fail("an engine was built"))
    assert command(source, output) == 0 and output.read_bytes().splitlines(keepends=True) == again
