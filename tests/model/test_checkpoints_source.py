"""Hub ids: fetched in one format, and served from the hub's cache without a network."""

import json
import os
import subprocess
import sys

import pytest

from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.export import export_huggingface
from apt_jax.checkpoints.load import load_model
from apt_jax.checkpoints.source import resolve
from tests.support.checkpoint_folders import TINY, assert_same_parameters, random_model, write_config, write_safetensors
from tests.support.hub_server import COMMIT, hub_server

REPOSITORY = "somebody/opt-tiny"
RESOLVE = """
import json, sys
from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.source import resolve
from apt_jax.checkpoints.formats.weight_files import LoadFormat
for line in sys.argv[1:]:
    model, revision, load_format = json.loads(line)
    try:
        print(json.dumps({"folder": str(resolve(model, revision=revision, load_format=LoadFormat(load_format)))}))
    except CheckpointError as error:
        print(json.dumps({"error": str(error)}))
assert "jax" not in sys.modules
"""


def resolved(cache, *asked, **environment):
    """What `resolve` says of each (model, revision, load_format) in a process with its own hub settings."""
    names = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *(json.dumps(one) for one in asked)],
        env={**clean, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_download_takes_one_format_and_then_works_offline(tmp_path):
    files = {
        "config.json": b'{"model_type": "opt"}',
        "vocab.json": b"{}",
        "README.md": b"not needed",
        "pytorch_model.bin": b"torch weights",
        "flax_model.msgpack": b"flax weights",
        "model.safetensors.index.json": b"index",
        "model-00001-of-00001.safetensors": b"weights",
        "onnx/model.safetensors": b"other weights",
        "tf_model.h5": b"other weights",
    }
    asked = [(REPOSITORY, None, "auto"), (REPOSITORY, "main", "flax"), (REPOSITORY, "v9", "auto")]
    asked += [("somebody/absent", None, "auto"), (REPOSITORY, None, "orbax")]
    with hub_server(REPOSITORY, files) as (address, downloaded):
        first, flax, revision, absent, orbax = resolved(tmp_path, *asked, HF_ENDPOINT=address)
    folder = tmp_path / "hub" / "models--somebody--opt-tiny" / "snapshots" / COMMIT
    assert first == flax == {"folder": str(folder)}
    assert "no such revision: somebody/opt-tiny at revision v9" in revision["error"]
    assert "neither a folder nor a public hub repository somebody/absent" in absent["error"]
    assert "no weights in load_format='orbax'" in orbax["error"]
    wanted = ["config.json", "flax_model.msgpack", "model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    assert sorted(downloaded) == [*wanted, "vocab.json"]
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == b"weights"

    # The server is gone: first as a network that fails, then as the user's wish.
    for environment in ({"HF_ENDPOINT": address}, {"HF_HUB_OFFLINE": "1"}):
        again = resolved(tmp_path, *asked[:2], (REPOSITORY, None, "pt"), asked[3], **environment)
        assert again[:2] == [first, flax]
        assert "no weights in load_format='pt'" in again[2]["error"] or "cache lacks" in again[2]["error"]
        assert "hub cannot be reached" in again[3]["error"]


def test_cache_made_by_hand_loads_offline(tmp_path):
    repository = tmp_path / "hub" / "models--somebody--opt-tiny"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    model = random_model(TINY, seed=5)
    write_config(blobs, TINY)
    write_safetensors(blobs, export_huggingface(TINY, model))
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(os.path.relpath(blob, snapshot))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    asked = [(REPOSITORY, None, "auto"), (REPOSITORY, COMMIT, "safetensors"), (REPOSITORY, "other", "auto")]
    default, exact, other = resolved(tmp_path, *asked, HF_HUB_OFFLINE="1")
    assert default == exact == {"folder": str(snapshot)}
    assert "revision other" in other["error"]
    assert_same_parameters(load_model(default["folder"]).model, model)


def test_folders_come_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facebook" / "opt-125m").mkdir(parents=True)
    assert resolve("facebook/opt-125m").samefile(tmp_path / "facebook" / "opt-125m")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/facebook").samefile(tmp_path / "facebook")
    for name in ("./absent", "/absent/model", "a/b/c", "~/absent", "models\\opt"):
        with pytest.raises(CheckpointError, match=r"there is no folder .*, and it is no hub id"):
            resolve(name)
    with pytest.raises(CheckpointError, match="name is empty"):
        resolve("")
