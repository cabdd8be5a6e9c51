"""One tensor inside a checkpoint file, read a strip of rows at a time so that it need not fit in memory twice."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

FLOATING: dict[str, np.dtype] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored and how to read it; holds no data.

    `rows(step)` yields the tensor as consecutive strips of `step` rows of its first axis (the last may be
    shorter), and raises `CheckpointError` when the file ends early or cannot be decoded.
    """

    stored_name: str  # as the file spells it
    name: str  # torch name, see `apt_jax.checkpoints.mapping`
    file: Path
    shape: tuple[int, ...]
    dtype: str  # numpy's name for it
    flax_layout: bool  # linear weights are [in, out], not [out, in]
    rows: Callable[[int], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as stored; 0 for a dtype that is not a known floating one."""
        return int(np.prod(self.shape)) * FLOATING[self.dtype].itemsize if self.dtype in FLOATING else 0
