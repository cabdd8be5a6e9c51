"""Files that users bring, of every odd sort: one sentence, whatever is in them."""

import codecs
import json
import os
import socket
from pathlib import Path

import pytest

from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.families import read_config
from apt_jax.checkpoints.formats.manifest import Manifest
from apt_jax.checkpoints.formats.weight_files import MANIFEST
from apt_jax.checkpoints.generation_config import FILE, read_generation_config
from apt_jax.files import read_json, read_text
from apt_jax.scheduling.costs.fit import Calibration
from apt_jax.serve.batch.batch_file import readable_twice
from apt_jax.serve.bench.work import check_dataset, load_dataset
from apt_jax.serve.bench.work_options import WorkOptions
from apt_jax.serve.options import ServerOptions
from apt_jax.simulation.workload import load_lengths
from apt_jax.tokenization.tokenizer_store import TokenizerStore

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
