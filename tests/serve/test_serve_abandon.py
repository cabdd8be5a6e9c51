"""--abandon-after over HTTP: what a client gets whose request is ended because its SLO can no longer be kept."""

import asyncio
import dataclasses

import pytest

from apt_jax.engine_config import EngineConfig
from apt_jax.request import FinishReason
from apt_jax.serve.bench.offline.options import BenchLatency, BenchThroughput
from apt_jax.serve.cli import RunBatch
from apt_jax.serve.llm import LLM
from tests.support.asgi_service import events_of, run, serving, until
from tests.support.fake_engine import CharTokenizer, FakeEngine

LONG = {"prompt": "a", "max_tokens": 100}
HURRIED = {"prompt": "k", "max_tokens": 5, "slo": {"ttft_ms": 30_000}}
ABANDON_AFTER_S = 40.0
LATE_S = (
    100.0  # by the engine's clock, which is moved on: a limit of seconds is never reached because a machine is busy
)


def engine_with(max_num_seqs, **options):
    config = EngineConfig(
        max_num_seqs=max_num_seqs, max_num_queued_reqs=8, max_num_batched_tokens=64, scheduling_policy="fcfs", **options
    )
    return FakeEngine(config, CharTokenizer(), paced=True)


async def sample(client, name, **labels):
    return client.service.metrics.registry.get_sample_value(name, {"model_name": "tiny", **labels})


async def queued(engine, count):
    """Step, one at a time, until `count` requests wait: the engine reads its inbox between steps only."""
    await until(lambda: engine.num_begun > engine.num_steps)  # it waits to be allowed the next one
    while engine.num_waiting < count:
        begun = engine.num_begun
        engine.allow_step()
        await until(lambda begun=begun: engine.num_begun > begun)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_before_its_first_token_a_request_gets_503_and_when_to_come_back(stream, n):
    engine = engine_with(1, abandon_after=ABANDON_AFTER_S)

    async def main():
        async with serving(engine) as client:
            ahead = asyncio.create_task(client.post("/v1/completions", json=LONG))
            engine.allow_step()
            await until(lambda: engine.num_steps == 1)
            task = asyncio.create_task(client.post("/v1/completions", json={**HURRIED, "stream": stream, "n": n}))
            await queued(engine, n)
            engine.ahead_s = LATE_S
            engine.allow_step(2)
            reply = await task
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["type"]) == (503, "slo_abandoned", "server_error")
            assert (
                reply.headers["retry-after"] == "1" and "SLO of 30 s and what --abandon-after adds" in error["message"]
            )
            assert await sample(client, "apt:requests_abandoned_total", stage="waiting") == n
            assert await sample(client, "apt:requests_abandoned_total", stage="running") == 0
            assert await sample(client, "apt:slo_missed_total", slo="strict") == n
            assert await sample(client, "vllm:request_success_total", finished_reason="abandoned") == n
            assert await sample(client, "apt:requests_rejected_total", reason="queue_full") == 0
            engine.allow_step(200)
            assert (await ahead).json()["choices"][0]["finish_reason"] == "length"
            await until(lambda: engine.is_idle)

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_after_its_first_token_a_request_ends_with_what_it_has(stream):
    engine = engine_with(4, abandon_after=ABANDON_AFTER_S)

    async def main():
        async with serving(engine) as client:
            body = {**LONG, "stream": stream, "slo": {"stall_ms": 30_000}}
            frozen = asyncio.create_task(client.post("/v1/completions", json=body))
            engine.allow_step(3)
            await until(lambda: engine.num_steps == 3)
            other = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}))
            await queued(engine, 1)
            engine.ahead_s = LATE_S
            engine.allow_step(200)  # the first prefills the other and leaves the frozen one standing
            reply = await frozen
            assert reply.status_code == 200
            if stream:
                events = events_of(reply)
                choice, slo = events[-1]["choices"][0], events[-1]["slo"]
                text = "".join(event["choices"][0]["text"] for event in events)
            else:
                choice, slo = reply.json()["choices"][0], reply.json()["slo"]
                text = choice["text"]
            assert choice["finish_reason"] == "abandoned" and text and "bcdefghijklmnopqrstuvwxyz".startswith(text[:20])
            assert (slo["abandoned"], slo["attained_strict"], slo["attained"]) == (True, False, False)
            assert await sample(client, "apt:requests_abandoned_total", stage="running") == 1
            assert (await other).json()["choices"][0]["finish_reason"] == "length"
            state = (await client.get("/debug/state")).json()
            assert (state["requests"], state["strict_attainment"]) == (2, 0.5)
            plans = (await client.get("/debug/plans")).json()["plans"]
            abandoned = [entry for plan in plans for entry in plan["abandoned"]]
            assert [entry["reason"] for entry in abandoned] == ["abandoned because its SLO can no longer be kept"]

    run(main)


def test_one_of_two_samples_that_is_abandoned_leaves_the_other_s_answer():
    engine = engine_with(1, abandon_after=ABANDON_AFTER_S)

    async def main():
        async with serving(engine) as client:
            task = asyncio.create_task(
                client.post("/v1/completions", json={**LONG, "n": 2, "max_tokens": 3, "slo": {"ttft_ms": 30_000}})
            )
            engine.allow_step()
            await until(lambda: engine.num_steps == 1 and engine.num_waiting == 1)
            engine.ahead_s = LATE_S
            engine.allow_step(200)
            reply = await task
            choices = reply.json()["choices"]
            assert reply.status_code == 200 and reply.json()["slo"]["abandoned"]
            assert [(c["text"], c["finish_reason"]) for c in choices] == [("bcd", "length"), ("", "abandoned")]

    run(main)


def test_without_the_flag_a_late_request_is_answered():
    engine = engine_with(1)

    async def main():
        async with serving(engine) as client:
            hurried = {**HURRIED, "slo": {"ttft_ms": 20}}  # of the client's time too: the report's times are real
            task = asyncio.create_task(client.post("/v1/completions", json=hurried))
            await until(lambda: engine.has_unfinished)
            await asyncio.sleep(0.1)
            engine.allow_step(200)
            reply = (await task).json()
            assert reply["choices"][0]["finish_reason"] == "length"
            assert (reply["slo"]["attained"], reply["slo"]["abandoned"]) == (False, False)
            assert await sample(client, "apt:requests_abandoned_total", stage="waiting") == 0

    run(main)


def test_the_counter_of_each_stage_exists_from_the_start():
    async def main():
        async with serving(engine_with(1)) as client:
            for stage in ("waiting", "running"):
                assert await sample(client, "apt:requests_abandoned_total", stage=stage) == 0

    run(main)


def test_offline_work_takes_no_such_limit(tmp_path):
    config = EngineConfig(abandon_after=5)
    sentence = "abandon_after=5: offline requests are never abandoned"
    for make in (
        lambda: LLM(abandon_after=5),
        lambda: RunBatch(tmp_path / "in", tmp_path / "out", engine=config),
        lambda: BenchThroughput(engine=config),
        lambda: BenchLatency(engine=config),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()
    with pytest.raises(ValueError, match="abandon_after=-1"):
        dataclasses.replace(config, abandon_after=-1)
    assert FinishReason.ABANDONED.value == "abandoned"
