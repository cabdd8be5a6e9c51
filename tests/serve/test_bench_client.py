"""The streaming client of `bench serve`: events however they are cut, and what every kind of server sends."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jax.serve.bench.serving.client import Answer, Endpoint, Events, plain_base
from apt_jax.serve.bench.serving.records import Record
from apt_jax.serve.bench.work import Work


@given(st.lists(st.integers(0, 200), max_size=8))
def test_events_are_the_same_however_the_bytes_are_cut(cuts):
    stream = b': hello\n\ndata: {"a": 1}\n\nevent: x\r\ndata:{"b": "\xc3\xa4"}\r\n\r\ndata: [DONE]\n\n'
    marks = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    events = Events()
    found = [event for a, b in itertools.pairwise(marks) for event in events.feed(stream[a:b])]
    assert found == [b'{"a": 1}', b'{"b": "\xc3\xa4"}', b"[DONE]"]


def taken(*chunks, done=True):
    record = Record(0.0, 5, 3)
    answer = Answer(record)
    for number, chunk in enumerate(chunks):
        answer.take(json.dumps(chunk).encode(), 1.0 + number)
    if done:
        answer.take(b"[DONE]", 99.0)
    answer.finish()
    return record


def text(value, reason=None):
    return {"choices": [{"index": 0, "text": value, "finish_reason": reason}]}


def delta(reason=None, **fields):
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": reason}]}


def usage(prompt_tokens, completion_tokens):
    return {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}


def test_every_piece_of_a_completion_is_a_token_also_one_without_text():
    record = taken(text("a"), text(""), text("b", "length"), usage(9, 3))
    assert record.piece_s == [1.0, 2.0, 3.0] and (record.prompt_tokens, record.output_tokens) == (9, 3)
    assert record.error is None


def test_without_usage_pieces_are_counted_and_the_prompt_is_what_was_sent():
    record = taken(text("a"), text("b", "length"))
    assert (record.prompt_tokens, record.output_tokens) == (5, 2)


def test_a_chat_s_role_and_end_are_no_tokens():
    """As OpenAI and vLLM send them: role first, and an empty piece with the reason last."""
    chunks = [delta(role="assistant", content=""), delta(content="a"), delta(content="b"), delta("stop"), usage(4, 2)]
    record = taken(*chunks)
    assert record.piece_s == [2.0, 3.0] and record.output_tokens == 2


def test_a_chat_whose_role_comes_with_the_first_token():
    record = taken(delta(role="assistant", content=""), delta("length", content="b"), usage(4, 2))
    assert record.piece_s == [1.0, 2.0], "a token may have no text yet"


def test_several_tokens_in_a_piece_are_told_by_usage():
    record = taken(text("abc"), text("de", "length"), usage(9, 5))
    assert record.piece_s == [1.0, 2.0] and record.output_tokens == 5


def test_a_role_and_an_end_are_no_tokens_where_pieces_hold_several():
    """Fewer pieces than tokens: the role must not be the first token, nor the reason the last."""
    chunks = [delta(role="assistant", content=""), delta(content="abcd"), delta(content="ef"), delta("stop")]
    record = taken(*chunks, usage(4, 6))
    assert record.piece_s == [2.0, 3.0] and record.first_tokens == 4
    assert record.tpot_s == pytest.approx(0.5), "two tokens in the second after the first piece"


@pytest.mark.parametrize("first", [{"role": "assistant", "content": ""}, {"role": "assistant"}, {"content": None}])
def test_running_usage_says_which_piece_is_a_token(first):
    chunks = [
        {**delta(**first), "usage": {"prompt_tokens": 4, "completion_tokens": 0}},
        {**delta(content="ab"), "usage": {"prompt_tokens": 4, "completion_tokens": 3}},
        {**delta(content=""), "usage": {"prompt_tokens": 4, "completion_tokens": 4}},
        {**delta("stop"), "usage": {"prompt_tokens": 4, "completion_tokens": 4}},
    ]
    record = taken(*chunks, usage(4, 4))
    assert record.piece_s == [2.0, 3.0] and (record.first_tokens, record.output_tokens) == (3, 4)
    assert record.tpot_s == 1.0


@pytest.mark.parametrize("where", ["token_ids", "tokens", "content"])
def test_token_ids_and_log_probabilities_count_tokens_too(where):
    def counted(value, tokens):
        more = {"token_ids": [7] * tokens} if where == "token_ids" else {"logprobs": {where: [{}] * tokens}}
        return {"choices": [{"index": 0, "text": value, **more}]}

    record = taken(counted("a", 2), counted("b", 3))
    assert (record.first_tokens, record.output_tokens) == (2, 5)


def test_without_usage_a_tokenizer_counts_the_tokens():
    record = Record(0.0, 5, 6)
    answer = Answer(record, count=len)
    for at, chunk in enumerate([text("ab"), text("cdef"), text("", "stop")]):
        answer.take(json.dumps(chunk).encode(), float(at))
    answer.take(b"[DONE]", 9.0)
    answer.finish()
    assert record.piece_s == [0.0, 1.0] and (record.output_tokens, record.first_tokens) == (6, 2)
    assert record.tpot_s == 0.25


def test_an_answer_in_one_piece_has_no_time_per_token():
    record = taken(text("abcdef", "stop"), usage(4, 6))
    assert not record.has_tpot and record.tpot_s == 0.0 and taken(text("a"), text("b"), usage(4, 2)).has_tpot


@pytest.mark.parametrize(
    "alive", [b": ping\n\n", b"data:\n\n", b"data: \r\n\r\n", b"event: ping\ndata: {}\n\n", b"data: null\n\n", b"\n\n"]
)
def test_events_that_only_keep_the_connection_alive_change_nothing(alive):
    record = Record(0.0, 5, 2)
    answer, events = Answer(record), Events()
    stream = [json.dumps(text("a")), json.dumps(text("b", "stop")), json.dumps({**usage(5, 2), "error": None})]
    data = alive + b"".join(b"data: " + chunk.encode() + b"\n\n" + alive for chunk in stream) + b"data: [DONE]"
    for at, event in enumerate([*events.feed(data), *events.end()]):
        answer.take(event, float(at))
    answer.finish()
    assert record.error is None and len(record.piece_s) == record.output_tokens == 2


@pytest.mark.parametrize(
    ("chunks", "done", "error"),
    [
        ([text("a")], False, "the stream broke off"),
        ([usage(3, 0)], True, "the answer has no token"),
        ([text("a"), {"error": {"message": "out of memory", "code": 500}}], True, "error in the stream: out of memory"),
        ([text("a", "abort")], True, "the server ended it: abort"),
    ],
)
def test_what_is_no_whole_answer_has_a_reason(chunks, done, error):
    assert taken(*chunks, done=done).error == error


def test_a_body_asks_for_a_stream_with_usage_and_as_many_tokens():
    fields = {"temperature": 0.0, "ignore_eos": True}
    endpoint = Endpoint("http://x", "completions", "m", {}, fields, 1.0)
    assert json.loads(endpoint.body(Work([11, 12], 2, 7))) == {
        "model": "m", "prompt": [11, 12], "max_tokens": 7, "stream": True,
        "stream_options": {"include_usage": True}, **fields,
    }  # fmt: skip
    chat = Endpoint("http://x", "chat", "m", {}, {}, 1.0)
    assert json.loads(chat.body(Work("hi", 2, 7)))["messages"] == [{"role": "user", "content": "hi"}]
    assert chat.url == "http://x/v1/chat/completions"


def test_an_address_may_end_with_v1():
    assert {plain_base(f"http://x:1{end}") for end in ("", "/", "/v1", "/v1/")} == {"http://x:1"}
    with pytest.raises(ValueError, match=r"base_url='x:1' must begin with http:// or https://"):
        plain_base("x:1")
