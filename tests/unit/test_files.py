"""Files that are replaced: whole or as they were, private where they should be, and in their place."""

import ast
import errno
import os
import socket
import threading
from pathlib import Path

import pytest

from apt_jax.files import EVERYBODY, check_apart, check_readable, check_writable, replace_file
from tests.support.import_graph import ROOT, sources

# What writes without replacing, with the reason.
WRITERS = {
    "apt_jax/files.py": "what is no file on disk is written to",
    "checkpoints/convert.py": "into a folder that is moved into its place",
    "checkpoints/demo_training/folder.py": "makes a folder once, by hand",
    "checkpoints/demo_training/tokenizer.py": "makes a folder once, by hand",
    "checkpoints/demo_training/state.py": "a draft that takes the file's place",
    "pallas_kernels/bench/decode_steps.py": "into a temporary folder",
    "pallas_kernels/bench/kernel_parts.py": "into a temporary folder",
    "serve/http/snapshot_cache.py": "each page has its digest",
}

# What reads without `read_file`, with the reason.
READERS = {
    "apt_jax/cpu_kernels/features.py": "of the system",
    "apt_jax/cpu_kernels/library.py": "of the package",
    "apt_jax/execution/cache/ranges.py": "of the package",
    "apt_jax/execution/program_store.py": "of the package",
    "apt_jax/files.py": "opens without waiting and looks what it is",
    "apt_jax/host_limits.py": "of the system",
    "serve/line_file.py": "looks what it is",
    "apt_jax/simulation/workload.py": "of the package",
    "apt_jax/tokenization/grammars/compiling.py": "a grammar, no file",
    "apt_jax/tokenization/grammars/process.py": "of the system",
    "checkpoints/convert.py": "folders, for their locks",
    "checkpoints/demo_training/corpus.py": "of Python's library",
    "checkpoints/formats/flax_reader.py": "looked at by `find_weight_files`",
    "pallas_kernels/bench/kernel_cycles.py": "written just before",
    "pallas_kernels/bench/kernel_parts.py": "written just before",
    "serve/batch/store.py": "its own lock and files",
    "serve/batch/worker.py": "its own results",
    "serve/batch/batch_file.py": "`readable_twice` looks what it is: a pipe may be waited for",
    "serve/http/routes/dashboard.py": "of the package",
    "serve/http/snapshot_cache.py": "`check_file` looks what it is: a page at a time",
    "serve/http/server.py": "opens a TLS file to name it in the error, reads nothing",
    "serve/http/snapshot_file.py": "looks what it is",
}


def modes(path):
    return path.stat().st_mode & 0o777


def test_new_files_are_the_owner_s_unless_said_otherwise_and_old_ones_keep_their_mode(tmp_path):
    private, shared = tmp_path / "new" / "private", tmp_path / "shared"
    before = os.umask(0o027)
    try:
        replace_file(private, b"a")
        replace_file(shared, b"a", mode=EVERYBODY)
        assert (modes(private), modes(shared)) == (0o600, 0o640)
        shared.chmod(0o664)
        replace_file(shared, b"b", mode=EVERYBODY, durable=True)
        private.chmod(0o644)
        replace_file(private, b"b", durable=True)
        assert (modes(private), modes(shared)) == (0o600, 0o664)
    finally:
        os.umask(before)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("step", ["write", "fsync", "replace", "fchmod"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new", mode=EVERYBODY, durable=True)
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    replace_file(tmp_path / "link", b"through")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"through"
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    replace_file(pipe, b"piped")
    reader.join()
    assert found == [b"piped"] and pipe.is_fifo()


def writes(node: ast.AST) -> bool:
    """Whether a call writes a file in place."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return name in ("write_text", "write_bytes", "savez") or (
        name == "open" and any(set(text) & set("wax+") and set(text) <= set("wax+brt") for text in texts)
    )


def reads(node: ast.AST) -> bool:
    """Whether a call opens a file, other than to write it."""
    if not isinstance(node, ast.Call) or writes(node):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return (name in ("read_text", "read_bytes") and isinstance(node.func, ast.Attribute)) or name == "open"


def test_what_a_user_brings_is_read_by_read_file():
    """A config.json that was a folder was a raw error of the system, one that was a pipe was waited for for ever."""
    found = {
        path
        for path, source in sources().items()
        if not path.startswith(("tests/", "experiments/")) and any(map(reads, ast.walk(source.tree)))
    }
    assert found == READERS.keys(), "use read_file, or say why not"


def test_nothing_in_the_package_writes_a_file_in_place():
    found = {
        path
        for path, source in sources().items()
        if not path.startswith(("tests/", "experiments/")) and any(map(writes, ast.walk(source.tree)))
    }
    assert found == WRITERS.keys(), "use replace_file, or say why not"
    assert all((Path(ROOT) / path).is_file() for path in WRITERS)


def test_what_cannot_be_read_is_told_with_its_flag(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "none")
    (tmp_path / "secret").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)  # who is root may read everything
    for name, sentence in (
        ("none", "--input {} does not exist; give the name of a file"),
        ("link", "--input {} is a link to no file; give the name of a file"),
        ("secret", "--input {} cannot be read: permission denied; choose another file"),
    ):
        with pytest.raises(ValueError, match="--input") as caught:
            check_readable(tmp_path / name, "--input")
        assert str(caught.value) == sentence.format(tmp_path / name)


def test_one_file_has_one_result(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a")
    check_apart({"--json": tmp_path / "a", "--plot": None, "--output": tmp_path / "b"})
    check_apart({"--json": Path("/dev/null"), "--plot": Path("/dev/null")})
    with pytest.raises(ValueError, match=f"--json and --plot both name {tmp_path}/link; give each a file of its own"):
        check_apart({"--json": tmp_path / "a", "--plot": tmp_path / "link"})


def test_a_device_that_takes_nothing_is_named():
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        replace_file(Path("/dev/full"), b"a")


def no_room(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_will_not_take_a_result_is_told_before_the_work(tmp_path, monkeypatch):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"old")
    link.symlink_to(tmp_path / "none" / "file")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path, sentence in (
            (tmp_path, " is a folder; give the name of a file"),
            (tmp_path / "none" / "a", f": there is no folder {tmp_path}/none; make it, or choose another file"),
            (Path("/dev/full"), " cannot be written: no space left on device; choose another file"),
            (tmp_path / "socket", " cannot be written: no such device or address; choose another file"),
            (link, " cannot be written: no such file or directory; choose another file"),
        ):
            with pytest.raises(ValueError, match="--json") as caught:
                check_writable(path, "--json")
            assert str(caught.value) == f"--json {path}{sentence}"
    monkeypatch.setattr(os, "write", no_room)
    for path in (file, tmp_path / "new"):
        with pytest.raises(ValueError, match=f"--json {path} cannot be written: no space left on device; choose"):
            check_writable(path, "--json")
    monkeypatch.undo()
    assert file.read_bytes() == b"old" and sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "socket"]


def test_what_takes_a_result_is_as_it_was_after_the_check(tmp_path):
    pipe, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(pipe)
    file.write_bytes(b"old")
    for path in (None, pipe, file, tmp_path / "new", Path("/dev/null")):
        check_writable(path, "--json")
    assert file.read_bytes() == b"old" and sorted(p.name for p in tmp_path.iterdir()) == ["file", "pipe"]


def test_a_file_that_grows_needs_no_new_one_beside_it(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # who is root may write everywhere
    monkeypatch.setattr(os, "write", no_room)
    check_writable(file, "--output", in_place=True)
    with pytest.raises(ValueError, match=r"--output .*new cannot be written: permission denied"):
        check_writable(tmp_path / "new", "--output", in_place=True)
    with pytest.raises(ValueError, match="no space left"):
        check_writable(file, "--output")


def test_an_error_of_a_result_names_its_file_and_not_the_draft(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", no_room)
    with pytest.raises(OSError, match="No space left") as caught:
        replace_file(tmp_path / "a", b"a")
    assert caught.value.filename == str(tmp_path / "a")


def test_the_pipe_of_a_process_substitution_is_written_to():
    """Resolved, its name is that of no file: the result of a whole run was lost."""
    reader, writer = os.pipe()
    for name in (f"/dev/fd/{writer}", f"/proc/self/fd/{writer}"):
        check_writable(Path(name), "--json")
        replace_file(Path(name), b"piped")
        assert os.read(reader, 9) == b"piped"
    os.close(reader)
    os.close(writer)
