"""Calibration of an int8 cache: centre and width of every channel of hidden vectors, measured when a model is loaded.

The model reads a text that ships with this package, some seconds. What it finds is kept beside the compiled programs
under the weights' fingerprint, or in a converted folder.
"""

import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from apt_jax.attention.int8 import LARGEST
from apt_jax.execution.runner import Runner
from apt_jax.files import read_file, replace_file
from apt_jax.model_config import ModelConfig
from apt_jax.tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TEXT = Path(__file__).with_name("calibration.txt")
LONGEST = 256  # tokens of a sequence
_SEPARATOR = "\n----\n"
_RANDOM_SEQUENCES = 8
_ROUNDING = 2.0**-8  # by so much of itself a number may differ in bfloat16, which others may be served in
_STORED = np.dtype("<f4")
_DIGEST_BYTES = hashlib.sha256().digest_size
_NARROWEST = 1e-2  # of the median width in a layer: a channel that hardly varied may vary in another text


def calibration_tokens(tokenizer: Tokenizer | None, vocab_size: int, longest: int) -> list[list[int]]:
    """Token ids of the text, in sequences of at most `LONGEST` and `longest`, whose first tokens are not measured.

    Random ids without a tokenizer that makes such sequences of the text; what is not below `vocab_size` is left out.
    """
    longest, found = min(LONGEST, longest), []
    if tokenizer is not None:
        passages = TEXT.read_text(encoding="utf-8").split(_SEPARATOR)[1:]
        ids = [[own for own in tokenizer.encode(passage) if own < vocab_size] for passage in passages]
        found = [row[at : at + longest] for row in ids for at in range(0, len(row) - 1, longest)]
    return found or np.random.default_rng(0).integers(vocab_size, size=(_RANDOM_SEQUENCES, longest)).tolist()


def cache_channels(runner: Runner, tokenizer: Tokenizer | None = None, fingerprint: str = "") -> np.ndarray:
    """Centre and width of every channel, float32 `[2, L, D]` (`attention/int8.py`), measured or as kept from before.

    Several processes that run one model call this at the same time, and then all measure.

    Args:
        fingerprint: of the weights; empty: nothing is kept.

    Raises:
        ValueError: the model's hidden vectors are not finite.
    """
    config = runner.model_config
    sequences = calibration_tokens(tokenizer, config.vocab_size, config.max_position_embeddings)
    path = _path(runner, sequences, fingerprint)
    if path is not None and (kept := _load(path, shape_of(config), fingerprint)) is not None:
        return kept
    if sequences == calibration_tokens(None, config.vocab_size, config.max_position_embeddings):
        logger.warning(
            "int8 cache: %s, so the ranges of hidden vectors are measured on random token ids; text may be "
            "less precise than with the ranges of text",
            "no tokenizer" if tokenizer is None else "the tokenizer has no ids of this model for the text",
        )
    started = time.perf_counter()
    least, greatest = runner.measure_ranges(sequences)
    found = channels_of(least, greatest)
    tokens = sum(map(len, sequences))
    logger.info("int8 cache: ranges measured on %d tokens in %.1f s", tokens, time.perf_counter() - started)
    if path is not None:
        try:
            replace_file(path, packed(found, fingerprint))
        except OSError as error:
            logger.warning("cannot keep the cache's ranges at %s (%s); the next start measures again", path, error)
    return found


def channels_of(least: np.ndarray, greatest: np.ndarray) -> np.ndarray:
    """Centre and width `[2, L, D]` of channels with these ranges `[L, D]`, which are centre plus or minus 127 widths.

    Raises:
        ValueError: a range is not finite.
    """
    if not (np.isfinite(least).all() and np.isfinite(greatest).all()):
        raise ValueError(
            "cache_dtype='int8' cannot be used: the model's hidden vectors are not finite on the calibration text; use "
            "--cache-dtype auto"
        )
    centre, half = (greatest + least) / 2, (greatest - least) / 2
    floor = np.maximum(_NARROWEST * np.median(half, axis=-1, keepdims=True), np.finfo(np.float32).tiny * 1e6)
    floor = np.maximum(floor, _ROUNDING * np.abs(centre))
    return np.stack([centre, np.maximum(half, floor) / LARGEST]).astype(np.float32)


def shape_of(config: ModelConfig) -> tuple[int, int, int]:
    """That of `cache_channels`, `[2, L, D]`."""
    return 2, config.num_hidden_layers, config.hidden_size


def packed(channels: np.ndarray, fingerprint: str) -> bytes:
    """Channels as a file: a digest over them and the weights' fingerprint, then the numbers."""
    data = channels.astype(_STORED).tobytes()
    return _digest(data, fingerprint) + data


def unpacked(file: bytes, shape: tuple[int, int, int], fingerprint: str) -> np.ndarray | None:
    """What was `packed`; None if that was of another shape or other weights, or the file is damaged."""
    digest, data = file[:_DIGEST_BYTES], file[_DIGEST_BYTES:]
    if digest != _digest(data, fingerprint) or len(data) != np.prod(shape) * _STORED.itemsize:
        return None
    return np.frombuffer(data, _STORED).reshape(shape).astype(np.float32)


def _digest(data: bytes, fingerprint: str) -> bytes:
    return hashlib.sha256(fingerprint.encode() + b"\n" + data).digest()


def _path(runner: Runner, sequences: Sequence[Sequence[int]], fingerprint: str) -> Path | None:
    folder = jax.config.jax_compilation_cache_dir
    if not folder or not fingerprint or jax.process_count() > 1:
        return None
    digest = hashlib.sha256(repr((fingerprint, str(runner.dtype), sequences)).encode()).hexdigest()[:16]
    return Path(folder) / "cache-ranges" / digest


def _load(path: Path, shape: tuple[int, int, int], fingerprint: str) -> np.ndarray | None:
    try:
        return unpacked(read_file(path), shape, fingerprint)
    except OSError:  # not there, or not to be read
        return None
