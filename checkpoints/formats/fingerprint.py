"""Names for the content of a checkpoint: equal weights have equal fingerprints, and others have others."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping

import jax
import ml_dtypes
import numpy as np

from apt_jax.model_config import ModelConfig

_CHUNK_BYTES = 32 * 2**20
_RUNS, _RUN_LENGTH = 1024, 64  # numbers next to each other lie on few pages
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


class SampledFingerprint:
    """`sample:` and a hash over the config and up to 65,536 numbers of every parameter, rounded to bfloat16.

    So it costs milliseconds, and is the same for the same weights in every format, converted or not, in every dtype
    that they are served in.
    """

    def __init__(self, config: ModelConfig):
        self._config = config
        self._parts: dict[str, bytes] = {}

    def add(self, path: tuple[str, ...], array: np.ndarray) -> None:
        """Take in a whole parameter."""
        flat = array.reshape(-1)
        if flat.size > _RUNS * _RUN_LENGTH:
            starts = np.linspace(0, flat.size - _RUN_LENGTH, _RUNS, dtype=np.int64)
            flat = flat[starts[:, None] + np.arange(_RUN_LENGTH)]
        digest = hashlib.blake2b(f"{'.'.join(path)} {array.shape}\n".encode(), digest_size=_DIGEST_BYTES)
        digest.update(flat.astype(ml_dtypes.bfloat16).tobytes())
        self._parts[".".join(path)] = digest.digest()

    def __str__(self) -> str:
        """The fingerprint of what was added, in whatever order."""
        total = _start(self._config)
        for _, part in sorted(self._parts.items()):
            total.update(part)
        return f"sample:{total.hexdigest()}"


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
