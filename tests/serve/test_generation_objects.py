"""The objects of a completion, streamed and whole, output by output."""

import gc
import json
import math
from dataclasses import replace

import pytest

from apt_jax.output import Output, TokenLogprobs
from apt_jax.request import FinishReason, Request, SamplingParams
from apt_jax.serve.errors import EngineFailure
from apt_jax.serve.openai.bodies.chat_requests import parse_chat
from apt_jax.serve.openai.bodies.requests import parse_completion
from apt_jax.serve.openai.chat_completions import ChatCompletion
from apt_jax.serve.openai.completions import Completion
from apt_jax.serve.openai.generation import ServedModel
from tests.support.fake_engine import CharTokenizer, FakeEngine

MODEL = ServedModel(FakeEngine(tokenizer=CharTokenizer()), "tiny")


def prepared(**body):
    generation = Completion.prepare(parse_completion({"prompt": "a", **body}), MODEL, request_id="cmpl-1")
    generation.created = 1000
    return generation


def output(generation, index, text, reason=None, tokens=None):
    """Sample `index` brings these characters, with log-probabilities if they are wanted, and maybe ends."""
    sample = generation.samples[index]
    request = Request(sample.request_id, sample.prompt_token_ids, SamplingParams(), 0.0, 9)
    request.first_token_s, request.finish_reason, request.num_preemptions = 0.25, reason, index + 1
    ids = tuple(text.encode("latin-1")) if tokens is None else tokens
    count = sample.params.logprobs
    scores = () if count is None else tuple(TokenLogprobs(i, -i / 100, 1, ((i + 1, -0.5),) * count) for i in ids)
    return sample, Output(request, text, ids, scores, reason)


BRINGS = [
    (0, "b", None), (1, "x", None), (0, 'c"', None), (1, "\u00e9\n", None), (0, "", None),
    (0, "d", FinishReason.STOP), (1, "z", FinishReason.LENGTH),
]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {}, {"stream_options": {"include_usage": True}}, {"return_token_ids": True}, {"echo": True}, {"logprobs": 0},
        {"logprobs": 1},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"stream_options": {"continuous_usage_stats": True}},
    ],
)  # fmt: skip
def test_events_are_the_chunks_of_the_outputs(options):
    """Most events are put together from a frame; each must read as the object that `chunk` makes."""
    body = {"n": 2, "stream": True, "max_tokens": 9, **options}
    framed, plain = prepared(**body), prepared(**body)
    for bring in BRINGS:
        event = framed.streamed(*output(framed, *bring))
        assert event.startswith(b"data: ") and event.endswith(b"\n\n")
        assert json.loads(event.removeprefix(b"data: ")) == json.loads(json.dumps(plain.chunk(*output(plain, *bring))))
    for generation in (framed, plain):
        assert generation.is_finished and [c.token_ids for c in generation.choices] == [
            list(b'bc"d'), list("x\u00e9\nz".encode("latin-1"))
        ]  # fmt: skip
    assert framed.usage_chunk() == plain.usage_chunk()


def test_a_chunk_has_its_sample_s_text_and_ends_with_its_slo():
    generation = prepared(n=2, stream=True, max_tokens=9)
    chunk = generation.chunk(*output(generation, 1, "b"))
    choice = {"index": 1, "text": "b", "logprobs": None, "finish_reason": None}
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1000, "model": "tiny"}
    assert chunk == {**head, "choices": [choice]}
    last = generation.chunk(*output(generation, 1, "c", FinishReason.LENGTH))
    assert last["choices"][0]["finish_reason"] == "length" and last["slo"]["preemptions"] == 2
    assert generation.usage_chunk() == {
        **head, "choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "wants", "usages"),
    [
        (None, False, ["absent"] * 2), ({}, False, ["absent"] * 2), ({"include_usage": True}, True, [None] * 2),
        ({"include_usage": True, "continuous_usage_stats": True}, True, [1, 3]),
    ],
)  # fmt: skip
def test_usage_in_a_stream(options, wants, usages):
    generation = prepared(stream=True, max_tokens=9, **({} if options is None else {"stream_options": options}))
    assert generation.wants_usage is wants
    found = []
    for text in ("b", "cd"):
        usage = generation.chunk(*output(generation, 0, text)).get("usage", "absent")
        found.append(usage["completion_tokens"] if isinstance(usage, dict) else usage)
    assert found == usages


def test_token_ids_come_with_the_prompt_s_first():
    generation = prepared(stream=True, max_tokens=9, return_token_ids=True)
    first = generation.chunk(*output(generation, 0, "b"))["choices"][0]
    later = generation.chunk(*output(generation, 0, "c"))["choices"][0]
    assert (first["token_ids"], first["prompt_token_ids"]) == ([98], [2, 97])
    assert later["token_ids"] == [99] and "prompt_token_ids" not in later


def test_a_whole_object_reports_the_slo_of_all_and_of_each():
    one, two = prepared(max_tokens=9), prepared(max_tokens=9, n=2, return_token_ids=True)
    one.collect(*output(one, 0, "b", FinishReason.STOP))
    for index in range(2):
        two.collect(*output(two, index, "bc"))
        two.collect(*output(two, index, "d", FinishReason.STOP))
    whole = one.response()
    assert whole["slo"]["preemptions"] == 1 and "slo" not in whole["choices"][0]
    assert whole["choices"] == [{"index": 0, "text": "b", "logprobs": None, "finish_reason": "stop"}]
    whole = two.response()
    assert whole["slo"]["preemptions"] == 3 and [c["slo"]["preemptions"] for c in whole["choices"]] == [1, 2]
    assert [(c["text"], c["token_ids"], c["prompt_token_ids"]) for c in whole["choices"]] == [
        ("bcd", [98, 99, 100], [2, 97])
    ] * 2
    assert whole["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}


def test_what_was_streamed_can_be_written_as_a_whole_with_offsets_from_its_beginning():
    generation = prepared(stream=True, max_tokens=9, logprobs=0, echo=True)
    offsets = []
    for text, reason in (("b", None), ("cd", None), ("e", FinishReason.STOP)):
        entry = json.loads(generation.streamed(*output(generation, 0, text, reason)).removeprefix(b"data: "))
        offsets += entry["choices"][0]["logprobs"]["text_offset"]
    for _ in range(2):  # writing it again changes nothing
        (choice,) = generation.response()["choices"]
        assert choice["logprobs"]["text_offset"] == offsets == [1, 2, 3, 4]
        assert [choice["text"][at] for at in offsets] == choice["logprobs"]["tokens"]


def test_scores_of_the_prompt_that_came_for_an_echo_are_no_prompt_logprobs():
    generation = prepared(max_tokens=9, logprobs=0, echo=True)
    assert generation.samples[0].params.prompt_logprobs == 0
    sample, brought = output(generation, 0, "b", FinishReason.STOP)
    generation.collect(sample, replace(brought, prompt_logprobs=(TokenLogprobs(97, -2.0, 3, ()),)))
    (choice,) = generation.response()["choices"]
    assert "prompt_logprobs" not in choice and choice["logprobs"]["token_logprobs"] == [None, -2.0, -0.98]


def test_an_engine_s_error_is_told_up_to_its_200th_character_without_its_details():
    generation = prepared(max_tokens=9)
    sample, brought = output(generation, 0, "", FinishReason.ERROR)
    for error, told in (
        ("x" * 300 + "y", "x" * 200),
        ("a line\nits details", "a line"),
        ("", "unknown"),
        (None, "unknown"),
    ):
        with pytest.raises(EngineFailure) as caught:
            generation.collect(sample, replace(brought, error=error))
        assert str(caught.value) == f"the engine failed on this request: {told}"


def test_a_sample_that_was_resumed_as_ended_leaves_the_report_out():
    generation = prepared(max_tokens=9, n=2)
    generation.choices[0].finish_reason, generation.choices[0].text = FinishReason.STOP, ["b"]
    generation.collect(*output(generation, 1, "c", FinishReason.STOP))
    whole = generation.response()
    assert "slo" not in whole and ["slo" in choice for choice in whole["choices"]] == [False, True]


def test_a_prompt_without_an_answer_drops_the_token_that_was_generated():
    generation = prepared(max_tokens=0, echo=True)
    generation.collect(*output(generation, 0, "b", FinishReason.STOP))
    (choice,) = generation.response()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("a", "length")
    assert generation.usage()["completion_tokens"] == 0


def test_log_probabilities_of_tokens_and_of_the_prompt():
    generation = prepared(max_tokens=9, logprobs=1, prompt_logprobs=1)
    sample, brought = output(generation, 0, "bc", FinishReason.STOP)
    scores = (TokenLogprobs(98, -0.25, 1, ((98, -0.25), (99, -1.5))), TokenLogprobs(240, -math.inf, 9, ((99, -0.5),)))
    prompt = (TokenLogprobs(97, -2.0, 3, ((98, -0.5), (99, -1.0))),)
    generation.collect(sample, replace(brought, logprobs=scores, prompt_logprobs=prompt))
    (choice,) = generation.response()["choices"]
    assert choice["logprobs"] == {
        "tokens": ["b", "token_id:240"], "token_logprobs": [-0.25, -9999.0],
        "top_logprobs": [{"b": -0.25}, {"token_id:240": -9999.0, "c": -0.5}], "text_offset": [0, 1],
    }  # fmt: skip
    assert choice["prompt_logprobs"] == [
        None,
        {
            "97": {"logprob": -2.0, "rank": 3, "decoded_token": "a"},
            "98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
        },
    ]
    plain = prepared(max_tokens=9)
    plain.collect(*output(plain, 0, "b", FinishReason.STOP))
    assert "prompt_logprobs" not in plain.response()["choices"][0]


def test_every_event_of_a_chat_is_a_chunk_and_its_first_has_the_role():
    model = ServedModel(FakeEngine(tokenizer=CharTokenizer("{{ messages[0].content }}")), "tiny")
    body = parse_chat({"messages": [{"role": "user", "content": "x"}], "stream": True})
    framed, plain = (ChatCompletion.prepare(body, model, request_id="chatcmpl-1") for _ in range(2))
    framed.created = plain.created = 1000
    events = []
    for text, reason in (("y", None), ("z", None), ("!", None), ("?", FinishReason.STOP)):
        events.append(json.loads(framed.streamed(*output(framed, 0, text, reason)).removeprefix(b"data: ")))
        assert events[-1] == json.loads(json.dumps(plain.chunk(*output(plain, 0, text, reason))))
    assert {event["object"] for event in (*events, framed.usage_chunk())} == {"chat.completion.chunk"}
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas == [{"role": "assistant", "content": "y"}, {"content": "z"}, {"content": "!"}, {"content": "?"}]
    whole = framed.response()
    assert whole["object"] == "chat.completion" and whole["choices"][0]["message"]["content"] == "yz!?"


def test_the_likely_tokens_of_an_answer_are_few_objects_for_the_garbage_collector():
    """Two dozen a token would be 1.4 million for 128 samples of 500: it held Python's lock for 0.2 s each time."""
    generation = prepared(n=1, max_tokens=100, logprobs=20)
    sample, plain = output(generation, 0, "b")
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(100):
        entry = TokenLogprobs(98, -0.5, 1, tuple((i, -0.5 - i) for i in range(20)))
        generation.collect(sample, replace(plain, logprobs=(entry,)))
    gc.collect()
    assert len(generation.choices[0].logprobs) == 100
    assert len(gc.get_objects()) - before < 50
