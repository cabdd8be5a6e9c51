"""Conversion to Orbax: equal to its source, marked by a fingerprint, and whole or not there at all."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from apt_jax.checkpoints import convert as convert_module
from apt_jax.checkpoints.convert import convert, verify
from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.export import export_huggingface
from apt_jax.checkpoints.formats.fingerprint import SampledFingerprint
from apt_jax.checkpoints.formats.manifest import Manifest
from apt_jax.checkpoints.formats.weight_files import MANIFEST, LoadFormat
from apt_jax.checkpoints.load import load_model
from apt_jax.engine_config import EngineConfig
from apt_jax.serve.runtime.build import build_engine
from tests.support.checkpoint_folders import (
    VARIANTS,
    assert_same_parameters,
    flax_tree,
    random_model,
    write_config,
    write_flax,
    write_safetensors,
)


@functools.cache
def reference(variant):
    config = VARIANTS[variant]
    model = random_model(config, seed=11)
    return config, model, export_huggingface(config, model)


@pytest.fixture
def source(tmp_path):
    config, _, tensors = reference("plain")
    write_config(tmp_path / "source", config)
    write_safetensors(tmp_path / "source", tensors, shards=2)
    (tmp_path / "source" / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "source" / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": 7}')
    return tmp_path / "source"


@pytest.fixture
def converted(tmp_path, source):
    convert(str(source), tmp_path / "converted")
    return tmp_path / "converted"


@pytest.mark.parametrize("variant", ["untied", "no_affine", "no_bias"])
def test_restored_equals_source(tmp_path, variant):
    config, model, tensors = reference(variant)
    write_config(tmp_path / "a", config)
    write_safetensors(tmp_path / "a", tensors)
    done = convert(str(tmp_path / "a"), tmp_path / "new" / "b")
    loaded = load_model(str(tmp_path / "new" / "b"))
    assert_same_parameters(loaded.model, model)
    assert loaded.load_format is LoadFormat.ORBAX
    assert loaded.config == config
    assert loaded.fingerprint == load_model(str(tmp_path / "a")).fingerprint
    assert Manifest.read(tmp_path / "new" / "b").fingerprint == done.fingerprint
    assert loaded.weight_bytes == done.weight_bytes


def test_folder_holds_config_and_tokenizer(source, converted):
    for name in ("vocab.json", "merges.txt", "generation_config.json"):
        assert (converted / name).read_bytes() == (source / name).read_bytes()
    verify(converted)


def test_fingerprint_is_of_the_weights_and_not_of_the_files(tmp_path, source):
    config, _, tensors = reference("plain")
    write_config(tmp_path / "flax", config)
    write_flax(tmp_path / "flax", flax_tree(config, tensors))
    one, two = convert(str(source), tmp_path / "one"), convert(str(tmp_path / "flax"), tmp_path / "two")
    assert one.fingerprint == two.fingerprint
    again = convert(str(tmp_path / "one"), tmp_path / "three")  # Orbax to Orbax
    assert again.fingerprint == one.fingerprint
    changed = dict(tensors)
    changed["model.decoder.layers.2.fc2.bias"] = np.nextafter(changed["model.decoder.layers.2.fc2.bias"], np.inf)
    write_config(tmp_path / "changed", config)
    write_safetensors(tmp_path / "changed", changed)
    assert convert(str(tmp_path / "changed"), tmp_path / "four").fingerprint != one.fingerprint


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_the_same_weights_have_one_fingerprint_in_every_form_and_dtype(tmp_path, stored):
    """A Hugging Face folder and the folder converted from it were two models: a snapshot of one was refused."""
    config, _, tensors = reference("untied")
    tensors = {name: tensor.astype(stored) for name, tensor in tensors.items()}
    for name in ("whole", "sharded", "flax"):
        write_config(tmp_path / name, config, torch_dtype=stored)
    write_safetensors(tmp_path / "whole", tensors)
    write_safetensors(tmp_path / "sharded", tensors, shards=3)
    write_flax(tmp_path / "flax", flax_tree(config, tensors))
    convert(str(tmp_path / "flax"), tmp_path / "converted")
    convert(str(tmp_path / "converted"), tmp_path / "again")
    names = ("whole", "sharded", "flax", "converted", "again")
    found = {
        load_model(str(tmp_path / name), dtype=dtype).fingerprint for name in names for dtype in ("auto", "bfloat16")
    }
    assert len(found) == 1 and found.pop().startswith("sample:")


def test_another_number_anywhere_is_another_fingerprint(tmp_path):
    config, _, tensors = reference("plain")
    found = set()
    for changed in (None, *tensors):
        write_config(tmp_path / "a", config)
        write_safetensors(tmp_path / "a", {n: t * (1.01 if n == changed else 1) for n, t in tensors.items()})
        found.add(load_model(str(tmp_path / "a")).fingerprint)
    assert len(found) == 1 + len(tensors)


def test_of_a_large_parameter_the_ends_and_what_lies_between_count(tmp_path):
    found = set()
    for changed in (slice(0), slice(64), slice(500_000, 502_000), slice(-64, None)):
        array, fingerprint = np.zeros(1 << 20, np.float32), SampledFingerprint(reference("plain")[0])
        array[changed] = 1
        fingerprint.add(("a",), array)
        found.add(str(fingerprint))
    assert len(found) == 4


def test_dtype_of_the_checkpoint_is_kept_or_changed(tmp_path):
    config, _, tensors = reference("projected")
    write_config(tmp_path / "source", config, torch_dtype="float16")
    write_safetensors(tmp_path / "source", {name: t.astype(np.float16) for name, t in tensors.items()})
    kept = convert(str(tmp_path / "source"), tmp_path / "kept")
    cast = convert(str(tmp_path / "source"), tmp_path / "cast", dtype="bfloat16")
    assert (kept.dtype, cast.dtype) == (np.float16, ml_dtypes.bfloat16)
    assert kept.weight_bytes == cast.weight_bytes == sum(t.size for t in tensors.values()) * 2
    loaded = load_model(str(tmp_path / "cast"))
    assert loaded.config.checkpoint_dtype == "bfloat16"
    assert loaded.dtype == np.float32  # "auto" on a CPU
    back = export_huggingface(config, loaded.model)
    for name, tensor in tensors.items():
        stored = tensor.astype(np.float16).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(back[name], stored.astype(np.float32))
    assert load_model(str(tmp_path / "kept"), dtype="float16").dtype == np.float16


@pytest.mark.parametrize(
    ("destination", "sentence"),
    [
        ("file/new", "cannot be made, since {}/file is no folder; name another"),
        ("file/a/b", "cannot be made, since {}/file is no folder; name another"),
        ("link", "is a link to no folder; name a new folder or delete it first"),
        ("shut/new", "cannot be made: no permission to write in {}/shut; name another"),
    ],
)
def test_a_place_where_no_folder_can_be_is_told_before_the_source_is_read(tmp_path, destination, sentence, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "link")
    (tmp_path / "shut").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "shut")  # who is root may write everywhere
    with pytest.raises(CheckpointError) as caught:
        convert("no/such/source", tmp_path / destination)
    assert str(caught.value) == f"{tmp_path / destination} {sentence.format(tmp_path)}"
    assert not (tmp_path / "shut/new").exists()


def test_where_the_folder_cannot_be_made_the_destination_is_named(tmp_path, source):
    with pytest.raises(CheckpointError, match=r"^/proc/new cannot be made: No such file or directory; name another"):
        convert(source, Path("/proc/new"))


@pytest.mark.parametrize("model", [None, "."])
def test_a_folder_has_no_revisions(tmp_path, model):
    with pytest.raises(CheckpointError, match=r"revision='v2' is for models of the hub, and the .* has none; leave"):
        convert(model, tmp_path / "new", revision="v2")
    with pytest.raises(CheckpointError, match=r"revision='v2' is for models of the hub"):
        build_engine(model, engine_config=EngineConfig(), revision="v2")


def test_existing_destination_is_left_alone(tmp_path, source, converted):
    for there in (converted, source, tmp_path / "source" / "config.json"):
        with pytest.raises(CheckpointError, match=r"exists; name a new folder"):
            convert(str(source), there)
    verify(converted)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("module", "step"),
    [
        (convert_module, "weights_fingerprint"),
        (convert_module, "save_weights"),
        (convert_module, "_companions"),
        (Path, "write_bytes"),  # of a companion
        (Path, "rename"),
        (Manifest, "write"),
        (os, "replace"),  # of the manifest into its place
    ],
)
def test_interrupted_conversion_leaves_nothing_that_loads(tmp_path, source, monkeypatch, module, step, error):
    original = getattr(module, step)
    interrupted = []

    def interrupt(*arguments, **options):
        if step == "save_weights":
            original(*arguments, **options)  # the weights are there, and nothing else
        interrupted.append(step)
        raise error("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(module, step, interrupt)
        with pytest.raises(error, match="interrupted"):
            convert(str(source), tmp_path / "converted")
    assert interrupted
    assert list(tmp_path.iterdir()) == [source]
    convert(str(source), tmp_path / "converted")
    verify(tmp_path / "converted")


def test_a_folder_without_its_manifest_is_called_an_interrupted_conversion(source, converted):
    (converted / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="left from an interrupted conversion; delete it"):
        convert(str(source), converted)


def test_what_a_killed_conversion_left_is_removed_by_the_next_one_and_what_another_writes_is_not(tmp_path, source):
    with convert_module._beside(tmp_path / "converted") as in_use:
        killed = in_use.parent.with_name(".converted.partial-killed")
        other = in_use.parent.with_name(".another.partial-killed")
        (killed / "converted").mkdir(parents=True)
        other.mkdir()
        convert(str(source), tmp_path / "converted")
        assert in_use.is_dir() and other.is_dir() and not killed.exists()
    assert not in_use.parent.exists()


@pytest.mark.parametrize("name", ["converted", "./converted", "../{}/converted"])
def test_a_relative_path_loads(tmp_path, source, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    name = name.format(tmp_path.name)
    convert("source", Path(name))
    assert load_model(name).load_format is LoadFormat.ORBAX
    verify(Path(name))
    convert(name, Path("again"))


KEEP_CONVERTING = """
import itertools, pathlib, sys
from apt_jax.checkpoints.convert import convert
for number in itertools.count():
    convert(sys.argv[1], pathlib.Path(sys.argv[2]) / f"c{number}")
    print(number, flush=True)
"""


def test_killed_conversion_leaves_nothing_that_loads(tmp_path, source):
    _, model, _ = reference("plain")
    target = tmp_path / "target"
    command = [sys.executable, "-c", KEEP_CONVERTING, str(source), str(target)]
    generator = random.Random(os.urandom(8))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        finished = {process.stdout.readline().strip() for _ in range(2)}
        assert finished == {"0", "1"}
        time.sleep(generator.uniform(0, 0.4))  # one conversion takes about that long
        process.send_signal(signal.SIGKILL)
        finished |= {line.strip() for line in process.stdout}
    assert process.returncode == -signal.SIGKILL
    for folder in target.iterdir():
        try:
            loaded = load_model(str(folder))
        except CheckpointError:
            assert folder.name.removeprefix("c") not in finished, folder
        else:
            assert not folder.name.startswith(".")
            assert_same_parameters(loaded.model, model)
    for number in finished:
        verify(target / f"c{number}")


def weight_file(folder):
    """The largest file of the weights."""
    return max((p for p in (folder / "weights").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_damaged_conversion_is_named(source, converted):
    def refused(match):
        with pytest.raises(CheckpointError, match=match) as caught:
            load_model(str(converted))
        assert "\n" not in str(caught.value)

    data = weight_file(converted)
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    refused(rf"{data.name} has {len(whole) - 1} bytes, not the {len(whole)}")
    data.unlink()
    refused(rf"{data.name} is missing")
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    data.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="convert again"):  # the size is right: only a full check can tell
        verify(converted)
    data.write_bytes(whole)
    verify(converted)

    config = (converted / "config.json").read_text()
    (converted / "config.json").write_text(config.replace("relu", "gelu"))
    refused(r"config\.json (has|was)")
    (converted / "config.json").write_text(config)
    manifest = (converted / MANIFEST).read_text()
    (converted / MANIFEST).write_text(manifest[:-20])
    refused(f"{MANIFEST} is truncated or corrupt")
    fields = json.loads(manifest)
    (converted / MANIFEST).write_text(json.dumps({**fields, "version": 4}))
    refused("version=4")
    for name, value in [("files", "x"), ("files", ["x"]), ("fingerprint", {}), ("sample", None), ("dtype", 7)]:
        (converted / MANIFEST).write_text(json.dumps({**fields, name: value}))
        refused("truncated or corrupt")
    del fields["sample"]
    (converted / MANIFEST).write_text(json.dumps({**fields, "version": 1}))
    assert load_model(str(converted)).fingerprint == fields["fingerprint"], "an older folder loads"
    (converted / MANIFEST).write_text(json.dumps({**fields, "more": 2}))
    refused("truncated or corrupt")
    (converted / MANIFEST).unlink()
    refused("interrupted; delete it")


def test_weights_that_do_not_fit_the_config(tmp_path, source, converted):
    config, _, tensors = reference("untied")
    write_config(tmp_path / "other", config)
    write_safetensors(tmp_path / "other", tensors)
    convert(str(tmp_path / "other"), tmp_path / "mixed")
    before = Manifest.read(tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "weights")
    shutil.copytree(converted / "weights", tmp_path / "mixed" / "weights")
    described = {"fingerprint": before.fingerprint, "sample": before.sample, "dtype": "float32"}
    Manifest.of(tmp_path / "mixed", **described).write(tmp_path / "mixed")
    with pytest.raises(CheckpointError, match=r"lacks lm_head.kernel, project_in.kernel, project_out.kernel"):
        load_model(str(tmp_path / "mixed"))
