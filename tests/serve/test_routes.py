"""A route is one handler and one row: the application, the middleware and the OpenAPI document follow the row."""

import logging

import httpx
import pytest
from starlette.responses import JSONResponse

from apt_jax.serve.errors import BadRequest
from apt_jax.serve.http.app import create_app
from apt_jax.serve.http.routes.dashboard import PAGES
from apt_jax.serve.http.routes.openapi import document
from apt_jax.serve.http.routes.route import RouteSpec
from apt_jax.serve.http.routes.table import ROUTES
from apt_jax.serve.http.service import Service
from apt_jax.serve.openai.replies import Version
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from tests.support.asgi_service import run, serving
from tests.support.fake_engine import FakeEngine

KEY = {"authorization": "Bearer secret"}


async def echo(service, http):
    """GET /echo/NAME."""
    if http.path_params["name"] == "bad":
        raise BadRequest("the name is bad", "name")
    return JSONResponse({"version": http.path_params["name"]})


def service_of(**options) -> Service:
    return Service.of_engine(EngineThread(lambda: FakeEngine()), "tiny", ServerOptions(api_key=("secret",), **options))


def client_of(service: Service, *rows: RouteSpec) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(service, routes=(*ROUTES, *rows)), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def test_a_row_is_served_and_documented():
    row = RouteSpec("GET", "/echo/{name:path}", echo, summary="Say it again", reply=Version, statuses=(400,))

    async def main():
        async with client_of(service_of(), row) as client:
            assert (await client.get("/echo/a/b", headers=KEY)).json() == {"version": "a/b"}
            assert (await client.get("/echo/bad", headers=KEY)).status_code == 400
            assert (await client.post("/echo/a", headers=KEY)).status_code == 405

    run(main)
    operation = document((row,))["paths"]["/echo/{name}"]["get"]
    assert operation["summary"] == "Say it again" and set(operation["responses"]) == {"200", "400"}


@pytest.mark.parametrize("is_open", [False, True])
def test_a_row_says_whether_it_needs_a_key(is_open):
    async def main():
        async with client_of(service_of(), RouteSpec("GET", "/echo", echo_version, is_open=is_open)) as client:
            assert (await client.get("/echo")).status_code == (200 if is_open else 401)
            assert (await client.get("/echo", headers=KEY)).status_code == 200

    run(main)


@pytest.mark.parametrize("is_probe", [False, True])
def test_a_row_says_whether_it_is_worth_a_line_in_the_log(is_probe, caplog):
    async def main():
        async with client_of(service_of(), RouteSpec("GET", "/echo", echo_version, is_probe=is_probe)) as client:
            await client.get("/echo", headers=KEY)

    with caplog.at_level(logging.INFO, "apt_jax.access"):
        run(main)
    assert len(caplog.records) == (0 if is_probe else 1)


@pytest.mark.parametrize("is_generation", [False, True])
def test_a_row_says_whether_refusals_count(is_generation):
    service = service_of()
    counted = []
    service.refused = counted.append

    async def main():
        async with client_of(service, RouteSpec("GET", "/bad", refuse, is_generation=is_generation)) as client:
            assert (await client.get("/bad", headers=KEY)).status_code == 400

    run(main)
    assert counted == (["bad_request"] if is_generation else [])


async def echo_version(service, http):
    """GET /echo."""
    return JSONResponse({"version": "1"})


async def refuse(service, http):
    """GET /bad."""
    raise BadRequest("no", "name")


def test_what_can_be_asked_without_a_key_and_without_a_line_in_the_log():
    assert {route.path for route in ROUTES if route.is_open} == {
        *("/health", "/ready", "/version", "/metrics", "/load", "/openapi.json", *PAGES)
    }
    assert {route.path for route in ROUTES if route.is_probe} == {
        *("/health", "/ready", "/metrics", "/load", *PAGES),
        *("/debug/state", "/debug/history", "/debug/requests"),
    }
    assert {route.path for route in ROUTES if route.is_generation} == {
        *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"),
        *("/score", "/v1/score"),
    }


def test_every_path_has_one_row():
    paths = [(route.method, route.path) for route in ROUTES]
    assert len(paths) == len(set(paths))


def test_models_and_unknown_routes():
    async def main():
        async with serving(FakeEngine()) as client:
            listed = (await client.get("/v1/models")).json()
            assert [(m["id"], m["object"], m["max_model_len"]) for m in listed["data"]] == [("tiny", "model", 128)]
            assert (await client.get("/v1/models/tiny")).json() == listed["data"][0]
            for path, status in (("/v1/models/gpt-4", 404), ("/nothing", 404), ("/v1/completions", 405)):
                reply = await client.get(path)
                assert reply.status_code == status and reply.json()["error"]["type"] == "invalid_request_error"

    run(main)
