"""Weights as 8-bit integers: `array ~ factor * values * scale`, made on the host when a model is loaded or converted.

A scale for each output, symmetric, so that the greatest weight of an output is 127 scales. Before that every input's
weights are brought to like size by a factor, a power of two, with which the input is multiplied instead: in a channel
that a layer norm makes a hundred times larger than the others, the weights may be a hundred times smaller, and would
all round to zero. (docs/quantization.md)
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from apt_jax.models.kernels import LARGEST

_CHUNK_NUMBERS = 2**20  # float32 copies of this many at a time
_SMALLEST_FACTOR = 2.0**-14  # of what float16 still has in all its digits


class Int8Weight(NamedTuple):
    """A weight, or a stack of one for each layer (`[L, ...]` each).

    Attributes:
        values: int8 `[*inputs, *outputs]`, or for a table of embeddings `[V, E]`, outputs first.
        scale: float32 `[*outputs]`.
        factor: float32 `[*inputs]`, powers of two; None is 1.
    """

    values: np.ndarray
    scale: np.ndarray
    factor: np.ndarray | None = None


def quantise_weight(
    array: np.ndarray, num_inputs_axes: int, factor: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Values and scale of `array [*inputs, *outputs] / factor`, of any floating type. Pure.

    Raises:
        ValueError: a number is not finite.
    """
    inputs, outputs = array.shape[:num_inputs_axes], array.shape[num_inputs_axes:]
    matrix = array.reshape(int(np.prod(inputs)), -1)
    factors = None if factor is None else factor.reshape(-1, 1)
    greatest = np.zeros(matrix.shape[1], np.float32)
    for _, chunk in _chunks(matrix, factors):
        np.maximum(greatest, np.abs(chunk).max(0), out=greatest)
    scale = _scale(greatest)
    values = np.empty(matrix.shape, np.int8)
    for rows, chunk in _chunks(matrix, factors):
        values[rows] = np.rint(chunk / scale)
    return values.reshape(array.shape), scale.reshape(outputs)


def quantise_table(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and scale of a table of embeddings `[V, E]`, whose rows are outputs of the logits. Pure.

    Raises:
        ValueError: a number is not finite.
    """
    values, scale = np.empty(table.shape, np.int8), np.empty(len(table), np.float32)
    for rows, chunk in _chunks(table, None):
        scale[rows] = _scale(np.abs(chunk).max(1))
        values[rows] = np.rint(chunk / scale[rows, None])
    return values, scale


def input_factor(array: np.ndarray, num_inputs_axes: int) -> np.ndarray:
    """Factors `[*inputs]` that bring the inputs' greatest weights within a factor of two, in (0, 1]. Pure.

    Raises:
        ValueError: a number is not finite.
    """
    inputs = array.shape[:num_inputs_axes]
    matrix = array.reshape(int(np.prod(inputs)), -1)
    greatest = np.empty(len(matrix), np.float32)
    for rows, chunk in _chunks(matrix, None):
        greatest[rows] = np.abs(chunk).max(1)
    _check_finite(greatest)
    most = greatest.max(initial=0) or 1
    relative = np.where(greatest > 0, greatest, most) / most
    exponents = np.ceil(np.log2(np.clip(relative, _SMALLEST_FACTOR, 1)))
    return np.exp2(exponents).astype(np.float32).reshape(inputs)


def quantise_stack(stack: np.ndarray, num_inputs_axes: int) -> Int8Weight:
    """The layers' kernels `[L, *inputs, *outputs]`, with factors; some layers at a time. Pure.

    Raises:
        ValueError: a number is not finite.
    """
    inputs, outputs = np.split(np.array(stack.shape[1:]), [num_inputs_axes])
    found = Int8Weight(
        np.empty(stack.shape, np.int8),
        np.empty((len(stack), *outputs), np.float32),
        np.empty((len(stack), *inputs), np.float32),
    )

    def one(layer: int) -> None:
        assert found.factor is not None
        found.factor[layer] = input_factor(stack[layer], num_inputs_axes)
        found.values[layer], found.scale[layer] = quantise_weight(stack[layer], num_inputs_axes, found.factor[layer])

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as threads:
        for job in [threads.submit(one, layer) for layer in range(len(stack))]:
            job.result()
    return found


def _chunks(matrix: np.ndarray, factors: np.ndarray | None) -> Iterator[tuple[slice, np.ndarray]]:
    """Some rows of `matrix / factors` at a time, float32."""
    count = max(_CHUNK_NUMBERS // matrix.shape[1], 1)
    for start in range(0, len(matrix), count):
        rows = slice(start, start + count)
        chunk = matrix[rows].astype(np.float32)
        yield rows, chunk if factors is None else chunk / factors[rows]


def _scale(greatest: np.ndarray) -> np.ndarray:
    """The scales of outputs with these greatest weights."""
    _check_finite(greatest)
    return np.where(greatest > 0, greatest / np.float32(LARGEST), np.float32(1))


def _check_finite(greatest: np.ndarray) -> None:
    if not np.isfinite(greatest).all():
        raise ValueError("a weight is not finite, so it cannot be quantised; leave out --quantization")
