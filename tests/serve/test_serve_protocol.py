"""The completion body: what is taken, and the sentence with which the rest is refused."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jax.request import SamplingParams, Slo
from apt_jax.serve.errors import BadRequest
from apt_jax.serve.json_text import parse_json
from apt_jax.serve.openai.bodies.chat_requests import MAX_MESSAGES, parse_chat
from apt_jax.serve.openai.bodies.requests import parse_completion
from apt_jax.serve.openai.bodies.slo import SloBody, slo_of
from apt_jax.serve.openai.prompts import prompt_ids
from tests.support.fake_engine import CharTokenizer


def parse(**fields):
    return parse_completion({"prompt": "hi", **fields})


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("hi", ("hi",)),
        (["hi", "ho"], ("hi", "ho")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_prompt_takes_four_forms(prompt, parsed):
    assert parse(prompt=prompt).prompt == parsed


def test_defaults_are_openai_s():
    assert parse().sampling_params() == SamplingParams(max_tokens=16)


def test_null_is_the_default_for_every_field_but_prompt():
    names = set(type(parse()).model_fields) - {"prompt"}
    assert parse(**dict.fromkeys(names)).sampling_params() == SamplingParams(max_tokens=16)


def test_sampling_fields_reach_the_sampling_params():
    fields = {
        "n": 2,
        "max_tokens": 5,
        "min_tokens": 1,
        "temperature": 0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": -4,
        "stop": ["x"],
        "stop_token_ids": [9],
        "allowed_token_ids": [9, 10],
        "bad_words": ["never"],
        "ignore_eos": True,
        "logprobs": 3,
        "prompt_logprobs": 4,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    others = {"logit_bias", "structured_outputs", "truncate_prompt_tokens"}
    assert set(fields) | others == SamplingParams.field_names(), "a sampling field is not in the API"
    expected = SamplingParams(**fields, logit_bias={7: -1.5})
    assert parse(**fields, logit_bias={"7": -1.5}).sampling_params() == expected


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}, "strict": True}}},
         {"json": {"type": "null"}}),
        ({"structured_outputs": {"json": {"enum": [1]}}}, {"json": {"enum": [1]}}),
        ({"structured_outputs": {"json": '{"enum": [1]}', "regex": None}}, {"json": '{"enum": [1]}'}),
        ({"structured_outputs": {"choice": ["a", "b"]}, "response_format": {"type": "text"}}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"grammar": "start: x"}}, {"grammar": "start: x"}),
    ],
)  # fmt: skip
def test_structures_reach_the_sampling_params(fields, asked):
    assert parse(**fields).sampling_params().structured_outputs == asked


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"prompt": ""}, "prompt", "prompt is empty; give at least one character or token id"),
        ({"prompt": []}, "prompt", "prompt is empty; give at least one character or token id"),
        ({"prompt": ["a", ""]}, "prompt", "prompt 1 is empty; give at least one character or token id"),
        ({"prompt": [[1], []]}, "prompt", "prompt 1 is empty; give at least one character or token id"),
        ({"prompt": None}, "prompt", "prompt must be a string, a list of strings"),
        ({"prompt": [1, "a"]}, "prompt", "prompt must be a string, a list of strings"),
        ({"prompt": [True]}, "prompt", "prompt must be a string, a list of strings"),
        ({"prompt": {"text": "a"}}, "prompt", 'not {"text": "a"}'),
        ({"temprature": 1}, "temprature", 'unknown field "temprature"; did you mean temperature?'),
        ({"xyzzy": 1}, "xyzzy", 'unknown field "xyzzy"'),
        ({"best_of": 2}, "best_of", "field best_of is not supported; leave it out"),
        ({"suffix": "x"}, "suffix", "field suffix is not supported; leave it out"),
        ({"max_tokens": "5"}, "max_tokens", 'max_tokens="5": input should be a valid integer'),
        ({"max_tokens": 5.5}, "max_tokens", "max_tokens=5.5: input should be a valid integer"),
        ({"max_tokens": True}, "max_tokens", "max_tokens=true: input should be a valid integer"),
        ({"temperature": "hot"}, "temperature", 'temperature="hot": input should be a valid number'),
        ({"stream": 1}, "stream", "stream=1: input should be a valid boolean"),
        ({"stop": [1]}, "stop", "stop must be a string or a list of strings, not [1]"),
        ({"stop": ["a"] * 65}, "stop", "stop has 65 strings, at most 64 are allowed"),
        ({"logit_bias": {"x": 1}}, "logit_bias", 'logit_bias has the key "x", keys must be token ids'),
        ({"logit_bias": {"-1": 1}}, "logit_bias", 'logit_bias has the key "-1", keys must be token ids'),
        (
            {"stop_token_ids": [5, -1]},
            "stop_token_ids",
            "stop_token_ids=-1: input should be greater than or equal to 0",
        ),
        ({"logit_bias": [1]}, "logit_bias", "logit_bias=[1]: input should be a valid dictionary"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream=true"),
        ({"stream": True, "stream_options": {"chunks": 1}}, "stream_options.chunks", "unknown field"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "only possible without stream"),
        ({"echo": True, "max_tokens": 0, "min_tokens": 1}, "min_tokens", "min_tokens=1 is more than max_tokens=0"),
        ({"slo": {"ttft_ms": 0}}, "slo.ttft_ms", "slo.ttft_ms=0: input should be greater than or equal to 0.001"),
        ({"slo": {"ttft": 5}}, "slo.ttft", 'unknown field "slo.ttft"'),
        ({"temperature": float("inf")}, "temperature", "finite number"),
    ],
)
def test_a_bad_field_is_refused_by_name(fields, param, sentence):
    with pytest.raises(BadRequest) as caught:
        parse(**fields)
    assert sentence in str(caught.value)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens", "max_tokens=0 must be at least 1"),
        ({"temperature": -1}, "temperature", "temperature=-1.0 must be between 0.0 and 10000.0"),
        ({"n": 1000}, "n", "n=1000 must be between 1 and 128"),
        ({"logprobs": 21}, "logprobs", "logprobs=21 must be between 0 and 20"),
        ({"logprobs": 21, "echo": True}, "logprobs", "logprobs=21 must be between 0 and 20"),
        ({"prompt_logprobs": -1, "logprobs": 1, "echo": True}, "prompt_logprobs", "must be between 0 and 20"),
        ({"max_tokens": -1, "echo": True}, "max_tokens", "max_tokens=-1 must be at least 1"),
        ({"seed": 2**64}, "seed", "must be between"),
        ({"stop": ""}, "stop", "stop has an empty string"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(fields, param, sentence):
    with pytest.raises(BadRequest) as caught:
        parse(**fields).sampling_params()
    assert sentence in str(caught.value)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({"logprobs": 2}, (2, None)),
        ({"prompt_logprobs": 3}, (None, 3)),
        ({"logprobs": 2, "echo": True}, (2, 2)),
        ({"logprobs": 2, "prompt_logprobs": 5, "echo": True}, (2, 5)),
        ({"logprobs": 2, "prompt_logprobs": 0, "echo": True}, (2, 2)),
        ({"echo": True}, (None, None)),
    ],
)
def test_echo_wants_the_logprobs_of_the_prompt_too(fields, counts):
    params = parse(**fields).sampling_params()
    assert (params.logprobs, params.prompt_logprobs) == counts


def test_a_missing_prompt_is_named():
    with pytest.raises(BadRequest, match="field prompt is missing"):
        parse_completion({"model": "m"})


@pytest.mark.parametrize("value", [[], "x", 3, None])
def test_a_body_that_is_no_object_is_refused(value):
    with pytest.raises(BadRequest, match="must be a JSON object"):
        parse_completion(value)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b'{"a": "\\ud800"}', b'{"a":' + b"9" * 5000 + b"}"]
)
def test_what_is_not_json_is_refused(data):
    with pytest.raises(BadRequest, match="the body is not valid JSON"):
        parse_json(data)


texts = st.text(alphabet='ab1-\n"\u00e9\U0001f600', max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
field_names = st.sampled_from([*type(parse()).model_fields, "best_of", "x"])


@given(st.dictionaries(field_names, json_values, max_size=4))
def test_any_body_is_either_taken_or_refused_with_a_short_sentence(fields):
    sentence = "taken"
    try:
        parse_completion(json.loads(json.dumps(fields))).sampling_params()
    except BadRequest as error:
        sentence = str(error)
    assert 0 < len(sentence) < 400 and "\n" not in sentence


def test_slo_comes_from_body_then_header_then_default():
    headers = {"x-slo-ttft-ms": "250", "x-slo-tbt-ms": "50"}
    default = Slo(1.0, 2.0)
    assert slo_of(None, {}, default) == default
    assert slo_of(None, headers, default) == Slo(0.25, 0.05)
    assert slo_of(SloBody(ttft_ms=100.0), headers, default) == Slo(0.1, 0.05)
    default = Slo(1.0, 2.0, 4.0)
    assert slo_of(None, headers, default) == Slo(0.25, 0.05, 4.0)
    assert slo_of(None, {"x-slo-stall-ms": "500"}, default) == Slo(1.0, 2.0, 0.5)
    assert slo_of(SloBody(stall_ms=3000.0), {"x-slo-stall-ms": "500"}, default) == Slo(1.0, 2.0, 3.0)


def test_the_gap_slo_has_two_spellings_which_must_agree():
    assert slo_of(None, {"x-slo-tpot-ms": "50"}, Slo()) == Slo(1.0, 0.05)
    assert slo_of(None, {"x-slo-tpot-ms": "50", "x-slo-tbt-ms": "50.0"}, Slo()) == Slo(1.0, 0.05)
    assert slo_of(SloBody(tbt_ms=20.0), {"x-slo-tpot-ms": "50"}, Slo()) == Slo(1.0, 0.02)
    with pytest.raises(BadRequest, match="x-slo-tbt-ms=40 and x-slo-tpot-ms=50 mean the same and differ") as caught:
        slo_of(None, {"x-slo-tpot-ms": "50", "x-slo-tbt-ms": "40"}, Slo())
    assert caught.value.param == "x-slo-tbt-ms"


def test_an_slo_header_that_comes_twice_must_agree_with_itself():
    assert slo_of(None, {"x-slo-stall-ms": "50, 50.0"}, Slo()) == Slo(1.0, 1.0, 0.05)
    for text, sentence in (
        ("40,50", "header x-slo-stall-ms came several times, with .40,50.; send it once"),
        ("40,", "header x-slo-stall-ms: .40,. must be a number of milliseconds"),
        ("nan,nan", "header x-slo-stall-ms: .nan,nan. must be a number of milliseconds"),
    ):
        with pytest.raises(BadRequest, match=sentence) as caught:
            slo_of(SloBody(stall_ms=1.0), {"x-slo-stall-ms": text}, Slo())
        assert caught.value.param == "x-slo-stall-ms"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("slo", 5, "slo=5: input should be a JSON object"), ("slo", [], "slo=[]: input should be a JSON object"),
     ("slo", {"tpot_ms": 5}, 'unknown field "slo.tpot_ms"; did you mean tbt_ms?'),
     ("slo", {"ttft": 5}, 'unknown field "slo.ttft"; did you mean ttft_ms?'),
     ("slo", {"seeds": 5}, 'unknown field "slo.seeds"'),
     ("stream_options", True, "stream_options=true: input should be a JSON object")],
)  # fmt: skip
def test_what_is_wrong_in_an_object_of_the_body_is_told_by_its_own_fields(field, value, message):
    with pytest.raises(BadRequest) as caught:
        parse_completion({"prompt": "a", "stream": True, field: value})
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ["", "fast", "0", "-1", "nan", "inf"])
def test_a_bad_slo_header_is_refused(text):
    for header in ("x-slo-ttft-ms", "x-slo-tbt-ms", "x-slo-tpot-ms", "x-slo-stall-ms"):
        with pytest.raises(BadRequest, match="must be a number of milliseconds greater than 0") as caught:
            slo_of(None, {header: text}, Slo())
        assert caught.value.param == header
    with pytest.raises(BadRequest, match="must be a number of milliseconds greater than 0"):
        slo_of(SloBody(tbt_ms=5.0), {"x-slo-tbt-ms": text}, Slo())  # the body goes before it, but wrong is wrong


def test_a_list_is_counted_before_its_entries_are_checked():
    for number, refusal in ((MAX_MESSAGES, "messages.0"), (MAX_MESSAGES + 1, f"at most {MAX_MESSAGES} are allowed")):
        with pytest.raises(BadRequest) as caught:
            parse_chat({"messages": [0] * number})
        assert refusal in f"{caught.value.param}: {caught.value}"


class NeverEncodes(CharTokenizer):
    def encode(self, text, add_special_tokens=True):
        raise AssertionError("it was tokenised")


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised():
    engine, body = SimpleNamespace(tokenizer=NeverEncodes(), max_model_len=128), parse_completion({"prompt": "a"})
    with pytest.raises(BadRequest, match="maximum context length"):
        prompt_ids("a" * 129, body, engine, "prompt", special=True)
    with pytest.raises(AssertionError, match="it was tokenised"):
        prompt_ids("a" * 20, body, engine, "prompt", special=True)
