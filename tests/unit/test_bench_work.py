"""The requests that benchmarks make: lengths, prompts and arrivals are those asked for, and the same for a seed."""

import json

import numpy as np
import pytest

from apt_jax.checkpoints.demo_training.tokenizer import save_tokenizer, train_tokenizer
from apt_jax.serve.bench.work import load_dataset, load_tokenizer, make_work, text_of_length
from apt_jax.serve.bench.work_options import WorkOptions
from apt_jax.simulation.workload import gamma_times, load_lengths, recorded_times
from apt_jax.tokenization.tokenizer import Tokenizer
from tests.support.fake_engine import CharTokenizer


def works_of(options, *, seed=0, tokenizer=None, run=0, **more):
    dataset = load_dataset(options, seed=seed, tokenizer=tokenizer, **more)
    rows = dataset.rows(options.num_prompts, seed=seed).tolist()
    return make_work(dataset, rows, vocab_size=options.vocab_size, tokenizer=tokenizer, seed=(seed, run))


def test_random_prompts_are_token_ids_of_the_lengths_asked_for():
    options = WorkOptions(num_prompts=300, random_input_len=20, random_output_len=10, random_range_ratio=0.5)
    works = works_of(options)
    assert all(len(work.prompt) == work.prompt_tokens for work in works)
    assert {work.prompt_tokens for work in works} == set(range(10, 31))
    assert {work.output_tokens for work in works} == set(range(5, 16))
    assert all(10 <= token < 256 for work in works for token in work.prompt)


def test_a_seed_gives_the_same_requests_and_every_run_other_prompts_of_the_same_lengths():
    options = WorkOptions(num_prompts=20, dataset="sharegpt")
    assert works_of(options) == works_of(options)
    first, second, other = works_of(options), works_of(options, run=1), works_of(options, seed=1)
    lengths = [[(work.prompt_tokens, work.output_tokens) for work in works] for works in (first, second, other)]
    assert lengths[0] == lengths[1] != lengths[2]
    assert all(a.prompt != b.prompt for a, b in zip(first, second, strict=True))


def test_a_dataset_leaves_out_what_the_context_does_not_hold():
    works = works_of(WorkOptions(num_prompts=500, dataset="sharegpt"), max_model_len=128)
    assert max(work.prompt_tokens + work.output_tokens for work in works) <= 128


def test_a_csv_file_is_a_table_of_lengths_and_may_have_arrivals(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,5,6\n1,7,8\n4,9,10\n")
    dataset = load_dataset(WorkOptions(dataset=str(path)), seed=0, tokenizer=None)
    assert dataset.has_arrivals and dataset.rows(5, seed=0, in_order=True).tolist() == [0, 1, 2, 0, 1]
    assert dataset.recorded_times(5, None).tolist() == [0, 1, 4, 4, 5]
    assert dataset.recorded_times(3, 1.5).tolist() == [0, 0.5, 2]  # recorded at 3 requests in 4 s


def test_a_sharegpt_file_brings_its_own_texts(tmp_path):
    path = tmp_path / "chats.json"
    talks = [("a" * 9, "b" * 5), ("short", "x"), ("c" * 30, "d" * 300), ("only",)]
    chats = [{"conversations": [{"from": "x", "value": text} for text in talk]} for talk in talks]
    path.write_text(json.dumps(chats))
    options = WorkOptions(dataset=str(path), num_prompts=2)
    works = works_of(options, tokenizer=CharTokenizer(), max_model_len=100)
    assert [(w.prompt, w.prompt_tokens, w.output_tokens) for w in works] == [("a" * 9, 10, 6)] * 2
    with pytest.raises(ValueError, match="need a tokenizer to be counted; give --tokenizer"):
        works_of(options)
    path.write_text('{"conversations": 3}')
    with pytest.raises(ValueError, match="is not a ShareGPT file"):
        works_of(options, tokenizer=CharTokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["the quick brown fox jumps over the lazy dog"], 300), path, 128)
    return path


def test_texts_have_as_many_tokens_as_asked_for(folder):
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, Tokenizer)
    generator = np.random.default_rng(0)
    found = [text_of_length(tokenizer, tokens, generator) for tokens in range(2, 120)]
    assert [len(tokenizer.encode(text)) for text, _ in found] == [tokens for _, tokens in found]
    exact = sum(tokens == wanted for (_, tokens), wanted in zip(found, range(2, 120), strict=True))
    assert exact >= 110 and all(tokens <= wanted for (_, tokens), wanted in zip(found, range(2, 120), strict=True))
    with pytest.raises(ValueError, match="makes no text of 1 tokens"):
        text_of_length(tokenizer, 1, generator)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"num_prompts": 0}, "num_prompts=0 must be at least 1"),
        ({"random_range_ratio": 1.0}, "random_range_ratio=1.0 must be"),
        ({"vocab_size": 4}, "vocab_size=4 must be at least 11"),
        ({"dataset": "no/such.csv"}, "no/such.csv"),
        ({"random_input_len": 4000}, "4128 tokens are more than the 2048 of the model's context"),
    ],
)
def test_wrong_options_are_named(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        works_of(WorkOptions(**flags))


def test_arrivals_are_the_same_for_a_seed_and_scale_with_the_rate():
    first = gamma_times(1000, rate=2.0, cv=1.0, seed=3)
    assert (first == gamma_times(1000, rate=2.0, cv=1.0, seed=3)).all()
    assert np.allclose(first / 2, gamma_times(1000, rate=4.0, cv=1.0, seed=3))
    assert (first != gamma_times(1000, rate=2.0, cv=1.0, seed=4)).all()


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_the_mean_and_variation_asked_for(cv):
    gaps = np.diff(gamma_times(40_000, rate=2.0, cv=cv, seed=0), prepend=0.0)
    assert gaps.mean() == pytest.approx(0.5, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-9)


def test_recorded_arrivals_keep_their_pattern():
    lengths = load_lengths("azure")
    times = recorded_times(lengths, 500, rate=2 * lengths.recorded_rate)
    assert np.allclose(times * 2, lengths.arrival_s[:500])
