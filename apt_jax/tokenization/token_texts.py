"""A request's tokens as parts of its text: what each one shows, its bytes, and where in the text it begins.

A token that is only part of a character is shown as OpenAI does, `bytes:` and its bytes, at the place of that
character; one that is left out of the text (a special one) keeps its name and takes no room. Every other one stands in
the text as it is shown: `text[offset : offset + len(shown)] == shown`.
"""

import codecs
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

from apt_jax.tokenization.detokenizer import IncrementalDetokenizer


class TokenText(NamedTuple):
    """One token: as shown, its UTF-8 bytes, and the characters of the text before it."""

    shown: str
    data: bytes
    offset: int


class TokenTexts(Protocol):
    """Those of one request, in order."""

    def push(self, token_id: int) -> TokenText:
        """The next token."""
        ...


def shown(token_id: int, data: bytes) -> str:
    """A token by itself: its text, its bytes where they are part of a character, its id where it stands for nothing."""
    if not data:
        return f"token_id:{token_id}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class ByteTokenTexts:
    """Of a byte-level vocabulary: the text is the tokens' bytes, joined and decoded."""

    def __init__(self, token_bytes: Callable[[int], bytes], skipped_ids: Collection[int] = (), offset: int = 0):
        self._token_bytes, self._skipped_ids = token_bytes, skipped_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._chars = offset  # of the text so far; an unfinished character is the next one

    def push(self, token_id: int) -> TokenText:
        """The next token."""
        data, offset = self._token_bytes(token_id), self._chars
        if token_id not in self._skipped_ids:
            self._chars += len(self._decoder.decode(data))
            if text := _whole(data):  # what came before it may have ended in bytes that are no character
                offset = self._chars - len(text)
        return TokenText(shown(token_id, data), data, offset)


class WindowTokenTexts:
    """Of any vocabulary: a token is what it adds to the text of those before it."""

    def __init__(
        self,
        detokenizer: IncrementalDetokenizer,
        token_bytes: Callable[[int], bytes],
        skipped_ids: Collection[int] = (),
        offset: int = 0,
    ):
        self._detokenizer, self._token_bytes, self._skipped_ids = detokenizer, token_bytes, skipped_ids
        self._chars = offset
        self._is_held = False  # bytes of an unfinished character are not in the text yet

    def push(self, token_id: int) -> TokenText:
        """The next token."""
        data, offset = self._token_bytes(token_id), self._chars
        if token_id in self._skipped_ids:
            return TokenText(shown(token_id, data), data, offset)
        fresh = self._detokenizer.push([token_id])
        self._chars += len(fresh)
        own, was_held = _whole(data), self._is_held
        self._is_held = not fresh and (own is None or was_held)
        if own is None:
            return TokenText(shown(token_id, data), data, offset)
        if not was_held:
            return TokenText(fresh, fresh.encode(), offset)
        text = next((text for text in (own, own.lstrip(" ")) if text and fresh.endswith(text)), fresh)
        return TokenText(text, text.encode(), self._chars - len(text))


def _whole(data: bytes) -> str | None:
    """The text of bytes that are whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def spans_of(
    prompt: str, spans: Sequence[tuple[int, int] | None], tokens: Sequence[tuple[int, bytes]]
) -> list[TokenText]:
    """Tokens of `prompt` where the tokenizer says that they stand; None is a special one that it has added."""
    found, at = [], 0
    for (token_id, data), span in zip(tokens, spans, strict=True):
        if span is None:
            found.append(TokenText(shown(token_id, data), data, at))
            continue
        at = span[1]
        text = prompt[span[0] : span[1]]
        is_part = bool(data) and _whole(data) is None
        found.append(
            TokenText(shown(token_id, data), data, span[0]) if is_part else TokenText(text, text.encode(), span[0])
        )
    return found
