"""Weights in Orbax's format: written once by a conversion, restored straight onto the devices."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from apt_jax.checkpoints.errors import CheckpointError, first_line, some
from apt_jax.checkpoints.skeleton import Skeleton
from apt_jax.execution.weights.layout import Placed, WeightLayout
from apt_jax.models.quantization import Int8Weight
from apt_jax.models.sharding import padded_shape

_CHUNK_BYTES = 64 * 2**20  # a shard reads only the chunks it needs, and no chunk is read beside a whole stack
_GROUP_BYTES = 64 * 2**20
_PARTS = Int8Weight._fields  # of a quantised parameter, each stored under its name
# axes along which models are split over devices and which Orbax, which cuts the longest, would leave whole: the heads
_HEADS_AXIS = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "out_proj": 1}


def stored_arrays(placed: Mapping[tuple[str, ...], Placed]) -> dict[tuple[str, ...], jax.Array]:
    """The arrays of placed stacks by the path that each is stored under; of a quantised parameter one for each part."""
    found = {}
    for path, one in placed.items():
        if one.in_module is None:
            found[path] = one.array
        else:
            found |= {(*path, part): array for part, array in zip(_PARTS, one.leaves[0], strict=False)}
    return found


def save_weights(folder: Path, parameters: Mapping[tuple[str, ...], jax.Array]) -> None:
    """Write `parameters` (from `stored_arrays`) to the new folder `folder`.

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
    folder: Path,
    skeleton: Skeleton,
    layout: WeightLayout,
    progress: Callable[[int], Any],
    *,
    is_quantised: bool = False,
) -> dict[tuple[str, ...], Placed]:
    """Restore what `save_weights` wrote, cast to the skeleton's dtype, each parameter into its shards.

    `is_quantised`: the parameters that `layout` quantises are stored as such.

    A process reads the chunks that its devices' shards need; an axis that does not divide is padded with zeros.
    Large parameters come first and alone, for Orbax holds a second copy of what it is reading: so that copy is
    never together with all the others. `progress` is called with the bytes of each parameter or group.

    Raises:
        CheckpointError: a parameter is missing, extra or of another shape, or its data cannot be read.
    """
    folder = folder.absolute()  # Orbax takes no other
    targets = {path: _targets(path, skeleton, layout, is_quantised) for path in skeleton.shapes}
    _check_shapes(folder, {path: shape for parts in targets.values() for path, (shape, _) in parts.items()})
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    context.array.loading.enable_padding_and_truncation = True  # shapes are checked above; only padding is left
    result: dict[tuple[str, ...], Placed] = {}
    with context:
        for group in _groups(skeleton):
            wanted = {path: target for each in group for path, (_, target) in targets[each].items()}
            restored = traverse_util.flatten_dict(_load(folder, traverse_util.unflatten_dict(wanted)))
            progress(sum(jax.block_until_ready(restored[path]).nbytes for path in wanted))
            for path in group:
                parts = [restored.pop(part) for part in targets[path]]
                if is_quantised and layout.is_int8(path):
                    result[path] = layout.place_int8(path, Int8Weight(*parts))
                else:
                    result[path] = layout.place(path, *parts)
                del parts
    return result


def _targets(
    path: tuple[str, ...], skeleton: Skeleton, layout: WeightLayout, is_quantised: bool
) -> dict[tuple[str, ...], tuple[tuple[int, ...], jax.ShapeDtypeStruct]]:
    """Paths under which a parameter is stored, each with its shape there, and as what it is restored."""

    def target(shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(padded_shape(shape, sharding), dtype, sharding=sharding)

    shape = skeleton.shapes[path].shape
    if not (is_quantised and layout.is_int8(path)):
        return {path: (shape, target(shape, skeleton.dtype, layout.sharding(path, shape)))}
    assert layout.int8 is not None
    parts = zip(_PARTS, layout.int8.shapes(path, shape), layout.int8_shardings(path, shape), strict=True)
    return {
        (*path, name): (part.shape, target(part.shape, part.dtype, sharding))
        for name, part, sharding in parts if part is not None
    }  # fmt: skip


def _storage(path: Any, value: Any) -> Any:
    """How to cut a parameter into chunks, where it is not just the longest axes first."""
    names = [getattr(key, "key", "") for key in path]
    if names[-1:] == [_PARTS[0]]:
        names.pop()
    axis = _HEADS_AXIS.get(names[-2]) if names[-1:] == ["kernel"] and len(names) > 1 else None
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


def _check_shapes(folder: Path, shapes: Mapping[tuple[str, ...], tuple[int, ...]]) -> None:
    try:
        tree = ocp.metadata(folder).metadata
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise CheckpointError(f"{folder} is corrupt ({first_line(error)}); convert again") from error
    stored = traverse_util.flatten_dict(tree)
    if missing := sorted(".".join(path) for path in shapes.keys() - stored.keys()):
        raise CheckpointError(f"{folder} lacks {some(missing)}, which its config.json asks for")
    if extra := sorted(".".join(path) for path in stored.keys() - shapes.keys()):
        raise CheckpointError(f"{folder} holds {some(extra)}, for which its config.json has no place")
    for path, shape in shapes.items():
        if tuple(stored[path].shape) != shape:
            raise CheckpointError(
                f"{folder}: {'.'.join(path)} has shape {tuple(stored[path].shape)}, but its config.json asks for "
                f"{shape}"
            )


def _load(folder: Path, target: Any) -> Any:
    try:
        return ocp.load(folder, target)
    except Exception as error:
        raise CheckpointError(f"{folder} is corrupt ({first_line(error)}); convert again") from error
