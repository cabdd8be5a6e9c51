"""What is noticed of an engine that fails or stands still, what /health says of it, and how it comes back."""

import asyncio
import logging
from contextlib import asynccontextmanager

import pytest

from apt_jax.output import Output, PolicyFailed
from apt_jax.request import FinishReason, Request, SamplingParams
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from apt_jax.serve.runtime.samples import fan_out
from apt_jax.serve.runtime.status import FEWEST_STEP_S, TIMES_PREDICTED, EngineStatus, Watchdog, WatchLimits
from tests.support.asgi_service import run, serving, until
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.local_replicas import Replicas, keeping

ON_FIRE = RuntimeError("device on fire")
ODD = PolicyFailed("policy 'odd' raised: division by zero")
BODY = {"prompt": "a", "max_tokens": 2}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def engine():
    return FakeEngine(tokenizer=CharTokenizer())


@asynccontextmanager
async def failing(engine, error, num_replies=0, **options):
    """A client of a server whose engine raises `error`, which that many requests were told of."""
    async with serving(engine, **options) as client:
        engine.fails_with = error
        for _ in range(num_replies):
            assert (await client.post("/v1/completions", json=BODY)).status_code == 500
        yield client


def output(*token_ids, reason=None):
    return Output(Request("r", [1], SamplingParams(), 0.0, 4), "", token_ids, (), reason)


TOKEN, NOTHING = [output(5)], []
ERROR = [output(reason=FinishReason.ERROR)]
BOTH = [*ERROR, *TOKEN]  # one request failed, the step did not
ABORTED = [output(reason=FinishReason.ABORT)]


@pytest.mark.parametrize(
    ("steps", "in_a_row"),
    [
        ([None], 1),
        ([None, None], 2),
        ([None, TOKEN], 0),
        ([None, TOKEN, None], 1),
        ([None, NOTHING, None], 2),  # a step was only started: whether it works is not known
        ([None, ABORTED, None], 2),
        ([ERROR, ERROR], 2),
        ([ERROR, BOTH], 0),
        ([TOKEN, NOTHING, ABORTED], 0),
    ],
)
def test_consecutive_failures(steps, in_a_row):
    watchdog = Watchdog(WatchLimits(max_failed_steps=2))
    for outputs in steps:
        watchdog.judge(outputs or (), failed=outputs is None)
    assert watchdog.num_failed == in_a_row
    assert (watchdog.trouble is None) is (in_a_row < 2)


def test_a_step_that_the_engine_itself_recovered_from_has_failed_whatever_it_brought():
    watchdog = Watchdog()
    watchdog.judge(TOKEN, failed=True)
    assert watchdog.num_failed == 1


def test_pauses_double_up_to_a_second_and_outlast_one_before_the_limit():
    watchdog, pauses = Watchdog(), []
    assert watchdog.pause_s == 0
    for _ in range(2000):
        watchdog.judge((), failed=True)
        pauses.append(watchdog.pause_s)
    assert pauses[:8] == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0] and set(pauses[8:]) == {1.0}
    assert sum(pauses[: watchdog.limits.max_failed_steps - 1]) > 2, "a policy that raises for a second loses nothing"
    watchdog.judge(TOKEN, failed=False)
    assert watchdog.pause_s == 0


@pytest.mark.parametrize(
    ("given", "predicted_s", "limit_s"),
    [
        (None, 0.0, FEWEST_STEP_S),
        (None, 1.0, FEWEST_STEP_S),
        (None, 10.0, 10 * TIMES_PREDICTED),
        (5.0, 10.0, 5.0),
        (500.0, 0.1, 500.0),
    ],
)
def test_the_limit_of_a_step(clock, given, predicted_s, limit_s):
    watchdog = Watchdog(WatchLimits(max_step_s=given), clock)
    watchdog.watch(lambda: predicted_s)
    assert watchdog.max_step_s == limit_s and watchdog.stuck is None
    with watchdog.working():
        clock.now = limit_s
        assert watchdog.trouble is None
        clock.now += 1
        assert f"has not returned for {limit_s + 1:.0f} s, the limit is {limit_s:.0f} s" in watchdog.trouble
    assert watchdog.trouble is None


def test_health_changes_are_logged_once(caplog):
    watchdog = Watchdog(WatchLimits(max_failed_steps=1))
    with caplog.at_level(logging.WARNING):
        for outputs in (None, None, TOKEN, TOKEN, None):
            watchdog.judge(outputs or (), failed=outputs is None)
            watchdog.report()
            watchdog.report()
    texts = [record.getMessage() for record in caplog.records]
    assert ["unhealthy" in text for text in texts] == [True, False, True] and "healthy again" in texts[1]


def metric(text: str, name: str) -> float:
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name}{{"))


async def healthy(client) -> float:
    return metric((await client.get("/metrics")).text, "apt:engine_healthy")


def test_health_is_503_after_the_stated_number_of_failed_steps_and_200_after_a_good_one(engine):
    async def main():
        async with failing(engine, ON_FIRE, max_failed_steps=3) as client:
            for attempt in range(3):
                assert (await client.post("/v1/completions", json=BODY)).status_code == 500
                assert (await client.get("/health")).status_code == (200 if attempt < 2 else 503)
            reply = await client.get("/health")
            assert reply.json()["status"] == "unhealthy"
            assert "the last 3 steps failed, the limit is 3" in reply.json()["reason"] and "fire" not in reply.text
            assert await healthy(client) == 0
            assert (await client.get("/ready")).status_code == 200
            assert (await client.get("/debug/state")).json()["trouble"] == reply.json()["reason"]
            engine.fails_with = None
            assert (await client.post("/v1/completions", json=BODY)).json()["choices"][0]["text"] == "bc"
            assert (await client.get("/health")).json() == {"status": "ready"} and await healthy(client) == 1
            assert "trouble" not in (await client.get("/debug/state")).json()

    run(main)


def test_an_idle_engine_that_is_unhealthy_is_probed_until_it_works(engine, monkeypatch, caplog):
    """A load balancer sends an unhealthy server nothing: without a request nothing showed that it works again."""
    monkeypatch.setattr("apt_jax.serve.runtime.engine_thread.PROBE_S", 0.01)

    async def main():
        async with failing(engine, ON_FIRE, 2, max_failed_steps=2) as client:
            watchdog, before = client.service.backend.watchdog, (await client.get("/metrics")).text
            await until(lambda: watchdog.num_failed >= 6)
            assert (await client.get("/health")).status_code == 503
            engine.fails_with = None
            await until(lambda: watchdog.trouble is None)
            assert (await client.get("/health")).json() == {"status": "ready"}
            await until(lambda: engine.is_idle)
            after, steps = (await client.get("/metrics")).text, engine.num_steps
            assert metric(after, "apt:failed_steps_total") > metric(before, "apt:failed_steps_total")
            for name in ("vllm:generation_tokens_total", "vllm:e2e_request_latency_seconds_count"):
                assert metric(after, name) == metric(before, name), "a probe is no request"
            await asyncio.sleep(0.05)
            assert engine.num_steps == steps, "a healthy engine is left alone"
            assert (await client.post("/v1/completions", json=BODY)).json()["choices"][0]["text"] == "bc"

    with caplog.at_level(logging.ERROR):
        run(main)
    assert caplog.text.count("device on fire") == 2


def test_probing_a_policy_that_raises_ends_with_the_server(engine, monkeypatch):
    monkeypatch.setattr("apt_jax.serve.runtime.engine_thread.PROBE_S", 0.01)

    async def main():
        async with failing(engine, ODD, 1, max_failed_steps=1) as client:
            thread = client.service.backend
            await until(lambda: thread.watchdog.num_failed >= 3)
            assert thread.status is EngineStatus.READY and await asyncio.to_thread(thread.stop, 5)

    run(main)


def test_a_step_that_does_not_return_is_seen_from_outside_and_forgotten_when_it_does(clock):
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():
        async with serving(engine, max_step_seconds=90) as client:
            watchdog = client.service.backend.watchdog
            watchdog.clock = clock
            task = asyncio.create_task(client.post("/v1/completions", json=BODY))
            await until(lambda: watchdog._since_s is not None and engine.has_unfinished)
            clock.now += 90
            assert (await client.get("/health")).status_code == 200
            clock.now += 1
            reply = await client.get("/health")
            assert reply.status_code == 503 and "has not returned for 91 s, the limit is 90 s" in reply.text
            assert await healthy(client) == 0
            refused = await client.post("/v1/completions", json=BODY)
            assert refused.status_code == 503 and "does not answer" in refused.json()["error"]["message"]
            engine.allow_step(100)
            assert (await task).json()["choices"][0]["text"] == "bc"
            assert (await client.get("/health")).status_code == 200 and await healthy(client) == 1
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200

    run(main)


def test_loading_and_warming_up_are_not_watched(clock, engine):
    async def main():
        held = asyncio.Event()
        loop = asyncio.get_running_loop()
        engine.warm_up = lambda progress: asyncio.run_coroutine_threadsafe(held.wait(), loop).result()
        async with serving(engine, wait=False) as client:
            backend = client.service.backend
            backend.watchdog.clock = clock
            await until(lambda: backend.status is EngineStatus.WARMING)
            clock.now += 10_000
            assert (await client.get("/health")).json() == {"status": "warming up"}
            held.set()
            await until(lambda: backend.status is EngineStatus.READY)
            clock.now += 10_000  # idle
            assert (await client.get("/health")).json() == {"status": "ready"}

    run(main)


def test_requests_wait_while_the_policy_raises_and_the_error_is_logged_once(engine, caplog):
    async def main():
        async with failing(engine, ODD) as client:
            task = asyncio.create_task(client.post("/v1/completions", json=BODY))
            await until(lambda: client.service.backend.watchdog.num_failed >= 4)
            assert not task.done()
            engine.fails_with = None
            assert (await task).json()["choices"][0]["text"] == "bc"
            assert (await client.get("/health")).status_code == 200
            assert metric((await client.get("/metrics")).text, "apt:failed_steps_total") >= 4
            assert engine.num_policies == 1

    with caplog.at_level(logging.ERROR):
        run(main)
    assert caplog.text.count("division by zero") == 1 and "its 1 requests wait" in caplog.text


def test_a_policy_that_goes_on_raising_ends_the_requests_and_is_renewed_and_the_engine_goes_on(engine):
    async def main():
        async with failing(engine, ODD, max_failed_steps=4) as client:
            replies = await asyncio.gather(*(client.post("/v1/completions", json=BODY) for _ in range(3)))
            assert [reply.status_code for reply in replies] == [500] * 3
            assert (await client.get("/health")).status_code == 503 and engine.num_policies >= 2
            assert client.service.backend.status is EngineStatus.READY
            engine.fails_with = None
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200
            assert (await client.get("/health")).status_code == 200

    run(main)


def test_a_step_that_fails_when_no_request_is_left_does_not_end_the_engine(engine):
    """A request that was aborted is still to be reported; such a step ended the engine for good."""
    step, failures = engine.step, iter([RuntimeError("once"), RuntimeError("twice")])

    def failing():
        if (error := next(failures, None)) is not None:
            raise error
        return step()

    engine.step = failing

    async def main():
        async with serving(engine) as client:
            assert (await client.post("/v1/completions", json=BODY)).status_code == 500
            await until(lambda: client.service.backend.watchdog.num_failed == 2)
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200
            assert client.service.backend.status is EngineStatus.READY and engine.is_idle

    run(main)


def test_aborts_are_heard_during_a_pause_and_stopping_ends_an_engine_that_only_fails(engine):
    async def main():
        thread = EngineThread(lambda: engine)
        thread.start()
        await until(lambda: thread.status is EngineStatus.READY)
        engine.fails_with = ODD
        group = thread.submit(fan_out("r", [[10]], SamplingParams(max_tokens=5)))
        await group.accepted()
        await until(lambda: thread.watchdog.num_failed >= 2)
        group.close()
        await until(lambda: engine.is_idle)
        thread.watchdog.num_failed = 1_000  # pauses of a second
        engine.step = lambda: (_ for _ in ()).throw(RuntimeError("always"))
        await thread.submit(fan_out("s", [[10]], SamplingParams(max_tokens=5))).accepted()
        assert await asyncio.to_thread(thread.stop, 5)

    run(main)


def test_a_replica_whose_engine_is_stuck_is_replaced_and_its_requests_go_on_elsewhere(clock, monkeypatch):
    monkeypatch.setattr("apt_jax.serve.replicas.keeper.CHECK_S", 0.01)

    async def main():
        engines = [FakeEngine(paced=True)]
        replicas = Replicas(make_engine=lambda: engines.pop() if engines else FakeEngine(), min_instances=1)
        async with keeping(replicas) as r:
            first = r.handles["r1"]
            group = r.fleet.submit(fan_out("q", [[10]], SamplingParams(max_tokens=2)))
            watchdog = first._actor._thread.watchdog
            watchdog.clock = clock
            await until(lambda: watchdog._since_s is not None and first.engine.has_unfinished)
            clock.now += 10_000
            found = [output async for outputs in group for _, output in outputs]
            assert found[-1].finish_reason is FinishReason.LENGTH
            assert first.is_killed and [replica.name for replica in r.fleet.ready()] == ["r2"]

    run(main)


@pytest.mark.parametrize(
    "options", [{"max_failed_steps": 0}, {"max_step_seconds": 0.0}, {"max_step_seconds": float("nan")}]
)
def test_limits_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ServerOptions(**options)
