"""Tokens back to text, piece by piece while they arrive."""

import codecs
from collections.abc import Callable, Sequence
from typing import Any, Protocol

_LONGEST_CHARACTER = 4  # tokens: a byte each at worst
_CONTEXT = 6  # tokens of a prompt, before which nothing decides how the next one is written


class IncrementalDetokenizer(Protocol):
    """Text of one request's tokens as they come; never half a character.

    All pushes and the flush joined equal what `Tokenizer.decode` makes of all ids at once (with a vocabulary that is
    not byte-level, if that is valid text). The cost of a token does not depend on the number before it.
    """

    def push(self, ids: Sequence[int]) -> str:
        """Text that `ids` complete; "" while a character is unfinished."""
        ...

    def flush(self) -> str:
        """The rest at the end: U+FFFD for an unfinished character."""
        ...


class TokenBytes(dict[int, bytes]):
    """Token id to the bytes it stands for in a byte-level vocabulary, filled as ids are asked for."""

    def __init__(self, backend: Any):
        from tokenizers.pre_tokenizers import ByteLevel

        super().__init__()
        self._backend = backend
        # Byte-level vocabularies write a byte that prints as itself, and the others, in order, as what follows.
        alphabet = sorted(ByteLevel.alphabet())
        printing = {char: ord(char) for char in alphabet if ord(char) < 256}
        others = [char for char in alphabet if ord(char) >= 256]
        hidden = sorted(set(range(256)) - set(printing.values()))
        self._byte_of = printing | dict(zip(others, hidden, strict=True))

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:  # not kept: there are more such ids than memory holds
            return b""
        if all(char in self._byte_of for char in token):
            result = bytes(self._byte_of[char] for char in token)
        else:  # an added token that was not written in that alphabet
            result = token.encode()
        self[token_id] = result
        return result


class ByteDetokenizer:
    """Joins tokens' bytes in an incremental UTF-8 decoder: exact for byte-level vocabularies."""

    def __init__(self, token_bytes: TokenBytes, skipped_ids: frozenset[int]):
        self._token_bytes, self._skipped_ids = token_bytes, skipped_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """Text that `ids` complete."""
        kept = (self._token_bytes[token_id] for token_id in ids if token_id not in self._skipped_ids)
        return self._decoder.decode(b"".join(kept))

    def flush(self) -> str:
        """The rest at the end."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Decodes the last few tokens again with each new one: for vocabularies that are not byte-level.

    The text of the tokens before the window is already delivered; inside it, a token's text may depend on the token
    before it (a space between words), so the difference of two decodings is what is new.
    """

    def __init__(self, decode: Callable[..., str], skipped_ids: frozenset[int], prompt_token_ids: Sequence[int] = ()):
        self._decode, self._skipped_ids = decode, skipped_ids
        # tokens whose text is out, then those whose is not
        self._window = [i for i in prompt_token_ids[-_CONTEXT:] if i not in skipped_ids]
        self._shown_tokens = len(self._window)

    def push(self, ids: Sequence[int]) -> str:
        """Text that `ids` complete."""
        return "".join([self._push(token_id) for token_id in ids if token_id not in self._skipped_ids])

    def _push(self, token_id: int) -> str:
        self._window.append(token_id)
        fresh = self._fresh()
        if not fresh or (fresh.endswith("\ufffd") and len(self._window) - self._shown_tokens <= _LONGEST_CHARACTER):
            return ""
        self._window = self._window[self._shown_tokens :]
        self._shown_tokens = len(self._window)
        return fresh

    def flush(self) -> str:
        """The rest at the end."""
        fresh = self._fresh()
        self._window, self._shown_tokens = [], 0
        return fresh

    def _fresh(self) -> str:
        before = self._decode(self._window[: self._shown_tokens], skip_special_tokens=False)
        return self._decode(self._window, skip_special_tokens=False)[len(before) :]
