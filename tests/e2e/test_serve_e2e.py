"""The whole path on a real engine: openai's client, raw sockets, processes that are killed."""

import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from apt_jax import LLM, SamplingParams
from tests.support.live_server import until
from tests.support.served_model import (
    CONFIG,
    NAME,
    engine_options,
    flags,
    is_ready,
    serving,
    start_server,
    write_folder,
)

PROMPTS = ["the quick", "def add(", "the lazy dog jumps", "return", "x"]
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder) as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made
    until(lambda: server.is_idle)


def complete(client, prompt="the quick", **fields):
    known = {"temperature", "max_tokens", "n", "echo", "logprobs", "seed", "stop", "stream", "stream_options"}
    extra = {name: fields.pop(name) for name in list(fields) if name not in known}
    return client.completions.create(**{"model": NAME, "prompt": prompt, **fields}, extra_body=extra)


def test_openai_s_client_completes(client):
    reply = complete(client, **GREEDY)
    (choice,) = reply.choices
    assert choice.finish_reason == "length" and choice.text and choice.logprobs is None
    assert reply.object == "text_completion" and reply.model == NAME
    assert (reply.usage.completion_tokens, reply.usage.total_tokens) == (12, 12 + reply.usage.prompt_tokens)
    assert complete(client, **GREEDY).choices[0].text == choice.text


def test_a_stream_brings_the_text_of_the_plain_reply(client):
    plain = complete(client, PROMPTS, n=2, **GREEDY)
    texts, reasons, usage = {}, {}, None
    for chunk in complete(client, PROMPTS, n=2, stream=True, stream_options={"include_usage": True}, **GREEDY):
        assert usage is None, "usage comes last"
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason
    assert [texts[choice.index] for choice in plain.choices] == [choice.text for choice in plain.choices]
    assert set(reasons.values()) == {"length"} and usage == plain.usage


def test_the_same_seed_gives_the_same_samples_whatever_else_runs(client):
    def seeded():
        reply = complete(client, PROMPTS[:2], n=3, seed=11, max_tokens=10, ignore_eos=True)
        return [choice.text for choice in reply.choices]

    alone = seeded()
    assert len(set(alone)) > 3, "samples differ"
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(complete, client, prompt, max_tokens=20) for prompt in PROMPTS * 2]
        assert seeded() == alone
        assert all(other.result().choices for other in others)


def test_token_ids_and_text_mean_the_same_prompt(client, server):
    ids = server.engine.tokenizer.encode("the quick")
    texts = [complete(client, prompt, **GREEDY).choices[0].text for prompt in ("the quick", ids, [ids])]
    assert len(set(texts)) == 1


def test_echo_stop_and_stop_token_ids(client):
    text = complete(client, **GREEDY).choices[0].text
    assert complete(client, echo=True, **GREEDY).choices[0].text == "the quick" + text
    stop = text[4:6]
    stopped = complete(client, stop=stop, **GREEDY).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")
    ids = complete(client, return_token_ids=True, **GREEDY).choices[0].token_ids
    stopped = complete(client, stop_token_ids=[ids[3]], return_token_ids=True, **GREEDY).choices[0]
    assert stopped.finish_reason == "stop" and stopped.token_ids == ids[: ids.index(ids[3]) + 1]


def test_logprobs_name_the_chosen_and_the_likely_tokens(client):
    choice = complete(client, logprobs=3, **GREEDY).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 12
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert logprob <= 0 and top[token] == logprob == max(top.values())


@pytest.mark.parametrize(
    ("fields", "kind", "sentence"),
    [
        ({"prompt": ""}, openai.BadRequestError, "prompt is empty"),
        (
            {"prompt": [CONFIG["vocab_size"]]},
            openai.BadRequestError,
            "the prompt has token id 320, which is not",
        ),
        ({"prompt": [5] * 500}, openai.BadRequestError, "the prompt has 500 tokens, but the context holds 128"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens=-1 must be at least 1"),
        ({"logit_bias": {"999": 1}}, openai.BadRequestError, "logit_bias has token id 999"),
        ({"best_of": 3}, openai.BadRequestError, "field best_of is not supported"),
        ({"model": "gpt-4"}, openai.NotFoundError, "'gpt-4' is not served here"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_openai_s_client_sees_errors(client, fields, kind, sentence, stream):
    with pytest.raises(kind, match=re.escape(sentence)) as caught:
        client.completions.create(**{"model": NAME, "prompt": "a"}, stream=stream, extra_body=fields)
    assert caught.value.body["type"] == "invalid_request_error"
    assert complete(client, max_tokens=1).usage.completion_tokens == 1


def test_openai_s_client_chats_as_the_template_says(client, server):
    messages = [{"role": "system", "content": "be quick"}, {"role": "user", "content": "the quick"}]
    fields = {"model": NAME, "messages": messages, "temperature": 0, "max_completion_tokens": 8}
    reply = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True})
    (choice,) = reply.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length" and reply.slo["cache_kinds"]
    assert len(choice.logprobs.content) == reply.usage.completion_tokens == 8
    assert all(len(entry.top_logprobs) == 2 and entry.bytes for entry in choice.logprobs.content)
    prompt = "system: be quick\nuser: the quick\nassistant:"  # the tokenizer puts </s> first, as the template does
    assert complete(client, prompt, **GREEDY, return_token_ids=True).choices[0].text.startswith(choice.message.content)
    assert reply.usage.prompt_tokens == len(server.engine.tokenizer.encode(prompt))
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            **fields, stream=True, stream_options=options, extra_body={"ignore_eos": True, "slo": {"ttft_ms": 60_000}}
        )
    )
    assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == choice.message.content
    assert chunks[-1].usage.completion_tokens == 8 and chunks[-2].slo["ttft_slo_ms"] == 60_000


SCHEMA = {
    "type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 22, 333]}},
    "required": ["ok", "n"], "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, None),
        ({"extra_body": {"structured_outputs": {"regex": "[0-9]{3}-[ab]{2}"}}}, "[0-9]{3}-[ab]{2}"),
        ({"extra_body": {"structured_outputs": {"choice": ["left", "right"]}}}, "left|right"),
    ],
)
def test_answers_follow_what_openai_s_client_asks_for(client, fields, pattern):
    messages = [{"role": "user", "content": "the quick"}]
    asked = {"model": NAME, "messages": messages, "max_tokens": 60, "temperature": 1.5, "seed": 3, **fields}
    reply = client.chat.completions.create(**asked)
    text = reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "stop"
    if pattern is None:
        found = json.loads(text)
        assert type(found["ok"]) is bool and found["n"] in (1, 22, 333) and len(found) == 2
    else:
        assert re.fullmatch(pattern, text)
    streamed = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices) == text


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"response_format": {"type": "json_schema"}}, "needs json_schema with a schema"),
        ({"structured_outputs": {"regex": "a("}}, "structured_outputs regex cannot be compiled"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "give exactly one of"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "response_format and structured_outputs ask for the same thing",
        ),
    ],
)
def test_structures_that_cannot_be_followed_are_400(client, fields, sentence):
    with pytest.raises(openai.BadRequestError, match=sentence):
        client.completions.create(model=NAME, prompt="the quick", extra_body=fields)


def test_tokens_of_the_served_model(server):
    with httpx.Client(base_url=server.url) as http:
        tokens = http.post("/tokenize", json={"prompt": "the quick"}).json()["tokens"]
        assert tokens == server.engine.tokenizer.encode("the quick")
        assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "</s>the quick"


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).max_model_len == CONFIG["max_position_embeddings"]


def test_ten_megabytes_get_413_and_the_connection_stays_usable(server):
    with httpx.Client(base_url=server.url) as http:
        for content in (b'{"prompt": "' + b"a" * 10_000_000, (b"a" * 100_000 for _ in range(100))):
            reply = http.post("/v1/completions", content=content)
            assert reply.status_code == 413 and "4194304 bytes" in reply.json()["error"]["message"]
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_noise_on_the_socket_harms_nobody(server, client):
    host, port = urlsplit(server.url).hostname, urlsplit(server.url).port
    random.seed(5)
    for noise in (b"\x00" * 100, b"GET\r\n\r\n", random.randbytes(5000), b"POST /v1/completions HTTP/1.1\r\n\r\n"):
        with socket.create_connection((host, port), timeout=5) as raw:
            raw.sendall(noise)
            raw.shutdown(socket.SHUT_WR)
            raw.recv(1000)
    assert complete(client, max_tokens=1).choices


def open_completion(server, **fields):
    """A connection on which a long completion has been asked for."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    body = {"prompt": "the quick", "max_tokens": 120, "ignore_eos": True, **fields}
    connection.request("POST", "/v1/completions", json.dumps(body))
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_blocks(server, stream):
    leaving = [open_completion(server, stream=stream, n=3) for _ in range(4)]  # some run, some still wait
    until(lambda: server.engine.state.num_unfinished == 12 and server.engine.state.running)
    if stream:
        response = leaving[0].getresponse()
        assert response.readline().startswith(b"data: ")
        response.close()
    steps = [len(request.output_token_ids) for request in server.engine.state.running]
    for connection in leaving:
        connection.close()
    until(lambda: server.is_idle)
    assert max(steps) < 100, "they left before they were done"


def test_every_client_that_stays_gets_its_answer_while_others_leave(server, client):
    expected = {prompt: complete(client, prompt, **GREEDY).choices[0].text for prompt in PROMPTS}
    random.seed(3)

    def visit(number):
        if number % 4 == 0:
            open_completion(server, stream=number % 8 == 0).close()
            return True
        prompt = random.choice(PROMPTS)
        if number % 2:
            return complete(client, prompt, **GREEDY).choices[0].text == expected[prompt]
        pieces = [chunk.choices[0].text for chunk in complete(client, prompt, stream=True, **GREEDY)]
        return "".join(pieces) == expected[prompt]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(visit, range(48)))
    until(lambda: server.is_idle)


@pytest.fixture(scope="module")
def batch_lines():
    lines = []
    for i in range(60):
        body = {"prompt": PROMPTS[i % len(PROMPTS)], "max_tokens": 10 + i % 30, "seed": i, "n": 1 + i % 2}
        lines.append({"custom_id": f"line-{i}", "method": "POST", "url": "/v1/completions", "body": body})
    lines[7]["body"] = {"prompt": "a", "temprature": 1}
    return [*map(json.dumps, lines[:30]), "this is not JSON", *map(json.dumps, lines[30:])]


def run_batch(folder, source, output):
    command = [
        sys.executable,
        "-m",
        "apt_jax.serve.cli",
        "run-batch",
        "-i",
        str(source),
        "-o",
        str(output),
        str(folder),
    ]
    return subprocess.Popen([*command, "--load-format", "dummy", *flags()], stderr=subprocess.PIPE, text=True)


def test_a_batch_that_is_killed_goes_on_and_answers_every_line_once_as_http_would(
    folder, client, batch_lines, tmp_path
):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(batch_lines) + "\n")
    job = run_batch(folder, source, output)
    until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 10, 120)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    before = output.read_bytes()
    assert before.count(b"\n") < len(batch_lines), "it was killed in the middle"
    job = run_batch(folder, source, output)
    _, errors = job.communicate(timeout=240)
    assert job.returncode == 0, errors
    assert f"{len(batch_lines)}/{len(batch_lines)}" in errors, "the progress bar ends full"
    after = output.read_bytes()
    assert after.startswith(before[: before.rindex(b"\n") + 1])
    results = [json.loads(line) for line in after.splitlines()]
    assert sorted(int(r["id"].split("_")[2]) for r in results) == list(range(1, len(batch_lines) + 1))
    by_id = {r["custom_id"]: r for r in results}
    assert by_id[None]["error"]["code"] == "invalid_json"
    assert by_id["line-7"]["response"]["status_code"] == 400
    for i in (0, 1, 31, 58):
        asked = json.loads(next(line for line in batch_lines if f'"line-{i}"' in line))["body"]
        over_http = complete(client, **asked)
        in_batch = by_id[f"line-{i}"]["response"]["body"]
        assert [c["text"] for c in in_batch["choices"]] == [c.text for c in over_http.choices]
        counts = {"prompt_tokens", "completion_tokens", "total_tokens"}  # what was cached may differ
        assert {key: in_batch["usage"][key] for key in counts} == over_http.usage.model_dump(include=counts)


def test_llm_gives_what_http_gives(folder, client):
    llm = LLM(str(folder), load_format="dummy", **engine_options())
    params = SamplingParams(n=2, seed=9, max_tokens=15, ignore_eos=True)
    results = llm.generate(PROMPTS, params, use_tqdm=False)
    reply = complete(client, PROMPTS, n=2, seed=9, max_tokens=15, ignore_eos=True)
    assert [o.text for r in results for o in r.outputs] == [choice.text for choice in reply.choices]
    assert [r.prompt for r in results] == PROMPTS and all(r.finished for r in results)
    pool = llm.engine.state.pool
    assert pool.num_free == pool.num_blocks


def test_the_command_serves_at_once_is_ready_later_and_ends_in_order(folder):
    process, url = start_server(folder, "--served-model-name", NAME)
    try:
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/ready").status_code == 503
        until(lambda: is_ready(url), 240)
        body = {"model": NAME, "prompt": "the quick", "max_tokens": 100, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
            lines = (line for line in reply.iter_lines() if line)
            events = [next(lines)]
            process.send_signal(signal.SIGTERM)
            events += lines
        assert len(events) == 101 and '"length"' in events[99] and events[100] == "data: [DONE]"
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "stopped" in errors and "Traceback" not in errors


def test_interrupting_the_command_while_it_loads_ends_it(folder):
    process, url = start_server(folder)
    try:
        assert httpx.get(f"{url}/health").json()["status"] == "loading"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in errors
