"""`apt-jax convert`: any readable checkpoint to an Orbax one that restores straight to the devices."""

import contextlib
import dataclasses
import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from apt_jax.cache import as_cache_dtype
from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.families import read_config
from apt_jax.checkpoints.formats.fingerprint import SampledFingerprint, weights_fingerprint
from apt_jax.checkpoints.formats.manifest import Manifest
from apt_jax.checkpoints.formats.orbax_store import save_weights, stored_arrays
from apt_jax.checkpoints.formats.weight_files import (
    CACHE_RANGES,
    MANIFEST,
    ORBAX_WEIGHTS,
    LoadFormat,
    choose_format,
)
from apt_jax.checkpoints.load import choose_int8, parse_format, read_channels, read_parameters
from apt_jax.checkpoints.placement import PlainLayout, stored_dtype
from apt_jax.checkpoints.skeleton import Skeleton
from apt_jax.checkpoints.source import COMPANION_FILES, check_revision, resolve
from apt_jax.engine.setup import measure_channels
from apt_jax.execution.cache.ranges import packed
from apt_jax.execution.weights.layout import host_device
from apt_jax.files import Unreadable, read_file, read_json, sync_folder
from apt_jax.model_config import ModelConfig, Quantization, as_quantization
from apt_jax.tokenization.tokenizer import Tokenizer, TokenizerNotFound


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert` wrote."""

    folder: Path
    fingerprint: str
    dtype: np.dtype
    weight_bytes: int
    quantization: Quantization


def convert(
    source: str | None,
    destination: Path,
    *,
    dtype: str | None = None,
    load_format: str = "auto",
    revision: str | None = None,
    quantization: str | None = None,
    cache_dtype: str = "auto",
) -> Conversion:
    """Write `source` (as in `load_model`) to the new folder `destination`, with config, tokenizer and fingerprint.

    `dtype` None keeps the checkpoint's own, and so does `quantization`, which is none or int8. With `cache_dtype`
    int8 the model also reads the calibration text, which spares that to an int8 cache of the new folder. Everything is
    written next to `destination` and then moved there in one step: a conversion that is interrupted leaves nothing that
    loads, and what it left is removed by the next one.

    Raises:
        CheckpointError: `destination` exists or cannot be made, `source` cannot be loaded or has a file that
            cannot be read, its weights cannot be stored as `quantization`, or it has no tokenizer to read with.
        OSError: it cannot be written.
    """
    destination = destination.expanduser().absolute()
    _remove_abandoned(destination)
    _check_absent(destination)
    requested = parse_format(load_format)
    check_revision(source, revision)
    folder = resolve(source, revision=revision, load_format=requested)
    config = read_config(folder)
    chosen = choose_format([path.name for path in folder.iterdir()], requested, str(folder))
    skeleton = Skeleton.of(config, stored_dtype(dtype, config))
    companions = _companions(folder, skeleton.dtype)
    tokenizer = _tokenizer(folder) if as_cache_dtype(cache_dtype) == "int8" else None
    int8 = choose_int8(folder, skeleton, chosen, _storable(quantization))
    layout = PlainLayout.of(_host(), int8=int8)
    placed, sample = read_parameters(folder, config, skeleton, chosen, layout)
    parameters = stored_arrays(placed)
    fingerprint = weights_fingerprint(config, parameters)
    if tokenizer is not None:
        channels = measure_channels(layout.weights(skeleton.model, placed), config, tokenizer)
        companions[CACHE_RANGES] = packed(channels, fingerprint)
    if int8 is None:
        sample = _sample(config, parameters)
    with _beside(destination) as partial:
        save_weights(partial / ORBAX_WEIGHTS, parameters)
        for name, data in companions.items():
            (partial / name).write_bytes(data)
        Manifest.of(
            partial, fingerprint=fingerprint, sample=sample, dtype=skeleton.dtype.name,
            int8_parts=() if int8 is None else int8.parts,
        ).write(partial)  # fmt: skip
        _check_absent(destination)
        partial.rename(destination)
        sync_folder(destination.parent)
    nbytes = sum(array.nbytes for array in parameters.values())
    return Conversion(destination, fingerprint, skeleton.dtype, nbytes, "none" if int8 is None else "int8")


def verify(folder: Path) -> None:
    """Read every weight of a converted folder and compare with the fingerprint that it was written with.

    Raises:
        CheckpointError: they differ, or the folder does not load.
    """
    config, manifest = read_config(folder), Manifest.read(folder)
    skeleton = Skeleton.of(config, stored_dtype(manifest.dtype, config))
    int8 = choose_int8(folder, skeleton, LoadFormat.ORBAX, None)
    placed, _ = read_parameters(folder, config, skeleton, LoadFormat.ORBAX, PlainLayout.of(_host(), int8=int8))
    if (found := weights_fingerprint(config, stored_arrays(placed))) != manifest.fingerprint:
        raise CheckpointError(f"{folder} was written as {manifest.fingerprint} and now is {found}; convert again")
    read_channels(folder, config)


def _storable(quantization: str | None) -> Quantization | None:
    if quantization == "int8-dynamic":
        raise CheckpointError(
            "quantization='int8-dynamic' is a way to multiply int8 weights, which are stored alike for both: convert "
            "with --quantization int8 and serve with --quantization int8-dynamic"
        )
    try:
        return None if quantization is None else as_quantization(quantization)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_folder(folder)
    except TokenizerNotFound as error:
        raise CheckpointError(
            f"cache_dtype='int8' measures the hidden vectors of a text, and {error}; put it there, or leave "
            "--cache-dtype out: then every start measures"
        ) from error


def _sample(config: ModelConfig, parameters: Mapping[tuple[str, ...], jax.Array]) -> str:
    sample = SampledFingerprint(config)
    for path, array in parameters.items():
        sample.add(path, np.asarray(array))
    return str(sample)


def _check_absent(destination: Path) -> None:
    if destination.is_symlink() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a link to no folder; name a new folder or delete it first")
    if not destination.exists():
        outer = next(folder for folder in destination.parents if os.path.lexists(folder))
        if not outer.is_dir():
            raise CheckpointError(f"{destination} cannot be made, since {outer} is no folder; name another")
        if not os.access(outer, os.W_OK | os.X_OK):
            raise CheckpointError(f"{destination} cannot be made: no permission to write in {outer}; name another")
        return
    if (destination / ORBAX_WEIGHTS).is_dir() and not (destination / MANIFEST).exists():
        raise CheckpointError(f"{destination} is left from an interrupted conversion; delete it and convert again")
    raise CheckpointError(f"{destination} exists; name a new folder or delete it first")


@contextlib.contextmanager
def _beside(destination: Path) -> Iterator[Path]:
    """A new folder in one next to `destination`, which is removed at the end; a lock tells that it is in use."""
    outer = destination.with_name(f"{_partial(destination)}{secrets.token_hex(4)}")
    try:
        outer.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be made: {error.strerror}; name another folder") from error
    lock = os.open(outer, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (outer / destination.name).mkdir()
        yield outer / destination.name
    finally:
        shutil.rmtree(outer, ignore_errors=True)
        os.close(lock)


def _partial(destination: Path) -> str:
    """How the names of the folders begin in which conversions to `destination` write."""
    return f".{destination.name}.partial-"


def _remove_abandoned(destination: Path) -> None:
    """Remove the folders of conversions to `destination` that were killed; nobody holds their locks."""
    for folder in destination.parent.glob(f"{glob.escape(_partial(destination))}*"):
        with contextlib.suppress(OSError):  # BlockingIOError: it is in use
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _companions(source: Path, dtype: np.dtype) -> dict[str, bytes]:
    """Config and tokenizer files by name; config.json then names the dtype of the new weights."""
    found = {}
    for name in COMPANION_FILES:
        try:
            found[name] = read_file(source / name)
        except FileNotFoundError:
            continue
        except Unreadable as error:
            raise CheckpointError(str(error)) from error
    fields = read_json(source / "config.json")
    fields.pop("torch_dtype", None)  # the older name of the same field
    found["config.json"] = (json.dumps({**fields, "dtype": dtype.name}, indent=2) + "\n").encode()
    return found


def _host() -> jax.sharding.Sharding | None:
    """The host's memory where jax has it as a device."""
    host = host_device()
    return None if host is None else jax.sharding.SingleDeviceSharding(host)
