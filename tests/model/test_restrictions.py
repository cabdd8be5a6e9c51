"""`allowed_token_ids` and `bad_words`: what the engine samples, and the bits by hand."""

import numpy as np
import pytest

from apt_jax.checkpoints.load import load_model
from apt_jax.engine.engine import Engine
from apt_jax.engine.setup import set_up
from apt_jax.engine_config import EngineConfig
from apt_jax.request import SamplingParams
from apt_jax.tokenization.restriction import Restriction, bad_sequences, clear, restriction
from apt_jax.tokenization.tokenizer import Tokenizer
from tests.support.engines import finish


@pytest.fixture(scope="module")
def engine():
    found = load_model(None)
    chosen = EngineConfig(max_model_len=256, num_blocks=40, max_num_seqs=4, max_num_batched_tokens=64)
    return Engine(set_up(found.weights, found.config, chosen), Tokenizer.from_folder(found.folder))


def ask(engine, name, prompt="def read_file(", **params):
    chosen = SamplingParams(**{"max_tokens": 40, "seed": 3, "ignore_eos": True, **params})
    return engine.add(engine.tokenizer.encode(prompt), chosen, request_id=name)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_only_allowed_tokens_are_sampled(engine, asynchronous, monkeypatch):
    monkeypatch.setattr(engine, "_depth", int(asynchronous))
    allowed = [7, 100, 1000, 3071]
    request, free = ask(engine, "a", allowed_token_ids=allowed), ask(engine, "b")
    depths = []
    while engine.has_unfinished:
        engine.step()
        depths.append(len(engine._inflight))
    assert set(request.output_token_ids) <= set(allowed) and len(set(request.output_token_ids)) > 1
    assert not set(free.output_token_ids) <= set(allowed) and len(request.output_token_ids) == 40
    assert max(depths) == int(asynchronous), "what does not depend on the newest token is planned ahead"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_words_do_not_occur(engine, temperature):
    plain = ask(engine, "a", temperature=temperature)
    finish(engine)
    text = engine.tokenizer.decode(plain.output_token_ids)
    single = engine.tokenizer.decode(plain.output_token_ids[:1]).strip()
    double = engine.tokenizer.decode(plain.output_token_ids[4:7]).strip()
    assert single in text and double in text
    first = ask(engine, "b", temperature=temperature, bad_words=[single])
    second = ask(engine, "c", temperature=temperature, bad_words=[double])
    finish(engine)
    for word, request in ((single, first), (double, second)):
        forbidden, given = bad_sequences([word], engine.tokenizer), request.output_token_ids
        assert forbidden
        for ids in forbidden:
            assert all(given[at : at + len(ids)] != ids for at in range(len(given)))
    assert second.output_token_ids != plain.output_token_ids and first.output_token_ids != plain.output_token_ids


def test_bits_of_a_sequence_depend_on_what_came():
    always = np.full(2, -1, np.int32)
    clear(always, [0, 63, 64, 1000])
    assert bits(always) == set(range(1, 63))
    found = Restriction(None, always, [(5, 6, 7), (6, 8)], generated=[1, 5])
    words = np.zeros(2, np.int32)
    assert found.follows_tokens and not found.is_complete
    assert found.allow(words) is None and bits(words) == set(range(1, 63))
    found.accept(6)
    assert found.allow(words) is None and bits(words) == set(range(1, 63)) - {7, 8}
    found.accept(9)
    assert found.allow(words) is None and bits(words) == set(range(1, 63))


def test_nothing_left_is_an_error():
    always = np.zeros(1, np.int32)
    assert Restriction(None, always).allow(np.zeros(1, np.int32)) == "no token can follow"
    assert not Restriction(None, always).follows_tokens


def test_bad_words_need_a_tokenizer():
    with pytest.raises(ValueError, match="bad_words need a tokenizer"):
        restriction(SamplingParams(bad_words=["a"]), None, 4, ())
    assert restriction(SamplingParams(), None, 4, ()) is None


def bits(words) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def test_what_leaves_only_an_end_before_min_tokens_is_refused():
    only = Restriction(None, np.array([0b110], np.int32), names=["allowed_token_ids"])
    only.check_begins(32, ends=[1])
    with pytest.raises(ValueError, match=r"allowed_token_ids and min_tokens leave no token .* \(only an end\); change"):
        only.check_begins(32, ends=[1, 2])
