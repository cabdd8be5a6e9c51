"""Checks that the files of a checkpoint hold each tensor of the model exactly once, before any is read."""

from collections.abc import Callable
from pathlib import Path

from apt_jax.checkpoints.errors import CheckpointError, some
from apt_jax.checkpoints.families import family_of
from apt_jax.checkpoints.formats.flax_reader import read_flax
from apt_jax.checkpoints.formats.safetensors_reader import read_safetensors
from apt_jax.checkpoints.formats.stored_tensor import FLOATING, StoredTensor
from apt_jax.checkpoints.formats.torch_reader import read_torch
from apt_jax.checkpoints.formats.weight_files import LoadFormat, WeightFiles
from apt_jax.checkpoints.mapping import WeightMapping
from apt_jax.model_config import ModelConfig

_READERS: dict[LoadFormat, Callable[[Path, WeightMapping], list[StoredTensor]]] = {
    LoadFormat.SAFETENSORS: read_safetensors,
    LoadFormat.PT: read_torch,
    LoadFormat.FLAX: read_flax,
}


def take_inventory(config: ModelConfig, files: WeightFiles) -> dict[str, StoredTensor]:
    """Torch name to stored tensor: one for each slot of `config`, and the head where a tied one is stored too.

    Raises:
        CheckpointError: a tensor is missing, extra, stored twice, or of another shape or kind of number than
            `config` asks for; or a file cannot be read, or disagrees with the index.
    """
    mapping = family_of(config).mapping
    found: dict[str, StoredTensor] = {}
    for path in files.paths:
        tensors = _READERS[files.format](path, mapping)
        if files.index is not None:
            _check_index(mapping, files, files.index, path, tensors)
        for tensor in tensors:
            earlier = found.setdefault(tensor.name, tensor)
            if earlier is not tensor:
                raise CheckpointError(
                    f"{tensor.name} is stored twice: {earlier.stored_name!r} in {earlier.file} and "
                    f"{tensor.stored_name!r} in {tensor.file}; remove one"
                )
    _check_against_model(config, files, found)
    return found


def _check_index(
    mapping: WeightMapping, files: WeightFiles, index: Path, path: Path, tensors: list[StoredTensor]
) -> None:
    listed = {_index_name(mapping, files.format, key) for key, file in files.weight_map.items() if file == path.name}
    listed.discard(None)
    stored = {tensor.name for tensor in tensors}
    if missing := sorted(str(name) for name in listed - stored):
        raise CheckpointError(f"{path} lacks {some(missing)}, which {index.name} places there; fetch both again")
    if extra := sorted(stored - listed):
        raise CheckpointError(f"{path} holds {some(extra)}, which {index.name} does not place there; fetch both again")


def _index_name(mapping: WeightMapping, load_format: LoadFormat, key: str) -> str | None:
    return mapping.flax_name(key.split("/")) if load_format is LoadFormat.FLAX else mapping.canonical_name(key)


def _check_against_model(config: ModelConfig, files: WeightFiles, found: dict[str, StoredTensor]) -> None:
    mapping = family_of(config).mapping
    wanted = mapping.slots(config)
    where = str(files.paths[0]) if files.index is None else str(files.index)
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(f"{where} lacks {some(missing)}, which its config.json asks for")
    tied = mapping.head in found and config.tie_word_embeddings
    known = {*wanted, mapping.head} if tied else wanted.keys()
    if extra := [tensor.stored_name for tensor in found.values() if tensor.name not in known]:
        raise CheckpointError(f"{where} holds {some(extra)}, for which its config.json has no place")
    for tensor in found.values():
        slot = wanted[mapping.embedding if tied and tensor.name == mapping.head else tensor.name]
        expected = slot.flax_shape if tensor.flax_layout else slot.torch_shape
        if tied and tensor.name == mapping.head and tensor.flax_layout:
            expected = expected[::-1]  # a kernel is [in, out], a table [out, in]
        if tensor.shape != expected:
            raise CheckpointError(
                f"{tensor.file}: {tensor.stored_name!r} has shape {tensor.shape}, "
                f"but its config.json asks for {expected}"
            )
        if tensor.dtype not in FLOATING:
            raise CheckpointError(
                f"{tensor.file}: {tensor.stored_name!r} holds {tensor.dtype} numbers; use one of {', '.join(FLOATING)}"
            )
