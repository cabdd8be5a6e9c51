"""Metrics, logs, request ids, keys and limits around the routes, over the fake engine."""

import asyncio
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from apt_jax.scheduling.plan import Plan, Preempted, Reason, Waited
from apt_jax.serve.logs import JsonFormatter, TextFormatter
from apt_jax.serve.observability.metrics import Metrics
from tests.support.asgi_service import run, serving, until
from tests.support.fake_engine import CharTokenizer, FakeEngine

# the names that docs/metrics.md lists, as Prometheus' parser gives them
FIXED = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:request_success",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "apt:cache_blocks",
    "apt:cache_conversions",
    "apt:slo_attained",
    "apt:slo_missed",
    "apt:late_demotions",
    "apt:recompiles_after_warmup",
    "apt:cache_values_outside_range",
    "apt:schedule_seconds",
}


def samples(text: str) -> dict[tuple, float]:
    """Value by name and labels other than the model's."""
    found = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("process_"):
            continue
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "le")}
            assert sample.labels["model_name"] == "tiny"
            found[(sample.name, *labels.values())] = sample.value
    return found


async def metrics_of(client: httpx.AsyncClient) -> dict[tuple, float]:
    return samples((await client.get("/metrics")).text)


def test_every_fixed_name_is_exported():
    families = {family.name for family in text_string_to_metric_families(Metrics("m").text().decode())}
    assert families >= FIXED


def test_counters_and_histograms_agree_with_what_was_served():
    engine = FakeEngine(tokenizer=CharTokenizer())

    async def main():
        async with serving(engine) as client:
            body = {"prompt": ["abc", "x"], "n": 2, "max_tokens": 5}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            late = {"prompt": "a", "max_tokens": 3, "slo": {"ttft_ms": 60_000, "tbt_ms": 0.001}}
            assert (await client.post("/v1/completions", json=late)).status_code == 200
            found = await metrics_of(client)
            assert found["vllm:prompt_tokens_total",] == 2 * 4 + 2 * 2 + 2
            assert found["vllm:generation_tokens_total",] == 4 * 5 + 3
            assert found["vllm:request_success_total", "length"] == 5
            for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
                assert found[f"vllm:{name}_seconds_count",] == 5
            assert found["vllm:inter_token_latency_seconds_count",] == 4 * 4 + 2
            assert found["vllm:request_time_per_output_token_seconds_count",] == 5
            assert found["vllm:request_generation_tokens_sum",] == 23
            assert found["vllm:request_prompt_tokens_sum",] == 14
            assert (found["apt:slo_attained_total", "both"], found["apt:slo_missed_total", "both"]) == (4, 1)
            assert (found["apt:slo_attained_total", "ttft"], found["apt:slo_missed_total", "tbt"]) == (5, 1)
            assert found["vllm:num_requests_running",] == found["vllm:num_requests_waiting",] == 0
            assert found["vllm:kv_cache_usage_perc",] == 0 and found["apt:cache_blocks", "free"] == 64
            assert found["apt:schedule_seconds_count",] == engine.num_steps
            assert found["apt:recompiles_after_warmup_total",] == found["apt:idle_lost_blocks",] == 0

    run(main)


def test_levels_show_what_runs_and_waits():
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():
        async with serving(engine) as client:
            body = {"prompt": ["abcdefg"] * 6, "max_tokens": 4}
            task = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: len(engine.state.waiting) == 6)
            engine.allow_step()
            backend = client.service.backend
            await until(
                lambda: backend.num_waiting_running == (2, 4) and sum(client.service.view.metrics.last_blocks.values())
            )
            found = await metrics_of(client)
            assert found["vllm:num_requests_running",] == 4 and found["vllm:num_requests_waiting",] == 2
            blocks = [found["apt:cache_blocks", kind] for kind in ("kv", "hidden", "free")]
            assert sum(blocks) == 64 and blocks[2] < 64
            assert found["vllm:kv_cache_usage_perc",] == pytest.approx(1 - blocks[2] / 64)
            assert (await client.get("/load")).json() == {"server_load": 1, "waiting": 2, "running": 4}
            engine.allow_step(100)
            assert (await task).status_code == 200

    run(main)


def test_refused_requests_are_counted_by_reason_and_the_server_s_refusals_as_missed():
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():
        async with serving(engine) as client:
            post = [client.post("/v1/completions", json={"prompt": ["a"] * 8, "max_tokens": 1}) for _ in range(2)]
            tasks = [asyncio.create_task(p) for p in post]
            await until(lambda: engine.has_unfinished and client.service.backend._inbox.qsize() == 1)
            engine.allow_step(100)
            assert sorted([(await t).status_code for t in tasks]) == [200, 503]
            await client.post("/v1/completions", json={"prompt": ""})
            await client.post("/v1/chat/completions", json={"messages": []})
            await client.post("/v1/completions", json={"prompt": "a", "model": "x"})
            found = await metrics_of(client)
            assert found["apt:requests_rejected_total", "queue_full"] == 1
            assert found["apt:requests_rejected_total", "bad_request"] == 2
            assert found["apt:requests_rejected_total", "model_not_found"] == 1
            assert found["apt:slo_missed_total", "both"] == 1

    run(main)


def test_a_failed_step_is_counted_and_its_requests_are_missed():
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():
        async with serving(engine) as client:
            task = asyncio.create_task(client.post("/v1/completions", json={"prompt": "a", "n": 2}))
            await until(lambda: engine.has_unfinished)
            engine.fail_with = RuntimeError("out of memory")
            engine.allow_step(100)
            assert (await task).status_code == 500
            found = await metrics_of(client)
            assert found["apt:failed_steps_total",] == 1 and found["vllm:request_success_total", "error"] == 2
            assert found["apt:slo_missed_total", "both"] == 2
            assert (await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})).status_code == 200

    run(main)


def test_conversions_preemptions_and_demotions_come_from_the_plans():
    engine = FakeEngine()
    metrics = Metrics("tiny")
    request = engine.add([1], replace_max_tokens(3), request_id="r")

    class Step:
        outputs = ()
        cancelled = ()

    engine.last_plan = Plan(
        preempted=(Preempted(request, Reason.PREEMPTED_LATE),),
        waited=(Waited((request,), Reason.WAITS_LATE), Waited((request,), Reason.WAITS_BEHIND)),
    )
    engine.num_recompiles = engine.num_failed_steps = 2
    for _ in range(3):
        metrics.stepped(engine.figures(), Step)
    found = samples(metrics.text().decode())
    assert found["vllm:num_preemptions_total",] == 3 and found["apt:late_demotions_total",] == 1
    assert found["apt:recompiles_after_warmup_total",] == 2 and found["apt:failed_steps_total",] == 2


def replace_max_tokens(tokens):
    from apt_jax.request import SamplingParams

    return replace(SamplingParams(), max_tokens=tokens)


def test_two_engines_in_one_process_count_apart():
    first, second = Metrics("a"), Metrics("b")
    first.reject("queue_full")
    wanted = 'apt:requests_rejected_total{{model_name="{}",reason="queue_full"}} {}'.format
    assert wanted("a", 1.0) in first.text().decode() and wanted("b", 0.0) in second.text().decode()


def test_request_ids_go_round_and_into_the_log_without_content(caplog):
    caplog.set_level(logging.INFO)

    async def main():
        async with serving(FakeEngine(tokenizer=CharTokenizer())) as client:
            body = {"prompt": "secret", "max_tokens": 2}
            reply = await client.post("/v1/completions", json=body, headers={"x-request-id": "my-7"})
            assert reply.headers["x-request-id"] == "my-7"
            made = (await client.get("/v1/models", headers={"x-request-id": "two\x01"})).headers["x-request-id"]
            assert len(made) == 32
            await client.get("/health")

    run(main)
    lines = [record.fields for record in caplog.records if record.name == "apt_jax.access"]
    assert [(line["path"], line["status"]) for line in lines] == [("/v1/completions", 200), ("/v1/models", 200)]
    assert lines[0]["request_id"] == "my-7" and lines[0]["duration_ms"] > 0
    (finished,) = [record.fields for record in caplog.records if record.name == "apt_jax.requests"]
    assert finished["finish_reason"] == "length" and finished["tokens"] == 2 and finished["attained"]
    assert all("secret" not in TextFormatter().format(record) for record in caplog.records)


def test_content_is_logged_only_when_asked(caplog):
    caplog.set_level(logging.INFO)

    async def main():
        async with serving(FakeEngine(tokenizer=CharTokenizer()), log_requests=True) as client:
            await client.post("/v1/completions", json={"prompt": "secret", "max_tokens": 2})

    run(main)
    assert any("secret" in record.getMessage() for record in caplog.records)


def test_log_lines_for_programs_and_for_people():
    record = logging.LogRecord("apt_jax.access", logging.INFO, "", 0, "request", None, None)
    record.fields = {"path": "/a\nb", "status": 200}
    assert (
        json.loads(JsonFormatter().format(record)).items() >= {"path": "/a\nb", "status": 200, "level": "INFO"}.items()
    )
    assert TextFormatter().format(record).endswith('request path="/a\\nb" status=200')
    try:
        raise ValueError("broken")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    shown = json.loads(JsonFormatter().format(record))
    assert "ValueError: broken" in shown["traceback"]


def test_keys_are_asked_for_and_probes_are_open():
    async def main():
        async with serving(FakeEngine(tokenizer=CharTokenizer()), api_key=("first", "second")) as client:
            for path in ("/v1/models", "/v1/nothing"):
                for header in (None, "Bearer third", "Bearer ", "first", "Basic first", "Bearer f\xefrst"):
                    headers = {} if header is None else {"authorization": header.encode("latin-1")}
                    reply = await client.get(path, headers=headers)
                    assert reply.status_code == 401
                    none = header in (None, "Bearer ", "first")
                    assert reply.json()["error"]["code"] == ("missing_api_key" if none else "invalid_api_key")
            for key in ("first", "second"):
                reply = await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
                assert reply.status_code == 200
            reply = await client.post("/v1/completions", json={"prompt": "a"})
            assert reply.status_code == 401
            assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 401
            for path in ("/health", "/ready", "/metrics", "/version", "/load", "/openapi.json"):
                assert (await client.get(path)).status_code == 200

    run(main)


def test_long_headers_are_refused():
    async def main():
        async with serving(FakeEngine(), max_header_bytes=2000) as client:
            assert (await client.get("/health", headers={"x": "a" * 1500})).status_code == 200
            reply = await client.get("/health", headers={"x": "a" * 2000})
            assert reply.status_code == 431 and reply.json()["error"]["code"] == "headers_too_large"

    run(main)


@pytest.mark.parametrize("origins", [(), ("https://page.example",)])
def test_other_origins_are_let_in_only_when_named(origins):
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}

    async def main():
        async with serving(FakeEngine(), allowed_origins=origins, api_key=("k",)) as client:
            reply = await client.options("/v1/completions", headers=asked)
            assert reply.headers.get("access-control-allow-origin") == (origins[0] if origins else None)
            other = await client.options("/v1/completions", headers={**asked, "origin": "https://evil.example"})
            assert "access-control-allow-origin" not in other.headers

    run(main)


def test_the_grafana_dashboard_asks_only_for_metrics_that_exist():
    exported = {sample.name for family in Metrics("m").registry.collect() for sample in family.samples}
    exported |= {f"{family.name}_bucket" for family in Metrics("m").registry.collect() if family.type == "histogram"}
    exported |= {f"{family.name}_total" for family in Metrics("m").registry.collect() if family.type == "counter"}
    exported |= {family.name for family in Metrics("m").registry.collect() if family.type == "gauge"}
    board = json.loads((Path(__file__).parents[2] / "deploy" / "monitoring" / "grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"(?:vllm|apt):\w+", expression)}
    assert len(asked) > 15 and asked <= exported


def test_tasks_come_back_to_what_they_were():
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():
        async with serving(engine) as client:
            before = (await metrics_of(client))[("apt:event_loop_tasks",)]
            body = {"prompt": "a", "max_tokens": 50, "stream": True}
            asked = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(6)]
            await until(lambda: client.service.num_generating == len(asked))
            assert (await metrics_of(client))[("apt:event_loop_tasks",)] >= before + 2 * len(asked)
            for task in asked[:3]:
                task.cancel()
            engine.allow_step(1000)
            await asyncio.gather(*asked, return_exceptions=True)
            await until(lambda: engine.is_idle)
            assert (await metrics_of(client))[("apt:event_loop_tasks",)] <= before

    run(main)
