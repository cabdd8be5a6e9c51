"""Names for the content of a checkpoint: equal fingerprints mean equal weights."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from apt_jax.model_config import ModelConfig

_CHUNK_BYTES = 32 * 2**20
_SAMPLE_BYTES = 64 * 2**10
_DIGEST_BYTES = 20


def weights_fingerprint(config: ModelConfig, parameters: Mapping[tuple[str, ...], jax.Array]) -> str:
    """`weights:` and a hash over the config and every number of every parameter, whatever file they came from.

    Reads all weights: about 0.3 s a GiB and core. Uses all cores, and one parameter's host copy at a time.
    """
    total = _start(config)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, array in sorted(parameters.items()):
            host = np.ascontiguousarray(np.asarray(array))
            total.update(f"{'.'.join(path)} {host.dtype.name} {host.shape}\n".encode())
            for digest in pool.map(_digest, _chunks(host)):
                total.update(digest)
    return f"weights:{total.hexdigest()}"


def files_fingerprint(config: ModelConfig, paths: Sequence[Path]) -> str:
    """`files:` and a hash over the config and each file's name, size, first and last 64 KiB: cheap, and a sample."""
    total = _start(config)
    for path in paths:
        size = path.stat().st_size
        total.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            total.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            total.update(file.read(_SAMPLE_BYTES))
    return f"files:{total.hexdigest()}"


def dummy_fingerprint(config: ModelConfig, dtype: np.dtype, seed: int) -> str:
    """`dummy:` and a hash over everything that random weights depend on, except the device that draws them."""
    total = _start(config)
    total.update(f"{dtype.name} {seed}\n".encode())
    return f"dummy:{total.hexdigest()}"


def _start(config: ModelConfig) -> "hashlib.blake2b":
    fields = dataclasses.asdict(config)
    del fields["checkpoint_dtype"]  # every parameter's own is hashed
    if config.model_type == "opt":
        del fields["model_type"]  # fingerprints of OPT are older than other families
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=_DIGEST_BYTES)


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = array.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _CHUNK_BYTES):
        yield flat[start : start + _CHUNK_BYTES]


def _digest(chunk: np.ndarray) -> bytes:
    return hashlib.blake2b(memoryview(chunk), digest_size=_DIGEST_BYTES).digest()
