"""Fixed, seeded windows of token ids for training the demo model."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from apt_jax.checkpoints.demo_training.tokenizer import END_ID


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """All documents in one row `[tokens]`; each starts with `</s>`, which also ends the one before it."""

    ids: np.ndarray
    starts: np.ndarray  # index of every document's first token
    text_bytes: int

    def head(self, tokens: int) -> "TokenStream":
        """The first `tokens` of the stream; their bytes of text are not counted (0)."""
        return TokenStream(self.ids[:tokens], self.starts[self.starts < tokens], 0)


def encode(tokenizer: Tokenizer, texts: Sequence[str], seed: int) -> TokenStream:
    """Encode the documents and join them in a fixed shuffled order."""
    order = np.random.default_rng(seed).permutation(len(texts))
    shuffled = [texts[i] for i in order]
    rows = [encoding.ids for encoding in tokenizer.encode_batch(shuffled)]
    lengths = np.array([len(row) for row in rows])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    ids = np.concatenate([*(np.array(row, np.int32) for row in rows), np.array([END_ID], np.int32)])
    return TokenStream(ids, starts, sum(len(text.encode()) for text in texts))


def window_batch(
    stream: TokenStream, *, step: int, seed: int, rows: int, length: int, max_positions: int
) -> tuple[np.ndarray, np.ndarray]:
    """One batch: token ids `[rows, length + 1]` and the first position of each row `[rows]`, int32.

    The first half of the rows starts with a document at position 0, as a request does. The rest starts
    anywhere in the stream, at a random position, so that all `max_positions` positions are learned.
    """
    random = np.random.default_rng([seed, step])
    ordered = rows // 2
    wrapped = np.concatenate([stream.ids, stream.ids[: length + 1]])
    begins = np.concatenate(
        [random.choice(stream.starts, ordered), random.integers(0, len(stream.ids), rows - ordered)]
    )
    positions = np.zeros(rows, np.int32)
    positions[ordered:] = random.integers(0, max_positions - length + 1, rows - ordered)
    tokens = wrapped[begins[:, None] + np.arange(length + 1)]
    return tokens.astype(np.int32), positions


def every_window(stream: TokenStream, *, rows: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The whole stream once: `(ids [rows, length + 1], weights [rows, length])`; padding has weight 0."""
    targets = len(stream.ids) - 1
    batches = -(-targets // (rows * length))
    padded = np.full(batches * rows * length + 1, END_ID, np.int32)
    padded[: targets + 1] = stream.ids
    weights = (np.arange(batches * rows * length) < targets).astype(np.float32)
    for batch in range(batches):
        first = batch * rows * length
        index = first + np.arange(rows)[:, None] * length + np.arange(length + 1)
        yield padded[index], weights[index[:, :-1]]
