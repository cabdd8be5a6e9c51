"""OpenAI's Batch API over HTTP, with OpenAI's own client and by hand, over the fake engine."""

import json
import time

import httpx
import openai
import pytest

from apt_jax.request import OFFLINE_SLO
from apt_jax.serve.batch.store import BatchStore, owner_of
from apt_jax.serve.batch.worker import PRIORITY, BatchWorker
from apt_jax.serve.http.service import Service
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from tests.kill_windows.work import batch_of
from tests.support.asgi_service import run, serving
from tests.support.asgi_service import until as when
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.live_server import live, until


def lines_of(*bodies, url="/v1/completions"):
    return b"".join(
        json.dumps({"custom_id": str(i), "method": "POST", "url": url, "body": body}).encode() + b"\n"
        for i, body in enumerate(bodies)
    )


def served(folder, engine=None, **options):
    """A live server with a folder for batches; its store is `store`."""
    thread = EngineThread(lambda: engine or FakeEngine(tokenizer=CharTokenizer()))
    service = Service.of_engine(thread, "tiny", ServerOptions(snapshot_file=None, **options))
    store = BatchStore(folder)
    service.batches = BatchWorker(store, thread.submit, service.served_model, service.off_loop)
    return live(service), service


def ended(client, batch):
    while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.01)
    return batch


def test_a_batch_by_the_client_of_openai(tmp_path):
    server, service = served(tmp_path)
    source = lines_of({"prompt": "a", "max_tokens": 3}, {"prompt": "k", "max_tokens": 2}, {"prompt": "x", "top_q": 1})
    with server as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        file = client.files.create(file=("in.jsonl", source), purpose="batch")
        assert (file.filename, file.bytes, file.purpose) == ("in.jsonl", len(source), "batch")
        assert client.files.content(file.id).read() == source
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"job": "7"}
        )
        assert batch.status == "validating" and batch.expires_at == batch.created_at + 86_400
        batch = ended(client, batch)
        assert batch.status == "completed" and batch.metadata == {"job": "7"}
        assert batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
        answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
        assert {a["custom_id"]: a["response"]["body"]["choices"][0]["text"] for a in answers} == {"0": "bcd", "1": "lm"}
        (fault,) = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
        assert fault["custom_id"] == "2" and fault["response"]["status_code"] == 400
        assert "top_q" in fault["response"]["body"]["error"]["message"]
        assert [b.id for b in client.batches.list()] == [batch.id]
        assert {f.id for f in client.files.list()} == {file.id, batch.output_file_id, batch.error_file_id}
        assert client.files.delete(file.id).deleted and len(list(client.files.list())) == 2
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            client.files.retrieve(file.id)
        text = httpx.get(f"{url}/metrics").text
    assert 'apt:slo_attained_total{model_name="tiny",slo="strict"} 0.0' in text, "nobody was promised anything"
    service.batches.store.close()


def test_chats_and_the_place_behind_everybody(tmp_path):
    """Requests of batches have the lowest priority, and no more than half of the seats."""
    asked = []

    class Noting(FakeEngine):
        def add(self, *args, **fields):
            asked.append((fields["priority"], fields["slo"], self.state.num_unfinished))
            return super().add(*args, **fields)

    engine = Noting(tokenizer=CharTokenizer("{{ messages[0].content }}"))
    server, service = served(tmp_path, engine)
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "priority": -5}
    with server as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        source = lines_of(*[body] * 12, url="/v1/chat/completions")
        file = client.files.create(file=("in.jsonl", source), purpose="batch")
        batch = ended(
            client,
            client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"),
        )
        (answer, *_) = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert batch.error_file_id is None and batch.request_counts.completed == 12
    assert answer["response"]["body"]["choices"][0]["message"]["content"] == "bc"
    assert {(priority, slo) for priority, slo, _ in asked} == {(PRIORITY, OFFLINE_SLO)}
    assert max(others for _, _, others in asked) < engine.max_num_seqs // 2
    service.batches.store.close()


def test_a_batch_of_responses(tmp_path):
    server, service = served(tmp_path)
    source = lines_of({"input": "a", "max_output_tokens": 3}, {"input": "k", "store": True}, url="/v1/responses")
    with server as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        file = client.files.create(file=("in.jsonl", source), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
        batch = ended(client, made)
        (answer,) = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
        (fault,) = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    body = answer["response"]["body"]
    assert body["object"] == "response" and body["output"][0]["content"][0]["text"] == "bcd" and "slo" not in body
    assert fault["response"]["body"]["error"]["param"] == "store"
    service.batches.store.close()


def test_each_key_sees_its_own(tmp_path):
    server, service = served(tmp_path, api_key=("one", "two"))
    with server as url:
        one, two = (openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in ("one", "two"))
        file = one.files.create(file=("in.jsonl", lines_of({"prompt": "a", "max_tokens": 1})), purpose="batch")
        with pytest.raises(openai.NotFoundError):
            two.files.content(file.id)
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            two.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        batch = one.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        for act in (two.batches.retrieve, two.batches.cancel):
            with pytest.raises(openai.NotFoundError, match="there is no batch"):
                act(batch.id)
        batch = ended(one, batch)
        assert not list(two.files.list()) and not list(two.batches.list())
        with pytest.raises(openai.NotFoundError):
            two.files.delete(batch.output_file_id)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="three", max_retries=0).files.list()
        one.close(), two.close()
    service.batches.store.close()


@pytest.mark.parametrize(
    ("data", "codes"),
    [
        (b"", ["empty_file"]),
        (b"no json\n" + lines_of({"prompt": "a"}), ["invalid_json"]),
        (lines_of({"prompt": "a"}) * 2, ["duplicate_custom_id"]),
        (lines_of({"messages": []}, url="/v1/chat/completions"), ["mismatched_url"]),
        (lines_of({"prompt": "a"}, url="/v1/embeddings"), ["unsupported_url"]),
        (b"[]\n" * 150, ["invalid_line"] * 100),
    ],
)
def test_a_file_that_is_no_batch_fails_before_anything_is_answered(tmp_path, data, codes):
    store = BatchStore(tmp_path)

    async def main():
        engine = FakeEngine(tokenizer=CharTokenizer())
        async with serving(engine, store=store) as client:
            file = store.add_file("", "in", "batch", [data])
            body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
            batch = (await client.post("/v1/batches", json=body)).json()
            await when(lambda: not store.unfinished())
            batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
            assert batch["status"] == "failed" and batch["output_file_id"] is None
            assert [error["code"] for error in batch["errors"]["data"]] == codes
            assert engine.num_steps == 0 and all(error["message"] for error in batch["errors"]["data"])

    run(main)
    store.close()


def test_a_cancelled_batch_ends_with_what_it_has_and_one_that_waits_at_once(tmp_path):
    store = BatchStore(tmp_path)

    async def main():
        engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)
        async with serving(engine, store=store) as client:
            file = store.add_file("", "in", "batch", [lines_of(*[{"prompt": "a", "max_tokens": 2}] * 9)])
            body = {"input_file_id": file["id"], "endpoint": "/v1/completions"}
            first, second = [(await client.post("/v1/batches", json=body)).json() for _ in range(2)]
            while (await client.get(f"/v1/batches/{first['id']}")).json()["request_counts"]["completed"] < 2:
                done = engine.num_steps
                engine.allow_step()  # one at a time: none is left over for after the cancellation
                await when(lambda done=done: engine.num_steps > done)
            reply = await client.request("DELETE", f"/v1/files/{file['id']}")
            assert reply.status_code == 400 and "which is under way" in reply.text
            assert (await client.post(f"/v1/batches/{second['id']}/cancel")).json()["status"] == "cancelled"
            assert (await client.post(f"/v1/batches/{first['id']}/cancel")).json()["status"] == "cancelling"
            engine.allow_step(1000)
            await when(lambda: not store.unfinished())
            batch = (await client.get(f"/v1/batches/{first['id']}")).json()
            answered = (await client.get(f"/v1/files/{batch['output_file_id']}/content")).text.splitlines()
            assert batch["status"] == "cancelled" and batch["cancelled_at"] and batch["error_file_id"] is None
            assert batch["cancelling_at"] and batch["in_progress_at"], "what was told before stays told"
            assert 2 <= len(answered) == batch["request_counts"]["completed"] < 9
            again = await client.post(f"/v1/batches/{first['id']}/cancel")
            assert again.status_code == 400 and "is cancelled; only a batch that is under way" in again.text
            await when(lambda: engine.is_idle)

    run(main)
    store.close()


def test_a_batch_that_was_cancelled_just_before_it_was_begun_stays_so(tmp_path, monkeypatch):
    store = BatchStore(tmp_path)
    file = store.add_file("", "in", "batch", [lines_of({"prompt": "a", "max_tokens": 1})])
    batch = store.add_batch("", batch_of(file["id"]))
    look = store.unfinished

    def and_then_it_is_cancelled():
        found = look()
        store.update("", batch["id"], status="cancelled", cancelled_at=7)
        return found

    monkeypatch.setattr(store, "unfinished", and_then_it_is_cancelled)

    async def main():
        engine = FakeEngine(tokenizer=CharTokenizer())
        async with serving(engine, store=store) as client:
            await when(lambda: not look())
            found = (await client.get(f"/v1/batches/{batch['id']}")).json()
            assert (found["status"], found["cancelled_at"], engine.num_steps) == ("cancelled", 7, 0)

    run(main)
    store.close()


def test_a_batch_whose_day_is_over_tells_what_was_not_answered(tmp_path):
    store = BatchStore(tmp_path)
    file = store.add_file("", "in", "batch", [lines_of(*[{"prompt": "a", "max_tokens": 1}] * 3)])
    batch = store.add_batch("", {**batch_of(file["id"]), "expires_at": int(time.time()) - 1})

    async def main():
        async with serving(FakeEngine(tokenizer=CharTokenizer(), paced=True), store=store) as client:
            await when(lambda: not store.unfinished())
            found = (await client.get(f"/v1/batches/{batch['id']}")).json()
            faults = (await client.get(f"/v1/files/{found['error_file_id']}/content")).text.splitlines()
            assert found["status"] == "expired" and found["expired_at"]
            assert [json.loads(line)["error"]["code"] for line in faults] == ["batch_expired"] * 3

    run(main)
    store.close()


def test_a_batch_goes_on_after_the_server_has_stopped(tmp_path):
    store = BatchStore(tmp_path)
    file = store.add_file("", "in", "batch", [lines_of(*[{"prompt": "a", "max_tokens": 2}] * 9)])
    batch = store.add_batch("", batch_of(file["id"]))

    async def stopped_early():
        engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)
        async with serving(engine, store=store) as client:
            while (await client.get(f"/v1/batches/{batch['id']}")).json()["request_counts"]["completed"] < 3:
                engine.allow_step()
        assert not client.service.unfinished_records, "they are the batch's, not the snapshot's"

    async def finished():
        engine = FakeEngine(tokenizer=CharTokenizer())
        async with serving(engine, store=store) as client:
            await when(lambda: not store.unfinished())
            found = (await client.get(f"/v1/batches/{batch['id']}")).json()
            lines = (await client.get(f"/v1/files/{found['output_file_id']}/content")).text.splitlines()
            assert found["status"] == "completed" and found["request_counts"]["completed"] == 9
            assert sorted(json.loads(line)["custom_id"] for line in lines) == [str(i) for i in range(9)]
            ran = {entry["request"] for plan in engine.state.plans.as_dicts() for entry in plan["scheduled"]}
            assert len(ran) <= 6, "those answered before are not answered again"

    run(stopped_early)
    assert [each["status"] for _, each in store.unfinished()] == ["in_progress"]
    run(finished)
    store.close()


def test_files_are_listed_by_order_and_purpose(tmp_path):
    store = BatchStore(tmp_path)
    names = ["a", "b", "c"]
    for name in names:
        store.add_file(owner_of(None), name, "batch" if name != "b" else "batch_output", [b"{}"])

    async def main():
        async with serving(FakeEngine(), store=store) as client:

            async def listed(query: str) -> list[str]:
                return [file["id"] for file in (await client.get(f"/v1/files?{query}")).json()["data"]]

            newest_first = await listed("")
            assert len(newest_first) == 3 and await listed("order=desc") == newest_first
            assert await listed("order=asc") == newest_first[::-1]
            of_batches, of_outputs = await listed("purpose=batch"), await listed("purpose=batch_output")
            assert len(of_batches) == 2 and len(of_outputs) == 1 and not await listed("purpose=vision")
            assert await listed(f"order=asc&after={newest_first[2]}&limit=1") == [newest_first[1]]

    run(main)
    store.close()


def test_files_of_others_in_the_folder_are_left_alone(tmp_path):
    """Somebody may name a folder that has `files` and `batches` of its own."""
    theirs = [tmp_path / "files" / "corpus.jsonl", tmp_path / "batches" / "old.results.jsonl"]
    cut_off = tmp_path / "files" / f"file-{'0' * 24}.jsonl"
    for path in (*theirs, cut_off):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}\n")
    store = BatchStore(tmp_path)
    assert all(path.exists() for path in theirs) and not cut_off.exists() and not store.files("")
    store.close()


def test_what_is_refused(tmp_path):
    store = BatchStore(tmp_path)
    with pytest.raises(ValueError, match="is used by another server"):
        BatchStore(tmp_path)

    async def main():
        def form(data=b"{}", **fields):
            return {"files": {"file": ("in", data)}, "data": {"purpose": "batch", **fields}}

        async with serving(FakeEngine(), store=store, max_batch_file_bytes=1000) as client:
            for reply, status, sentence in (
                (await client.post("/v1/files", **form(b"x" * 1001)), 413, "longer than 1000 bytes; split it"),
                (await client.post("/v1/files", **form(b"x" * 200_000)), 413, "longer than 1000 bytes; split it"),
                (await client.post("/v1/files", **form(purpose="fine-tune")), 400, "only batch is served"),
                (await client.post("/v1/files", data={"purpose": "batch"}, files={"other": b""}), 400, "has no file"),
                (await client.post("/v1/files", json={}), 415, "multipart/form-data"),
                (await client.post("/v1/files", **form(), headers={"origin": "http://x"}), 415, "needs an API key"),
                (await client.get("/v1/files/..%2flock"), 404, "Not Found"),
                (await client.get("/v1/files/file-1"), 404, "there is no file 'file-1'"),
                (await client.get("/v1/batches?limit=0"), 400, "between 1 and 100"),
                (await client.get("/v1/files?order=up"), 400, "must be asc or desc"),
                (await client.get(f"/v1/files?limit={'9' * 5000}"), 400, "between 1 and 10000"),
                (await client.post("/v1/files", **form(bogus="1")), 400, 'unknown field \\"bogus\\" of the form'),
                (
                    await client.post("/v1/files", **form(**{"expires_after[seconds]": "9"})),
                    400,
                    "until they are deleted",
                ),
                (await client.get("/v1/batches?after=x"), 400, "is no id of batches"),
                (await client.post("/v1/batches", json={"input_file_id": "f", "endpoint": "/v1/x"}), 400, "endpoint"),
            ):
                assert reply.status_code == status and sentence in reply.text, reply.text
            body = {"input_file_id": "f", "endpoint": "/v1/completions", "metadata": {"k": "v" * 513}}
            reply = await client.post("/v1/batches", json=body)
            assert reply.status_code == 400 and "its value 512" in reply.text
            assert not store.files("") and len(list((tmp_path / "files").iterdir())) == 0
        async with serving(FakeEngine()) as client:
            reply = await client.get("/v1/files")
            assert reply.status_code == 404 and "start it with --batch-dir DIR" in reply.text

    run(main)
    store.close()


def test_an_upload_that_was_cut_off_leaves_nothing(tmp_path):
    store = BatchStore(tmp_path)

    def broken():
        yield b"half"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.add_file("", "in", "batch", broken())
    (tmp_path / "files" / f"file-{'0' * 24}.jsonl").write_bytes(b"of a server that was killed")
    store.close()
    BatchStore(tmp_path).close()
    assert list((tmp_path / "files").iterdir()) == []
    until(lambda: True)
