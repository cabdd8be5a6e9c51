"""Weights in Orbax's format: written once by a conversion, restored straight onto the devices."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from apt_jax.checkpoints.errors import CheckpointError, first_line, some
from apt_jax.checkpoints.skeleton import Skeleton
from apt_jax.execution.weights.layout import Placed, WeightLayout
from apt_jax.models.sharding import padded_shape

_CHUNK_BYTES = 64 * 2**20  # a shard reads only the chunks it needs, and no chunk is read beside a whole stack
_GROUP_BYTES = 64 * 2**20
# axes along which models are split over devices and which Orbax, which cuts the longest, would leave whole: the heads
_HEADS_AXIS = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "out_proj": 1}


def save_weights(folder: Path, parameters: Mapping[tuple[str, ...], jax.Array]) -> None:
    """Write `parameters` (NNX path to array) to the new folder `folder`.

    Raises:
        CheckpointError: it cannot be written.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly compress, and restoring is what must be quick
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    context.array.saving.scoped_storage_options_creator = _storage
    # Orbax copies what it writes; it wants more room than the largest array takes, or it fails.
    context.memory.write_concurrent_bytes = max(array.nbytes for array in parameters.values()) + _CHUNK_BYTES
    try:
        with context:
            ocp.save(folder.absolute(), traverse_util.unflatten_dict(dict(parameters)))
    except Exception as error:  # Orbax and TensorStore raise many kinds, a full disk among them
        raise CheckpointError(f"{folder} cannot be written: {first_line(error)}") from error


def restore_weights(
    folder: Path, skeleton: Skeleton, layout: WeightLayout, progress: Callable[[int], Any]
) -> dict[tuple[str, ...], Placed]:
    """Restore what `save_weights` wrote, cast to the skeleton's dtype, each parameter into its shards.

    A process reads the chunks that its devices' shards need; an axis that does not divide is padded with zeros.
    Large parameters come first and alone, for Orbax holds a second copy of what it is reading: so that copy is
    never together with all the others. `progress` is called with the bytes of each parameter or group.

    Raises:
        CheckpointError: a parameter is missing, extra or of another shape, or its data cannot be read.
    """
    folder = folder.absolute()  # Orbax takes no other
    _check_shapes(folder, skeleton)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    context.array.loading.enable_padding_and_truncation = True  # shapes are checked above; only padding is left
    result: dict[tuple[str, ...], Placed] = {}
    with context:
        for group in _groups(skeleton):
            targets = {path: _target(path, skeleton, layout) for path in group}
            restored = traverse_util.flatten_dict(_load(folder, traverse_util.unflatten_dict(targets)))
            progress(sum(jax.block_until_ready(restored[path]).nbytes for path in group))
            result |= {path: layout.place(path, restored.pop(path)) for path in group}
    return result


def _target(path: tuple[str, ...], skeleton: Skeleton, layout: WeightLayout) -> jax.ShapeDtypeStruct:
    shape = skeleton.shapes[path].shape
    sharding = layout.sharding(path, shape)
    return jax.ShapeDtypeStruct(padded_shape(shape, sharding), skeleton.dtype, sharding=sharding)


def _storage(path: Any, value: Any) -> Any:
    """How to cut a parameter into chunks, where it is not just the longest axes first."""
    *_, module, leaf = (getattr(key, "key", "") for key in ((), *path))
    axis = _HEADS_AXIS.get(module) if leaf == "kernel" else None
    if axis is None:
        return None
    options = ocp.options.ArrayOptions.Saving.StorageOptions
    return options(chunk_byte_size=_CHUNK_BYTES, shard_axes=(axis,))


def _groups(skeleton: Skeleton) -> list[list[tuple[str, ...]]]:
    """The parameters from the largest to the smallest, the small ones in groups of `_GROUP_BYTES`."""
    sizes = {path: a.size * a.dtype.itemsize for path, a in skeleton.shapes.items()}
    groups: list[list[tuple[str, ...]]] = []
    room = 0
    for path, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if size > room:
            groups.append([])
            room = _GROUP_BYTES
        groups[-1].append(path)
        room -= size
    return groups


def _check_shapes(folder: Path, skeleton: Skeleton) -> None:
    try:
        tree = ocp.metadata(folder).metadata
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise CheckpointError(f"{folder} is corrupt ({first_line(error)}); convert again") from error
    stored = traverse_util.flatten_dict(tree)
    if missing := sorted(".".join(path) for path in skeleton.shapes.keys() - stored.keys()):
        raise CheckpointError(f"{folder} lacks {some(missing)}, which its config.json asks for")
    if extra := sorted(".".join(path) for path in stored.keys() - skeleton.shapes.keys()):
        raise CheckpointError(f"{folder} holds {some(extra)}, for which its config.json has no place")
    for path, abstract in skeleton.shapes.items():
        if tuple(stored[path].shape) != abstract.shape:
            raise CheckpointError(
                f"{folder}: {'.'.join(path)} has shape {tuple(stored[path].shape)}, but its config.json asks for "
                f"{abstract.shape}"
            )


def _load(folder: Path, target: Any) -> Any:
    try:
        return ocp.load(folder, target)
    except Exception as error:
        raise CheckpointError(f"{folder} is corrupt ({first_line(error)}); convert again") from error
