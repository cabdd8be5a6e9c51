"""What a snapshot keeps of a request, field by field, and what comes back."""

import json

import pytest

from apt_jax.output import Output, TokenLogprobs
from apt_jax.request import MAX_USER_CHARS, FinishReason, Request, Slo
from apt_jax.serve.http.snapshot import is_of, record_of, restore
from apt_jax.serve.http.snapshot_file import read_snapshot, write_snapshot
from apt_jax.serve.openai.bodies.requests import parse_completion
from apt_jax.serve.openai.completions import Completion
from apt_jax.serve.openai.generation import ServedModel
from tests.support.fake_engine import CharTokenizer, FakeEngine

MODEL = ServedModel(FakeEngine(tokenizer=CharTokenizer()), "tiny")
SCORE = TokenLogprobs(98, -0.5, 2, ((99, -0.25), (98, -0.5)))


def prepared(**body):
    """A completion of the prompt "a"."""
    parsed = parse_completion({"prompt": "a", "max_tokens": 9, **body})
    return Completion.prepare(parsed, MODEL, request_id="cmpl-1")


def bring(generation, index, text, reason=None, *, seed=None, scores=(), prompt_scores=None):
    """An output of sample `index` with the tokens of `text`; the engine's request has `seed`."""
    sample = generation.samples[index]
    params = sample.params.with_seed(seed)
    request = Request(sample.request_id, sample.prompt_token_ids, params, 0.0, 9)
    tokens = tuple(text.encode("latin-1"))
    generation.collect(sample, Output(request, text, tokens, scores, reason, prompt_logprobs=prompt_scores))


def kept(name="cmpl-1", **body):
    """The record of a request that has not begun."""
    record = record_of(prepared(**body), "weights:fake")
    return {**record, "id": name, "samples": [{**entry, "request_id": name} for entry in record["samples"]]}


def round_trip(generation):
    record = json.loads(json.dumps(record_of(generation, "weights:fake")))
    return restore(record, MODEL), record


def test_the_seed_that_the_engine_drew_is_kept():
    generation = prepared()
    assert generation.samples[0].params.seed is None
    bring(generation, 0, "b")
    bring(generation, 0, "c", FinishReason.ABORT, seed=2**62 + 3)
    (_, (sample,)), _ = round_trip(generation)
    assert sample.params.seed == 2**62 + 3
    assert sample.output_token_ids == [98, 99]


def test_the_user_is_kept_and_snapshots_of_earlier_versions_have_none():
    (_, (sample,)), record = round_trip(prepared(user="someone"))
    assert sample.user == "someone"
    del record["samples"][0]["user"]
    assert restore(record, MODEL)[1][0].user is None


@pytest.mark.parametrize("wrong", [5, ["someone"], "x" * (MAX_USER_CHARS + 1)])
def test_a_user_that_no_client_could_give_is_refused(wrong):
    record = kept(user="x" * MAX_USER_CHARS)
    assert restore(record, MODEL)[1][0].user == "x" * MAX_USER_CHARS
    record["samples"][0]["user"] = wrong
    sentence = r"the snapshot of request cmpl-1 is damaged: user=\S+ is no text of at most 256 characters$"
    with pytest.raises(ValueError, match=sentence) as error:
        restore(record, MODEL)
    assert len(str(error.value)) < 400


def test_each_sample_keeps_a_seed_of_its_own():
    generation = prepared(n=3)
    for index in range(3):
        bring(generation, index, "b", FinishReason.ABORT, seed=100 + index)
    (_, samples), _ = round_trip(generation)
    assert [sample.params.seed for sample in samples] == [100, 101, 102]


def test_a_seed_that_was_given_is_kept_before_the_engine_has_ended_it():
    generation = prepared(seed=7)
    bring(generation, 0, "b", seed=9)
    (_, (sample,)), _ = round_trip(generation)
    assert sample.params.seed == 7, "what was asked; the engine's request is known at its end only"


def test_priority_promise_parameters_and_prompts_are_kept():
    body = {"prompt": ["ab", "x"], "n": 2, "priority": -3, "temperature": 0.5, "stop": ["zz"], "logit_bias": {"5": 2.0},
            "slo": {"ttft_ms": 250, "tbt_ms": 125}, "min_tokens": 2, "stop_token_ids": [70]}  # fmt: skip
    generation = prepared(**body)
    (again, samples), record = round_trip(generation)
    assert [sample.request_id for sample in samples] == ["cmpl-1-0-0", "cmpl-1-0-1", "cmpl-1-1-0", "cmpl-1-1-1"]
    assert [sample.index for sample in samples] == [0, 1, 2, 3]
    for sample in samples:
        assert (sample.priority, sample.slo) == (-3, Slo(0.25, 0.125))
        params = sample.params
        assert (params.temperature, params.stop, params.logit_bias, params.min_tokens) == (0.5, ("zz",), {5: 2.0}, 2)
        assert (params.stop_token_ids, params.max_tokens, params.n) == ((70,), 9, 1)
    assert [list(prompt) for prompt in again.prompt_token_ids] == [[2, 97, 98], [2, 120]]
    assert [list(sample.prompt_token_ids) for sample in samples] == [[2, 97, 98]] * 2 + [[2, 120]] * 2
    assert again.created == generation.created and again.request_id == "cmpl-1"
    assert again.body == generation.body and record["kind"] == "cmpl"


def test_a_promise_that_was_not_given_is_the_server_s():
    (_, (sample,)), record = round_trip(prepared())
    assert sample.slo == Slo(1.0, 1.0) and sample.priority == 0
    record["samples"][0]["slo"] = None
    assert restore(record, MODEL)[1][0].slo is None


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
def test_a_sample_that_has_ended_is_kept_and_not_run_again(reason):
    generation = prepared(n=2, logprobs=1)
    bring(generation, 0, "b", scores=(SCORE,))
    bring(generation, 0, "cd", reason, scores=(SCORE, SCORE), seed=5)
    bring(generation, 1, "b", FinishReason.ABORT, scores=(SCORE,), seed=6)
    (again, unfinished), _ = round_trip(generation)
    assert [sample.index for sample in unfinished] == [1] and again.num_unfinished == 1 and not again.is_finished
    done, left = again.choices
    assert (done.finish_reason, done.text, done.token_ids) == (reason, ["bcd"], [98, 99, 100])
    assert done.logprobs == [SCORE] * 3 and left.logprobs == [SCORE]
    assert (left.finish_reason, left.text, left.token_ids, left.started) == (None, [], [98], True)


def test_scores_of_the_prompt_are_kept_and_a_record_without_them_is_read_too():
    generation = prepared(prompt_logprobs=1)
    bring(generation, 0, "b", prompt_scores=(SCORE,))
    (again, _), record = round_trip(generation)
    assert again.choices[0].prompt_logprobs == [SCORE]
    record["samples"][0]["prompt_logprobs"] = None
    assert restore(record, MODEL)[0].choices[0].prompt_logprobs is None
    del record["samples"][0]["prompt_logprobs"]
    assert restore(record, MODEL)[0].choices[0].prompt_logprobs is None


def test_what_has_not_begun_begins_anew():
    (again, (sample,)), _ = round_trip(prepared())
    assert sample.output_token_ids == [] and not again.choices[0].started and again.num_unfinished == 1


@pytest.mark.parametrize("missing", ["id", "samples", "prompts", "created", "body"])
def test_a_record_that_lacks_a_part_is_refused(missing):
    record = kept()
    del record[missing]
    with pytest.raises(ValueError, match=r"the snapshot of request (cmpl-1|None) is damaged"):
        restore(record, MODEL)


def test_a_file_is_replaced_as_a_whole_and_readable_for_its_owner_only(tmp_path):
    path = tmp_path / "left.jsonl"
    write_snapshot(path, [kept("a")])
    path.chmod(0o644)
    (tmp_path / ".left.jsonl.x1.draft").write_text("torn")
    assert write_snapshot(path, [kept("a"), kept("b", seed=4)]) == 2
    assert [r["samples"][0]["params"]["seed"] for r in read_snapshot(path)] == [None, 4]
    assert path.stat().st_mode & 0o777 == 0o600 and [p.name for p in tmp_path.iterdir()] == ["left.jsonl"]
    assert read_snapshot(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 1}, "line 2 is of version 1, this server reads 2"),
        ({"version": 3}, "line 2 is of version 3, this server reads 2"),
        ({"kind": "embeddings"}, "line 2 is no snapshot of a request of this server"),
        ({"id": 7}, "line 2 is no snapshot of a request of this server"),
    ],
)
def test_another_version_or_kind_is_refused_with_its_line(tmp_path, caplog, change, sentence):
    path = tmp_path / "left.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (kept("a"), {**kept("b"), **change})))
    assert [record["id"] for record in read_snapshot(path)] == ["a"] and sentence in caplog.text
    path.write_text("\n" + json.dumps({**kept("b"), **change}) + "\n")
    with pytest.raises(ValueError, match=f"{sentence}; move the file away, or choose another one"):
        read_snapshot(path)


def test_a_record_names_its_model_and_is_of_the_same_weights_only():
    record = kept()
    assert (record["model"], record["fingerprint"]) == ("tiny", "weights:fake")
    assert is_of(record, MODEL) and not is_of({**record, "fingerprint": "weights:other"}, MODEL)
    assert is_of({**record, "fingerprint": ""}, MODEL), "an engine that was made without a checkpoint"
