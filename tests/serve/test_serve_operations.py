"""What production does to a server, over the fake engine: time limits, overload, failures, being stopped."""

import asyncio
import json

import pytest

from apt_jax.output import DeviceLost
from apt_jax.request import SamplingParams, Slo
from apt_jax.serve.errors import PredictedLate, error_reply
from apt_jax.serve.http.resume import Resumption
from apt_jax.serve.http.snapshot import record_of, restore
from apt_jax.serve.http.snapshot_file import read_snapshot, write_snapshot
from apt_jax.serve.runtime.admission import ENOUGH_S, Admission
from apt_jax.serve.runtime.samples import fan_out
from apt_jax.serve.runtime.status import EngineStatus
from tests.support.asgi_service import events_of, run, serving, until
from tests.support.fake_engine import CharTokenizer, FakeEngine

LONG = {"prompt": "a", "max_tokens": 100}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_request_that_takes_too_long_gets_504_and_gives_its_blocks_back(stream, steps):
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():
        async with serving(engine, request_timeout=0.3) as client:
            if steps:
                engine.allow_step(steps)
            task = asyncio.create_task(client.post("/v1/completions", json={**LONG, "n": 6, "stream": stream}))
            await until(lambda: engine.has_unfinished and engine.num_steps == steps)
            await asyncio.sleep(0.35)
            engine.allow_step()
            await until(lambda: engine.is_idle)
            reply = await task
            error = events_of(reply)[-1]["error"] if stream else reply.json()["error"]
            assert reply.status_code == (200 if stream else 504) and error["code"] == "timeout"
            assert "0.3 s, the limit of --request-timeout" in error["message"]

    run(main)


def test_nobody_is_refused_before_something_is_known_or_while_nobody_waits():
    engine = FakeEngine(tokenizer=CharTokenizer())
    admission = Admission()
    samples = fan_out("r", [[1] * 50], SamplingParams(), slo=Slo(0.1, 1))
    assert admission.tokens_per_s is None
    admission.check(engine, samples)
    admission.learn(10, ENOUGH_S)
    assert admission.tokens_per_s == pytest.approx(10 / ENOUGH_S, rel=0.05)
    admission.check(engine, samples)  # nobody waits


def test_what_would_be_late_is_refused_with_how_long_to_wait():
    engine = FakeEngine(tokenizer=CharTokenizer())
    admission = Admission()
    admission.learn(100, 1.0)
    engine.add([1] * 100, SamplingParams(), request_id="ahead")
    hurried, patient = (fan_out("r", [[1] * 50], SamplingParams(), slo=Slo(ttft_s, 1)) for ttft_s in (0.5, 2.0))
    with pytest.raises(PredictedLate, match=r"about 1\.5 s, its SLO is 0\.5 s") as caught:
        admission.check(engine, hurried)
    admission.check(engine, patient)
    status, body, headers = error_reply(caught.value)
    assert (status, body["error"]["code"], headers) == (503, "predicted_late", {"retry-after": "1"})


def test_admission_forgets_with_busy_time_only():
    admission = Admission()
    admission.learn(1000, 1.0)
    for _ in range(300):
        admission.learn(10, 0.1)
    assert admission.tokens_per_s == pytest.approx(100, rel=0.1)


def test_the_option_refuses_over_http_and_counts_it():
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():
        async with serving(engine, reject_predicted_late=True) as client:
            client.service.backend.admission.learn(1, 10.0)
            tasks = [asyncio.create_task(client.post("/v1/completions", json=LONG)) for _ in range(6)]
            await until(lambda: engine.has_unfinished)
            engine.allow_step(1)
            await until(lambda: any(task.done() for task in tasks))  # refused
            engine.allow_step(1000)
            statuses = [(await task).status_code for task in tasks]
            assert 200 in statuses and 503 in statuses and set(statuses) == {200, 503}
            metrics = (await client.get("/metrics")).text
            assert f'reason="predicted_late"}} {statuses.count(503)}.0' in metrics

    run(main)


def test_a_lost_device_turns_health_to_503_and_fails_what_waits():
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():
        async with serving(engine) as client:
            task = asyncio.create_task(client.post("/v1/completions", json=LONG))
            await until(lambda: engine.has_unfinished)
            engine.fail_with = DeviceLost("the device does not work any more")
            engine.allow_step(10)
            assert (await task).status_code == 500
            await until(lambda: client.service.backend.status is EngineStatus.FAILED)
            assert (await client.get("/health")).status_code == 503
            assert (await client.get("/ready")).status_code == 503
            assert (await client.post("/v1/completions", json=LONG)).status_code == 503

    run(main)


def test_lost_blocks_are_noticed_when_the_engine_goes_idle(caplog):
    engine = FakeEngine(tokenizer=CharTokenizer())

    async def main():
        async with serving(engine) as client:
            await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            assert 'apt:idle_lost_blocks{model_name="tiny"} 0.0' in (await client.get("/metrics")).text
            engine.state.check = lambda: None
            engine.state.pool._free.pop()
            await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            assert 'apt:idle_lost_blocks{model_name="tiny"} 1.0' in (await client.get("/metrics")).text

    run(main)
    assert "the engine is idle but 1 blocks are not free" in caplog.text


def test_a_stopping_server_takes_nothing_new_and_keeps_what_it_could_not_finish():
    engine = FakeEngine(tokenizer=CharTokenizer("{{ messages[0].content }}"), paced=True)

    async def main():
        async with serving(engine) as client:
            chat = {"messages": [{"role": "user", "content": "k"}], "max_tokens": 30, "stream": True}
            posts = [("/v1/completions", {**LONG, "n": 2}), ("/v1/chat/completions", chat)]
            tasks = [asyncio.create_task(client.post(path, json=body)) for path, body in posts]
            await until(lambda: engine.has_unfinished and client.service.num_generating == 2)
            engine.allow_step(6)
            await until(lambda: engine.num_steps == 6)
            client.service.is_stopping = True
            assert (await client.post("/v1/completions", json=LONG)).json()["error"]["code"] == "not_ready"
            assert (await client.get("/ready")).json()["status"] == "stopping"
            client.service.backend.abort_all()
            engine.allow_step(100)
            whole, streamed = [await task for task in tasks]
            assert {c["finish_reason"] for c in whole.json()["choices"]} == {"abort"}
            assert events_of(streamed)[-1]["choices"][0]["finish_reason"] == "abort"
            records = client.service.unfinished_records
            assert sorted(record["kind"] for record in records) == ["chatcmpl", "cmpl"]
            assert all(len(sample["token_ids"]) >= 3 for record in records for sample in record["samples"])

    run(main)


def test_a_stopping_server_keeps_nothing_that_was_refused_or_that_nobody_wants():
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():
        async with serving(engine, request_timeout=0.2) as client:
            first = asyncio.create_task(client.post("/v1/completions", json=LONG))
            await until(lambda: engine.has_unfinished)
            bodies = [{"prompt": [999]}, {"prompt": ["a"] * 8}, {"prompt": "x"}]  # one is invalid, one too many
            tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
            statuses = [(await task).status_code for task in (first, *tasks)]
            assert statuses == [504] * 4, "the first and all that wait run into the time limit, before the engine looks"
            client.service.is_stopping = True
            client.service.backend.abort_all()
            engine.allow_step(100)
            await until(lambda: engine.is_idle)
            assert client.service.unfinished_records == []

    run(main)


def stopped_records() -> list[dict]:
    """The snapshot of two requests, stopped after some steps; the second has ended one of its two samples."""
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)
    found = []

    async def main():
        async with serving(engine) as client:
            bodies = [{"prompt": "a", "max_tokens": 20, "logprobs": 1}, {"prompt": ["b", "x"], "stop_token_ids": [122]}]
            tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
            await until(lambda: engine.has_unfinished)
            engine.allow_step(6)
            await until(lambda: engine.num_steps == 6)
            client.service.is_stopping = True
            client.service.backend.abort_all()
            engine.allow_step(100)
            await asyncio.gather(*tasks)
            found.extend(client.service.unfinished_records)

    run(main)
    return found


def resume(path, engine=None, until_done=True):
    """Run a server that resumes `path`; the results by id."""
    resumption = Resumption(path)

    async def main():
        async with serving(engine or FakeEngine(tokenizer=CharTokenizer()), resumption=resumption):
            await until(lambda: not path.exists())

    run(main)
    lines = map(json.loads, resumption.results_path.read_text().splitlines())
    return {line["custom_id"]: line["response"] for line in lines}


def test_the_next_start_finishes_them_with_the_same_tokens(tmp_path):
    path = tmp_path / "left.jsonl"
    records = stopped_records()
    assert write_snapshot(path, records) == 2 and path.stat().st_mode & 0o777 == 0o600
    results = resume(path)
    assert set(results) == {record["id"] for record in records}
    by_prompts = {len(record["prompts"]): results[record["id"]]["body"] for record in records}
    (choice,) = by_prompts[1]["choices"]
    assert choice["text"] == "bcdefghijklmnopqrstu" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == list("bcdefghijklmnopqrstu")
    assert by_prompts[1]["usage"]["completion_tokens"] == 20
    first, second = by_prompts[2]["choices"]
    assert (first["text"], second["text"], second["finish_reason"]) == ("cdefghijklmnopqr", "yz", "stop")
    assert resume_nothing(path)


def resume_nothing(path) -> bool:
    """A start after everything is done has nothing to do."""
    return read_snapshot(path) == [] and Resumption(path)._records == []


def test_what_has_a_result_already_is_not_done_again(tmp_path):
    path = tmp_path / "left.jsonl"
    records = stopped_records()
    write_snapshot(path, records)
    done = path.with_name(f"{path.name}.results.jsonl")
    done.write_text(json.dumps({"custom_id": records[0]["id"], "response": "kept"}) + "\n")
    results = resume(path)
    assert results[records[0]["id"]] == "kept" and results[records[1]["id"]]["status_code"] == 200


def test_a_record_that_cannot_be_resumed_gets_an_error_and_the_others_go_on(tmp_path):
    path = tmp_path / "left.jsonl"
    records = stopped_records()
    records[0]["samples"][0]["prompt_token_ids"] = [999]
    write_snapshot(path, records)
    results = resume(path)
    assert sorted(result["status_code"] for result in results.values()) == [200, 500]


def test_a_snapshot_of_a_snapshot_is_the_same(tmp_path):
    for record in stopped_records():
        engine = FakeEngine(tokenizer=CharTokenizer())

        class Model:
            name = "tiny"

        Model.engine = engine
        generation, _ = restore(json.loads(json.dumps(record)), Model)
        again = json.loads(json.dumps(record_of(generation, engine.fingerprint)))
        assert again == json.loads(json.dumps(record))


@pytest.mark.parametrize("text", ["[]\n", "{}\n", "x\n"])
def test_a_file_that_is_no_snapshot_is_refused(tmp_path, text):
    path = tmp_path / "left.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"left\.jsonl line 1 is"):
        Resumption(path)
