"""Batch jobs over the fake engine: what lines bring, and going on after any kind of stop."""

import io
import json
import logging
import re
from dataclasses import replace
from functools import partial

import pytest
from tqdm import tqdm

from apt_jax.engine_config import EngineConfig
from apt_jax.output import QueueFull
from apt_jax.request import FinishReason
from apt_jax.serve.batch import batch_jobs
from apt_jax.serve.batch.batch_file import MAX_LINE_BYTES, ResultFile, count_lines, read_lines
from apt_jax.serve.batch.batch_jobs import BatchJob, run_batch
from apt_jax.serve.errors import EngineFailure
from apt_jax.serve.openai.generation import ServedModel
from apt_jax.serve.options import LoadOptions
from tests.support.fake_engine import CharTokenizer, FakeEngine


def line(custom_id, body=None, **changes):
    body = {"prompt": "a", "max_tokens": 2} if body is None else body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body, **changes})


def write(path, *lines):
    path.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")
    return path


def answer(source, output, engine=None):
    """Run a job; returns its results by line number."""
    engine = engine or FakeEngine(tokenizer=CharTokenizer())
    with ResultFile(output) as results, tqdm(total=count_lines(source), file=io.StringIO()) as bar:
        bar.update(results.num_done)
        BatchJob(engine, ServedModel(engine, "tiny"), partial(read_lines, source), results, bar).run()
        assert bar.n == bar.total
    assert engine.is_idle
    return results_of(output)


def test_chats_and_completions_may_be_mixed(tmp_path):
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    source = write(tmp_path / "in.jsonl", line("chat", chat, url="/v1/chat/completions"), line("text"))
    results = answer(source, tmp_path / "out.jsonl", FakeEngine(tokenizer=CharTokenizer("{{ messages[0].content }}")))
    body = results[1]["response"]["body"]
    assert body["object"] == "chat.completion" and body["choices"][0]["message"]["content"] == "yz"
    assert body["id"] == results[1]["response"]["request_id"] and body["id"].startswith("chatcmpl-")
    assert results[2]["response"]["body"]["choices"][0]["text"] == "bc"
    refused = answer(source, tmp_path / "other.jsonl")[1]["response"]
    assert refused["status_code"] == 400 and "--chat-template" in refused["body"]["error"]["message"]


@pytest.mark.parametrize("fault", ["1 / 0", "nothing | tojson", "'x' + 1", "range(10 ** 12) | list"])
def test_a_line_on_which_the_template_fails_is_refused_and_the_job_goes_on(tmp_path, fault):
    chats = [{"messages": [{"role": "user", "content": text}], "max_tokens": 2} for text in ("bad", "x")]
    source = write(
        tmp_path / "in.jsonl", *(line(f"{n}", chat, url="/v1/chat/completions") for n, chat in enumerate(chats))
    )
    template = "{% if messages[0].content == 'bad' %}{{ " + fault + " }}{% endif %}{{ messages[0].content }}"
    results = answer(source, tmp_path / "out.jsonl", FakeEngine(tokenizer=CharTokenizer(template)))
    assert [results[n]["response"]["status_code"] for n in (1, 2)] == [400, 200]
    assert "the chat template" in results[1]["response"]["body"]["error"]["message"]


def test_a_line_that_raises_what_nobody_foresaw_is_an_answer_and_does_not_end_the_job(tmp_path, caplog):
    class Faulty(CharTokenizer):
        def encode(self, text, add_special_tokens=True):
            if text == "bad":
                raise KeyError("unforeseen")
            return super().encode(text, add_special_tokens)

    bodies = ({"prompt": text, "max_tokens": 2} for text in ("bad", "a"))
    source = write(tmp_path / "in.jsonl", *(line(f"{n}", body) for n, body in enumerate(bodies)))
    results = answer(source, tmp_path / "out.jsonl", FakeEngine(tokenizer=Faulty()))
    assert [results[n]["response"]["status_code"] for n in (1, 2)] == [500, 200]
    assert "line 1 cannot be answered" in caplog.text


def test_loglikelihoods_in_a_batch(tmp_path):
    body = {"prompt": ["ab", "xy"], "echo": True, "max_tokens": 0, "logprobs": 1, "prompt_logprobs": 0}
    response = answer(write(tmp_path / "in.jsonl", line("one", body)), tmp_path / "out.jsonl")[1]["response"]
    choices = response["body"]["choices"]
    assert [choice["text"] for choice in choices] == ["ab", "xy"] and response["body"]["usage"][
        "completion_tokens"
    ] == 0
    assert all(choice["logprobs"]["token_logprobs"] == [None, -1.5, -1.5] for choice in choices)
    assert [len(choice["prompt_logprobs"]) for choice in choices] == [3, 3]


def test_the_bar_shows_the_time_left_and_the_throughput(tmp_path):
    source = write(tmp_path / "in.jsonl", *(line(str(i)) for i in range(9)))
    shown = io.StringIO()
    with ResultFile(tmp_path / "out.jsonl") as results, tqdm(total=9, file=shown, mininterval=0, unit="line") as bar:
        engine = FakeEngine(tokenizer=CharTokenizer())
        BatchJob(engine, ServedModel(engine, "tiny"), partial(read_lines, source), results, bar).run()
    assert re.search(r"5/9 \[\d+:\d+<\d+:\d+, +[\d.]+line/s, \d+ tokens/s, \d running\]", shown.getvalue())


def results_of(output):
    found = {}
    for text in output.read_text(encoding="utf-8").splitlines():
        result = json.loads(text)
        assert set(result) == {"id", "custom_id", "response", "error"}
        number = int(result["id"].split("_")[2])
        assert number not in found, "a line is answered twice"
        found[number] = result
    return found


def test_lines_are_answered_in_openai_s_shape(tmp_path):
    source = write(tmp_path / "in.jsonl", line("one"), line("two", {"prompt": ["x", "b"], "n": 2, "max_tokens": 1}))
    results = answer(source, tmp_path / "out.jsonl")
    first, second = results[1], results[2]
    assert first["custom_id"] == "one" and first["error"] is None and first["response"]["status_code"] == 200
    body = first["response"]["body"]
    assert body["object"] == "text_completion" and body["choices"][0]["text"] == "bc"
    assert body["usage"] == {
        "prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert body["id"] == first["response"]["request_id"]
    assert [c["text"] for c in second["response"]["body"]["choices"]] == ["y", "y", "c", "c"]


@pytest.mark.parametrize(
    ("text", "custom_id", "code", "sentence"),
    [
        ("{", None, "invalid_json", "the line is not valid JSON"),
        ("[]", None, "invalid_line", "the line is not a JSON object"),
        ("{}", None, "invalid_line", "field custom_id is missing"),
        (line(""), "", "invalid_line", "custom_id"),
        (line(3), None, "invalid_line", "custom_id=3: input should be a valid string"),
        (line("x", method="GET"), "x", "unsupported_url", "GET /v1/completions cannot be answered in a batch"),
        (
            line("x", url="/v1/embeddings"),
            "x",
            "unsupported_url",
            "/v1/chat/completions and /v1/responses can",
        ),
        (line("x", extra=1), "x", "invalid_line", 'unknown field "extra"'),
        (line("x", "not an object"), "x", "invalid_line", "body="),
        (line("ok"), "ok", "duplicate_custom_id", "custom_id 'ok' is already that of line 1"),
        ("x" * (MAX_LINE_BYTES + 1), None, "line_too_long", "the line is longer than"),
    ],
)
def test_a_line_that_is_no_request_becomes_an_error_line(tmp_path, text, custom_id, code, sentence):
    source = write(tmp_path / "in.jsonl", line("ok"), text, line("last"))
    results = answer(source, tmp_path / "out.jsonl")
    assert [results[n]["response"]["status_code"] for n in (1, 3)] == [200, 200]
    assert results[2]["custom_id"] == custom_id and results[2]["response"] is None
    assert results[2]["error"]["code"] == code and sentence in results[2]["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({"prompt": ""}, 400, "prompt is empty"),
        ({"prompt": "a", "temprature": 1}, 400, "did you mean temperature?"),
        ({"prompt": "a", "stream": True}, 400, "stream is not possible in a batch"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "use 'tiny'"),
        ({"prompt": [[97], [999], [98]], "n": 3}, 400, "token id 999"),
        ({"prompt": [97] * 200}, 400, "the context holds 128"),
    ],
)
def test_a_body_that_cannot_be_served_gets_the_reply_that_http_would_give(tmp_path, body, status, sentence):
    source = write(tmp_path / "in.jsonl", line("bad", body), line("good"))
    results = answer(source, tmp_path / "out.jsonl")
    response = results[1]["response"]
    assert results[1]["custom_id"] == "bad" and results[1]["error"] is None
    assert response["status_code"] == status and sentence in response["body"]["error"]["message"]
    assert results[2]["response"]["body"]["choices"][0]["text"] == "bc"


def test_blank_lines_are_no_lines(tmp_path):
    source = write(tmp_path / "in.jsonl", "", line("a"), "  ", line("b"))
    assert count_lines(source) == 2
    assert sorted(answer(source, tmp_path / "out.jsonl")) == [2, 4]


def test_more_lines_than_the_queue_holds_all_get_answers(tmp_path):
    engine = FakeEngine(tokenizer=CharTokenizer())
    most = 0
    add = engine.add

    def counting_add(*args, **options):
        nonlocal most
        request = add(*args, **options)
        most = max(most, engine.state.num_unfinished)
        return request

    engine.add = counting_add
    source = write(tmp_path / "in.jsonl", *(line(f"r{i}") for i in range(100)))
    assert len(answer(source, tmp_path / "out.jsonl", engine)) == 100
    assert most == 2 * engine.state.limits.max_num_seqs, "running and waiting are full, and no more"


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("steps", [0, 1, 3, 7])
@pytest.mark.parametrize("torn", [b"", b'{"id": "batch_req_5_', b"{"])
def test_a_job_goes_on_where_it_was_killed(tmp_path, steps, torn):
    lines = [line(f"r{i}", {"prompt": "a", "max_tokens": 1 + i % 5, "n": 1 + i % 2}) for i in range(12)]
    lines[3] = "not json"
    lines[8] = lines[7]
    source, output = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    engine = FakeEngine(tokenizer=CharTokenizer())
    step = engine.step
    engine.step = lambda: step() if engine.num_steps < steps else (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        answer(source, output, engine)
    before = output.read_bytes()
    output.write_bytes(before + torn)
    results = answer(source, output)
    assert output.read_bytes().startswith(before)
    assert sorted(results) == list(range(1, 13))
    for number, result in results.items():
        i = number - 1
        if i == 3:
            assert result["error"]["code"] == "invalid_json"
        elif i == 8:
            assert result["error"]["code"] == "duplicate_custom_id"
        else:
            texts = [choice["text"] for choice in result["response"]["body"]["choices"]]
            assert texts == ["bcdef"[: 1 + i % 5]] * (1 + i % 2)


def test_lines_may_be_appended_to_the_input_between_runs(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))  # without a newline
    answer(source, output)
    write(source, line("a"), line("b"))
    assert [result["custom_id"] for result in answer(source, output).values()] == ["a", "b"]


def test_results_of_another_input_are_refused(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    answer(write(source, line("a"), line("b")), output)
    before = output.read_bytes()
    write(source, line("a"), line("c"), line("d"))
    with pytest.raises(ValueError, match="answers another line 2 than the input has now"):
        answer(source, output)
    assert output.read_bytes() == before


@pytest.mark.parametrize("text", ["hello\n", "{}\n", '{"id": "x"}\n', '{"id": 3}\n', "[]\n"])
def test_a_file_that_is_no_result_is_refused_and_left_as_it_is(tmp_path, text):
    output = tmp_path / "notes.txt"
    output.write_text(text)
    with pytest.raises(ValueError, match="line 1 is no result of a batch job"):
        ResultFile(output)
    assert output.read_text() == text


def test_a_second_job_on_the_same_output_is_refused(tmp_path):
    with ResultFile(tmp_path / "out.jsonl"), pytest.raises(ValueError, match="another run writes"):
        ResultFile(tmp_path / "out.jsonl")


def test_a_finished_job_does_not_load_the_model(tmp_path, caplog):
    source, output = write(tmp_path / "in.jsonl", line("a")), tmp_path / "out.jsonl"
    answer(source, output)
    with caplog.at_level(logging.INFO):
        assert run_batch(source, output, "/no/such/model", None, LoadOptions(), EngineConfig()) == 0
    assert "all 1 lines" in caplog.text


def test_input_as_output_is_refused(tmp_path):
    source = write(tmp_path / "in.jsonl", line("a"))
    with pytest.raises(ValueError, match="is both input and output"):
        run_batch(source, source, None, None, LoadOptions(), EngineConfig())


def failing(engine, on_text, times):
    """Make the engine fail `times` times (twice an attempt, as n is 2) on the request that is to say `on_text`."""
    step, failures = engine.step, []

    def failing_step():
        outputs = step()
        for number, output in enumerate(outputs):
            if output.text == on_text and len(failures) < times:
                failures.append(output)
                engine.abort(output.request.request_id)
                outputs[number] = replace(output, finish_reason=FinishReason.ERROR, error="NaN in the logits\nsecret")
        return outputs

    engine.step = failing_step
    return engine


@pytest.mark.parametrize(("times", "status"), [(1, 200), (4, 200), (6, 500), (99, 500)])
def test_a_line_on_which_the_engine_fails_is_tried_three_times_while_the_job_goes_on(tmp_path, times, status):
    engine = failing(FakeEngine(tokenizer=CharTokenizer()), "z", times)
    lines = [line(f"r{i}") for i in range(9)]
    source = write(tmp_path / "in.jsonl", *lines, line("fails", {"prompt": "x", "max_tokens": 3, "n": 2}), line("last"))
    results = answer(source, tmp_path / "out.jsonl", engine)
    assert [results[n]["response"]["status_code"] for n in sorted(results)] == [200] * 9 + [status, 200]
    if status == 500:
        error = results[10]["response"]["body"]["error"]
        assert error["code"] == "engine_failure" and error["message"].endswith("request: NaN in the logits")


def test_an_engine_that_fails_on_everything_ends_the_job_and_answers_nothing(tmp_path):
    source, output = write(tmp_path / "in.jsonl", *(line(f"r{i}") for i in range(50))), tmp_path / "out.jsonl"
    with pytest.raises(EngineFailure, match=r"failed on 16 lines in a row, the last time with: .*NaN"):
        answer(source, output, failing(FakeEngine(tokenizer=CharTokenizer()), "b", 1000))
    assert output.read_text() == ""
    assert len(answer(source, output)) == 50


def test_read_lines_gives_numbers_and_whole_lines(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"one\r\n\n" + b"y" * (MAX_LINE_BYTES + 3) + b"\n" + "z\u00e9".encode())
    found = [(text.number, text.data) for text in read_lines(path)]
    assert found == [(1, b"one"), (3, None), (4, "z\u00e9".encode())]


def test_a_line_whose_grammar_cannot_be_followed_yet_is_tried_again(tmp_path, monkeypatch):
    """It was answered with 500, for good."""
    refused: list[int] = []

    def prepare(request, *given):
        if request.custom_id == "r2" and not refused:
            refused.append(1)
            raise QueueFull("256 different grammars are being followed; try again later")
        return batch_jobs_prepare(request, *given)

    batch_jobs_prepare = batch_jobs.prepare
    monkeypatch.setattr(batch_jobs, "prepare", prepare)
    results = answer(write(tmp_path / "in.jsonl", *(line(f"r{i}") for i in range(4))), tmp_path / "out.jsonl")
    assert refused and len(results) == 4
    assert all(result["response"]["status_code"] == 200 for result in results.values())
