"""The OpenAPI document is true: schemathesis makes requests from it, good and bad, and checks every answer."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from apt_jax.serve.http.routes.table import openapi_document
from apt_jax.serve.http.service import Service
from apt_jax.serve.openai.completions import Completion
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.live_server import live

TEMPLATE = "{% for m in messages %}{{ m.content }};{% endfor %}"
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


@pytest.fixture(scope="module")
def api():
    engine = FakeEngine(tokenizer=CharTokenizer(TEMPLATE), num_blocks=512)
    with live(Service.of_engine(EngineThread(lambda: engine), "tiny", ServerOptions())) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")
    assert engine.is_idle


CASES = [
    (path, method, mode)
    for path, methods in openapi_document()["paths"].items()
    for method, operation in methods.items()
    for mode in GenerationMode
    if mode.is_positive or "requestBody" in operation  # the others have nothing to get wrong
]


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_every_answer_is_as_the_document_says(api, path, method, mode):
    operation = api[path][method.upper()]

    @settings(max_examples=20, suppress_health_check=list(HealthCheck), phases=[Phase.generate], deadline=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(checks=CHECKS)

    check()


def test_events_are_checked_against_the_document(api, monkeypatch):
    """A chunk that the document does not know is found, so the test above looks into streams."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "stream": True}
    case = api["/v1/completions"]["POST"].Case(body=body, media_type="application/json")
    case.call_and_validate(checks=CHECKS)
    monkeypatch.setattr(Completion, "_object", lambda self, choices, stream=False: {"id": 7, "choices": choices})
    with pytest.raises(BaseExceptionGroup, match="distinct failure"):
        case.call_and_validate(checks=CHECKS)


def test_every_field_that_a_body_takes_is_in_the_document():
    schemas = openapi_document()["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest", "TokenizeRequest", "DetokenizeRequest"):
        assert schemas[name]["additionalProperties"] is False
    properties = schemas["CompletionRequest"]["properties"]
    assert properties["n"]["maximum"] == 128 and properties["top_p"]["exclusiveMinimum"] == 0
    assert {"prompt", "logit_bias", "slo", "stop", "stream_options"} <= set(properties)
