"""Loads a model from wherever and in whatever format it is: the one entry for the engine and the server."""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from apt_jax.checkpoints.assemble import assemble
from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.families import read_config
from apt_jax.checkpoints.formats.dummy import random_parameters
from apt_jax.checkpoints.formats.fingerprint import SampledFingerprint, dummy_fingerprint
from apt_jax.checkpoints.formats.inventory import take_inventory
from apt_jax.checkpoints.formats.manifest import Manifest
from apt_jax.checkpoints.formats.weight_files import (
    CACHE_RANGES,
    ORBAX_WEIGHTS,
    LoadFormat,
    choose_format,
    find_weight_files,
)
from apt_jax.checkpoints.placement import PlainLayout, Shardings, check_room, device_of, platform_of, serving_dtype
from apt_jax.checkpoints.skeleton import Skeleton
from apt_jax.checkpoints.source import resolve
from apt_jax.execution.cache.ranges import shape_of, unpacked
from apt_jax.execution.weights.int8 import Int8Choice
from apt_jax.execution.weights.layout import Placed, WeightLayout, Weights
from apt_jax.files import Unreadable, read_file
from apt_jax.model_config import ModelConfig, Quantization
from apt_jax.models.sharding import Parallel
from apt_jax.progress import is_hidden

logger = logging.getLogger(__name__)


class LayoutChoice(Protocol):
    """How to lay out the weights of a model, such as `execution.weights.choice.serving_layout` with its options."""

    def __call__(
        self,
        model: nnx.Module,
        config: ModelConfig,
        dtype: np.dtype,
        *,
        device: jax.Device,
        parallel: Parallel | None,
        int8: Int8Choice | None,
    ) -> WeightLayout:
        """That for a model of shapes, on `device` or split over several."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready to serve, and what it was made from."""

    config: ModelConfig
    weights: Weights
    folder: Path  # holds config.json, and the tokenizer if there is one
    fingerprint: str  # `sample:` or `dummy:`, a hash, +quantization; see `apt_jax.checkpoints.formats.fingerprint`
    dtype: np.dtype
    load_format: LoadFormat  # never AUTO
    weight_bytes: int  # of all parameters, on all devices together if nothing is replicated
    load_seconds: float
    channels: np.ndarray | None  # of an int8 cache, where a conversion has measured them

    @property
    def model(self) -> Any:
        """The model as a module, of weights that were left in stacks."""
        assert self.weights.layers is None
        return self.weights.outer.module(self.weights.outer.arrays)


def load_model(
    model: str | None,
    *,
    load_format: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    seed: int = 0,
    shardings: Shardings = None,
    parallel: Parallel | None = None,
    layout: LayoutChoice | None = None,
    quantization: Quantization | None = None,
) -> Loaded:
    """Load `model`: a hub id, a Hugging Face folder, a converted folder, or None for the bundled demo.

    `dtype` is "auto" or a name, see `placement.serving_dtype`. `seed` is for `load_format="dummy"`, which needs
    nothing but config.json. A progress bar is shown on a terminal. `parallel` splits the model over devices, its
    vocabulary padded where it does not divide, and takes the place of `shardings`. `layout` chooses how
    the weights lie; None leaves stacks, of which `Loaded.model` is made. `quantization` None is as they are stored.

    Raises:
        ValueError: the model cannot be split as `parallel` says.
        CheckpointError: a file or key is missing, extra, truncated, corrupt or of the wrong shape, or the config
            is not supported; the message names it. Or the devices have too little memory, see `check_room`.
    """
    started = time.perf_counter()
    requested = parse_format(load_format)
    folder = resolve(model, revision=revision, load_format=requested)
    config = read_config(folder)
    if parallel is not None:
        parallel.check(config)
        shardings = parallel.weight_sharding
    chosen = choose_format([path.name for path in folder.iterdir()], requested, str(folder))
    skeleton = Skeleton.of(config, serving_dtype(dtype, config, platform_of(shardings)))
    int8 = choose_int8(folder, skeleton, chosen, quantization)
    weight_bytes = skeleton.nbytes if int8 is None else int8.nbytes(skeleton.shapes)
    check_room(weight_bytes, shardings, parallel)
    chosen_layout: WeightLayout = PlainLayout.of(shardings, parallel, int8)
    if layout is not None:
        chosen_layout = layout(
            skeleton.model, config, skeleton.dtype, device=device_of(shardings), parallel=parallel, int8=int8
        )
    placed, fingerprint = read_parameters(folder, config, skeleton, chosen, chosen_layout, seed=seed)
    return Loaded(
        config=config,
        weights=chosen_layout.weights(skeleton.model, placed),
        folder=folder,
        fingerprint=fingerprint if int8 is None else f"{fingerprint}+{int8.quantization}",
        dtype=skeleton.dtype,
        load_format=chosen,
        weight_bytes=weight_bytes,
        load_seconds=time.perf_counter() - started,
        channels=read_channels(folder, config) if chosen is LoadFormat.ORBAX else None,
    )


def choose_int8(
    folder: Path, skeleton: Skeleton, load_format: LoadFormat, quantization: Quantization | None
) -> Int8Choice | None:
    """Which parameters of a checkpoint are to be quantised, or are already; None: none.

    Args:
        quantization: as asked for; None is as they are stored.

    Raises:
        CheckpointError: wide weights are asked for, and the checkpoint has 8-bit ones.
    """
    stored = Manifest.read(folder).int8_parts if load_format is LoadFormat.ORBAX else ()
    if not stored:
        return Int8Choice.of(skeleton.model, quantization or "none")
    if quantization == "none":
        raise CheckpointError(
            f"quantization='none', but the weights in {folder} were converted with --quantization int8; leave "
            "--quantization out, or name the checkpoint that they were converted from"
        )
    logger.info("%s holds int8 weights: they are served as such, with no need of --quantization", folder)
    return Int8Choice.of(skeleton.model, quantization or "int8", stored)


def read_channels(folder: Path, config: ModelConfig) -> np.ndarray | None:
    """What `convert --cache-dtype int8` has measured, see `cache_channels`; None: it was converted without.

    Raises:
        CheckpointError: it is damaged, or of other weights.
    """
    manifest, path = Manifest.read(folder), folder / CACHE_RANGES
    if CACHE_RANGES not in manifest.files:
        return None
    try:
        found = unpacked(read_file(path), shape_of(config), manifest.fingerprint)
    except Unreadable as error:
        raise CheckpointError(str(error)) from error
    if found is None:
        raise CheckpointError(f"{path} is damaged or of other weights; convert again")
    return found


def read_parameters(
    folder: Path,
    config: ModelConfig,
    skeleton: Skeleton,
    load_format: LoadFormat,
    layout: WeightLayout,
    *,
    seed: int = 0,
) -> tuple[dict[tuple[str, ...], Placed], str]:
    """Read the parameters of `skeleton` (by NNX path) from `folder`; also a fingerprint of them, before quantisation.

    Raises:
        CheckpointError: see `load_model`.
    """
    if load_format is LoadFormat.DUMMY:
        fingerprint = dummy_fingerprint(config, skeleton.dtype, seed)
        return random_parameters(skeleton, seed, layout), fingerprint
    if load_format is LoadFormat.ORBAX:
        from apt_jax.checkpoints.formats.orbax_store import restore_weights  # the import takes most of a second

        manifest = Manifest.read(folder)
        with _progress(skeleton.nbytes) as bar:
            restored = restore_weights(
                folder / ORBAX_WEIGHTS, skeleton, layout, bar.update, is_quantised=bool(manifest.int8_parts)
            )
        return restored, manifest.sample
    files = find_weight_files(folder, load_format)
    inventory = take_inventory(config, files)
    sampled = SampledFingerprint(config)
    with _progress(sum(tensor.nbytes for tensor in inventory.values())) as bar:
        parameters = assemble(config, inventory, skeleton.dtype, layout, bar.update, sampled.add)
    return parameters, str(sampled)


def parse_format(name: str) -> LoadFormat:
    """The format named `name`.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return LoadFormat(name)
    except ValueError as error:
        raise CheckpointError(f"load_format={name!r} is not one of {', '.join(LoadFormat)}") from error


def _progress(total_bytes: int) -> tqdm:
    return tqdm(total=total_bytes, desc="Loading weights", unit="B", unit_scale=True, disable=is_hidden())
