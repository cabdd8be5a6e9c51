"""Weights in Orbax's format: written once by a conversion, restored straight onto the devices."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from checkpoints.errors import CheckpointError, first_line, some
from checkpoints.placement import Shardings, sharding_of
from checkpoints.skeleton import Skeleton

_CHUNK_BYTES = 64 * 2**20  # a shard reads only the chunks it needs, and no chunk is held beside a whole stack
_GROUP_BYTES = 64 * 2**20


def save_weights(folder: Path, parameters: Mapping[tuple[str, ...], jax.Array]) -> None:
    """Write `parameters` (NNX path to array) to the new folder `folder`."""
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly compress, and restoring is what must be quick
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    with context:
        ocp.save(folder, traverse_util.unflatten_dict(dict(parameters)))


def restore_weights(
    folder: Path, skeleton: Skeleton, shardings: Shardings, progress: Callable[[int], Any]
) -> dict[tuple[str, ...], jax.Array]:
    """Restore what `save_weights` wrote, cast to the skeleton's dtype, each parameter into its shards.

    Large parameters come first and alone, for Orbax holds a second copy of what it is reading: so that copy is
    never beside all the rest. `progress` is called with the bytes of each parameter or group.

    Raises:
        CheckpointError: a parameter is missing, extra or of another shape, or its data cannot be read.
    """
    _check_shapes(folder, skeleton)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    result: dict[tuple[str, ...], jax.Array] = {}
    with context:
        for group in _groups(skeleton):
            targets = {
                path: jax.ShapeDtypeStruct(
                    skeleton.shapes[path].shape,
                    skeleton.dtype,
                    sharding=sharding_of(shardings, path, skeleton.shapes[path].shape),
                )
                for path in group
            }
            restored = traverse_util.flatten_dict(_load(folder, traverse_util.unflatten_dict(targets)))
            result |= {path: jax.block_until_ready(restored[path]) for path in group}
            progress(sum(result[path].nbytes for path in group))
    return result


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
