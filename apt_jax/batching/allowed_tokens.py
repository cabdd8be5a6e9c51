"""The tokens that rows may sample where outputs must follow a grammar, as bits for the device."""

from collections.abc import Sequence

import numpy as np

from apt_jax.request import Request

EVERY = np.int32(-1)  # a word of which every token is allowed


def num_words(vocab_size: int) -> int:
    """Words of 32 tokens each in a row."""
    return -(-vocab_size // 32)


def allowed_tokens(
    requests: Sequence[Request], rows: int, vocab_size: int
) -> tuple[np.ndarray | None, list[tuple[Request, str]]]:
    """What each row may sample, int32 `[rows, W]`; None where no row is restricted.

    Returns:
        The bits, and the requests whose grammar has failed, with the reason: they are not restricted here.
    """
    restricted = [(row, request) for row, request in enumerate(requests) if request.matcher is not None]
    if not restricted:
        return None, []
    words = np.full((rows, num_words(vocab_size)), EVERY, np.int32)
    failed = []
    for row, request in restricted:
        error = request.matcher.allow(words[row])
        if error is not None:
            words[row] = EVERY
            failed.append((request, error))
    return words, failed
