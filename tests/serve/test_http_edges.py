"""The edges of the HTTP layer: exact limits, what passes through untouched, and what is logged when a file is lost."""

import asyncio
import contextlib
import json
import logging
from types import SimpleNamespace

import httpx
import pytest

from apt_jax.output import QueueFull
from apt_jax.serve.errors import PredictedLate
from apt_jax.serve.http.app import create_app
from apt_jax.serve.http.middleware import MAX_HEADERS, ApiKeys, HeaderLimit, Hosts, RequestIds, Unforeseen
from apt_jax.serve.http.resume import RETRY_S, Resumption
from apt_jax.serve.http.routes.debug import SHOWN_PLANS
from apt_jax.serve.http.routes.table import openapi_document
from apt_jax.serve.http.service import Service
from apt_jax.serve.http.snapshot_file import write_snapshot
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from tests.serve.test_snapshot_fields import kept
from tests.support.asgi_service import MAX_BODY_BYTES, run, serving
from tests.support.fake_engine import CharTokenizer, FakeEngine


@pytest.fixture
def engine():
    return FakeEngine(tokenizer=CharTokenizer())


async def pieces(data):
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]


def test_a_body_of_exactly_the_limit_is_read_whole_or_in_pieces(engine):
    async def main():
        async with serving(engine) as client:
            for more, status in ((0, 200), (1, 413)):
                body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
                body += b" " * (MAX_BODY_BYTES + more - len(body))
                for content in (body, pieces(body)):
                    headers = {"content-type": "application/json"}
                    reply = await client.post("/v1/completions", content=content, headers=headers)
                    assert reply.status_code == status

    run(main)


@pytest.mark.parametrize(("count", "status"), [(1, 200), (SHOWN_PLANS, 200), (SHOWN_PLANS + 1, 400)])
def test_as_many_plans_as_are_kept(engine, count, status):
    async def main():
        async with serving(engine) as client:
            await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3})
            reply = await client.get(f"/debug/plans?last={count}")
            assert reply.status_code == status
            if count == 1:
                assert len(reply.json()["plans"]) == 1

    run(main)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda app: RequestIds(app, ()),
        Unforeseen,
        lambda app: Hosts(app, (), loopback_only=False),
        lambda app: HeaderLimit(app, 1),
        lambda app: ApiKeys(app, ["k"], ()),
    ],
)
def test_start_and_stop_of_the_application_pass_every_layer(wrap):
    seen = []

    async def app(scope, receive, send):
        seen.append((scope["type"], receive, send))

    asyncio.run(wrap(app)({"type": "lifespan"}, "receive", seen.append))
    assert [(kind, receive) for kind, receive, _ in seen] == [("lifespan", "receive")]


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 431)])
def test_as_many_headers_as_are_taken_and_as_long(engine, more, status):
    async def main():
        async with serving(engine, max_header_bytes=4096) as client:
            others = len(client.build_request("GET", "/health").headers)
            names = {f"x-{number}": "" for number in range(MAX_HEADERS - others + more)}
            reply = await client.get("/health", headers=names)
            assert reply.status_code == status
            assert (
                status == 200 or f"the request has {MAX_HEADERS + 1} headers, at most {MAX_HEADERS} are" in reply.text
            )
            request = client.build_request("GET", "/health", headers={"x-long": ""})
            size = sum(len(name) + len(value) + 4 for name, value in request.headers.raw)
            request = client.build_request("GET", "/health", headers={"x-long": "a" * (4096 - size + more)})
            reply = await client.send(request)
            assert reply.status_code == status
            assert status == 200 or f"the headers have {4096 + more} bytes, at most 4096 are taken" in reply.text

    run(main)


def test_a_snapshot_that_cannot_be_brought_up_to_date_is_told_and_the_results_stay(tmp_path, engine, caplog):
    """A folder has taken the file's place while its requests were finished."""
    path = tmp_path / "left.jsonl"
    write_snapshot(path, [kept("a")])
    resumption = Resumption(path)
    path.unlink()
    path.mkdir()

    async def main():
        async with serving(engine, resumption=resumption):
            while resumption._results is not None:
                await asyncio.sleep(0.01)

    with caplog.at_level(logging.ERROR):
        run(main)
    (text,) = [r.getMessage() for r in caplog.records if "brought up to date" in r.getMessage()]
    assert text.startswith(f"{path} cannot be brought up to date (") and text.endswith("; it stays as it was")
    assert len(resumption.results_path.read_text().splitlines()) == 1


def test_the_document_has_every_refusal_of_a_route():
    responses = openapi_document()["paths"]["/v1/completions"]["post"]["responses"]
    assert {"200", "400", "404", "413", "415", "503"} <= set(responses)
    for status, response in responses.items():
        if status != "200":
            schema = response["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Error"}, status


def test_the_application_answers_without_a_connection_of_its_own(engine):
    """As under another ASGI server, which keeps none in the state."""

    async def main():
        async with serving(engine) as client:
            transport = httpx.ASGITransport(create_app(client.service, None))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
                reply = await other.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
                assert reply.status_code == 200

    run(main)


class Room:
    """A group that finds no room twice."""

    def __init__(self, refusal):
        self.answers = [refusal, refusal, None]

    async def accepted(self):
        if (refusal := self.answers.pop(0)) is not None:
            raise refusal

    async def __aiter__(self):
        yield []


@pytest.mark.parametrize("refusal", [QueueFull("full"), PredictedLate("late", 1.0)])
def test_a_resumed_request_that_finds_no_room_is_tried_again_after_a_pause(tmp_path, monkeypatch, refusal):
    """It was accepted once, so it is not refused; without a pause it would keep the event loop busy."""
    group, pauses = Room(refusal), []

    async def pause(seconds):
        pauses.append(seconds)

    engine = SimpleNamespace(config=SimpleNamespace(abandon_after=None))
    service = SimpleNamespace(
        check_accepts=lambda: None,
        served_model=lambda: SimpleNamespace(engine=engine),
        backend=SimpleNamespace(submit=lambda samples: group),
        generating=lambda *args: contextlib.nullcontext(),
    )
    monkeypatch.setattr("apt_jax.serve.http.resume.asyncio.sleep", pause)
    run(lambda: Resumption(tmp_path / "none")._generate(service, None, []))
    assert pauses == [RETRY_S] * 2 and group.answers == []


@pytest.mark.parametrize(
    ("is_stopping", "is_wanted", "is_whole", "is_cut", "kept"),
    [
        (False, True, False, True, False),  # an error of its own
        (True, False, False, True, False),  # the client has left
        (True, True, True, False, False),  # answered
        (True, True, False, False, True),  # ended with what it had
        (True, True, True, True, True),  # whole, and not all of it sent
    ],
)
def test_what_is_kept_of_a_request_when_the_server_stops(engine, is_stopping, is_wanted, is_whole, is_cut, kept):
    service = Service.of_engine(EngineThread(lambda: engine), "tiny", ServerOptions(snapshot_file=None))
    service.record_of = lambda generation: {"id": "a"}
    group = SimpleNamespace(is_wanted=is_wanted, take_pending=lambda: [("sample", "output")])
    collected = []
    generation = SimpleNamespace(is_whole=is_whole, collect=lambda *pair: collected.append(pair))

    def work():
        with service.generating(generation, group):
            assert service.num_generating == 1
            service.is_stopping = is_stopping
            if is_cut:
                raise BrokenPipeError

    for _ in range(2):  # twice, and kept once
        with contextlib.suppress(BrokenPipeError):
            work()
    assert service.num_generating == 0 and service.unfinished_records == [{"id": "a"}] * kept
    assert collected == [("sample", "output")] * 2 * (is_stopping and is_wanted)
