"""Text to token ids and back, and back piece by piece while tokens arrive.

The tokenizer is read by transformers, so ids are those of its `AutoTokenizer`, and run by the `tokenizers`
library behind it. No jax here.
"""

import codecs
import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from apt_jax.tokenization.tokenizer_store import TokenizerStore

logger = logging.getLogger(__name__)

# Any of these makes a folder one with a tokenizer; the second needs merges.txt beside it.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")


class TokenizerNotFound(FileNotFoundError, ValueError):
    """A folder has no tokenizer; its model can be served with token ids only."""


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


class Tokenizer:
    """A tokenizer of a model's folder."""

    def __init__(
        self,
        backend: Any,
        *,
        eos_token_id: int | None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        """Wrap a `tokenizers.Tokenizer`; `from_folder` is the usual way.

        `chat_template` (Jinja; None if the model has none) and `special_tokens` (such as `bos_token`) are only kept.
        """
        from tokenizers import decoders

        backend.no_truncation()  # a prompt that is too long must be refused, not cut
        backend.no_padding()
        self._backend = backend
        self.eos_token_id = eos_token_id
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes = _TokenBytes(backend) if isinstance(backend.decoder, decoders.ByteLevel) else None

    @classmethod
    def from_folder(cls, folder: Path, store: TokenizerStore | None = None) -> "Tokenizer":
        """Read the tokenizer files in `folder`; nothing is fetched and no code in it is run.

        It is taken from `store` if it is there, which is much faster, and put there otherwise.

        Raises:
            TokenizerNotFound: there is none.
            ValueError: its files are incomplete or damaged.
        """
        present = [name for name in _VOCABULARIES if (folder / name).is_file()]
        if not present:
            raise TokenizerNotFound(
                f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); prompts can only be token "
                "ids, or name another folder with --tokenizer"
            )
        if present == ["vocab.json"] and not (folder / "merges.txt").is_file():
            raise ValueError(f"{folder / 'merges.txt'} is missing, which belongs to vocab.json beside it")
        if store is not None and (kept := cls._kept(folder, store)) is not None:
            return kept
        with no_advice():
            from transformers import AutoTokenizer
        try:
            found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            template = found.chat_template
            fields = {
                "eos_token_id": found.eos_token_id,
                "chat_template": template.get("default") if isinstance(template, dict) else template,
                "special_tokens": {name: str(text) for name, text in found.special_tokens_map.items()},
            }
            tokenizer = cls(found.backend_tokenizer, **fields)
            if store is not None:
                store.save(folder, {"backend": found.backend_tokenizer.to_str(), **fields})
            return tokenizer
        except Exception as error:  # of the JSON parser, the Rust library or transformers
            reason = str(error).strip().splitlines()
            raise ValueError(
                f"the tokenizer files in {folder} ({', '.join(present)}) are damaged or of an unknown kind: "
                f"{reason[0] if reason else type(error).__name__}"
            ) from error

    @classmethod
    def _kept(cls, folder: Path, store: TokenizerStore) -> "Tokenizer | None":
        from tokenizers import Tokenizer as Backend

        fields = store.load(folder)
        try:
            return None if fields is None else cls(Backend.from_str(fields.pop("backend")), **fields)
        except Exception as error:  # the Rust library raises nothing narrower
            logger.warning("the tokenizer kept for %s cannot be used (%s); reading it again", folder, error)
            return None

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added ones too; the model's own `vocab_size` may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, for OPT with `</s>` in front unless `add_special_tokens` is false."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself, special ones too; part of a character shows as U+FFFD."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that one token stands for, which may be part of a character."""
        return self.token_text(token_id).encode() if self._bytes is None else self._bytes[token_id]

    def detokenizer(self, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """A new detokenizer for one request."""
        skipped = self._special_ids if skip_special_tokens else frozenset[int]()
        if self._bytes is None:
            return _WindowDetokenizer(self, skipped)
        return _ByteDetokenizer(self._bytes, skipped)


class _TokenBytes(dict[int, bytes]):
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
        if token is None:
            result = b""
        elif all(char in self._byte_of for char in token):
            result = bytes(self._byte_of[char] for char in token)
        else:  # an added token that was not written in that alphabet
            result = token.encode()
        self[token_id] = result
        return result


class _ByteDetokenizer:
    """Joins tokens' bytes in an incremental UTF-8 decoder: exact for byte-level vocabularies."""

    def __init__(self, token_bytes: _TokenBytes, skipped_ids: frozenset[int]):
        self._token_bytes, self._skipped_ids = token_bytes, skipped_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        kept = (self._token_bytes[token_id] for token_id in ids if token_id not in self._skipped_ids)
        return self._decoder.decode(b"".join(kept))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowDetokenizer:
    """Decodes the last few tokens again with each new one: for vocabularies that are not byte-level.

    The text of the tokens before the window is already delivered; inside it, a token's text may depend on the token
    before it (a space between words), so the difference of two decodings is what is new.
    """

    def __init__(self, tokenizer: Tokenizer, skipped_ids: frozenset[int]):
        self._tokenizer, self._skipped_ids = tokenizer, skipped_ids
        self._window: list[int] = []  # tokens whose text is out, then those whose is not
        self._shown_tokens = 0  # of the window

    def push(self, ids: Sequence[int]) -> str:
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
        fresh = self._fresh()
        self._window, self._shown_tokens = [], 0
        return fresh

    def _fresh(self) -> str:
        before = self._tokenizer.decode(self._window[: self._shown_tokens], skip_special_tokens=False)
        return self._tokenizer.decode(self._window, skip_special_tokens=False)[len(before) :]


_LONGEST_CHARACTER = 4  # tokens: a byte each at worst


@contextlib.contextmanager
def no_advice() -> Iterator[None]:
    """Keep transformers from advising to install torch when it is first imported."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
