"""Chats and tokens over the fake engine: templates, OpenAI's chat objects, /tokenize and /detokenize."""

import httpx
import pytest

from apt_jax.serve.errors import BadRequest
from apt_jax.serve.openai.bodies.requests import bad_request
from apt_jax.serve.openai.templates.chat_template import read_template
from tests.support.asgi_service import NOTHING_CACHED, events_of, run, serving
from tests.support.fake_engine import EOS, CharTokenizer, FakeEngine

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
HELLO = [{"role": "user", "content": "hi"}]


def post(*bodies, path="/v1/chat/completions", template=None, engine=None) -> list[httpx.Response]:
    replies = []
    engine = engine or FakeEngine(tokenizer=CharTokenizer(TEMPLATE))

    async def main():
        async with serving(engine, template=template) as client:
            for body in bodies:
                replies.append(await client.post(path, json=body))
            assert engine.is_idle

    run(main)
    return replies


def test_a_chat_in_openai_s_shape():
    messages = [{"role": "system", "content": "x"}, *HELLO]
    slo = {"ttft_ms": 60_000}  # the first chat imports the template library
    body = post({"slo": slo, "model": "tiny", "messages": messages, "max_tokens": 3, "return_token_ids": True})[
        0
    ].json()
    assert body.pop("id").startswith("chatcmpl-") and body.pop("created") > 0 and body.pop("slo")["attained"]
    ids = {"token_ids": list(b"bcd"), "prompt_token_ids": list(b"s:x;u:hi;a")}
    message = {"role": "assistant", "content": "bcd"}
    assert body == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length", **ids}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13} | NOTHING_CACHED,
    }


def test_a_streamed_chat_brings_the_role_first_and_usage_last():
    options = {"include_usage": True}
    reply = post({"messages": HELLO, "n": 2, "max_completion_tokens": 3, "stream": True, "stream_options": options})[0]
    *chunks, last = events_of(reply)
    texts = ["", ""]
    for i, chunk in enumerate(chunks):
        (choice,) = chunk["choices"]
        assert chunk["object"] == "chat.completion.chunk" and chunk["usage"] is None
        assert choice["delta"].get("role") == ("assistant" if i < 2 else None)
        texts[choice["index"]] += choice["delta"]["content"]
    assert texts == ["bcd", "bcd"] and last["choices"] == [] and last["usage"]["completion_tokens"] == 6
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == ["length", "length"]


def test_without_a_limit_a_chat_may_fill_the_context():
    choice = post({"messages": HELLO, "stop_token_ids": [ord("z")]})[0].json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"].endswith("xyz")


def test_logprobs_of_a_chat():
    choice = post({"messages": HELLO, "max_tokens": 1, "logprobs": True, "top_logprobs": 2})[0].json()["choices"][0]
    (entry,) = choice["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("b", -0.5, [98])
    assert [(top["token"], top["logprob"]) for top in entry["top_logprobs"]] == [("b", -0.5), ("c", -1.5)]
    choice = post({"messages": HELLO, "max_tokens": 1, "logprobs": True})[0].json()["choices"][0]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


def test_prompt_logprobs_of_a_chat_are_beside_its_choices():
    body = post({"messages": HELLO, "max_tokens": 1, "n": 2, "prompt_logprobs": 0})[0].json()
    first, *others = body["prompt_logprobs"]
    assert first is None and [list(entry) for entry in others] == [[str(i)] for i in b":hi;a"]
    assert "prompt_logprobs" not in body["choices"][0]
    refused = post({"messages": HELLO, "prompt_logprobs": 1, "stream": True})[0]
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt_logprobs"


def test_parts_of_text_are_joined_and_the_server_s_template_goes_first():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1, "return_token_ids": True}
    choice = post(body, template="{{ messages[0].content }}{{ eos_token }}")[0].json()["choices"][0]
    assert bytes(choice["prompt_token_ids"]) == b"one\ntwo</s>"


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0", "'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0", "messages.0="),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "only allowed with logprobs=true"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"messages": HELLO, "logprobs": 3}, "logprobs", "valid boolean"),
        ({"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "two names of one"),
        ({"messages": HELLO, "max_completion_tokens": 500}, "max_tokens", "the context holds 128 tokens"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools", "field tools is not supported"),
        ({"messages": HELLO, "response_format": {}}, "response_format.type", "response_format.type is missing"),
        ({"messages": HELLO, "echo": True}, "echo", "it is a field of /v1/completions"),
        ({"messages": HELLO, "prompt": "x"}, "prompt", "a chat has messages"),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, "messages", "the context holds 128"),
    ],
)
def test_a_bad_chat_is_refused_by_name(fields, param, sentence):
    reply = post(fields)[0]
    assert reply.status_code == 400 and sentence in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"] == param


def test_a_model_without_a_template_says_so_and_names_the_flag():
    reply = post({"messages": HELLO}, engine=FakeEngine(tokenizer=CharTokenizer()))[0]
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "messages"
    assert "has no chat template" in reply.text and "--chat-template FILE" in reply.text
    assert "cannot chat" in post({"messages": HELLO}, engine=FakeEngine())[0].text


def test_a_template_may_refuse_and_cannot_reach_out_of_its_sandbox():
    for template, sentence in (
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"),
        ("{{ '' }}", "makes nothing"),
    ):
        reply = post({"messages": HELLO}, template=template)[0]
        assert reply.status_code == 400 and sentence in reply.text


FAULTY = {
    "{{ nothing | tojson }}": "TypeError",
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{{ messages[0].content + 1 }}": "TypeError",
    "{{ 'x' + 1 }}": "TypeError",
    "{% for i in range(10 ** 12) %}x{% endfor %}": "",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}": "RecursionError",
    "{{ messages['content'] + [] | first }}": "",
    "{% include 'other' %}": "TypeError: no loader",
    "{{ 'x'.encode('no such encoding') }}": "LookupError",
    "{{ messages[0].content.index('not in it') }}": "ValueError",
    "{{ (1).nothing.at_all }}": "",
}


@pytest.mark.parametrize("template", FAULTY)
def test_whatever_a_template_raises_is_the_client_s_error(template):
    reply = post({"messages": HELLO}, template=template)[0]
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "messages"
    assert "the chat template" in reply.text and FAULTY[template] in reply.text


@pytest.mark.parametrize("template", [template for template, name in FAULTY.items() if name])
def test_a_template_file_that_fails_on_any_chat_is_told_in_a_sentence(template, tmp_path):
    path = tmp_path / "faulty.jinja"
    path.write_text(template)
    with pytest.raises(ValueError, match=r"--chat-template .*faulty.jinja fails on a chat") as told:
        read_template(path)
    assert FAULTY[template] in str(told.value) and "\n" not in str(told.value)


def test_a_template_file_is_checked(tmp_path):
    good, bad = tmp_path / "good.jinja", tmp_path / "bad.jinja"
    good.write_text("{{ raise_exception('not this chat') }}")
    bad.write_text("{% for %}")
    assert read_template(good).startswith("{{")
    with pytest.raises(ValueError, match=r"--chat-template .*bad.jinja is not a Jinja template"):
        read_template(bad)
    with pytest.raises(FileNotFoundError):
        read_template(tmp_path / "none")


def test_tokenize_and_detokenize():
    replies = post(
        {"prompt": "ab"},
        {"prompt": "ab", "add_special_tokens": False, "return_token_strs": True, "model": "tiny"},
        {"messages": HELLO},
        path="/tokenize",
    )
    assert replies[0].json() == {"count": 3, "max_model_len": 128, "tokens": [EOS, 97, 98], "token_strs": None}
    assert replies[1].json()["token_strs"] == ["a", "b"]
    assert bytes(replies[2].json()["tokens"]) == b"u:hi;a"
    assert post({"tokens": [97, 98]}, path="/detokenize")[0].json() == {"prompt": "ab"}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, 400),
        ("/tokenize", {"prompt": "a", "model": "gpt-4"}, 404),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": ["a"]}, 400),
    ],
)
def test_bad_tokens_are_refused(path, body, status):
    assert post(body, path=path)[0].status_code == status


def test_tokens_need_a_tokenizer():
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        reply = post(body, path=path, engine=FakeEngine())[0]
        assert reply.status_code == 400 and "--tokenizer" in reply.text


def test_version_and_load():
    async def main():
        engine = FakeEngine(paced=True)
        async with serving(engine) as client:
            assert (await client.get("/version")).json()["version"]
            assert (await client.get("/load")).json() == {"server_load": 0, "waiting": 0, "running": 0}

    run(main)


def test_a_lower_layer_s_error_names_the_field():
    assert bad_request(ValueError("the prompt has 3 tokens"), ["prompt"]).param == "prompt"
    assert isinstance(bad_request(ValueError("x"), []), BadRequest)
