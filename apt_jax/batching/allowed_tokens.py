"""The tokens that rows may sample where some are forbidden, as bits for the device."""

from collections.abc import Sequence

import numpy as np

from apt_jax.request import Request
from apt_jax.tokenization.restriction import EVERY, num_words


class AllowedTokens:
    """What each row of a batch may sample; found when it is first asked for, while the device runs the model.

    Args:
        requests: those that sample, row by row; at least one of them is restricted.
        rows: that the sampler has.

    Attributes:
        failed: requests whose grammar has failed, with the reason, once the bits are found: they are not restricted.
    """

    def __init__(self, requests: Sequence[Request], rows: int, vocab_size: int):
        self.failed: list[tuple[Request, str]] = []
        self._restricted = [(row, request) for row, request in enumerate(requests) if request.restriction is not None]
        self._shape = rows, num_words(vocab_size)
        self._words: np.ndarray | None = None

    def words(self) -> np.ndarray:
        """Int32 `[rows, W]`, token t is bit t % 32 of word t // 32."""
        if self._words is None:
            self._words = np.full(self._shape, EVERY, np.int32)
            for row, request in self._restricted:
                error = request.restriction.allow(self._words[row])
                if error is not None:
                    self._words[row] = EVERY
                    self.failed.append((request, error))
            self._restricted = []
        return self._words

    def found(self) -> "AllowedTokens":
        """The bits alone, for another process."""
        made = AllowedTokens((), 0, 0)
        made._words = self.words()
        return made


def allowed_tokens(requests: Sequence[Request], rows: int, vocab_size: int) -> AllowedTokens | None:
    """What the rows of a batch may sample; None where none is restricted."""
    if all(request.restriction is None for request in requests):
        return None
    return AllowedTokens(requests, rows, vocab_size)
