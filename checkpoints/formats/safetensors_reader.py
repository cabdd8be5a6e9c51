"""Tensors of one `.safetensors` file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from apt_jax.checkpoints.errors import CheckpointError, first_line
from apt_jax.checkpoints.formats.stored_tensor import StoredTensor
from apt_jax.checkpoints.mapping import WeightMapping

# The library maps the file, and mapped pages that were read count as resident until it is closed.
_REOPEN_BYTES = 32 * 2**20
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def read_safetensors(path: Path, mapping: WeightMapping) -> list[StoredTensor]:
    """List the tensors of `path` from its header.

    Raises:
        CheckpointError: the file is missing, truncated or not a safetensors file.
    """
    found: list[StoredTensor] = []
    with _open(path) as file:
        for stored in file.keys():  # noqa: SIM118 (the handle is not a mapping)
            name = mapping.canonical_name(stored)
            if name is None:
                continue
            view = file.get_slice(stored)
            kind = view.get_dtype()
            found.append(
                StoredTensor(
                    stored_name=stored,
                    name=name,
                    file=path,
                    shape=tuple(view.get_shape()),
                    dtype=_DTYPES.get(kind, kind),
                    flax_layout=False,
                    rows=_Rows(path, stored),
                )
            )
    return found


class _Rows:
    """Yields strips of one tensor; see `StoredTensor.rows`."""

    def __init__(self, path: Path, stored_name: str):
        self.path, self.stored_name = path, stored_name

    def __call__(self, step: int) -> Iterator[np.ndarray]:
        start, total = 0, 1
        while start < total:
            with _open(self.path) as file:
                view = file.get_slice(self.stored_name)
                total = view.get_shape()[0]
                read_bytes = 0
                while start < total and read_bytes < _REOPEN_BYTES:
                    strip = view[start : min(start + step, total)]
                    start, read_bytes = start + step, read_bytes + strip.nbytes
                    yield strip


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({first_line(error)}); fetch it again") from error
