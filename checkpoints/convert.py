"""`apt-jax convert`: any readable checkpoint to an Orbax one that restores straight to the devices."""

import contextlib
import dataclasses
import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.formats.fingerprint import weights_fingerprint
from apt_jax.checkpoints.formats.manifest import Manifest
from apt_jax.checkpoints.formats.orbax_store import save_weights
from apt_jax.checkpoints.formats.weight_files import MANIFEST, ORBAX_WEIGHTS, LoadFormat, choose_format
from apt_jax.checkpoints.load import parse_format, read_config, read_parameters
from apt_jax.checkpoints.placement import stored_dtype
from apt_jax.checkpoints.skeleton import Skeleton
from apt_jax.checkpoints.source import COMPANION_FILES, resolve


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert` wrote."""

    folder: Path
    fingerprint: str
    dtype: np.dtype
    weight_bytes: int


def convert(
    source: str | None,
    destination: Path,
    *,
    dtype: str | None = None,
    load_format: str = "auto",
    revision: str | None = None,
) -> Conversion:
    """Write `source` (as in `load_model`) to the new folder `destination`, with config, tokenizer and fingerprint.

    `dtype` None keeps the checkpoint's own. Everything is written next to `destination`, moved there, and only
    then made loadable by its manifest: a conversion that is interrupted leaves nothing that loads.

    Raises:
        CheckpointError: `destination` exists, or `source` cannot be loaded.
    """
    destination = destination.expanduser().absolute()
    _check_absent(destination)
    requested = parse_format(load_format)
    folder = resolve(source, revision=revision, load_format=requested)
    config = read_config(folder)
    chosen = choose_format([path.name for path in folder.iterdir()], requested, str(folder))
    skeleton = Skeleton.of(config, stored_dtype(dtype, config))
    parameters, _ = read_parameters(folder, config, skeleton, chosen, shardings=_host())
    fingerprint = weights_fingerprint(config, parameters)
    with _beside(destination) as partial:
        save_weights(partial / ORBAX_WEIGHTS, parameters)
        _copy_companions(folder, partial, skeleton.dtype)
        _check_absent(destination)
        partial.rename(destination)
    Manifest.of(destination, fingerprint=fingerprint, dtype=skeleton.dtype.name).write(destination)
    return Conversion(destination, fingerprint, skeleton.dtype, skeleton.nbytes)


def verify(folder: Path) -> None:
    """Read every weight of a converted folder and compare with the fingerprint that it was written with.

    Raises:
        CheckpointError: they differ, or the folder does not load.
    """
    config, manifest = read_config(folder), Manifest.read(folder)
    skeleton = Skeleton.of(config, stored_dtype(manifest.dtype, config))
    parameters, _ = read_parameters(folder, config, skeleton, LoadFormat.ORBAX, shardings=_host())
    if (found := weights_fingerprint(config, parameters)) != manifest.fingerprint:
        raise CheckpointError(f"{folder} was written as {manifest.fingerprint} and now is {found}; convert again")


def _check_absent(destination: Path) -> None:
    if not destination.exists():
        return
    if (destination / ORBAX_WEIGHTS).is_dir() and not (destination / MANIFEST).exists():
        raise CheckpointError(f"{destination} is left from an interrupted conversion; delete it and convert again")
    raise CheckpointError(f"{destination} exists; name a new folder or delete it first")


@contextlib.contextmanager
def _beside(destination: Path) -> Iterator[Path]:
    """A new folder next to `destination`, removed at the end unless it was moved away."""
    partial = destination.with_name(f".{destination.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_companions(source: Path, target: Path, dtype: np.dtype) -> None:
    """Copy config and tokenizer files; config.json then names the dtype of the new weights."""
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    path = target / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields.pop("torch_dtype", None)  # the older name of the same field
    path.write_text(json.dumps({**fields, "dtype": dtype.name}, indent=2) + "\n", encoding="utf-8")


def _host() -> jax.sharding.Sharding | None:
    """The host's memory where jax has its CPU backend, as it has unless JAX_PLATFORMS leaves it out."""
    try:
        return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return None
