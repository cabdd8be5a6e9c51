"""Fills the model's stacked parameters from stored tensors, a strip at a time.

Host memory: on the CPU backend each stack is allocated once, aligned so that jax adopts it without a copy; on
an accelerator one stack is on the host at a time. Beside that only one strip is held. `measure_memory.py`
measures it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.families import family_of
from apt_jax.checkpoints.formats.stored_tensor import StoredTensor
from apt_jax.checkpoints.mapping import Layout, Slot
from apt_jax.execution.weights.layout import Placed, WeightLayout
from apt_jax.model_config import ModelConfig
from apt_jax.models.sharding import put

_STRIP_ROWS = 128  # transposing 128 rows at a time stays in the processor's cache: twice as fast as at once
_ALIGNMENT_BYTES = 64  # jax adopts a host array at such an address on the CPU backend and copies any other


def assemble(
    config: ModelConfig,
    inventory: Mapping[str, StoredTensor],
    dtype: np.dtype,
    layout: WeightLayout,
    progress: Callable[[int], Any],
    seen: Callable[[tuple[str, ...], np.ndarray], Any],
) -> dict[tuple[str, ...], Placed]:
    """Read every tensor of `inventory`, cast it to `dtype` and lay it out; NNX path to parameter.

    `progress` is called with the stored bytes read since the last call, `seen` with every parameter on the host.

    Raises:
        CheckpointError: a file ends early, a value does not fit `dtype`, or a stored tied head differs from the
            embedding.
    """
    mapping = family_of(config).mapping
    if config.tie_word_embeddings and mapping.head in inventory:
        _check_tied(inventory[mapping.embedding], inventory[mapping.head], progress)
    by_path: dict[tuple[str, ...], list[Slot]] = {}
    for slot in mapping.slots(config).values():
        by_path.setdefault(slot.path, []).append(slot)
    result: dict[tuple[str, ...], Placed] = {}
    for path, parts in by_path.items():
        stacked = parts[0].layer is not None
        shape = (len(parts), *parts[0].shape) if stacked else parts[0].shape
        host = _empty(shape, dtype)
        for slot in parts:
            target = host if slot.layer is None else host[slot.layer]
            _fill(target, slot, inventory[slot.name], progress)
        seen(path, host)
        array = jax.block_until_ready(put(host, layout.sharding(path, shape)))
        del host
        result[path] = layout.place(path, array)
        del array
    return result


def _fill(target: np.ndarray, slot: Slot, tensor: StoredTensor, progress: Callable[[int], Any]) -> None:
    """Copy `tensor` into `target [slot.shape]`, casting and, for a torch linear, transposing."""
    view = target.reshape(slot.flax_shape)
    if slot.layout is Layout.LINEAR and not tensor.flax_layout:
        view = view.T
    start = 0
    for strip in tensor.rows(_STRIP_ROWS if len(tensor.shape) > 1 else tensor.shape[0]):
        try:
            with np.errstate(over="raise"):
                np.copyto(view[start : start + len(strip)], strip, casting="unsafe")
        except FloatingPointError as error:
            raise CheckpointError(
                f"{tensor.file}: {tensor.stored_name!r} has values too large for {target.dtype}; "
                "use --dtype bfloat16 or float32"
            ) from error
        start += len(strip)
        progress(strip.nbytes)


def _check_tied(embedding: StoredTensor, head: StoredTensor, progress: Callable[[int], Any]) -> None:
    """Compare a stored head with the embedding `[V, E]` that it repeats, bit for bit."""
    strips: Iterator[np.ndarray]
    if head.flax_layout:  # kernel [E, V]: its rows are the table's columns, so hold the one and walk the other
        kernel = np.concatenate(list(head.rows(_STRIP_ROWS)))
        strips = (kernel[:, i : i + _STRIP_ROWS].T for i in range(0, kernel.shape[1], _STRIP_ROWS))
    else:
        strips = head.rows(_STRIP_ROWS)
    for expected, strip in zip(embedding.rows(_STRIP_ROWS), strips, strict=True):
        if strip.dtype != expected.dtype or strip.tobytes() != expected.tobytes():
            raise CheckpointError(
                f"{head.file}: {head.stored_name!r} differs from {embedding.stored_name!r}, but config.json says "
                "tie_word_embeddings=true; set it to false if the head is its own"
            )
        progress(strip.nbytes)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array whose first byte lies at a multiple of `_ALIGNMENT_BYTES`."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT_BYTES
    return raw[start : start + nbytes].view(dtype).reshape(shape)
