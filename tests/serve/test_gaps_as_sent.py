"""Times are those at which tokens are ready to be sent, and who leaves after a limit was broken has missed it."""

import asyncio
import time

import httpx
import pytest

from apt_jax.output import Output
from apt_jax.request import FinishReason, SamplingParams, Slo, Status
from apt_jax.serve.http.service import Service
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from apt_jax.serve.runtime.samples import as_sent, fan_out, has_broken_slo, record_of
from apt_jax.serve.runtime.status import EngineStatus
from tests.support.asgi_service import events_of, run, serving, until
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.live_server import live
from tests.support.live_server import until as wait_until
from tests.support.scheduling_loop import request

STREAM = {"prompt": "a", "max_tokens": 6, "stream": True}


def judged(client, slo):
    value = client.service.metrics.registry.get_sample_value
    labels = {"model_name": "tiny", "slo": slo}
    return value("apt:slo_attained_total", labels), value("apt:slo_missed_total", labels)


def test_an_event_loop_that_stands_still_is_a_gap_in_the_answer_and_in_the_metrics():
    """The engine makes its tokens at once; the loop cannot hand them out for 0.4 s."""
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)
    slo = {"ttft_ms": 60_000, "tbt_ms": 60_000, "stall_ms": 300}

    async def main():
        async with serving(engine) as client:
            task = asyncio.create_task(client.post("/v1/completions", json={**STREAM, "slo": slo}))
            engine.allow_step()
            await until(lambda: engine.num_begun == 2)
            await asyncio.sleep(0)  # the first token is handed out
            engine.allow_step()
            time.sleep(0.4)
            engine.allow_step(100)
            reply = await task
            report = events_of(reply)[-1]["slo"]
            assert report["longest_gap_ms"] >= 390
            assert (report["attained_strict"], report["attained"]) == (False, True)
            assert judged(client, "strict") == (0, 1) and judged(client, "both") == (1, 0)
            state = (await client.get("/debug/state")).json()
            assert (state["strict_attainment"], state["attainment"]) == (0.0, 1.0)

    run(main)


def test_a_client_that_reads_slowly_makes_no_gap():
    engine = FakeEngine(tokenizer=CharTokenizer())

    async def main():
        thread = EngineThread(lambda: engine)
        thread.start()
        await until(lambda: thread.status is EngineStatus.READY)
        group = thread.submit(fan_out("r", [[97]], SamplingParams(max_tokens=6)))
        await until(lambda: engine.num_steps == 6 and not engine.has_unfinished)
        await asyncio.to_thread(thread.stop, 5.0)  # all is handed out, and nobody iterates
        handed_out_s = time.monotonic()
        await asyncio.sleep(0.02)
        outputs = [output async for part in group for _, output in part]
        record = outputs[-1].request
        assert record.output_token_ids == [98, 99, 100, 101, 102, 103] and len(record.gaps_s) == 5
        assert record.last_token_s < handed_out_s and record.finish_reason is FinishReason.LENGTH

    run(main)


def test_a_record_keeps_its_own_times_and_takes_the_rest_when_the_request_has_ended():
    of = request(arrival_s=10.0)
    of.output_token_ids = [7]  # of an earlier run
    record = record_of(of)
    of.first_scheduled_s = 10.5
    of.output_token_ids.append(8)
    first = as_sent(record, Output(of, "x", (8,), (), None), 12.0)
    assert first.request is record and (record.first_token_s, record.first_scheduled_s) == (12.0, 10.5)
    of.gaps_s, of.num_preemptions, of.cache_history = [0.1, 0.1], 2, ["kv"]
    as_sent(record, Output(of, "y", (9,), (), None), 12.5)
    assert (record.gaps_s, record.num_preemptions, record.cache_history) == ([0.5], 0, [])
    of.status, of.stop_reason = Status.FINISHED, "end"
    last = as_sent(record, Output(of, "z", (10,), (), FinishReason.STOP, None, ()), 14.0)
    assert (record.gaps_s, record.output_token_ids) == ([0.5, 1.5], [7, 8, 9, 10])
    assert (record.status, record.finish_reason, record.stop_reason) == (Status.FINISHED, FinishReason.STOP, "end")
    assert (record.num_preemptions, record.cache_history, last.prompt_logprobs) == (2, ["kv"], ())


@pytest.mark.parametrize(
    ("first_s", "gaps_s", "left_after_s", "broken"),
    [
        (None, [], 1.0, False), (None, [], 1.01, True),  # while it waited for the first token
        (1.0, [], 0.75, False), (1.25, [], 0.0, True),
        (0.5, [0.25], 0.75, False), (0.5, [0.25], 0.76, True),  # in the middle of a gap
        (0.5, [0.5], 0.0, True), (0.5, [0.25] * 99 + [0.75], 0.0, False), (0.5, [0.25] * 99 + [0.76], 0.0, True),
    ],
)  # fmt: skip
def test_which_limits_a_client_need_not_have_waited_for(first_s, gaps_s, left_after_s, broken):
    record = request(slo=Slo(1.0, 0.25, stall_s=0.75), arrival_s=0.0)
    if first_s is not None:
        record.first_token_s, record.last_token_s = first_s, first_s + sum(gaps_s)
    record.gaps_s = gaps_s
    assert has_broken_slo(record, (record.last_token_s or 0.0) + left_after_s) is broken


@pytest.mark.parametrize(("ttft_ms", "missed"), [(20, 1), (60_000, 0)])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_client_that_leaves_counts_only_after_a_limit_was_broken(ttft_ms, missed, steps):
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)
    service = Service.of_engine(EngineThread(lambda: engine), "tiny", ServerOptions(snapshot_file=None))
    body = {"prompt": "a", "max_tokens": 50, "stream": True, "slo": {"ttft_ms": ttft_ms}}
    value = service.metrics.registry.get_sample_value
    with live(service) as url, httpx.Client() as client:
        with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
            wait_until(lambda: engine.num_waiting == 1)
            time.sleep(0.1)
            for _ in range(steps):
                engine.allow_step()
            pieces, seen = reply.iter_raw(), b""
            while seen.count(b"data: ") < steps:
                seen += next(pieces)
        wait_until(lambda: service.num_generating == 0)  # it is seen to have left
        engine.allow_step(3)
        ended = {"model_name": "tiny", "finished_reason": "abort"}
        wait_until(lambda: engine.is_idle and value("vllm:request_success_total", ended) == 1)
        for slo in ("strict", "both"):
            labels = {"model_name": "tiny", "slo": slo}
            assert (value("apt:slo_attained_total", labels), value("apt:slo_missed_total", labels)) == (0, missed)
        engine.allow_step(100)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_took_too_long_is_missed_once(stream):
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():
        async with serving(engine, request_timeout=0.2) as client:
            body = {"prompt": "a", "max_tokens": 50, "stream": stream, "slo": {"ttft_ms": 20}}
            task = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: engine.num_waiting == 1)
            await asyncio.sleep(0.25)
            engine.allow_step(3)
            await task
            await until(lambda: engine.is_idle)
            assert judged(client, "strict") == (0, 1)

    run(main)
