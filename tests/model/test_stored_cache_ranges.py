"""`apt-jax convert --cache-dtype int8`: what an int8 cache is calibrated with, kept with the weights."""

import json
import shutil

import numpy as np
import pytest

from apt_jax.checkpoints.convert import convert, verify
from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.formats.manifest import Manifest
from apt_jax.checkpoints.formats.weight_files import CACHE_RANGES, MANIFEST
from apt_jax.checkpoints.load import load_model
from apt_jax.checkpoints.source import DEMO_FOLDER
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.cache.ranges import packed
from apt_jax.execution.runner import Runner
from apt_jax.serve.cli import main
from apt_jax.serve.runtime.build import build_engine

QUANTIZATIONS = ("none", "int8")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder of the demo model for each number type of the weights."""
    folder = tmp_path_factory.mktemp("converted")
    for name in QUANTIZATIONS:
        convert(str(DEMO_FOLDER), folder / name, quantization=name, cache_dtype="int8")
        verify(folder / name)
    return folder


def channels_of(model, tmp_path, **options):
    chosen = {"cache_dtype": "int8", "num_blocks": 80, "max_model_len": 64, **options}
    config = EngineConfig(compilation_cache_dir=str(tmp_path), **chosen)
    return build_engine(str(model), engine_config=config).runner._channels


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_start_takes_what_the_conversion_measured(converted, tmp_path, monkeypatch, name):
    """Near to what it would measure in float32 (the checkpoint has bfloat16); also where the context is shorter."""
    options = {"quantization": name, "max_model_len": 256}
    measured = channels_of(DEMO_FOLDER, tmp_path, **options)
    monkeypatch.setattr(Runner, "measure_ranges", lambda *_: pytest.fail("measured again"))
    stored = channels_of(converted / name, tmp_path, **options)
    np.testing.assert_allclose(stored[1], measured[1], rtol=0.02)
    assert np.abs(stored[0] - measured[0]).max() < 0.02 * (127 * measured[1]).max()
    np.testing.assert_array_equal(channels_of(converted / name, tmp_path), stored)
    np.testing.assert_array_equal(channels_of(converted / name, tmp_path, cache_mode="hidden"), stored)
    for others in ({"cache_dtype": "auto"}, {"cache_mode": "kv"}):
        assert channels_of(converted / name, tmp_path, **others) is None


def test_what_is_damaged_or_of_other_weights_is_refused(converted, tmp_path):
    folder = shutil.copytree(converted / "none", tmp_path / "copy")
    whole, fingerprint = (folder / CACHE_RANGES).read_bytes(), Manifest.read(folder).fingerprint
    found = load_model(str(folder)).channels
    assert packed(found, fingerprint) == whole
    for damaged in (
        whole[:-1] + bytes([whole[-1] ^ 1]),
        b"\x00" * len(whole),
        (converted / "int8" / CACHE_RANGES).read_bytes(),
    ):
        (folder / CACHE_RANGES).write_bytes(damaged)
        for action in (lambda: load_model(str(folder)), lambda: verify(folder)):
            with pytest.raises(CheckpointError, match=rf"{CACHE_RANGES} is damaged or of other weights; convert again"):
                action()
    fields = json.loads((folder / MANIFEST).read_text())
    fields["files"][CACHE_RANGES] = 32 + 4
    (folder / MANIFEST).write_text(json.dumps(fields))
    (folder / CACHE_RANGES).write_bytes(packed(found[:1, :1, :1], fingerprint))  # whole, of another model's shape
    with pytest.raises(CheckpointError, match="damaged or of other weights"):
        load_model(str(folder))


def test_without_a_tokenizer_nothing_is_converted(tmp_path):
    folder = shutil.copytree(
        DEMO_FOLDER, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "vocab*", "merg*")
    )
    with pytest.raises(CheckpointError, match=r"measures the hidden vectors of a text, and .*; put it there, or leave"):
        convert(str(folder), tmp_path / "new", cache_dtype="int8")
    assert not (tmp_path / "new").exists()
    convert(str(folder), tmp_path / "new")
    assert load_model(str(tmp_path / "new")).channels is None


@pytest.mark.parametrize("flag", ["--cache-dtype", "--kv-cache-dtype"])
def test_the_command(tmp_path, capsys, flag):
    for value, sentence in (("fp8", "its error is three times int8's; use int8"), ("int4", "is not one of auto, int8")):
        with pytest.raises(SystemExit, match="1"):
            main(["convert", str(DEMO_FOLDER), str(tmp_path / "new"), flag, value])
        assert sentence in capsys.readouterr().err and not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match="0"):
        main(["convert", str(DEMO_FOLDER), str(tmp_path / "new"), flag, "int8"])
    assert load_model(str(tmp_path / "new")).channels is not None
