"""Log-probabilities index the text that is returned, whatever the tokenizer: each token's text, bytes and offset.

A token that is part of a character is shown as its bytes, as OpenAI does (vLLM gives U+FFFD or nothing); one that is no
part of the text (a special one that is left out) keeps its name and takes no room.
"""

import itertools
import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from apt_jax.engine_config import EngineConfig
from apt_jax.output import Output, TokenLogprobs
from apt_jax.request import FinishReason
from apt_jax.serve.openai.bodies.chat_requests import parse_chat
from apt_jax.serve.openai.bodies.requests import parse_completion
from apt_jax.serve.openai.chat_completions import ChatCompletion
from apt_jax.serve.openai.completions import Completion
from apt_jax.serve.openai.generation import ServedModel
from apt_jax.tokenization.tokenizer import Tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog, don't it? yes it does.", "naïve café costs 5 € 你好 🙂 ok"] * 8
SPECIAL = ["<unk>", "</s>", "<mark>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(prefix_space=False):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return backend, trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)


def metaspace(model, trainer, **more):
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(**more)
    backend.decoder = decoders.Metaspace(**more)
    return backend, trainer


def word_piece(cleanup=True):
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=cleanup)
    return backend, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL)


def byte_fallback():
    """As Llama 2's: spaces are written as a mark, and bytes for what the vocabulary does not have."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [char for char in sorted({*"".join(CORPUS[:1]), "\u2581"}) if char != " "]
    vocabulary = {
        token: i for i, token in enumerate([*SPECIAL, *BYTES, *alphabet, "th", "the", "\u2581the", "\u2581t"])
    }
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "t")]
    backend.model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    return backend, None


def end_of_word():
    backend = Backend(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder("</w>")
    return backend, trainers.BpeTrainer(vocab_size=160, special_tokens=SPECIAL, end_of_word_suffix="</w>")


KINDS = {
    "byte-level": byte_level,
    "byte-level with a space in front": lambda: byte_level(prefix_space=True),
    "metaspace BPE": lambda: metaspace(
        models.BPE(unk_token="<unk>"), trainers.BpeTrainer(vocab_size=140, special_tokens=SPECIAL)
    ),
    "metaspace BPE, first": lambda: metaspace(
        models.BPE(unk_token="<unk>"), trainers.BpeTrainer(vocab_size=140, special_tokens=SPECIAL),
        prepend_scheme="first",
    ),
    "metaspace Unigram": lambda: metaspace(
        models.Unigram(), trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>")
    ),
    "WordPiece": word_piece,
    "WordPiece without cleaning": lambda: word_piece(cleanup=False),
    "byte fallback": byte_fallback,
    "end of word": end_of_word,
}  # fmt: skip


def make(kind):
    backend, trainer = KINDS[kind]()
    if trainer is not None:
        backend.train_from_iterator(CORPUS, trainer)
    else:
        backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", backend.token_to_id("</s>"))]
    )
    return Tokenizer(backend, eos_token_id=backend.token_to_id("</s>"), chat_template="{{ messages[0].content }}")


TOKENIZERS = {kind: make(kind) for kind in KINDS}
PROMPTS = ["the fox", " the", "  two  spaces", "x", "café 🙂", "</s>the", "the</s>", "5 €", "don't , it", "\nline\n"]
kinds = st.sampled_from(list(TOKENIZERS))
answers = st.lists(st.integers(0, 10**6), min_size=1, max_size=10)


def served(tokenizer):
    facts = SimpleNamespace(tokenizer=tokenizer, max_model_len=4096, config=EngineConfig(), sampling_defaults={})
    return ServedModel(facts, "tiny")


def outputs_of(generation, tokenizer, ids, prompt_ids):
    """What the engine brings for these tokens: their text as they come, and two rivals of each."""
    (sample,) = generation.samples
    detokenizer = tokenizer.detokenizer(sample.params.skip_special_tokens, prompt_ids)
    for at, token_id in enumerate(ids):
        is_last = at == len(ids) - 1
        text = detokenizer.push([token_id]) + (detokenizer.flush() if is_last else "")
        others = [(token_id, -0.5), ((token_id + 1) % tokenizer.vocab_size, -1.0), (3, -2.0)]
        entry = TokenLogprobs(token_id, -0.5, 1, tuple(dict(others).items())[:3])
        prompt = tuple(TokenLogprobs(i, -1.5, 1, ((i, -1.5),)) for i in prompt_ids[1:]) if at == 0 else None
        reason = FinishReason.LENGTH if is_last else None
        request = SimpleNamespace(stop_reason=None)
        yield sample, Output(request, text, (token_id,), (entry,), reason, prompt_logprobs=prompt)


def check(text, logprobs, ids, tokenizer):
    """Every token stands where it says; what one does not show (special, part of a character) says so."""
    tokens, offsets = logprobs["tokens"], logprobs["text_offset"]
    assert len(tokens) == len(offsets) == len(ids) and offsets == sorted(offsets)
    for token, offset, token_id in zip(tokens, offsets, ids, strict=True):
        if not token.startswith("bytes:") and not (token in SPECIAL and text[offset : offset + len(token)] != token):
            assert text[offset : offset + len(token)] == token, (token, offset, text)
        assert 0 <= offset <= len(text) and isinstance(token, str), token_id


@given(kinds, st.sampled_from(PROMPTS) | st.text("the fox,€🙂ïX. \n'", min_size=1, max_size=12), answers, st.booleans(),
       st.booleans(), st.booleans(), st.booleans())  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_tokens_index_the_text(kind, prompt, numbers, echo, stream, as_ids, skip):
    tokenizer = TOKENIZERS[kind]
    prompt_ids = tokenizer.encode(prompt)
    ids = [number % tokenizer.vocab_size for number in numbers]
    body = {"prompt": prompt_ids if as_ids else prompt, "echo": echo, "stream": stream, "logprobs": 3, "max_tokens": 20}
    completion = Completion.prepare(
        parse_completion({**body, "skip_special_tokens": skip}), served(tokenizer), request_id="cmpl-1"
    )
    outputs = outputs_of(completion, tokenizer, ids, completion.samples[0].prompt_token_ids)
    choices = []
    for sample, output in outputs:
        if stream:
            (choice,) = completion.chunk(sample, _without_report(output))["choices"]
            choices.append(choice)
        else:
            completion.collect(sample, output)
    if not stream:
        completion.choices[0].request = None  # as after a resume: there is no report of a fake request
        choices = completion.response()["choices"]
    text = "".join(choice["text"] for choice in choices)
    joined = {name: [x for choice in choices for x in choice["logprobs"][name]] for name in choices[0]["logprobs"]}
    check(text, joined, [*(prompt_ids if echo else ()), *ids], tokenizer)
    if echo and not as_ids:
        assert text.startswith(prompt)
    for at, top in enumerate(joined["top_logprobs"][-len(ids) :]):
        assert len(top) == len({ids[at], (ids[at] + 1) % tokenizer.vocab_size, 3}), "no rival is lost"
        assert joined["tokens"][at - len(ids)] in top
    json.dumps(joined)


def _without_report(output):
    """A chunk with a reason reports on the request, which is a fake here."""
    return Output(output.request, output.text, output.token_ids, output.logprobs, None,
                  prompt_logprobs=output.prompt_logprobs)  # fmt: skip


@given(kinds, answers)
@settings(max_examples=60, deadline=None)
def test_bytes_of_a_chat_s_tokens_join_to_its_content(kind, numbers):
    tokenizer = TOKENIZERS[kind]
    ids = [3 + number % (tokenizer.vocab_size - 3) for number in numbers]  # no special ones
    body = parse_chat({"messages": [{"role": "user", "content": "the fox"}], "logprobs": True, "top_logprobs": 2})
    chat = ChatCompletion.prepare(body, served(tokenizer), request_id="chatcmpl-1")
    for sample, output in outputs_of(chat, tokenizer, ids, chat.samples[0].prompt_token_ids):
        chat.collect(sample, output)
    chat.choices[0].request = None
    (choice,) = chat.response()["choices"]
    content = choice["logprobs"]["content"]
    joined = b"".join(bytes(entry["bytes"]) for entry in content)
    text = choice["message"]["content"]
    assert joined.decode("utf-8", "replace") == text or "\ufffd" in text, "bytes that are no text show as they like"
    for entry in content:
        assert entry["token"].startswith("bytes:") or entry["token"].encode() == bytes(entry["bytes"])
        assert entry["top_logprobs"][0]["token"] == entry["token"]


@pytest.mark.parametrize("kind", ["metaspace BPE", "metaspace Unigram", "WordPiece", "byte fallback"])
def test_words_keep_their_space(kind):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("the the the", add_special_tokens=False)
    texts = tokenizer.token_texts(prompt_token_ids=tokenizer.encode("the"))
    found = [texts.push(token_id) for token_id in ids]
    assert "".join(text.shown for text in found) == " the the the"
    assert b"".join(tokenizer.token_bytes(token_id) for token_id in ids) == b" the the the"


def test_parts_of_characters_are_bytes_at_the_place_of_the_character():
    for kind in ("byte-level", "byte fallback"):
        tokenizer = TOKENIZERS[kind]
        ids = list(itertools.chain.from_iterable(_byte_id(tokenizer, byte) for byte in "ä🙂".encode()))
        texts = tokenizer.token_texts(offset=5)
        found = [texts.push(token_id) for token_id in ids]
        assert [text.offset for text in found] == [5, 5, 6, 6, 6, 6], kind
        assert [text.shown for text in found[:2]] == ["bytes:\\xc3", "bytes:\\xa4"]
        assert b"".join(text.data for text in found).decode() == "ä🙂"


def _byte_id(tokenizer, byte):
    return [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([byte])][:1]


def test_a_prompt_of_special_tokens_only_costs_little():
    tokenizer = TOKENIZERS["byte-level"]
    prompt = "</s>" * 4000
    text, tokens = tokenizer.prompt_texts(prompt, tokenizer.encode(prompt))
    assert text == prompt and len(tokens) == 4001 and tokens[-1].offset == len(prompt) - 4
