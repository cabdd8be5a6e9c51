"""Files that users bring, of every odd sort: one sentence, whatever is in them."""

import codecs
import json
import os
import socket
import threading
from pathlib import Path

import pytest

from apt_jax.checkpoints.convert import convert
from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.families import read_config
from apt_jax.checkpoints.formats.manifest import Manifest
from apt_jax.checkpoints.formats.weight_files import MANIFEST
from apt_jax.checkpoints.generation_config import FILE, read_generation_config
from apt_jax.checkpoints.load import load_model
from apt_jax.execution.program_store import ProgramStore
from apt_jax.files import Unreadable, read_file, read_json, read_text
from apt_jax.request import Slo
from apt_jax.scheduling.costs.fit import Calibration
from apt_jax.serve.batch.batch_file import readable_twice
from apt_jax.serve.bench.work import check_dataset, load_dataset
from apt_jax.serve.bench.work_options import WorkOptions
from apt_jax.serve.openai.templates.chat_template import read_template
from apt_jax.serve.options import ServerOptions
from apt_jax.simulation.requests.classes import load_classes
from apt_jax.simulation.workload import load_lengths
from apt_jax.tokenization.tokenizer import Tokenizer
from apt_jax.tokenization.tokenizer_store import TOKENIZER_FILES, TokenizerStore
from tests.support.checkpoint_folders import VARIANTS, write_config

ODD = {
    "deep": b"[" * 100_000,
    "cut": b'{"a": ',
    "empty": b"",
    "zeros": bytes(100),
    "binary": bytes(range(256)),
    "UTF-16": "{}".encode("utf-16"),
    "long number": b"[" + b"1" * 10_000 + b"]",
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_what_is_no_json_is_a_sentence(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"."):
        read_json(path)


def test_a_byte_order_mark_is_left_out_and_bytes_that_are_no_text_are_said(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(codecs.BOM_UTF8 + '{"\u00e9": 1}'.encode())
    assert read_json(path) == {"\u00e9": 1} and read_text(path).startswith("{")
    path.write_bytes(b"ab\xffc")
    with pytest.raises(ValueError, match=r"^not UTF-8 text \(byte 0xff at 2\)$"):
        read_text(path)


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_files_of_a_model_folder(tmp_path, data):
    """Deep nesting was a RecursionError, with its traceback."""
    for name, read in (
        ("config.json", read_config), (MANIFEST, Manifest.read), (FILE, lambda folder: read_generation_config(folder)),
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=name):
            read(folder)


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_files_that_are_kept_from_start_to_start_are_made_again(tmp_path, data, caplog):
    path = tmp_path / "calibration.json"
    path.write_bytes(data)
    assert Calibration.load(path, None) is None
    store = TokenizerStore(tmp_path / "kept")
    store.save(tmp_path, {"a": 1})
    (kept,) = (tmp_path / "kept").iterdir()
    assert store.load(tmp_path) == {"a": 1}
    kept.write_bytes(data)
    assert store.load(tmp_path) is None or data == ODD["long number"]


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_datasets_and_workloads(tmp_path, data):
    texts, table = tmp_path / "texts.json", tmp_path / "table.csv"
    texts.write_bytes(data)
    with pytest.raises(ValueError, match=r"texts\.json is not a ShareGPT file"):
        load_dataset(WorkOptions(dataset=str(texts)), seed=0, tokenizer=object())
    table.write_bytes(data)
    with pytest.raises(ValueError, match=r"table\.csv") as caught:
        load_lengths(str(table), 2048)
    assert len(str(caught.value)) < 300 + len(str(table)) and str(caught.value).isprintable()


def test_a_table_s_head_that_is_one_long_field_is_a_sentence(tmp_path):
    """csv.Error was no ValueError, and came with its traceback."""
    table = tmp_path / "table.csv"
    table.write_text("prompt_tokens,output_tokens," + "x" * 200_000 + "\n5,6\n")
    with pytest.raises(ValueError, match=r"table\.csv, line 1: field larger than field limit"):
        load_lengths(str(table), 2048)


def test_a_flag_that_is_a_deep_list_is_a_sentence():
    with pytest.raises(ValueError, match="is not a JSON list"):
        ServerOptions(allowed_hosts=('["a",' + "[" * 100_000,))
    assert ServerOptions(allowed_hosts=(json.dumps(["a", "b"]),)).allowed_hosts == ("a", "b")


def test_a_device_that_gives_bytes_for_ever_is_no_file_of_requests(tmp_path):
    """Copies of /dev/zero filled the disk."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path in (Path("/dev/zero"), Path("/dev/full"), tmp_path / "socket"):
            with pytest.raises(ValueError, match=f"{path} is a device or socket, not a file"), readable_twice(path):
                pytest.fail("it was read")


def test_nothing_and_a_terminal_are_read_to_their_end():
    with readable_twice(Path("/dev/null")) as copy:
        assert copy.read_bytes() == b""
    keyboard, terminal = os.openpty()
    try:
        os.write(keyboard, b"typed\n\x04")
        with readable_twice(Path(os.ttyname(terminal))) as copy:
            assert copy.read_bytes() == b"typed\n"
    finally:
        os.close(keyboard)
        os.close(terminal)


@pytest.mark.parametrize("dataset", ["none.csv", "none.json", "sharegpt+none", "sharegtp", "", "/tmp"])
def test_a_dataset_that_is_not_there_is_told_before_a_model_is_loaded(dataset):
    with pytest.raises(ValueError, match=r"^dataset='.*' is neither a file nor one of random, sharegpt"):
        check_dataset(WorkOptions(dataset=dataset))


def test_datasets_that_are_there_pass(tmp_path):
    (tmp_path / "w.csv").touch()
    for dataset in ("random", "azure", "sharegpt+longbench", str(tmp_path / "w.csv"), f"azure+{tmp_path / 'w.csv'}"):
        check_dataset(WorkOptions(dataset=dataset))


NO_FILES = {
    "folder": (Path.mkdir, "is a folder; a file is needed there"),
    "pipe": (os.mkfifo, "is a pipe or a device; a file is needed there"),  # whoever opened it waited for ever
    "device": (lambda path: path.symlink_to("/dev/null"), "is a pipe or a device; a file is needed there"),
    "broken disk": (lambda path: path.symlink_to("/proc/self/mem"), "cannot be read: input/output error"),
    "circle": (lambda path: path.symlink_to(path), "cannot be read: too many levels of symbolic links"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_said_in_one_sentence_at_once(tmp_path, kind):
    make, sentence = NO_FILES[kind]
    make(tmp_path / "a")
    for read in (read_file, read_text, read_json):
        with pytest.raises(Unreadable, match=f"^{tmp_path}/a {sentence}$"):
            read(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none")
    assert not [name for name in os.listdir("/proc/self/fd") if leads_to(name, tmp_path)]


def leads_to(descriptor, folder):
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(folder))
    except OSError:
        return False


def test_a_pipe_is_read_where_one_may_be_and_one_without_a_writer_is_refused(tmp_path):
    reader, writer = os.pipe()
    sender = threading.Timer(0.2, lambda: (os.write(writer, b"{{ messages[0].content }}"), os.close(writer)))
    sender.start()
    assert read_template(Path(f"/proc/self/fd/{reader}")) == "{{ messages[0].content }}"  # as the shell's <(...) is
    sender.join()
    os.close(reader)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Unreadable, match="pipe is a pipe that nobody writes to"):
        read_template(tmp_path / "pipe")


SHARD, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", SHARD, "flax_model.msgpack", "pytorch_model.bin")


@pytest.mark.parametrize("name", ["config.json", FILE, MANIFEST, INDEX, *WEIGHTS])
@pytest.mark.parametrize("kind", NO_FILES)
def test_a_file_of_a_model_that_is_no_file(tmp_path, kind, name):
    """A config.json that was a folder was a raw IsADirectoryError, a generation_config.json was passed over."""
    make, sentence = NO_FILES[kind]
    if name in WEIGHTS and kind == "broken disk":
        sentence = "is (truncated|in torch's format)"  # a library reads it
    if name != "config.json":
        write_config(tmp_path, VARIANTS["plain"])
    for other in (SHARD, INDEX) if name in (SHARD, INDEX) else ():
        (tmp_path / other).write_text(json.dumps({"weight_map": {"a": SHARD}}))
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/{name} {sentence}"):
        read_generation_config(tmp_path) if name == FILE else load_model(str(tmp_path))


@pytest.mark.parametrize("name", TOKENIZER_FILES)
@pytest.mark.parametrize("kind", NO_FILES)
def test_a_file_of_a_tokenizer_that_is_no_file(tmp_path, kind, name):
    """A tokenizer.json that was a folder was none: the server took token ids only."""
    make, sentence = NO_FILES[kind]
    model, store = tmp_path / "model", TokenizerStore(tmp_path / "kept")
    write_config(model, VARIANTS["plain"])
    make(model / name)
    read_only_when_used = kind == "broken disk"
    with pytest.raises(ValueError, match=sentence if not read_only_when_used else r"damaged|no tokenizer|merges\.txt"):
        Tokenizer.from_folder(model, store)
    if not read_only_when_used:
        with pytest.raises(CheckpointError, match=f"^{model}/{name} {sentence}$"):
            convert(str(model), tmp_path / "new", load_format="dummy")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_kept_from_start_to_start_and_is_no_file_is_made_again(tmp_path, kind):
    make, _ = NO_FILES[kind]
    make(tmp_path / "a")
    make(tmp_path / "other.json")  # beside a tokenizer, and none of its files
    assert Calibration.load(tmp_path / "a", None) is None
    assert ProgramStore._load(tmp_path / "a") is None
    store = TokenizerStore(tmp_path / "kept")
    store.save(tmp_path, {"a": 1})
    assert store.load(tmp_path) == {"a": 1}
    (kept,) = (tmp_path / "kept").iterdir()
    kept.unlink()
    make(kept)
    assert store.load(tmp_path) is None


@pytest.mark.parametrize("kind", NO_FILES)
def test_datasets_and_workloads_that_are_no_files(tmp_path, kind):
    make, sentence = NO_FILES[kind]
    make(tmp_path / "a.json")
    with pytest.raises((Unreadable, ValueError), match=rf"a\.json.* ({sentence}|is neither a file)"):
        load_dataset(WorkOptions(dataset=str(tmp_path / "a.json")), seed=0, tokenizer=object())
    with pytest.raises((Unreadable, ValueError), match=rf"a\.json.* ({sentence}|is neither a file)"):
        load_lengths(str(tmp_path / "a.json"), 2048)
    with pytest.raises((Unreadable, ValueError), match=rf"a\.json.* ({sentence}|there is no such file)"):
        load_classes(tmp_path / "a.json", Slo())


def test_a_file_on_disk_is_read_where_it_is_and_an_open_one_is_copied(tmp_path, caplog):
    """On some systems /dev/fd/N is read on from where another read stopped."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"one\ntwo\n")
    with caplog.at_level("INFO"):
        with readable_twice(path) as place:
            assert place == path and caplog.records == []
        with path.open("rb") as file, readable_twice(Path(f"/dev/fd/{file.fileno()}")) as place:
            assert not place.is_relative_to("/dev") and place.read_bytes() == b"one\ntwo\n"
    first, second = (record.getMessage() for record in caplog.records)
    assert first.endswith("can be read only once; reading all of it before the first answer")
    assert second.startswith("read 8 bytes of /dev/fd/")


def test_a_system_without_proc_has_a_copy_with_a_name(tmp_path, monkeypatch):
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: exists(path) and not path.is_relative_to("/proc"))
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b"one\ntwo\n",))
    writer.start()
    with readable_twice(path) as place:
        assert place.read_bytes() == b"one\ntwo\n" and place.parent != Path("/proc/self/fd")
    writer.join()
    assert not exists(place)
