"""Tokenizers of a model's folder by the `tokenizers` library alone: those of GPT-2's form, OPT's, and tokenizer.json.

What is of another kind is for transformers to read, which is 124 MB and takes seconds to import. The ids are those of
its `AutoTokenizer` (`tests/unit/test_tokenizer.py`).
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from apt_jax.files import read_json, read_text

GPT2, GENERIC = "GPT2Tokenizer", ("PreTrainedTokenizer", "TokenizersBackend")
SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says: the tokenizer, the id that ends a text, the chat template, special tokens by their names."""

    backend: Tokenizer
    eos_token_id: int | None
    chat_template: str | None
    special_tokens: dict[str, str]


def read_tokenizer(folder: Path) -> TokenizerFiles | None:
    """The tokenizer in `folder`; None if it is of a kind that is not read here.

    Raises:
        Exception: a file is damaged; of the JSON parser or the library.
    """
    config = _json(folder / "tokenizer_config.json")
    named = {**_json(folder / "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}
    special = {name: named[name] for name in SPECIAL if isinstance(named.get(name), str | dict)}
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    if "auto_map" in config or config.get("add_eos_token") or named.get("additional_special_tokens"):
        return None
    if kind == GPT2:
        backend = _gpt2(folder, config, special)
    elif kind in GENERIC and (folder / "tokenizer.json").is_file():
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        return None
    contents = {name: _content(token) for name, token in special.items()}
    if backend is None or any(backend.token_to_id(content) is None for content in contents.values()):
        return None
    bos, eos = contents.get("bos_token"), contents.get("eos_token")
    if kind != GPT2 and _begins(backend, bos) is not bool(config.get("add_bos_token")):
        return None
    eos_token_id = None if eos is None else backend.token_to_id(eos)
    return TokenizerFiles(backend, eos_token_id, _template(folder, config), contents)


def _gpt2(folder: Path, config: Mapping[str, Any], special: Mapping[str, Any]) -> Tokenizer | None:
    """Byte-level BPE; its added tokens are those of tokenizer.json, or the special ones."""
    added: list[AddedToken] = []
    if (folder / "tokenizer.json").is_file():
        whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if not isinstance(whole.model, models.BPE) or not isinstance(whole.decoder, decoders.ByteLevel):
            return None
        fields = json.loads(whole.to_str())["model"]
        vocabulary, merges = fields["vocab"], [tuple(pair) for pair in fields["merges"]]
        added = list(whole.get_added_tokens_decoder().values())
        if set(range(whole.get_vocab_size())) != set(whole.get_vocab().values()):
            return None
    else:
        vocabulary, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        if (folder / "added_tokens.json").is_file() or "added_tokens_decoder" in config:
            return None
    given = {token.content for token in added}
    for token in special.values():
        if _content(token) not in given:
            added.append(_added(token))
            given.add(_content(token))
    backend = Tokenizer(models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    for token in added:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    bos = special.get("bos_token")
    if config.get("add_bos_token") and bos is not None:
        name = _content(bos)
        token_id = backend.token_to_id(name)
        backend.post_processor = processors.TemplateProcessing(f"{name}:0 $A:0", special_tokens=[(name, token_id)])
    return backend


def _begins(backend: Tokenizer, bos: str | None) -> bool:
    """Whether the tokenizer puts the beginning-of-text token in front."""
    ids = backend.encode("a").ids
    return bos is not None and ids[:1] == [backend.token_to_id(bos)]


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _added(token: Any) -> AddedToken:
    flags = token if isinstance(token, dict) else {}
    names = ("single_word", "lstrip", "rstrip", "normalized")
    return AddedToken(_content(token), special=True, **{name: bool(flags.get(name, False)) for name in names})


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        return read_text(folder / "chat_template.jinja")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no object")
    return found
