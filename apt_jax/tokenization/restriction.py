"""Which tokens an output may not go on with: those of a grammar, `allowed_token_ids` and `bad_words` together."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from apt_jax.sampling.params import SamplingParams

if TYPE_CHECKING:
    from apt_jax.tokenization.grammars.following import Matcher
    from apt_jax.tokenization.tokenizer import Tokenizer

EVERY = np.int32(-1)  # a word of which every token is allowed


def num_words(vocab_size: int) -> int:
    """Words of 32 tokens each that have a bit for every token."""
    return -(-vocab_size // 32)


class Restriction:
    """The state of one output.

    Args:
        matcher: its state in a grammar, if it has one.
        always: int32 `[W]`, bits as of `allow`, of the tokens that are allowed at any place.
        sequences: lists of at least two token ids, none of which the output may have in a row.
        generated: the output so far.
        names: what asks for it, of SamplingParams.
    """

    def __init__(
        self,
        matcher: "Matcher | None",
        always: np.ndarray,
        sequences: Sequence[Sequence[int]] = (),
        generated: Sequence[int] = (),
        names: Sequence[str] = ("structured_outputs",),
    ):
        self._names = names
        self._matcher, self._always = matcher, always
        self._ends: dict[tuple[int, ...], list[int]] = {}
        for *first, last in sequences:
            self._ends.setdefault(tuple(first), []).append(last)
        self._longest = max(map(len, self._ends), default=0)
        self._tail = list(generated)[-self._longest :] if self._longest else []

    @property
    def follows_tokens(self) -> bool:
        """Whether what may come next depends on what came, so that the newest token must be known."""
        return self._matcher is not None or bool(self._ends)

    @property
    def asked(self) -> str:
        """What asks for it, for a sentence."""
        return f"{' and '.join(self._names)} {'asks' if len(self._names) == 1 else 'ask'}"

    def check_begins(self, vocab_size: int, ends: Collection[int] = ()) -> None:
        """Raises ValueError if no output can begin, with another token than `ends`, which `min_tokens` forbids."""
        words = np.empty(num_words(vocab_size), np.int32)
        error = self.allow(words)
        clear(words, [*ends])
        if error is not None or not words.any():
            names, error = " and ".join([*self._names, *(["min_tokens"] if ends else [])]), error or "only an end"
            raise ValueError(f"{names} leave no token that an output could begin with ({error}); change one of them")

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow but the end."""
        return self._matcher is not None and self._matcher.is_complete

    def allow(self, words: np.ndarray) -> str | None:
        """Set the bits of the tokens that may come next, and clear all others; an error if there are none.

        Args:
            words: int32 `[W]`, token t is bit t % 32 of word t // 32.
        """
        if self._matcher is None:
            words[:] = self._always
        elif (error := self._matcher.allow(words)) is not None:
            return error
        else:
            words &= self._always
        for first, lasts in self._ends.items():
            if not first or tuple(self._tail[-len(first) :]) == first:
                clear(words, lasts)
        return None if words.any() else "no token can follow"

    def push(self, token_id: int) -> None:
        """Begin to take in the next token, which `accept` then ends: quicker where it is done for all outputs first."""
        if self._matcher is not None:
            self._matcher.push(token_id)

    def close(self) -> None:
        """The output has ended."""
        if self._matcher is not None:
            self._matcher.close()

    def accept(self, token_id: int) -> str | None:
        """Take in the next token; an error if the grammar does not allow it."""
        if self._longest:
            self._tail = [*self._tail, token_id][-self._longest :]
        return None if self._matcher is None else self._matcher.accept(token_id)


def clear(words: np.ndarray, token_ids: Sequence[int]) -> None:
    """Clear the bits of tokens; those beyond `words` change nothing."""
    ids = np.array([token_id for token_id in token_ids if token_id < 32 * len(words)], np.int64)
    np.bitwise_and.at(words, ids // 32, ~(np.uint32(1) << (ids % 32).astype(np.uint32)).view(np.int32))


def restriction(
    params: SamplingParams, tokenizer: "Tokenizer | None", vocab_size: int, generated: Sequence[int]
) -> Restriction | None:
    """What `params` restrict, after tokens that were generated before; None if that is nothing.

    Raises:
        ValueError: it needs a tokenizer and there is none, the grammar cannot be compiled, or the tokens do not
            follow it.
    """
    if not params.is_restricted:
        return None
    always = np.full(num_words(vocab_size), EVERY, np.int32)
    clear(always, range(vocab_size, 32 * len(always)))
    if params.allowed_token_ids is not None:
        clear(allowed := always.copy(), params.allowed_token_ids)
        always &= ~allowed
    sequences: list[list[int]] = []
    if params.bad_words:
        if tokenizer is None:
            raise ValueError("bad_words need a tokenizer, and this model has none; use logit_bias")
        sequences = bad_sequences(params.bad_words, tokenizer)
        clear(always, [ids[0] for ids in sequences if len(ids) == 1])
        sequences = [ids for ids in sequences if len(ids) > 1]
    matcher = None
    if params.structured_outputs is not None:
        if tokenizer is None:
            raise ValueError("structured_outputs need a tokenizer, and this model has none; leave them out")
        matcher = tokenizer.grammars.matcher(params.structured_outputs)
        for token in generated:
            if (error := matcher.accept(token)) is not None:
                raise ValueError(f"output_token_ids do not follow structured_outputs: {error}")
    names = [name for name in ("structured_outputs", "allowed_token_ids", "bad_words") if getattr(params, name)]
    return Restriction(matcher, always, sequences, generated, names)


def bad_sequences(words: Sequence[str], tokenizer: "Tokenizer") -> list[list[int]]:
    """The token ids of each word, and those of it after a space if that is a token of its own kind, as in vLLM."""
    found: list[list[int]] = []
    for word in words:
        bare = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        found.append(bare)
        if spaced[0] != bare[0] and len(spaced) == len(bare):
            found.append(spaced)
    return [ids for ids in found if ids]
