"""Two replicas with real engines and prefix caches of their own: what each router finds cached, and emptying both."""

import asyncio
import random

import pytest

from apt_jax.model_config import ModelConfig
from apt_jax.request import FinishReason, SamplingParams
from apt_jax.routing.catalogue import make_router
from apt_jax.serve.replicas.fleet_view import FleetView
from apt_jax.serve.runtime.samples import fan_out
from tests.support.asgi_service import until
from tests.support.checkpoint_folders import random_model
from tests.support.engines import make_engine
from tests.support.local_replicas import Replicas, keeping

CONFIG = ModelConfig(
    vocab_size=101, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=96,
    num_attention_heads=4, word_embed_proj_dim=32, eos_token_ids=(),
)  # fmt: skip
USERS, TURNS, SHARED = 5, 4, 8  # an odd number: in turn, a user meets another replica each time
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


async def answer(fleet, name: str, prompt: list[int]) -> list[int]:
    group = fleet.submit(fan_out(name, [prompt], GREEDY))
    found: list[int] = []
    async for outputs in group:
        for _, output in outputs:
            found += output.token_ids
            assert output.finish_reason in (None, FinishReason.LENGTH)
    return found


async def talk(fleet, user: int, router: str) -> list[int]:
    """Turns of a user, each of which repeats the earlier ones; the last answer."""
    history = [*range(SHARED), *(30 + user for _ in range(24))]
    for turn in range(TURNS):
        answered = await answer(fleet, f"{router}-{user}-{turn}", history)
        history += [*answered, 40 + user, 50 + turn, *range(6)]
    return answered


def cached(replicas) -> int:
    return sum(handle.engine.state.prefix_hits for handle in replicas.handles.values())


@pytest.mark.timeout(120)
def test_the_router_that_knows_prefixes_finds_more_of_them_and_all_caches_are_emptied(monkeypatch):
    monkeypatch.setattr("apt_jax.batching.buckets.ladder", lambda smallest, largest: [largest])
    monkeypatch.setattr("apt_jax.routing.prefix.CHUNK_TOKENS", 8)
    model = random_model(CONFIG, seed=0)

    def make():
        return make_engine(model, CONFIG, num_blocks=400)

    async def main():
        async with keeping(Replicas(make_engine=make, min_instances=2), wait_s=100) as r:
            view, found, answers = FleetView(r.fleet, r.keeper, "tiny"), {}, {}
            for router in ("round-robin", "prefix"):
                r.fleet.router, before = make_router(router), cached(r)
                users = random.Random(0).sample(range(USERS), USERS)
                answers[router] = await asyncio.gather(*(talk(r.fleet, user, router) for user in users))
                found[router] = cached(r) - before
                await until(lambda: all(replica.load.num_requests == 0 for replica in r.fleet.ready()))
                pools = [handle.engine.state.pool for handle in r.handles.values()]
                assert len(pools) == 2 and all(pool.num_idle > 0 for pool in pools), "both have served"
                assert all(pool.num_free == pool.num_blocks for pool in pools)
                await view.reset_prefix_cache()
                await until(lambda pools=pools: not any(pool.num_idle for pool in pools))
                assert not getattr(r.fleet.router, "_chunks", ())
            assert answers["prefix"] == answers["round-robin"]
            assert found["prefix"] > 1.1 * found["round-robin"] > 0, found
            before = cached(r)
            await asyncio.gather(*(answer(r.fleet, f"cold-{i}", [60 + i] * 30) for i in range(2)))
            assert cached(r) == before

    asyncio.run(main())
