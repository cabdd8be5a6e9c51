"""Replicas behind a front: nothing lost, nothing twice, whatever happens. Without Ray; tests/on_ray has the rest."""

import asyncio
import importlib.util
import pickle
import threading
from collections import Counter
from dataclasses import replace

import pytest

from apt_jax.engine_config import EngineConfig
from apt_jax.output import QueueFull
from apt_jax.request import FinishReason, SamplingParams
from apt_jax.routing.attainment import RecentAttainment
from apt_jax.routing.catalogue import DEFAULT_ROUTER
from apt_jax.serve.cli import main
from apt_jax.serve.errors import EngineFailure, NotReady, PredictedLate
from apt_jax.serve.replicas.fleet_view import FleetView, merged
from apt_jax.serve.replicas.keeper import Endings
from apt_jax.serve.replicas.options import RayBatchOptions, RayOptions, ReplicaOptions
from apt_jax.serve.runtime.observer import Observer
from apt_jax.serve.runtime.samples import Sample, fan_out
from tests.support.asgi_service import run, until
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.local_replicas import Replicas, keeping

CONFIG = EngineConfig(max_num_seqs=4, max_num_queued_reqs=3, max_num_batched_tokens=64, scheduling_policy="fcfs")


def paced() -> FakeEngine:
    return FakeEngine(CONFIG, CharTokenizer(), paced=True)


def samples(name: str, prompt: str = "a", **params) -> list[Sample]:
    return fan_out(name, [[2, *prompt.encode()]], SamplingParams(**{"max_tokens": 8, **params}))


async def collected(group) -> tuple[str, list[int], FinishReason | None]:
    text, tokens, reason = "", [], None
    async for outputs in group:
        for _, output in outputs:
            assert reason is None, "something came after the last output"
            text, reason = text + output.text, output.finish_reason
            tokens += output.token_ids
    return text, tokens, reason


class First:
    """Always the first that may be chosen."""

    def choose(self, request, loads):
        return 0


class Seen(Observer):
    """Outputs by request, as observers see them."""

    def __init__(self):
        self.tokens, self.endings, self.lost_ids = Counter(), Counter(), []

    def brought(self, step):
        for output in step.outputs:
            self.tokens[output.request.request_id] += len(output.token_ids)
            self.endings[output.request.request_id] += output.finish_reason is not None

    def lost(self, samples):
        self.lost_ids += [sample.request_id for sample in samples]


def test_groups_are_spread_and_answered():
    async def main():
        async with keeping(Replicas(make_engine=lambda: FakeEngine(tokenizer=CharTokenizer()), min_instances=2)) as r:
            groups = [r.fleet.submit(samples(f"q{i}", "ab", n=2)) for i in range(4)]
            for group in groups:
                await group.accepted()
                text, tokens, _ = await asyncio.wait_for(collected_of(group), 5)
                assert text == {0: "cdefghij", 1: "cdefghij"} and tokens == 16
            assert all(handle.engine.num_steps for handle in r.handles.values())
            await until(lambda: all(replica.load.num_requests == 0 for replica in r.fleet.ready()))

    run(main)


async def collected_of(group) -> tuple[dict[int, str], int, int]:
    texts, tokens, ended = {}, 0, 0
    async for outputs in group:
        for sample, output in outputs:
            texts[sample.index] = texts.get(sample.index, "") + output.text
            tokens, ended = tokens + len(output.token_ids), ended + (output.finish_reason is not None)
    return texts, tokens, ended


def test_a_request_of_a_lost_replica_goes_on_from_its_last_token():
    async def main():
        r = Replicas(make_engine=paced, min_instances=2)
        async with keeping(r):
            seen = Seen()
            r.fleet.observers.append(seen)
            groups = [r.fleet.submit(samples(f"q{i}")) for i in range(4)]
            first, second = r.handles["r1"], r.handles["r2"]
            for handle in (first, second):
                handle.engine.allow_step(3)
            await until(lambda: all(seen.tokens[f"q{i}"] >= 2 for i in range(4)))
            first.kill()
            await until(lambda: r.fleet.num_moved == 2)
            assert {replica.name for replica in r.fleet.replicas} >= {"r2"}
            second.engine.allow_step(1000)
            for group in groups:
                assert await asyncio.wait_for(collected(group), 5) == (
                    "bcdefghi",
                    [*range(98, 106)],
                    FinishReason.LENGTH,
                )
            assert set(seen.tokens.values()) == {8} and set(seen.endings.values()) == {1}
            await until(lambda: len(r.fleet.ready()) == 2)  # another one in its place
            assert "r3" in r.handles and r.keeper.num_failures == 1

    run(main)


def test_requests_wait_while_there_is_no_replica_at_all():
    async def main():
        async with keeping(Replicas(make_engine=paced)) as r:
            group = r.fleet.submit(samples("q", seed=7))
            r.handles["r1"].engine.allow_step(2)
            await group.accepted()
            gate = threading.Event()

            def held() -> FakeEngine:
                engine = paced()
                warm_up = engine.warm_up
                engine.warm_up = lambda *args, **more: (gate.wait(10), warm_up(*args, **more))
                return engine

            r.make_engine = held
            r.handles["r1"].kill()
            await until(lambda: r.fleet.num_moved == 1)
            with pytest.raises(NotReady):
                r.fleet.submit(samples("new"))
            gate.set()
            await until(lambda: len(r.fleet.ready()) == 1)
            r.handles["r2"].engine.allow_step(1000)
            assert (await asyncio.wait_for(collected(group), 5))[0] == "bcdefghi"

    run(main)


def test_a_request_that_brings_down_one_replica_after_the_other_fails():
    async def main():
        async with keeping(Replicas(make_engine=paced)) as r:
            seen = Seen()
            r.fleet.observers.append(seen)
            group = r.fleet.submit(samples("q"))
            for number in range(1, 5):
                await until(lambda number=number: f"r{number}" in r.handles and bool(r.fleet.ready()))
                r.handles[f"r{number}"].kill()
                await until(lambda number=number: r.keeper.num_failures == number)
            with pytest.raises(EngineFailure, match="4 replicas were lost"):
                await collected(group)
            assert seen.lost_ids == ["q"]

    run(main)


def test_a_full_queue_sends_a_request_to_another_replica():
    config = EngineConfig(max_num_seqs=1, max_num_queued_reqs=1, max_num_batched_tokens=64, scheduling_policy="fcfs")

    async def main():
        async with keeping(Replicas(make_engine=lambda: FakeEngine(config, paced=True), min_instances=2)) as r:
            r.fleet.router = First()

            async def accepted(name):
                group = r.fleet.submit(samples(name, max_tokens=100))
                waiting = asyncio.create_task(group.accepted())
                while not waiting.done():  # an engine looks at its inbox between steps
                    for handle in r.handles.values():
                        handle.engine.allow_step()
                    await asyncio.sleep(0.002)
                await waiting
                return group

            groups = [await accepted(f"q{i}") for i in range(4)]
            assert [len(replica.routes) for replica in r.fleet.ready()] == [2, 2]
            with pytest.raises(QueueFull):
                await accepted("late")
            for handle in r.handles.values():
                handle.engine.allow_step(1000)
            for group in groups:
                assert (await asyncio.wait_for(collected(group), 5))[2] is FinishReason.LENGTH

    run(main)


def test_who_leaves_frees_blocks_and_is_told_as_cancelled():
    async def main():
        async with keeping(Replicas(make_engine=paced)) as r:
            steps = []
            r.fleet.observers.append(type("O", (Observer,), {"brought": lambda self, step: steps.append(step)})())
            group = r.fleet.submit(samples("q"))
            engine = r.handles["r1"].engine
            engine.allow_step(2)
            await until(lambda: len(steps) >= 1)
            group.abandon()
            assert steps[-1].cancelled == {"q"} and steps[-1].outputs[0].finish_reason is FinishReason.ABORT
            engine.allow_step(1000)
            await until(lambda: engine.is_idle)
            count = len(steps)
            await asyncio.sleep(0.02)
            assert len(steps) == count
            attainment = RecentAttainment(enough=1)
            for step in steps:
                Endings(attainment).brought(step)
            assert attainment.share(steps[-1].began_s) is None  # who leaves tells nothing
            Endings(attainment).brought(replace(steps[-1], cancelled=()))
            assert attainment.share(steps[-1].began_s) is not None

    run(main)


def test_abort_all_ends_every_request_with_its_tokens():
    async def main():
        async with keeping(Replicas(make_engine=paced)) as r:
            group = r.fleet.submit(samples("q"))
            r.handles["r1"].engine.allow_step(2)
            await group.accepted()
            r.fleet.abort_all()
            assert (await asyncio.wait_for(collected(group), 5))[2] is FinishReason.ABORT

    run(main)


def test_an_update_replaces_replicas_one_by_one_and_drops_nothing():
    async def main():
        async with keeping(Replicas(make_engine=paced, min_instances=2)) as r:
            old = [r.handles["r1"], r.handles["r2"]]
            groups = [r.fleet.submit(samples(f"q{i}")) for i in range(2)]
            for handle in old:
                handle.engine.allow_step(2)
            for group in groups:
                await group.accepted()
            fewest = []
            r.keeper.update()
            while [replica.name for replica in r.fleet.ready()] != ["r3", "r4"]:
                fewest.append(len(r.fleet.ready()))
                await asyncio.sleep(0.002)
            assert min(fewest) == 2 and not any(handle.is_killed for handle in old)
            new = [r.handles["r3"], r.handles["r4"]]
            for handle in new:
                handle.engine.allow_step(1000)
            after = r.fleet.submit(samples("after"))
            assert (await asyncio.wait_for(collected(after), 5))[2] is FinishReason.LENGTH
            for handle in old:
                handle.engine.allow_step(1000)
            for group in groups:
                assert (await asyncio.wait_for(collected(group), 5))[0] == "bcdefghi"
            await until(lambda: all(handle.is_killed for handle in old))
            assert not r.keeper.is_updating and r.fleet.num_moved == 0 and r.keeper.num_failures == 0

    run(main)


def test_an_update_that_cannot_start_leaves_the_old_replicas():
    async def main():
        async with keeping(Replicas(make_engine=FakeEngine, min_instances=2)) as r:

            class Broken(FakeEngine):
                def warm_up(self, progress=False):
                    raise ValueError("no such weights")

            r.make_engine = Broken
            r.keeper.update()
            await until(lambda: r.keeper.num_failures == 1 and not r.keeper.is_updating)
            assert [replica.name for replica in r.fleet.ready()] == ["r1", "r2"] and not r.keeper.is_updating
            assert (await collected(r.fleet.submit(samples("q"))))[2] is FinishReason.LENGTH

    run(main)


def test_the_first_replica_that_cannot_start_is_told():
    async def main():
        class Broken(FakeEngine):
            def warm_up(self, progress=False):
                raise ValueError("no such model")

        async with keeping(Replicas(make_engine=Broken)) as r:
            await asyncio.sleep(0.2)  # time enough to try again
            assert [str(error) for error in r.failures] == ["no such model"] and r.fleet.status.value == "failed"

    run(main)


def test_replicas_follow_the_queue_up_and_down(monkeypatch):
    monkeypatch.setattr("apt_jax.serve.replicas.keeper.SCALE_S", 0.0)
    monkeypatch.setattr("apt_jax.serve.replicas.keeper.CHECK_S", 0.01)

    async def main():
        r = Replicas(
            "least-requests",
            lambda: FakeEngine(num_blocks=6, paced=True),
            **{"min_instances": 1, "max_instances": 2, "up_delay_s": 0.05, "down_delay_s": 0.1},
        )
        async with keeping(r):
            groups = [r.fleet.submit(samples(f"q{i}", "abcdef")) for i in range(4)]
            for _ in range(3):  # the queue is counted after a step, if the last count is not quite new
                r.handles["r1"].engine.allow_step()
                await asyncio.sleep(0.02)
            await until(lambda: len(r.fleet.ready()) == 2)
            for handle in r.handles.values():
                handle.engine.allow_step(1000)
            for group in groups:
                assert (await asyncio.wait_for(collected(group), 5))[2] is FinishReason.LENGTH
            await until(lambda: len(r.fleet.replicas) == 1)
            assert r.fleet.num_moved == 0

    run(main)


def test_metrics_of_front_and_replicas_are_one_text():
    async def main():
        async with keeping(Replicas(min_instances=2)) as r:
            view = FleetView(r.fleet, r.keeper, "tiny")
            await collected(r.fleet.submit(samples("q")))
            text = (await view.metrics_text()).decode()
            assert 'vllm:generation_tokens_total{model_name="tiny"} 8.0' in text
            for name in ("r1", "r2"):
                assert f'vllm:num_requests_running{{model_name="tiny",replica="{name}"}} 0.0' in text
            assert text.count("# TYPE vllm:num_requests_running gauge") == 1
            assert 'apt:replicas{model_name="tiny",status="ready"} 2.0' in text
            assert [story["replica"] for story in await view.story("q")] == ["r1"]
            assert (await view.levels())["blocks"] == {"kv": 0, "hidden": 0, "free": 128}
            assert len(await view.plans()) >= 8

    run(main)


def test_the_default_router_is_the_routers_own():
    assert ReplicaOptions().router == DEFAULT_ROUTER


def test_texts_of_metrics_merge_by_name():
    one = b'# HELP a_total A.\n# TYPE a_total counter\na_total{r="1"} 1.0\n'
    two = one.replace(b'"1"', b'"2"')
    assert merged([one, two]).decode().splitlines()[-2:] == ['a_total{r="1"} 1.0', 'a_total{r="2"} 1.0']


def test_an_error_of_a_replica_survives_the_way():
    error = pickle.loads(pickle.dumps(PredictedLate("late", 2.5)))
    assert str(error) == "late" and error.late_s == 2.5


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ReplicaOptions(replicas=0), "replicas=0"),
        (lambda: ReplicaOptions(replicas=3, max_replicas=2), "max_replicas=2 must be at least replicas=3"),
        (lambda: ReplicaOptions(router="best"), "unknown router='best'; known: "),
        (lambda: RayOptions(replica_resources=("GPU",)), "'GPU', must be NAME=NUMBER"),
        (lambda: RayBatchOptions(replicas=2), "replicas=2 needs --ray ADDRESS, or --ray local"),
    ],
)
def test_wrong_flags_are_told(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("command", ["serve --replicas 2", "run-batch -i in -o out --ray local"])
def test_without_ray_there_is_one_sentence(monkeypatch, capsys, command):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else find(name, *more))
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 1
    assert capsys.readouterr().err == (
        "error: --replicas and --ray need Ray, which is not installed; pip install 'apt-jax[ray]'\n"
    )
