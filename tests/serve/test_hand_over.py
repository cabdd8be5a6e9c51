"""A replica whose machine will be taken away: what moves, when, and that the answers stay what they were."""

import asyncio
import threading
from dataclasses import replace

import jax
import pytest

import apt_jax.serve.replicas.leaving.hand_over as hand_over
from apt_jax.engine_config import EngineConfig
from apt_jax.request import FinishReason, SamplingParams
from apt_jax.routing.autoscaler import AutoscalerOptions
from apt_jax.routing.catalogue import make_router
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.serve.options import LoadOptions
from apt_jax.serve.replicas.fleet import Fleet
from apt_jax.serve.replicas.keeper import Keeper
from apt_jax.serve.replicas.leaving.hand_over import PROBE_BYTES, Link, is_worth_moving, measured, recompute_s
from apt_jax.serve.replicas.leaving.notice import PreemptionNotice
from apt_jax.serve.replicas.messages import EngineSpec
from apt_jax.serve.replicas.replica import Replica
from apt_jax.serve.runtime.samples import fan_out
from tests.serve.test_replicas import collected, paced, samples
from tests.support.asgi_service import run, until
from tests.support.engines import finish
from tests.support.local_replicas import Replicas, keeping
from tests.support.process_replicas import ProcessHandle
from tests.support.token_runner import answer
from tests.support.token_runner import make_engine as token_engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=160, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, seed=5, max_tokens=160, ignore_eos=True)


def test_pages_travel_only_where_the_link_is_quicker_than_the_prefill():
    model = CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"])
    again_s = recompute_s(model, 1000, 2048)
    assert again_s is not None and 0.1 < again_s < 0.3, "26 TFLOP at 60% of 312"
    assert recompute_s(model, 1000, 250) > again_s, "four chunks read the weights four times"
    kv, hidden = (per_token * 40 * 5120 * 2 * 1000 for per_token in (2, 1))
    fast, slow = Link(0.001, 12.5e9), Link(0.001, 1.25e9)  # 100 and 10 Gbit/s
    assert is_worth_moving(kv, again_s, fast) and not is_worth_moving(kv, again_s, slow)
    between = Link(0.001, 1.5 * hidden / again_s)
    assert is_worth_moving(hidden, again_s, between) and not is_worth_moving(kv, again_s, between)
    assert not is_worth_moving(kv, None, fast), "what computing takes is not known"
    assert not is_worth_moving(0, 0.5, Link(1.0, 1e9)), "the latency alone is longer"


def test_links_in_a_row_and_as_they_were_seen():
    both = Link(0.1, 3e6).then(Link(0.2, 6e6))
    assert both.seconds(2e6) == pytest.approx(0.3 + 1.0)
    assert both.as_seen(2_000_000, 2.3) == Link(pytest.approx(0.3), pytest.approx(1e6))
    assert both.as_seen(PROBE_BYTES - 1, 5.0) is both, "mostly the step that it waited for"


def test_who_watches_what():
    named = PreemptionNotice.parse("file:/run/{replica}/gone")
    assert named.of_front() is None and str(named.of_replica("r2").path) == "/run/r2/gone"
    plain = PreemptionNotice.parse("file:/run/gone")
    assert plain.of_front() is plain and plain.of_replica("r2") == plain
    gce, signal = PreemptionNotice.parse("gce"), PreemptionNotice.parse("signal")
    assert (gce.of_front(), gce.of_replica("r1")) == (gce, gce) and (signal.of_front(), signal.of_replica("r1")) == (
        signal,
        None,
    )


def noticed(r: Replicas, name: str, lasts_s: float) -> None:
    """The replica hears that its machine will be taken away."""
    actor = r.handles[name]._actor
    actor._spec = replace(actor._spec, preemption_grace=lasts_s)
    actor._noticed("told")


def test_it_takes_nothing_new_begins_nothing_and_decodes_until_it_hands_over(monkeypatch):
    monkeypatch.setattr("apt_jax.serve.replicas.keeper.HAND_OVER_S", 1.0)

    async def main():
        async with keeping(Replicas(make_engine=paced, min_instances=2)) as r:
            first = r.handles["r1"]

            def early_tokens() -> list[int]:
                return r.fleet._by_group[id(early)].unfinished[0].request.output_token_ids

            early, other = (r.fleet.submit(samples(name)) for name in ("early", "other"))
            first.engine.allow_step(3)
            await until(lambda: len(early_tokens()) >= 2)
            late = r.fleet.submit(samples("late"))
            assert (_at(r, early), _at(r, other), _at(r, late)) == ("r1", "r2", "r1")
            noticed(r, "r1", 8.0)
            await until(lambda: _at(r, late) == "r2")
            assert _at(r, early) == "r1", "it goes on where it is"
            before = len(early_tokens())
            first.engine.allow_step(2)
            await until(lambda: len(early_tokens()) >= before + 1)
            assert _at(r, early) == "r1" and len(early_tokens()) < 8
            await until(lambda: "r3" in r.handles)  # in its place
            for name in ("r2", "r3"):
                r.handles[name].engine.allow_step(1000)
            for group in (early, other, late):
                assert (await asyncio.wait_for(collected(group), 10))[:2] == ("bcdefghi", [*range(98, 106)])
            await until(lambda: first.is_killed and {x.name for x in r.fleet.replicas} == {"r2", "r3"})
            assert r.keeper.num_failures == 0 and r.fleet.num_moved == 2

    run(main)


def _at(r: Replicas, group) -> str | None:
    replica = r.fleet._by_group[id(group)].replica
    return replica and replica.name


def test_alone_it_decodes_to_the_end_and_its_requests_wait_for_the_next_one(monkeypatch):
    monkeypatch.setattr("apt_jax.serve.replicas.keeper.LATEST_S", 0.5)

    async def main():
        async with keeping(Replicas(make_engine=paced)) as r:
            group = r.fleet.submit(samples("q", seed=7))
            r.handles["r1"].engine.allow_step(2)
            await group.accepted()
            gate = threading.Event()

            def held():
                engine = paced()
                warm_up = engine.warm_up
                engine.warm_up = lambda *args, **more: (gate.wait(10), warm_up(*args, **more))
                return engine

            r.make_engine = held
            noticed(r, "r1", 1.0)
            await until(lambda: not r.fleet.ready())
            assert _at(r, group) == "r1"
            r.handles["r1"].engine.allow_step(1)
            await until(lambda: _at(r, group) is None)
            gate.set()
            await until(lambda: len(r.fleet.ready()) == 1)
            r.handles[r.fleet.ready()[0].name].engine.allow_step(1000)
            assert (await asyncio.wait_for(collected(group), 5))[0] == "bcdefghi"

    run(main)


@pytest.mark.parametrize("mode", ["kv", "hidden", "hybrid"])
@pytest.mark.parametrize("bytes_per_s", [1e12, 1.0])
def test_pages_go_from_engine_to_engine_where_the_link_is_fast(mode, bytes_per_s, monkeypatch):
    """Over a cache that holds token ids, so that a wrong page would show in the answer."""
    monkeypatch.setattr(hand_over, "recompute_s", lambda *unused: 1.0)
    prompt, count = [3 * k % 97 for k in range(30)], 24
    old, new = (token_engine(60, cache_mode=mode, enable_prefix_caching=True) for _ in range(2))
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    request = old.add(prompt, params, request_id="r")
    while len(request.output_token_ids) < 9:
        old.step()
    old.abort("r")
    finish(old)
    (sample,) = fan_out("r", [prompt], params)
    sample = replace(sample, output_token_ids=tuple(request.output_token_ids))
    pages = hand_over.take_pages(old, [sample], Link(0.0, bytes_per_s))
    held = 4 * ((30 + 9 - 1) // 4) if bytes_per_s > 1 else 0
    assert hand_over.enter_pages(new, pages) == held
    going_on = sample.add_to(new)
    finish(new)
    assert going_on.output_token_ids == answer(prompt, count) and (going_on.num_cached_tokens or 0) == held


def a_spec(notice: str) -> EngineSpec:
    config = EngineConfig(
        max_num_seqs=4, max_num_batched_tokens=64, num_blocks=200, enable_prefix_caching=True,
        compilation_cache_dir=jax.config.jax_compilation_cache_dir,
    )  # fmt: skip
    return EngineSpec(None, LoadOptions(), config, "demo", preemption_notice=notice, preemption_grace=6.0)


def begun(replica: Replica) -> int:
    """Its samples that have a token."""
    return sum(bool(p.request.output_token_ids) for route in replica.routes.values() for p in route.unfinished.values())


async def until_at_last(condition, limit_s: float = 400) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.timeout(900)
def test_two_processes_of_the_demo_model_answer_with_the_same_tokens_without_a_gap(tmp_path, caplog, monkeypatch):
    """One gets its notice in the middle of its answers, twice: with pages, and with tokens alone."""
    caplog.set_level("INFO")
    monkeypatch.setattr("apt_jax.serve.replicas.keeper.HAND_OVER_S", 100.0)  # at once
    prompts = ["The file object", "import os\n" * 12, "Return a list of"]
    handles: dict[str, ProcessHandle] = {}

    def launch(name: str) -> ProcessHandle:
        handles[name] = ProcessHandle(name, a_spec(f"file:{tmp_path}/{{replica}}"))
        return handles[name]

    async def main():
        fleet = Fleet(make_router("round-robin", 0), 0)
        keeper = Keeper(fleet, launch, AutoscalerOptions(min_instances=2, max_instances=2))
        task = asyncio.create_task(keeper.run())
        await until_at_last(lambda: len(fleet.ready()) == 2)
        tokens = [fleet.facts.tokenizer.encode(prompt) for prompt in prompts]

        def ask(name: str):
            wanted = [(prompt, params) for prompt in tokens for params in (GREEDY, SEEDED)]
            return [fleet.submit(fan_out(f"{name}-{i}", [p], params)) for i, (p, params) in enumerate(wanted)]

        async def moved(name: str, bytes_per_s: float) -> int:
            """Ask, and tell the first replica that it goes; tokens whose pages went with the requests."""
            victim, before = fleet.replicas[0], (fleet.num_moved, fleet.moved_tokens)
            for replica in fleet.replicas:
                replica._link = Link(0.0, bytes_per_s)  # as if that had been measured
            reading = [asyncio.create_task(collected(group)) for group in ask(name)]
            await until_at_last(lambda: begun(victim) == 3)
            (tmp_path / victim.name).touch()
            assert await asyncio.gather(*reading) == right
            await until_at_last(lambda: victim not in fleet.replicas and len(fleet.ready()) == 2)
            assert keeper.num_failures == 0 and fleet.num_moved == before[0] + 3
            return fleet.moved_tokens - before[1]

        right = [await collected(group) for group in ask("alone")]
        assert all(len(ids) == 160 and reason is FinishReason.LENGTH for _, ids, reason in right)
        assert await moved("with-pages", 1e12) > 0
        assert await moved("with-tokens", 1.0) == 0
        fresh = await measured(fleet.replicas[0].handle)
        assert 0 < fresh.latency_s < 1 and fresh.bytes_per_s > 1e6
        task.cancel()
        keeper.stop()

    try:
        asyncio.run(main())
    finally:
        for handle in handles.values():
            handle.join()
    assert "3 requests of replica r1 go on elsewhere before it is gone" in caplog.text
