"""How much may be asked for, at each limit and one past it, and how a response counts it."""

from dataclasses import replace

import pytest

from apt_jax.engine_config import EngineConfig
from apt_jax.output import Output
from apt_jax.request import FinishReason, Request, SamplingParams, Slo
from apt_jax.serve.errors import BadRequest, EngineFailure, ModelNotFound
from apt_jax.serve.openai.bodies.chat_requests import parse_chat
from apt_jax.serve.openai.bodies.requests import parse_completion
from apt_jax.serve.openai.bodies.slo import slo_of
from apt_jax.serve.openai.completions import Completion
from apt_jax.serve.openai.generation import VALUES_OF_CHOICE, ServedModel, as_bad_request, check_room
from tests.support.fake_engine import CharTokenizer, FakeEngine

MODEL = ServedModel(FakeEngine(tokenizer=CharTokenizer()), "tiny")  # a context of 128


def prepare(max_samples=None, **body):
    return Completion.prepare(
        parse_completion({"prompt": [97] * 8, **body}), MODEL, request_id="c", max_samples=max_samples
    )


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "refused"),
    [(8, 120, False), (8, 121, True), (127, 1, False), (127, 2, True), (128, 1, False), (130, 5, False)],
)
def test_prompt_and_answer_share_the_context(prompt, max_tokens, refused):
    """A prompt that fills it alone is the engine's to refuse."""
    if refused:
        with pytest.raises(BadRequest, match=f"ask for at most {128 - prompt}, or leave it out") as caught:
            check_room(prompt, max_tokens, 128)
        assert caught.value.param == "max_tokens"
    else:
        check_room(prompt, max_tokens, 128)


def test_the_longest_prompt_decides():
    prompts = [[97] * 8, [97] * 100, [97] * 20]
    prepare(prompt=prompts, max_tokens=28)
    with pytest.raises(BadRequest, match="the prompt has 100; ask for at most 28"):
        prepare(prompt=prompts, max_tokens=29)


@pytest.mark.parametrize(("prompts", "n", "refused"), [(3, 2, False), (2, 3, False), (7, 1, True), (1, 7, True)])
def test_prompts_times_n_fit_into_the_queue(prompts, n, refused):
    body = {"prompt": [[97]] * prompts, "n": n}
    if refused:
        with pytest.raises(BadRequest, match=rf"{prompts} prompts x n={n} is more than the queue holds \(6\)"):
            prepare(6, **body)
    else:
        assert len(prepare(6, **body).samples) == 6
    assert len(prepare(**body).samples) == prompts * n


@pytest.mark.parametrize(("n", "refused"), [(1, False), (128, False), (129, True), (0, True)])
def test_n_is_at_most_128(n, refused):
    if refused:
        with pytest.raises(BadRequest, match=f"n={n} must be between 1 and 128"):
            prepare(n=n)
    else:
        assert [sample.params.n for sample in prepare(n=n).samples] == [1] * n


@pytest.mark.parametrize(
    ("body", "max_tokens"),
    [({}, 16), ({"max_tokens": 5}, 5), ({"max_tokens": None}, 16), ({"max_tokens": 0, "echo": True}, 0)],
)
def test_a_completion_has_sixteen_tokens_where_nothing_is_said(body, max_tokens):
    assert prepare(**body).samples[0].params.max_tokens == max_tokens


def test_nothing_to_generate_is_only_possible_with_echo():
    with pytest.raises(BadRequest, match="max_tokens=0 must be at least 1"):
        prepare(max_tokens=0)


@pytest.mark.parametrize(
    ("body", "max_tokens"),
    [({}, None), ({"max_tokens": 5}, 5), ({"max_completion_tokens": 6}, 6),
     ({"max_tokens": 6, "max_completion_tokens": 6}, 6)],
)  # fmt: skip
def test_a_chat_may_fill_the_context_where_nothing_is_said(body, max_tokens):
    params = parse_chat({"messages": [{"role": "user", "content": "x"}], **body}).sampling_params()
    assert params.max_tokens == max_tokens


@pytest.mark.parametrize(
    ("body", "logprobs", "prompt_logprobs"),
    [({"logprobs": 3}, 3, None), ({"logprobs": 3, "echo": True}, 3, 3), ({"logprobs": 0, "echo": True}, 0, 0),
     ({"logprobs": 2, "echo": True, "prompt_logprobs": 5}, 2, 5), ({"echo": True}, None, None),
     ({"prompt_logprobs": 4}, None, 4)],
)  # fmt: skip
def test_an_echo_scores_the_prompt_as_far_as_either_asks(body, logprobs, prompt_logprobs):
    params = prepare(**body).samples[0].params
    assert (params.logprobs, params.prompt_logprobs) == (logprobs, prompt_logprobs)


def test_a_promise_is_the_body_s_then_the_header_s_then_the_server_s():
    default, headers = Slo(8.0, 4.0), {"x-slo-ttft-ms": "500", "x-slo-tbt-ms": "250"}
    body = parse_completion({"prompt": "a", "slo": {"ttft_ms": 125}}).slo
    assert slo_of(None, {}, default) == default
    assert slo_of(None, headers, default) == Slo(0.5, 0.25)
    assert slo_of(body, headers, default) == Slo(0.125, 0.25)
    assert slo_of(body, {}, default) == Slo(0.125, 4.0)
    generation = Completion.prepare(
        parse_completion({"prompt": "a"}), MODEL, request_id="c", headers={"x-slo-tbt-ms": "250"},
        otherwise_slo=Slo(9.0, 9.0), arrival_s=3.0,
    )  # fmt: skip
    assert (generation.samples[0].slo, generation.samples[0].arrival_s) == (Slo(9.0, 0.25), 3.0)
    engine = FakeEngine(EngineConfig(ttft_slo_ms=2000.0, tbt_slo_ms=300.0, max_num_seqs=4), CharTokenizer())
    slow = Completion.prepare(parse_completion({"prompt": "a"}), ServedModel(engine, "tiny"), request_id="c")
    assert slow.samples[0].slo == Slo(2.0, 0.3)


@pytest.mark.parametrize(("text", "kept"), [("0.001", 1e-6), ("1e9", 1e6)])
def test_the_shortest_and_the_longest_promise(text, kept):
    assert slo_of(None, {"x-slo-ttft-ms": text}, Slo()).ttft_s == pytest.approx(kept)
    for bad in ("0.0009", "1.1e9", "nan", "inf", "0", "-5", "fast", ""):
        with pytest.raises(BadRequest, match="header x-slo-ttft-ms"):
            slo_of(None, {"x-slo-ttft-ms": bad}, Slo())


def output(generation, index, text, reason=None):
    sample = generation.samples[index]
    request = Request(sample.request_id, sample.prompt_token_ids, SamplingParams(), 0.0, 9)
    request.finish_reason = reason
    return sample, Output(request, text, tuple(text.encode("latin-1")), (), reason)


def test_usage_counts_each_prompt_once_and_every_sample():
    generation = prepare(prompt=[[97] * 3, [97] * 5], n=2)
    for index, text in enumerate(("b", "bc", "bcd", "")):
        generation.collect(*output(generation, index, text, FinishReason.STOP))
    assert generation.usage() == {"prompt_tokens": 8, "completion_tokens": 6, "total_tokens": 14}


def test_it_is_finished_when_every_sample_is_and_whole_when_each_ended_by_itself():
    generation = prepare(n=2)
    generation.collect(*output(generation, 0, "b"))
    generation.collect(*output(generation, 0, "c", FinishReason.LENGTH))
    assert not generation.is_finished and not generation.is_whole and generation.num_unfinished == 1
    other = prepare(n=2)
    for index, reason in enumerate((FinishReason.STOP, FinishReason.ABORT)):
        other.collect(*output(other, index, "b", reason))
    assert other.is_finished and not other.is_whole
    generation.collect(*output(generation, 1, "b", FinishReason.STOP))
    assert generation.is_finished and generation.is_whole
    assert [choice["text"] for choice in generation.response()["choices"]] == ["bc", "b"]


def test_an_error_of_the_engine_is_an_exception_with_its_first_line():
    generation = prepare()
    sample, brought = output(generation, 0, "", FinishReason.ERROR)
    with pytest.raises(EngineFailure, match=r"failed on this request: NaN in the logits$"):
        generation.collect(sample, replace(brought, error="NaN in the logits\nsecret"))


def test_another_model_is_not_found():
    assert prepare(model="tiny").model_name == prepare(model=None).model_name == "tiny"
    with pytest.raises(ModelNotFound, match="the model 'other' is not served here; use 'tiny'"):
        prepare(model="other")


def test_what_the_engine_refuses_is_the_client_s_field():
    chat = parse_chat({"messages": [{"role": "user", "content": "x"}]})
    completion = parse_completion({"prompt": "x"})
    for body, of_prompt in ((chat, "messages"), (completion, "prompt")):
        assert as_bad_request(ValueError("the prompt has 200 tokens"), body).param == of_prompt
        assert as_bad_request(ValueError("seed=7 is taken"), body).param == "seed"
        assert as_bad_request(ValueError("something else"), body).param is None
    already = BadRequest("as it is", "stop")
    assert as_bad_request(already, chat) is already


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        # 2,048 numbers and texts: 16 for each output, 2 for each likely token, a quarter for a prompt token it brings
        ({}, 128), ({"logprobs": 3}, 93), ({"logprobs": 0}, 128), ({"prompt": [97] * 100}, 128),
        ({"echo": True}, 113), ({"return_token_ids": True}, 113), ({"echo": True, "logprobs": 1}, 102),
        ({"return_token_ids": True, "prompt": [[97] * 8, [97] * 100, [97] * 9]}, 49),
    ],
)  # fmt: skip
def test_streamed_outputs_that_are_written_at_once(body, outputs):
    assert prepare(**body).outputs_at_once == outputs


def test_one_output_is_written_however_long_its_prompt_is():
    long = ServedModel(FakeEngine(EngineConfig(max_model_len=20_000), tokenizer=CharTokenizer()), "tiny")
    for tokens, outputs in ((4032, 2), (4036, 1), (9000, 1)):
        body = parse_completion({"prompt": [97] * tokens, "echo": True})
        assert Completion.prepare(body, long, request_id="c").outputs_at_once == outputs


@pytest.mark.parametrize(
    ("body", "values"),
    [
        # two samples of 3 tokens and a prompt of 8 each
        ({}, 2 * 3 * 2 + 2 * 8), ({"logprobs": 3}, 2 * 3 * 8 + 2 * 8), ({"prompt_logprobs": 2}, 2 * 3 * 2 + 2 * 8 * 5),
        ({"logprobs": 1, "echo": True}, 2 * 3 * 4 + 2 * 8 * 3),
    ],
)  # fmt: skip
def test_how_much_a_response_has_to_write(body, values):
    generation = prepare(n=2, **body)
    for choice in generation.choices:
        choice.token_ids.extend((98, 98, 98))
    assert generation.num_values == values + 2 * VALUES_OF_CHOICE


def test_a_long_model_s_name_is_not_sent_back():
    """4 MB of a body came back as 4 MB of an answer."""
    with pytest.raises(ModelNotFound, match=r"^the model 'xxx") as caught:
        prepare(model="x" * 100_000)
    assert len(str(caught.value)) < 200
