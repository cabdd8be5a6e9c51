"""Ids as transformers' AutoTokenizer makes them, and text that arrives whole, character by character."""

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

import apt_jax.checkpoints
from apt_jax.tokenization.tokenizer import Tokenizer, TokenizerNotFound
from apt_jax.tokenization.tokenizer_files import read_tokenizer
from apt_jax.tokenization.tokenizer_store import TokenizerStore

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
TEXT = Path(json.__file__).read_text() + "Grüße aus Zürich, naïve café: 東京 привет 😀😀👩‍👩‍👧 € " * 5


def _special(content):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    return {"content": content, **flags, "__type": "AddedToken"}


CONFIG = {  # as facebook/opt-125m has it
    "errors": "replace",
    **{f"{name}_token": _special("</s>") for name in ("unk", "bos", "eos")},
    "pad_token": _special("<pad>"),
    "add_prefix_space": False,
    "add_bos_token": True,
    "special_tokens_map_file": None,
    "tokenizer_class": "GPT2Tokenizer",
}


def _train(byte_level: bool) -> Backend:
    if byte_level:
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(
            [TEXT], trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet)
        )
        return backend
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    ascii_text = TEXT.encode("ascii", "ignore").decode()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=[*SPECIAL, *byte_tokens])
    backend.train_from_iterator([ascii_text], trainer)
    # Only the first four are special to a reader; the bytes are plain tokens of the model.
    fields = json.loads(backend.to_str())
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] in SPECIAL]
    return Backend.from_str(json.dumps(fields))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """OPT's layout (vocab.json, merges.txt), tokenizer.json alone with added tokens, and one that is not byte-level."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("opt", "json", "metaspace")}
    byte_level = _train(byte_level=True)
    byte_level.model.save(str(made["opt"]))
    (made["opt"] / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    special = {name: dict(CONFIG[name]) for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
    for token in special.values():
        del token["__type"]
    (made["opt"] / "special_tokens_map.json").write_text(json.dumps(special))
    (made["opt"] / "config.json").write_text('{"model_type": "opt"}')

    byte_level.add_special_tokens([AddedToken("<|end of text|>", special=True)])
    byte_level.add_tokens(["<tool call>", "日本語", "plain"])
    byte_level.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    byte_level.enable_truncation(8)
    byte_level.save(str(made["json"] / "tokenizer.json"))
    _train(byte_level=False).save(str(made["metaspace"] / "tokenizer.json"))
    for name in ("json", "metaspace"):
        config = {**CONFIG, "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": name == "json"}
        (made[name] / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {name: Tokenizer.from_folder(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def theirs(folders):
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(str(folder)) for name, folder in folders.items()}


@pytest.mark.parametrize("name", ["opt", "json", "metaspace"])
@pytest.mark.parametrize(
    "text", ["", " ", "Hello world", "  two  spaces\n\ttab ", "naïve 😀 東京", "a</s>b<pad> <tool call>c"]
)
def test_ids_are_those_of_transformers(tokenizers, theirs, name, text):
    mine, other = tokenizers[name], theirs[name]
    assert mine.encode(text) == other(text).input_ids
    assert mine.encode(text, add_special_tokens=False) == other(text, add_special_tokens=False).input_ids
    ids = mine.encode(text)
    assert mine.decode(ids) == other.decode(ids, skip_special_tokens=True)
    assert mine.decode(ids, skip_special_tokens=False) == other.decode(ids)


@pytest.mark.parametrize("name", ["opt", "json", "metaspace", "demo"])
def test_they_are_read_without_transformers_and_alike(folders, theirs, name):
    folder = Path(apt_jax.checkpoints.__file__).parent / "demo" if name == "demo" else folders[name]
    found = read_tokenizer(folder)
    other = AutoTokenizer.from_pretrained(str(folder))
    assert found.eos_token_id == other.eos_token_id and found.chat_template == other.chat_template
    assert found.special_tokens == {key: str(text) for key, text in other.special_tokens_map.items()}
    for text in (TEXT, " a", "a</s>b<pad><unk>"):
        assert found.backend.encode(text).ids[:8] == other(text).input_ids[:8]
        bare = found.backend.encode(text, add_special_tokens=False).ids
        assert bare == other(text, add_special_tokens=False).input_ids or name == "json", "which the file cuts"


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"auto_map": {"AutoTokenizer": ["a.B", None]}},
        {"add_eos_token": True},
        {"additional_special_tokens": ["<x>"]},
        {"eos_token": "<not there>"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False},
    ],
)
def test_other_kinds_are_for_transformers(folders, tmp_path, changes, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(folders["json"], folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
    assert read_tokenizer(folder) is None
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ValueError, match=r"of a kind that transformers reads, .* pip install 'apt-jax\[transformers\]'"
    ):
        Tokenizer.from_folder(folder)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_ids_of_any_text(tokenizers, theirs, text):
    for name in ("opt", "json"):
        assert tokenizers[name].encode(text) == theirs[name](text).input_ids
        assert tokenizers[name].decode(tokenizers[name].encode(text)) == theirs[name].decode(
            theirs[name](text).input_ids, skip_special_tokens=True
        )


def test_the_beginning_of_text_is_marked_and_long_text_is_not_cut(tokenizers):
    for name in ("opt", "json"):
        ids = tokenizers[name].encode("word " * 100)
        assert ids[0] == 2 == tokenizers[name].eos_token_id
        assert ids.count(2) == 1
        assert tokenizers[name].decode(ids) == "word " * 100
        assert len(ids) > 100
    assert tokenizers["opt"].vocab_size == 700
    assert tokenizers["json"].vocab_size == 704


def _pieces(ids, cuts):
    """`ids` cut into runs at the given places."""
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(0, 720), max_size=30),  # some are beyond the vocabulary
    cuts=st.lists(st.integers(0, 30), max_size=8),
    skip=st.booleans(),
)
def test_pieces_make_the_whole_for_any_ids(tokenizers, ids, cuts, skip):
    for name in ("opt", "json"):
        detokenizer = tokenizers[name].detokenizer(skip_special_tokens=skip)
        pieces = [detokenizer.push(run) for run in _pieces(ids, cuts)]
        assert "".join(pieces) + detokenizer.flush() == tokenizers[name].decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30), skip=st.booleans())
def test_no_push_ends_inside_a_character(tokenizers, text, skip):
    text = text.replace("\ufffd", "")
    for name, tokenizer in tokenizers.items():
        ids = tokenizer.encode(text)
        detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
        pieces = [detokenizer.push([token_id]) for token_id in ids]
        assert not any("\ufffd" in piece for piece in pieces), name
        assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=skip), name


@pytest.mark.parametrize(("name", "tokens"), [("opt", 3), ("metaspace", 4)])  # opt knows the emojis' first two bytes
def test_an_emoji_comes_with_its_last_byte(tokenizers, name, tokens):
    tokenizer = tokenizers[name]
    crab = tokenizer.encode("x🦀", add_special_tokens=False)[-tokens:]
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push([token_id]) for token_id in crab] == [*[""] * (tokens - 1), "🦀"]
    assert detokenizer.flush() == ""
    assert detokenizer.push(crab[:-1]) == ""
    assert detokenizer.flush() == tokenizer.decode(crab[:-1])
    assert set(tokenizer.decode(crab[:-1])) == {"\ufffd"}


def test_bytes_of_tokens_join_to_the_text(tokenizers):
    text = "naïve 😀 東京 <tool call>日本語"
    for name in ("opt", "json"):
        ids = tokenizers[name].encode(text, add_special_tokens=False)
        assert b"".join(tokenizers[name].token_bytes(token_id) for token_id in ids).decode() == text
    assert tokenizers["opt"].token_text(2) == "</s>"
    assert tokenizers["json"].token_bytes(700) == b"<|end of text|>"
    assert tokenizers["opt"].token_bytes(5000) == b""


@pytest.mark.parametrize("name", ["opt", "metaspace"])
@pytest.mark.parametrize("kind", ["text", "special", "unfinished"])
def test_a_token_costs_the_same_however_many_came_before(tokenizers, name, kind):
    tokenizer = tokenizers[name]
    crab = tokenizer.encode("🦀", add_special_tokens=False)
    token_id = {"text": tokenizer.encode("a", add_special_tokens=False)[-1], "special": 2, "unfinished": crab[-1]}[kind]
    detokenizer = tokenizer.detokenizer()

    def seconds(tokens):
        started = time.perf_counter()
        for _ in range(tokens):
            detokenizer.push([token_id])
        return time.perf_counter() - started

    first = min(seconds(200) for _ in range(3))
    seconds(4000)
    assert min(seconds(200) for _ in range(3)) < 5 * first + 1e-3


def test_folders_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(TokenizerNotFound, match=r"has no tokenizer .*--tokenizer") as caught:
        Tokenizer.from_folder(tmp_path)
    assert isinstance(caught.value, FileNotFoundError)
    assert isinstance(caught.value, ValueError)


def test_damaged_tokenizers(tmp_path, folders):
    for name in ("vocab.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["opt"] / name).read_bytes())
    with pytest.raises(ValueError, match=r"merges\.txt is missing"):
        Tokenizer.from_folder(tmp_path)
    for name, text in (("merges.txt", "#version\nzz"), ("vocab.json", '{"a": 0'), ("tokenizer.json", "{}")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="are damaged or of an unknown kind") as caught:
            Tokenizer.from_folder(tmp_path)
        assert "\n" not in str(caught.value)
        assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("name", ["opt", "json", "metaspace"])
def test_a_kept_tokenizer_is_the_same_until_a_file_of_it_changes(tmp_path, folders, tokenizers, name, caplog):
    folder, store = tmp_path / "model", TokenizerStore(tmp_path / "kept")
    shutil.copytree(folders[name], folder)
    Tokenizer.from_folder(folder, store)
    (file,) = (tmp_path / "kept").iterdir()
    kept, right = Tokenizer.from_folder(folder, store), tokenizers[name]
    ids = right.encode(TEXT)
    assert kept.encode(TEXT) == ids and kept.decode(ids) == right.decode(ids)
    assert kept.encode("a", add_special_tokens=False) == right.encode("a", add_special_tokens=False)
    assert (kept.eos_token_id, kept.special_tokens) == (right.eos_token_id, right.special_tokens)
    assert kept.chat_template is None and kept.vocab_size == right.vocab_size
    (folder / "chat_template.jinja").write_text("{{ 'hello' }}")
    assert Tokenizer.from_folder(folder, store).chat_template == "{{ 'hello' }}"
    assert Tokenizer.from_folder(folder, store).chat_template == "{{ 'hello' }}"
    (folder / "chat_template.jinja").unlink()
    assert not caplog.messages
    code = (
        "import sys; from pathlib import Path; from apt_jax.tokenization.tokenizer import Tokenizer, TokenizerStore\n"
        "Tokenizer.from_folder(Path(sys.argv[1]), TokenizerStore(Path(sys.argv[2])))\n"
        "assert 'transformers' not in sys.modules, 'it takes seconds'"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "kept")], check=True)
    for damaged in ("{", '{"backend": "x"}'):
        file.write_text(damaged)
        assert Tokenizer.from_folder(folder, store).encode(TEXT) == ids
        assert "cannot be used" in caplog.messages[-1]


def test_importing_is_quiet_and_leaves_the_environment(folders):
    code = (
        "import os, sys; from apt_jax.tokenization.tokenizer import Tokenizer; from pathlib import Path\n"
        "assert 'transformers' not in sys.modules and 'jax' not in sys.modules\n"
        "before = dict(os.environ)\n"
        "print(Tokenizer.from_folder(Path(sys.argv[1])).encode('Hello'))\n"
        "assert dict(os.environ) == before"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folders["opt"])], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)[0] == 2
    assert done.stderr == ""
    assert logging.getLogger("transformers").level != logging.CRITICAL


def test_it_goes_on_without_threads_where_none_can_be_started(monkeypatch, caplog):
    """The library never worked again if its threads could not be started at the first request."""

    class PanicException(BaseException):  # as of PyO3
        pass

    def panic(self, text):
        raise PanicException("The global thread pool has not been initialized")

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", panic)
        tokenizer = Tokenizer.from_folder(Path(apt_jax.checkpoints.__file__).parent / "demo")
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false" and "no threads are left for the tokenizer" in caplog.text
    assert tokenizer.encode("a")
