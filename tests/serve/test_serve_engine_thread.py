"""The engine thread and its groups, over the fake engine."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from apt_jax.output import QueueFull
from apt_jax.request import FinishReason, SamplingParams
from apt_jax.serve.errors import EngineFailure, NotReady
from apt_jax.serve.runtime.engine_thread import EngineThread
from apt_jax.serve.runtime.group import Group
from apt_jax.serve.runtime.samples import fan_out
from apt_jax.serve.runtime.status import EngineStatus
from tests.support.fake_engine import FakeEngine


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 20))


@asynccontextmanager
async def running(engine, **options):
    thread = EngineThread(lambda: engine, **options)
    thread.start()
    await until(lambda: thread.status is EngineStatus.READY)
    try:
        yield thread
    finally:
        if engine.is_paced:
            engine.allow_step(1000)
        assert await asyncio.to_thread(thread.stop, 5)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def submit(thread: EngineThread, name: str, *prompts: list[int], **params: Any) -> Group:
    return thread.submit(fan_out(name, prompts, SamplingParams(**params)))


async def tokens_of(group: Group) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    async for outputs in group:
        for sample, output in outputs:
            found.setdefault(sample.index, []).extend(output.token_ids)
    return found


def test_a_group_gets_the_tokens_of_each_of_its_samples():
    async def main():
        async with running(FakeEngine()) as thread:
            group = submit(thread, "r", [10, 11], [20], n=2, max_tokens=3)
            await group.accepted()
            assert await tokens_of(group) == {0: [12, 13, 14], 1: [12, 13, 14], 2: [21, 22, 23], 3: [21, 22, 23]}

    run(main)


class Idling(FakeEngine):
    """Waits on purpose for `REST_S` after every step, unless somebody comes."""

    REST_S = 30.0

    def step(self):
        self.idle_s = self.REST_S
        return super().step()

    def add(self, *args, **options):
        self.idle_s = 0.0
        return super().add(*args, **options)


def test_the_thread_sleeps_while_the_engine_waits_on_purpose_and_an_arrival_wakes_it():
    async def main():
        engine = Idling()
        async with running(engine) as thread:
            first = submit(thread, "a", [10], max_tokens=2)
            await until(lambda: engine.num_steps == 1)
            await asyncio.sleep(0.1)
            assert engine.num_steps == 1, "it rests"
            second = submit(thread, "b", [20], max_tokens=1)
            assert await tokens_of(second) == {0: [21]} and engine.num_steps == 2
            engine.REST_S = 0.0
            third = submit(thread, "c", [30], max_tokens=1)
            assert await tokens_of(third) == {0: [31]} and await tokens_of(first) == {0: [11, 12]}

    run(main)


def test_groups_share_steps():
    async def main():
        engine = FakeEngine(paced=True)
        async with running(engine) as thread:
            groups = [submit(thread, f"r{i}", [10 * i + 10], max_tokens=4) for i in range(4)]
            for group in groups:
                await group.accepted()
            engine.allow_step(100)
            found = await asyncio.gather(*(tokens_of(group) for group in groups))
            assert [f[0] for f in found] == [[10 * i + 11 + k for k in range(4)] for i in range(4)]
            assert engine.num_steps < 16

    run(main)


def test_outputs_of_one_step_reach_the_loop_in_one_call():
    async def main():
        engine = FakeEngine(paced=True)
        async with running(engine) as thread:
            group = submit(thread, "r", [10], [20], [30], [40], max_tokens=2)
            await group.accepted()
            calls = []
            loop = asyncio.get_running_loop()
            original = loop.call_soon_threadsafe
            loop.call_soon_threadsafe = lambda *args, **kw: (calls.append(args), original(*args, **kw))[1]
            engine.allow_step(2)
            assert len(await tokens_of(group)) == 4
            assert len(calls) == 2

    run(main)


def test_a_refused_sample_refuses_its_group_and_leaves_nothing():
    async def main():
        engine = FakeEngine()
        async with running(engine) as thread:
            group = submit(thread, "r", [10], [999])
            with pytest.raises(ValueError, match="token id 999"):
                await group.accepted()
            assert engine.is_idle
            assert await tokens_of(submit(thread, "s", [10], max_tokens=1)) == {0: [11]}

    run(main)


def test_a_full_queue_refuses_the_whole_group():
    async def main():
        engine = FakeEngine(paced=True)
        async with running(engine) as thread:
            await submit(thread, "first", [1], max_tokens=1).accepted()  # the inbox is read again after its step
            seven, two, one = submit(thread, "a", *[[1]] * 7), submit(thread, "b", [1], [2]), submit(thread, "c", [1])
            engine.allow_step()
            await seven.accepted()
            with pytest.raises(QueueFull):
                await two.accepted()
            await one.accepted()
            assert len(engine.state.waiting) == 8

    run(main)


@pytest.mark.parametrize("steps", [0, 2])
def test_closing_a_group_frees_its_blocks_whether_it_waits_or_runs(steps):
    async def main():
        engine = FakeEngine(paced=True)
        async with running(engine) as thread:
            group = submit(thread, "r", [10], [20], max_tokens=50)
            await group.accepted()
            for _ in range(steps):
                engine.allow_step()
            await until(lambda: engine.num_steps == steps)
            assert engine.has_unfinished
            group.close()
            engine.allow_step()  # the step that is under way ends, then the inbox is read
            await until(lambda: engine.is_idle)
            assert [outputs async for outputs in group] == []

    run(main)


def test_a_group_closed_before_the_engine_saw_it_never_enters():
    async def main():
        engine = FakeEngine()
        async with running(engine) as thread:
            group = submit(thread, "r", [10], max_tokens=50)
            group.close()
            await group.accepted()
            assert await tokens_of(submit(thread, "s", [10], max_tokens=1)) == {0: [11]}
            assert engine.num_steps == 1

    run(main)


def test_a_failing_step_ends_its_requests_and_the_thread_serves_on(caplog):
    async def main():
        engine = FakeEngine(paced=True)
        async with running(engine) as thread:
            group = submit(thread, "r", [10], max_tokens=5)
            await group.accepted()
            engine.fail_with = RuntimeError("out of memory on the device")
            engine.allow_step(100)
            with pytest.raises(EngineFailure, match="the engine failed"):
                await tokens_of(group)
            await until(lambda: engine.is_idle)
            assert await tokens_of(submit(thread, "s", [10], max_tokens=2)) == {0: [11, 12]}

    with caplog.at_level(logging.ERROR):
        run(main)
    assert "out of memory on the device" in caplog.text


def test_an_engine_that_cannot_end_requests_fails_for_good(caplog):
    async def main():
        engine = FakeEngine()
        engine.abort = lambda request_id: None
        failures = []
        thread = EngineThread(lambda: engine, on_failure=failures.append)
        thread.start()
        await until(lambda: thread.status is EngineStatus.READY)
        engine.fail_with = RuntimeError("device lost")
        with pytest.raises(EngineFailure):
            await tokens_of(submit(thread, "r", [10]))
        await until(lambda: thread.status is EngineStatus.FAILED and bool(failures))
        with pytest.raises(NotReady, match="the engine is failed"):
            submit(thread, "s", [10])
        assert thread.stop(1)

    run(main)


def test_an_engine_that_cannot_be_made_is_reported():
    async def main():
        def make():
            raise ValueError("no such folder")

        failures = []
        thread = EngineThread(make, on_failure=failures.append)
        thread.start()
        await until(lambda: bool(failures))
        assert str(failures[0]) == "no such folder" and thread.status is EngineStatus.FAILED

    run(main)


def test_nothing_is_taken_before_it_is_warm():
    async def main():
        thread = EngineThread(FakeEngine)
        with pytest.raises(NotReady, match="loading"):
            submit(thread, "r", [10])

    run(main)


def test_abort_all_ends_requests_with_finish_reason_abort():
    async def main():
        engine = FakeEngine(paced=True)
        async with running(engine) as thread:
            group = submit(thread, "r", [10], max_tokens=50)
            await group.accepted()
            thread.abort_all()
            engine.allow_step(2)  # the one under way, and the one that reports
            reasons = [output.finish_reason async for outputs in group for _, output in outputs]
            assert reasons[-1] is FinishReason.ABORT
            assert engine.is_idle

    run(main)


def test_stopping_answers_everyone():
    async def main():
        engine = FakeEngine(paced=True)
        async with running(engine) as thread:
            group = submit(thread, "r", [10], max_tokens=50)
            await group.accepted()
            stopped = asyncio.create_task(asyncio.to_thread(thread.stop, 5))
            await until(lambda: not thread._inbox.empty())
            engine.allow_step(2)
            assert await stopped
            reasons = [output.finish_reason async for outputs in group for _, output in outputs]
            assert reasons[-1] is FinishReason.ABORT
            with pytest.raises(NotReady, match="stopped"):
                submit(thread, "s", [10])

    run(main)


def test_an_idle_engine_does_not_spin():
    async def main():
        engine = FakeEngine()
        async with running(engine) as thread:
            await tokens_of(submit(thread, "r", [10], max_tokens=3))
            steps = engine.num_steps
            reads = []
            original = thread._read_inbox
            thread._read_inbox = lambda e: (reads.append(1), original(e))[1]
            await asyncio.sleep(0.1)
            assert engine.num_steps == steps
            assert len(reads) <= 1

    run(main)
