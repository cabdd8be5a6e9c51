"""Outputs that must follow a grammar: what the engine samples, whatever runs beside it.

APT_JAX_SCHEMAS=FILE takes the random schemas from a file, a JSON list, in place of those drawn here.
"""

import json
import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import jsonschema_rs
import numpy as np
import pytest

from apt_jax.batching.allowed_tokens import allowed_tokens
from apt_jax.checkpoints.load import load_model
from apt_jax.engine.engine import Engine
from apt_jax.engine.setup import set_up
from apt_jax.engine_config import EngineConfig
from apt_jax.request import FinishReason, SamplingParams
from apt_jax.serve.runtime.driver import Driver
from apt_jax.serve.runtime.samples import Sample, fan_out
from apt_jax.tokenization.grammars import compiling
from apt_jax.tokenization.grammars.compiling import Grammars
from apt_jax.tokenization.tokenizer import Tokenizer
from tests.support.engines import finish
from tests.support.random_schemas import random_schemas

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "tags"],
    "properties": {
        "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bb"]}, "maxItems": 3},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded():
    found = load_model(None)
    return SimpleNamespace(weights=found.weights, config=found.config, tokenizer=Tokenizer.from_folder(found.folder))


@pytest.fixture(scope="module")
def engine(loaded):
    """One whose pool is too small for four long outputs."""
    chosen = EngineConfig(
        max_model_len=256, num_blocks=34, max_num_seqs=4, max_num_batched_tokens=64, scheduling_policy="fcfs",
        cache_mode="kv",
    )  # fmt: skip
    return Engine(set_up(loaded.weights, loaded.config, chosen), loaded.tokenizer)


def text_of(engine, request) -> str:
    return engine.tokenizer.decode(request.output_token_ids)


def ask(engine, name, asked, prompt="def f(", **params):
    chosen = SamplingParams(**{"max_tokens": 120, "temperature": 1.0, "seed": 5, "structured_outputs": asked, **params})
    return engine.add(engine.tokenizer.encode(prompt), chosen, request_id=name)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_form_is_followed_beside_requests_that_are_free(engine, asynchronous, monkeypatch):
    monkeypatch.setattr(engine, "_depth", int(asynchronous))
    free = ask(engine, "free", None, temperature=0, max_tokens=40, ignore_eos=True)
    asked = {
        "json": {"json": SCHEMA}, "regex": {"regex": r"\d{3}-[a-f]{4}"}, "choice": {"choice": ["yes", 'n"o']},
        "grammar": {"grammar": 'start: "x" ("," "x")~2'}, "object": {"json_object": True},
    }  # fmt: skip
    requests = {name: ask(engine, name, each, max_tokens=160) for name, each in asked.items()}
    finish(engine)
    texts = {name: text_of(engine, request) for name, request in requests.items()}
    found = json.loads(texts["json"])
    assert found.keys() == {"name", "age", "tags"} and 0 <= found["age"] <= 120 and set(found["tags"]) <= {"a", "bb"}
    assert re.fullmatch(r"\d{3}-[a-f]{4}", texts["regex"]) and texts["choice"] in ("yes", 'n"o')
    assert texts["grammar"] == "x,x,x"
    assert {r.finish_reason for name, r in requests.items() if name != "object"} == {FinishReason.STOP}
    alone = ask(engine, "alone", None, temperature=0, max_tokens=40, ignore_eos=True)
    finish(engine)
    assert free.output_token_ids == alone.output_token_ids


def test_the_same_seed_gives_the_same_alone_preempted_and_resumed(engine):
    alone = ask(engine, "alone", {"json": SCHEMA})
    finish(engine)
    crowd = [ask(engine, f"free{i}", None, max_tokens=100, ignore_eos=True, seed=i) for i in range(3)]
    crowded = ask(engine, "crowded", {"json": SCHEMA})
    finish(engine)
    assert crowded.output_token_ids == alone.output_token_ids
    assert sum(request.num_preemptions for request in (*crowd, crowded)) > 0
    begun = alone.output_token_ids[:9]
    resumed = engine.add(alone.prompt_token_ids, alone.params, request_id="resumed", output_token_ids=begun)
    finish(engine)
    assert resumed.output_token_ids == alone.output_token_ids
    with pytest.raises(ValueError, match="output_token_ids do not follow structured_outputs"):
        engine.add(alone.prompt_token_ids, alone.params, request_id="bad", output_token_ids=[90, 91, 92])


def test_what_follows_a_random_schema_is_an_instance_of_it(engine):
    given = os.environ.get("APT_JAX_SCHEMAS")
    schemas = random_schemas(40) if given is None else json.loads(Path(given).read_text("utf-8"))
    samples = [
        Sample(
            *(str(number), 0, engine.tokenizer.encode(f"x{number % 7} = ")),
            SamplingParams(temperature=1.0, seed=number, max_tokens=240, structured_outputs={"json": schema}),
        )
        for number, schema in enumerate(schemas)
    ]
    ended = [output for _, output in Driver(engine).run(samples) if output.finish_reason is not None]
    cut = [output for output in ended if output.finish_reason is FinishReason.LENGTH]  # a number without an end
    assert len(ended) == len(schemas) and len(cut) <= len(schemas) // 20
    for output in ended:
        schema, text = schemas[int(output.request.request_id)], text_of(engine, output.request)
        if output not in cut:
            assert output.finish_reason is FinishReason.STOP, (schema, text, output.error)
            assert jsonschema_rs.is_valid(schema, json.loads(text), validate_formats=True), (schema, text)


def test_more_grammars_than_may_be_followed_at_once_wait_for_each_other_offline(engine, monkeypatch):
    """`LLM.generate` ended with QueueFull in the middle of them."""
    monkeypatch.setattr(compiling, "MOST_PROCESSES", 3)
    engine.tokenizer.grammars.check({"regex": "before"})
    samples = [
        Sample(str(number), 0, [90], SamplingParams(max_tokens=9, structured_outputs={"regex": f"{number}[ab]{{3}}"}))
        for number in range(9)
    ]
    ended = [output for _, output in Driver(engine).run(samples) if output.finish_reason is not None]
    texts = {output.request.request_id: text_of(engine, output.request) for output in ended}
    assert len(texts) == 9 and all(re.fullmatch(f"{name}[ab]{{3}}", text) for name, text in texts.items())


def test_a_stop_string_ends_it_and_samples_of_one_prompt_differ(engine):
    """`n` samples are requests with seeds of their own, which `fan_out` derives."""
    samples = fan_out("s", [engine.tokenizer.encode("def f(")], SamplingParams(
        n=3, seed=1, max_tokens=40, structured_outputs={"regex": "[a-z]{12}"}, logprobs=1
    ))  # fmt: skip
    requests = [sample.add_to(engine) for sample in samples]
    stopped = ask(engine, "stopped", {"regex": "aaaa,bbbb,cccc"}, stop=["b,"])
    finish(engine)
    texts = [text_of(engine, request) for request in requests]
    assert all(re.fullmatch("[a-z]{12}", text) for text in texts) and len(set(texts)) == 3
    assert stopped.stop_reason == "b," and "aaaa,bbbb,cccc".startswith(text_of(engine, stopped))


def test_log_probabilities_stay_the_model_s_own(engine):
    outputs = []
    request = ask(engine, "a", {"choice": ["yes", "no"]}, temperature=0, logprobs=2)
    while engine.has_unfinished:
        outputs += engine.step()
    assert text_of(engine, request) in ("yes", "no")
    assert all(entry.rank >= 1 and entry.logprob < 0 for output in outputs for entry in output.logprobs)
    assert any(entry.rank > 1 for output in outputs for entry in output.logprobs), "or the grammar changed nothing"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"json": {"type": "banana"}}, "structured_outputs json cannot be compiled: .*banana"),
        ({"regex": "a("}, "structured_outputs regex cannot be compiled"),
        ({"grammar": "start: nothing"}, "structured_outputs grammar cannot be compiled"),
        (
            {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
            "structured_outputs json cannot be followed from its first token on: no text meets it",
        ),
        ({"regex": "a" * 500_000}, "structured_outputs has 500013 characters, at most 400000 are allowed"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "json cannot be compiled: Unsatisfiable"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(engine, asked, sentence):
    with pytest.raises(ValueError, match=sentence):
        ask(engine, "bad", asked)
    assert not engine.has_unfinished


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "structured_outputs is empty; give exactly one of json, json_object"),
        ({"json": {}, "regex": "a"}, "structured_outputs has json and regex; give exactly one of"),
        ({"xml": "a"}, "structured_outputs has xml; give exactly one of"),
        ("json", "structured_outputs='json' must be an object"),
        ({"choice": ["a", 1]}, "choice has something that is no text"),
        ({"regex": ""}, "structured_outputs regex='' must be a text that is not empty"),
        ({"choice": ["a"] * 10_001}, "structured_outputs choice has 10001 texts, at most 10000 are allowed"),
        ({"json_object": False}, "json_object=false asks for nothing; give true, or leave it out"),
        ({"choice": []}, r"choice=\[\] must be a list of texts, at least one"),
    ],
)
def test_what_makes_no_sense_is_refused_where_it_is_made(asked, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(structured_outputs=asked)


def test_a_grammar_that_fails_while_it_runs_ends_its_request_alone(engine):
    request, other = ask(engine, "a", {"regex": "[ab]{50}"}), ask(engine, "b", {"regex": "[ab]{4}"})

    class Fails:
        is_complete = False
        follows_tokens = True
        asked = "structured_outputs asks"

        def push(self, token) -> None:
            pass

        def close(self) -> None:
            pass

        def allow(self, words) -> str:
            words[:] = 0
            return "too many states"

    engine.step()
    request.restriction = Fails()
    outputs = [output for _ in range(30) if engine.has_unfinished for output in engine.step()]
    (failed,) = [output for output in outputs if output.request is request and output.finish_reason is not None]
    assert failed.error == "the output cannot go on as structured_outputs asks: too many states"
    assert re.fullmatch("[ab]{4}", text_of(engine, other))
    engine.state.check()


def test_a_grammar_that_would_take_long_ends_within_the_limits(engine):
    """By itself the library allows the ambiguous one a third of a second for a token."""
    asked = {"grammar": 'start: s\ns: s s s | s s | "a" | "b" | "ab" | '}
    request = ask(engine, "ambiguous", asked, ignore_eos=True, max_tokens=200)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert outputs[-1].request is request and outputs[-1].finish_reason is FinishReason.ERROR
    assert re.search("items; max is 500", outputs[-1].error) and "\n" not in outputs[-1].error


SEVERAL = [{"type": "integer", "multipleOf": number} for number in (9973, 9967, 9949, 9941)]


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": SEVERAL},
        {"properties": {"a": {"items": {"multipleOf": 9973, "anyOf": SEVERAL[1:]}}}},
        {"$defs": {"a": SEVERAL[0], "b/c": SEVERAL[1]}, "allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b~1c"}]},
    ],
)
def test_a_number_that_must_be_a_multiple_of_many_is_refused(engine, schema):
    """The library multiplies them out: it took all memory there was, without end."""
    with pytest.raises(ValueError, match=r"json cannot be compiled: it takes more than (2 s of proc|192 MiB of mem)"):
        ask(engine, "bad", {"json": schema})
    several = {name: {"multipleOf": 997, "type": "integer"} for name in "abcde"}
    ask(engine, "good", {"json": {"properties": several}}, max_tokens=3)
    finish(engine)


def test_bits_of_rows(loaded):
    grammars = Grammars(loaded.tokenizer._backend.to_str, loaded.tokenizer.eos_token_id)
    matcher = grammars.matcher({"choice": ["yes"]})

    class Row:
        def __init__(self, matcher):
            self.restriction = matcher

    allowed = allowed_tokens([Row(None), Row(matcher)], 4, loaded.config.vocab_size)
    words = allowed.words()
    assert words.shape == (4, -(-loaded.config.vocab_size // 32)) and not allowed.failed
    assert (pickle.loads(pickle.dumps(allowed.found())).words() == words).all(), "what other processes get"
    assert (words[[0, 2, 3]] == -1).all()
    bits = np.unpackbits(words[1].view(np.uint8), bitorder="little")
    texts = {loaded.tokenizer.token_text(int(token)) for token in np.flatnonzero(bits)}
    assert texts <= {"y", "ye", "yes"} and "y" in texts
    assert allowed_tokens([Row(None)], 4, loaded.config.vocab_size) is None


def test_a_tokenizer_without_an_end_cannot():
    with pytest.raises(ValueError, match="need an end-of-sequence token, and this tokenizer has none"):
        Grammars(str, None).check({"regex": "a"})
