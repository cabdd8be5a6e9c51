"""Text to token ids and back, and back piece by piece while tokens arrive.

The tokenizer is run by the `tokenizers` library; its ids are those of transformers' `AutoTokenizer`, which also reads
those of rarer kinds. No jax here.
"""

import contextlib
import itertools
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_jax.files import Unreadable
from apt_jax.tokenization.detokenizer import ByteDetokenizer, IncrementalDetokenizer, TokenBytes, WindowDetokenizer
from apt_jax.tokenization.grammars.compiling import Grammars
from apt_jax.tokenization.token_texts import ByteTokenTexts, TokenText, TokenTexts, WindowTokenTexts, shown, spans_of
from apt_jax.tokenization.tokenizer_store import TokenizerStore, check_tokenizer_files

if TYPE_CHECKING:
    from apt_jax.tokenization.tokenizer_files import TokenizerFiles

logger = logging.getLogger(__name__)

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # how vocabularies with byte fallback write a byte
_ADDED_AROUND = 4  # special tokens that a tokenizer puts on either side of a text, at most
_TRIED_WORDS = 10_000  # the first tokens of a vocabulary, among which one is a word

# Any of these makes a folder one with a tokenizer; the second needs merges.txt beside it.
PIECE_CHARS = 1 << 16  # of a long text that is tokenised at once
MAX_PIECE_CHARS = 1 << 18
PIECE_IDS = 4096

# Where GPT-2's splitting ends a piece whatever comes later: no rule looks back, and only letters continue a word.
_WORD_END = re.compile(r"(?<=[A-Za-z])(?=[\x00-@\[-`{-\x7f])")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")


class TokenizerNotFound(FileNotFoundError, ValueError):
    """A folder has no tokenizer; its model can be served with token ids only."""


class NeedsTransformers(ValueError):
    """A tokenizer is of a kind that only transformers reads, which is not installed."""


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

        Attributes:
            grammars: structured outputs in this vocabulary.
        """
        from tokenizers import decoders

        backend.no_truncation()  # a prompt that is too long must be refused, not cut
        backend.no_padding()
        self._backend = backend
        self.eos_token_id = eos_token_id
        self.grammars = Grammars(backend.to_str, eos_token_id)
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added = tuple(token.content for token in added.values())
        self._kept_bytes: dict[int, bytes] = {}
        self._bytes = TokenBytes(backend) if isinstance(backend.decoder, decoders.ByteLevel) else None
        self._start_threads()

    @classmethod
    def from_folder(cls, folder: Path, store: TokenizerStore | None = None) -> "Tokenizer":
        """Read the tokenizer files in `folder`; nothing is fetched and no code in it is run.

        It is taken from `store` if it is there, which is much faster, and put there otherwise.

        Raises:
            TokenizerNotFound: there is none.
            ValueError: its files are incomplete, damaged or unreadable.
        """
        try:
            check_tokenizer_files(folder)
        except Unreadable as error:
            raise ValueError(str(error)) from error
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
        from apt_jax.tokenization.tokenizer_files import read_tokenizer

        try:
            found = read_tokenizer(folder) or _by_transformers(folder, present)
            fields: dict[str, Any] = {
                "eos_token_id": found.eos_token_id,
                "chat_template": found.chat_template,
                "special_tokens": found.special_tokens,
            }
            tokenizer = cls(found.backend, **fields)
            if store is not None:
                store.save(folder, {"backend": found.backend.to_str(), **fields})
            return tokenizer
        except NeedsTransformers:
            raise
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

    def _start_threads(self) -> None:
        """Have the library start its threads now: it could never be used again if that failed at the first request."""
        try:
            self.encode("a")
        except BaseException as error:  # the panic of a thread pool that cannot be built is no Exception
            if type(error).__name__ != "PanicException":
                raise
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            logger.warning("no threads are left for the tokenizer, which goes on without (ulimit -u, --pids-limit)")

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added ones too; the model's own `vocab_size` may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, for OPT with `</s>` in front unless `add_special_tokens` is false."""
        # `encode` would hold Python's lock, for seconds where the text is long
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def encode_pieces(self, text: str, add_special_tokens: bool = True) -> Iterator[list[int]]:
        """`encode`, piece by piece where the vocabulary allows it: the library needs a hundred bytes for each byte.

        Raises:
            ValueError: more than MAX_PIECE_CHARS characters have no place at which they may be cut.
        """
        if len(text) <= PIECE_CHARS:
            yield self.encode(text, add_special_tokens)
            return
        before, after = self._special_around if add_special_tokens else ((), ())
        if before:
            yield list(before)
        at = 0
        while at < len(text):
            end = self._cut(text, at)
            if end - at > MAX_PIECE_CHARS:
                raise ValueError(
                    f"the text has more than {MAX_PIECE_CHARS} characters in a row at which it cannot be cut; "
                    f"send at most {MAX_PIECE_CHARS} at once"
                )
            yield self.encode(text[at:end], add_special_tokens=False)
            at = end
        if after:
            yield list(after)

    def encode_end(self, text: str, limit: int, add_special_tokens: bool = True) -> list[int]:
        """The last `limit` token ids of `text`; special tokens around it are kept, and counted.

        Raises:
            ValueError: see `encode_pieces`.
        """
        before, after = self._special_around if add_special_tokens else ([], [])
        room = max(limit - len(before) - len(after), 0)
        found: list[int] = []
        for ids in self.encode_pieces(text, add_special_tokens=False):
            found = [*found, *ids][-room:] if room else []
        return [*before, *found, *after][:limit]

    def fewest_tokens(self, text: str) -> int:
        """Tokens that `text` has at least; found without tokenising, in a fraction of its time."""
        if self._longest_bytes is None:
            return 0
        return -(-len(text.encode("utf-8", "surrogatepass")) // self._longest_bytes)

    @cached_property
    def _special_around(self) -> tuple[list[int], list[int]]:
        """Special tokens that are put before and after a text."""
        bare, full = self.encode("a", add_special_tokens=False), self.encode("a")
        at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return full[:at], full[at + len(bare) :]

    def _cut(self, text: str, at: int) -> int:
        """Where the piece that begins `at` may end without changing a token: at the end of a word of Latin letters."""
        if self._longest_bytes is None:
            return len(text)
        for found in _WORD_END.finditer(text, at + PIECE_CHARS, at + MAX_PIECE_CHARS + 1):  # the search holds the lock
            end = found.start()
            longest = max(map(len, self._added), default=0)
            around = text[max(end - longest, 0) : end + longest]
            if not any(token in around for token in self._added):  # nor inside </s>
                return end
        return len(text)

    @cached_property
    def _longest_bytes(self) -> int | None:
        """Bytes of the longest token, where every token stands for these bytes of the text and no others.

        So it is with GPT-2's vocabularies, OPT's among them. Others may drop white space, normalise the text or take
        any word as one unknown token: None.
        """
        from tokenizers import pre_tokenizers
        from tokenizers.models import BPE

        backend = self._backend
        split, model = backend.pre_tokenizer, backend.model
        if self._bytes is None or backend.normalizer is not None or not isinstance(model, BPE):
            return None
        if not isinstance(split, pre_tokenizers.ByteLevel) or not split.use_regex or split.add_prefix_space:
            return None
        if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
            return None
        vocabulary = backend.get_vocab(with_added_tokens=False)
        if not vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet()):  # other bytes would be dropped
            return None
        return max(*map(len, vocabulary), *(len(token.encode()) for token in self._added))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def decode_pieces(self, ids: Sequence[int]) -> Iterator[str]:
        """Text of `ids`, special ones too, in pieces that are whole characters; their cost is the vocabulary's."""
        if self._bytes is None:
            (text,) = self._backend.decode_batch([list(ids)], skip_special_tokens=False)  # without Python's lock
            yield text
            return
        detokenizer = self.detokenizer(skip_special_tokens=False)
        for at in range(0, len(ids), PIECE_IDS):
            yield detokenizer.push(ids[at : at + PIECE_IDS])
        yield detokenizer.flush()

    def token_text(self, token_id: int) -> str:
        """Text of one token inside a text, with its space in front; part of a character shows as U+FFFD."""
        alone = self.decode([token_id], skip_special_tokens=False)
        if self._bytes is not None or self._word is None or token_id in self._special_ids:
            return alone
        word, text = self._word
        both = self.decode([word, token_id], skip_special_tokens=False)
        return both[len(text) :] if both.startswith(text) else alone

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that one token stands for inside a text, which may be part of a character."""
        if self._bytes is not None:
            return self._bytes[token_id]
        if (kept := self._kept_bytes.get(token_id)) is None:
            kept = self._found_bytes(token_id)
            if token_id < self.vocab_size:  # there are more ids without a token than memory holds
                self._kept_bytes[token_id] = kept
        return kept

    def _found_bytes(self, token_id: int) -> bytes:
        name = self._backend.id_to_token(token_id) or ""
        byte = _BYTE.fullmatch(name)
        if byte is not None and self.decode([token_id], skip_special_tokens=False) != name:  # the decoder knows it too
            return bytes([int(byte[1], 16)])
        return self.token_text(token_id).encode()

    @cached_property
    def _word(self) -> tuple[int, str] | None:
        """A token that is a word, and its text: what a token is after it tells what it is inside a text."""
        for token_id in range(min(self.vocab_size, _TRIED_WORDS)):
            if token_id not in self._special_ids:
                text = self.decode([token_id], skip_special_tokens=False)
                if text.isascii() and text.isalnum():
                    return token_id, text
        return None

    def detokenizer(
        self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()
    ) -> IncrementalDetokenizer:
        """A new detokenizer for one request, whose text goes on after the prompt: with a space if a word begins."""
        skipped = self._skipped(skip_special_tokens)
        if self._bytes is None:
            return WindowDetokenizer(self.decode, skipped, prompt_token_ids)
        return ByteDetokenizer(self._bytes, skipped)

    def token_texts(
        self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = (), offset: int = 0
    ) -> TokenTexts:
        """Texts of the tokens that follow a prompt, as parts of the text that `detokenizer` makes of them."""
        skipped = self._skipped(skip_special_tokens)
        if self._bytes is None:
            detokenizer = self.detokenizer(skip_special_tokens, prompt_token_ids)
            return WindowTokenTexts(detokenizer, self.token_bytes, skipped, offset)
        return ByteTokenTexts(self.token_bytes, skipped, offset)

    def prompt_texts(self, prompt: str | None, ids: Sequence[int]) -> tuple[str, list[TokenText]]:
        """A prompt's text, and its tokens `ids` as parts of it; `prompt` is None if it was given as token ids."""
        if prompt is None:
            detokenizer = self.detokenizer(skip_special_tokens=False)
            texts = self.token_texts(skip_special_tokens=False)
            return detokenizer.push(ids) + detokenizer.flush(), [texts.push(token_id) for token_id in ids]
        tokens = [(token_id, self.token_bytes(token_id)) for token_id in ids]
        if self._bytes is not None and (bounds := self._inner(prompt, ids)) is not None:
            texts = ByteTokenTexts(self.token_bytes)
            return prompt, [
                texts.push(token_id)
                if at in range(*bounds)
                else TokenText(shown(token_id, data), data, 0 if at < bounds[0] else len(prompt))
                for at, (token_id, data) in enumerate(tokens)
            ]
        (encoding,) = self._backend.encode_batch([prompt])
        spans = [
            None if mask and start == end else (start, end)
            for (start, end), mask in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        ]
        return prompt, spans_of(prompt, spans, tokens)

    def _inner(self, prompt: str, ids: Sequence[int]) -> tuple[int, int] | None:
        """Which of `ids` are exactly the bytes of `prompt`: all but special ones around them; None if none are."""
        data = prompt.encode("utf-8", "surrogatepass")
        special = [token_id in self._special_ids for token_id in ids]
        before = list(itertools.takewhile(bool, special[:_ADDED_AROUND]))
        after = list(itertools.takewhile(bool, special[: -_ADDED_AROUND - 1 : -1]))
        for start, left_out in itertools.product(range(len(before), -1, -1), range(len(after), -1, -1)):
            stop = len(ids) - left_out
            if b"".join(map(self.token_bytes, ids[start:stop])) == data:
                return start, stop
        return None

    def _skipped(self, skip_special_tokens: bool) -> frozenset[int]:
        return self._special_ids if skip_special_tokens else frozenset()


def _by_transformers(folder: Path, present: Sequence[str]) -> "TokenizerFiles":
    """A tokenizer of another kind than GPT-2's."""
    from apt_jax.tokenization.tokenizer_files import TokenizerFiles

    try:
        with no_advice():
            from transformers import AutoTokenizer
    except ImportError as error:
        raise NeedsTransformers(
            f"the tokenizer in {folder} ({', '.join(present)}) is of a kind that transformers reads, which is not "
            "installed; pip install 'apt-jax[transformers]'"
        ) from error
    found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    template = found.chat_template
    return TokenizerFiles(
        found.backend_tokenizer,
        found.eos_token_id,
        template.get("default") if isinstance(template, dict) else template,
        {name: str(text) for name, text in found.special_tokens_map.items()},
    )


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
