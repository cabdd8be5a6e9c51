"""`pytorch_model.bin`: read by torch where it is installed, else refused with what to do about it."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.export import export_huggingface
from apt_jax.checkpoints.formats.weight_files import LoadFormat, torch_is_installed
from apt_jax.checkpoints.load import load_model
from tests.support.checkpoint_folders import assert_same_parameters, flax_tree

FOLDERS = Path(__file__).parents[1] / "torch_checkpoints"
NAMES = ("whole", "sharded", "legacy")

with_torch = pytest.mark.skipif(not torch_is_installed(), reason="torch is not installed")


@pytest.fixture(autouse=True)
def _quiet_torch():
    """Import torch before warnings are errors."""
    if torch_is_installed():
        pytest.importorskip("torch", exc_type=ImportError)


@pytest.fixture
def damaged(tmp_path):
    """A copy of the sharded checkpoint, to be damaged."""
    shutil.copytree(FOLDERS / "sharded", tmp_path / "sharded", ignore=shutil.ignore_patterns("expected"))
    return tmp_path / "sharded"


@pytest.mark.parametrize("name", NAMES)
def test_safetensors_of_transformers(name):
    loaded = load_model(str(FOLDERS / name / "expected"))
    assert loaded.dtype == np.float32
    assert len(export_huggingface(loaded.config, loaded.model)) > 20


@with_torch
@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_same_as_safetensors(name, dtype):
    loaded = load_model(str(FOLDERS / name), dtype=dtype)
    assert loaded.load_format is LoadFormat.PT
    assert_same_parameters(loaded.model, load_model(str(FOLDERS / name / "expected"), dtype=dtype).model)


@pytest.mark.parametrize("name", NAMES)
def test_without_torch_says_what_to_do(name, monkeypatch):
    monkeypatch.setattr("apt_jax.checkpoints.formats.weight_files.importlib.util.find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"pytorch_model.*\.bin is in torch's format and .*pip install torch"):
        load_model(str(FOLDERS / name))


def test_without_torch_the_flax_copy_is_taken(tmp_path, monkeypatch):
    from tests.support.checkpoint_folders import write_flax

    expected = load_model(str(FOLDERS / "whole" / "expected"))
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(FOLDERS / "whole" / name, tmp_path)
    write_flax(tmp_path, flax_tree(expected.config, export_huggingface(expected.config, expected.model)))
    monkeypatch.setattr("apt_jax.checkpoints.formats.weight_files.importlib.util.find_spec", lambda _: None)
    loaded = load_model(str(tmp_path))
    assert loaded.load_format is LoadFormat.FLAX
    assert_same_parameters(loaded.model, expected.model)


def test_missing_shard(damaged):
    (damaged / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
        load_model(str(damaged))


@with_torch
@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.9, -1])
@pytest.mark.parametrize("name", ["sharded", "legacy"])
def test_truncated(tmp_path, name, keep):
    shutil.copytree(FOLDERS / name, tmp_path / name)
    path = sorted((tmp_path / name).glob("*.bin"))[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(
        CheckpointError, match=rf"{path.name} is truncated, corrupt or not a plain state dict"
    ) as caught:
        load_model(str(tmp_path / name))
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@with_torch
@pytest.mark.parametrize("content", [Evil(), {"a": Evil()}, [1, 2], {"a": 1}, {1: 2}, {}])
def test_anything_but_named_tensors_is_refused(damaged, content, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    import torch

    path = damaged / "pytorch_model-00002-of-00002.bin"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin"):
        load_model(str(damaged))
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin"):
        load_model(str(damaged))
    assert not (tmp_path / "executed").exists()


@with_torch
def test_index_that_disagrees(damaged):
    path = damaged / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop("model.decoder.layers.0.fc1.weight")
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"holds model\.decoder\.layers\.0\.fc1\.weight, which pytorch_model"):
        load_model(str(damaged))
