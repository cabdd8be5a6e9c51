"""Tensors of one `pytorch_model*.bin` file, read by torch itself with `weights_only=True`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from apt_jax.checkpoints.errors import CheckpointError, first_line
from apt_jax.checkpoints.formats.stored_tensor import StoredTensor
from apt_jax.checkpoints.formats.weight_files import torch_is_installed
from apt_jax.checkpoints.mapping import WeightMapping

_REOPEN_BYTES = 128 * 2**20  # mapped pages that were read stay resident until the mapping is dropped


def read_torch(path: Path, mapping: WeightMapping) -> list[StoredTensor]:
    """List the tensors of the state dict in `path`.

    Raises:
        CheckpointError: torch is not installed; or the file is missing, truncated, corrupt, or holds something
            other than named tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if not torch_is_installed():
        raise CheckpointError(
            f"{path} is in torch's format and torch is not installed here; install it (pip install torch), or "
            "use a safetensors or flax_model.msgpack copy of the model, or run `apt-jax convert` where torch is"
        )
    mapped = _MappedFile(path)
    found: list[StoredTensor] = []
    for stored, tensor in mapped.tensors().items():
        name = mapping.canonical_name(stored)
        if name is None:
            continue
        found.append(
            StoredTensor(
                stored_name=stored,
                name=name,
                file=path,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                flax_layout=False,
                rows=_Rows(mapped, stored),
            )
        )
    mapped.close()
    return found


class _MappedFile:
    """A state dict mapped from its file, mapped again after every `_REOPEN_BYTES` read."""

    def __init__(self, path: Path):
        self.path = path
        self._tensors: dict[str, Any] | None = None
        self._read_bytes = 0

    def tensors(self) -> dict[str, Any]:
        """The state dict, mapping the file if it is not."""
        if self._tensors is None:
            self._tensors, self._read_bytes = _load(self.path), 0
        return self._tensors

    def close(self) -> None:
        """Drop the mapping and with it the resident pages."""
        self._tensors = None

    def rows(self, stored_name: str, start: int, stop: int) -> np.ndarray:
        """Copy rows `start..stop-1` of one tensor."""
        if self._read_bytes >= _REOPEN_BYTES:
            self.close()
        strip = _to_numpy(self.tensors()[stored_name][start:stop])
        self._read_bytes += strip.nbytes
        return strip


class _Rows:
    """Yields strips of one tensor; see `StoredTensor.rows`."""

    def __init__(self, mapped: _MappedFile, stored_name: str):
        self.mapped, self.stored_name = mapped, stored_name

    def __call__(self, step: int) -> Iterator[np.ndarray]:
        total = self.mapped.tensors()[self.stored_name].shape[0]
        for start in range(0, total, step):
            yield self.mapped.rows(self.stored_name, start, min(start + step, total))


def _load(path: Path) -> dict[str, Any]:
    import torch

    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6
    except Exception as error:  # torch raises many kinds: RuntimeError, UnpicklingError, EOFError, ValueError...
        raise CheckpointError(
            f"{path} is truncated, corrupt or not a plain state dict: {first_line(error)[:200]}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict of named tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path} holds {name!r}, a {type(value).__name__} and no tensor")
    return state


def _to_numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16 of its own, so pass the bits
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.numpy().copy()
